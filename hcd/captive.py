"""Captive mode: ``hcd device TYPE ... -- COMMAND ... {socket} ...``.

The device is served, then the command is started with the path of the device's socket in place of ``{socket}``; hcd
ends with it and passes its exit status on. The shortest way to a virtual machine with a device of one's own.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Sequence
from types import TracebackType

import trio

from hcd.errors import ConfigError

__all__ = ["NOT_FOUND", "PLACEHOLDER", "Captive"]

PLACEHOLDER = "{socket}"
#: what shells answer for a command that is not there
NOT_FOUND = 127


class Captive:
    """A command that runs beside a device. As a context manager it has a directory for the socket, if none is given.

    ConfigError for a command that has no place for the socket.
    """

    def __init__(self, command: Sequence[str], socket: str | None) -> None:
        if not any(PLACEHOLDER in word for word in command):
            raise ConfigError(f"the command after -- does not say where the socket belongs: {PLACEHOLDER} is missing")
        self._command = command
        self._directory = ""
        self._given = socket
        self.socket = ""
        #: the exit status, as shells tell it: 128 + number for a signal. Until the command ends, hcd was told to end.
        self.status = 128 + signal.SIGTERM
        self.failure = ""

    def __enter__(self) -> Captive:
        if self._given is None:
            self._directory = tempfile.mkdtemp(prefix="hcd-", dir=os.environ.get("XDG_RUNTIME_DIR") or None)
        self.socket = self._given or f"{self._directory}/socket"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def command(self) -> list[str]:
        """The command as it is run."""
        return [word.replace(PLACEHOLDER, self.socket) for word in self._command]

    async def run(self) -> None:
        """Run the command with our stdin, stdout and stderr; returns when it has ended. Cancelled: tell it to end."""
        try:
            done = await trio.run_process(self.command, stdin=None, check=False)
        except OSError as error:
            self.failure = f"cannot run {self.command[0]}: {error.strerror}"
            self.status = NOT_FOUND
            return
        self.status = done.returncode if done.returncode >= 0 else 128 - done.returncode
