"""Run a guest as a child process and follow what it says on its console.

The console is the child's standard output, copied to a log file. Lines ``HCD: key=value`` are collected in
order; ``status`` comes last. One thread per guest reads; callers wait on a condition.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Guest", "GuestFailedError"]

_MARK = "HCD: "
_FATAL = ("Kernel panic", "---[ end Kernel")
_TAIL_LINES = 25


class GuestFailedError(Exception):
    """The guest did not do what it was asked; the message ends with the last lines of its console."""


class Guest:
    """A started guest. Use it as a context manager: leaving it ends the process and the reader.

    ``on_value`` is called on the reader's thread with each key and value as it comes.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        on_value: Callable[[str, str], None] = lambda _key, _value: None,
        pass_fds: Sequence[int] = (),
        cwd: Path | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self.values: dict[str, str] = {}
        self._on_value = on_value
        self._tail: list[str] = []
        self._fatal = ""
        self._ended = False
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=pass_fds,
            cwd=cwd,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"console of {name}", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_for(self, key: str, timeout: float = 300) -> str:
        """The value of ``key`` as soon as the guest says it (seconds); GuestFailedError if it never does."""
        return self.wait_until(key, lambda _value: True, timeout)

    def wait_until(self, key: str, wanted: Callable[[str], bool], timeout: float = 300) -> str:
        """The same for a value of ``key`` that is ``wanted``."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while key not in self.values or not wanted(self.values[key]):
                if key != "status" and "status" in self.values:
                    raise self._failure(f"finished with status {self.values['status']} and never said {key!r}")
                if self._fatal or self._ended:
                    raise self._failure(
                        self._fatal or f"ended (exit status {self.process.wait()}) before it said {key!r}"
                    )
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise self._failure(f"said no {key!r} that was waited for within {timeout:g} s")
            return self.values[key]

    def wait(self, timeout: float = 300) -> dict[str, str]:
        """Wait for the job and for the power-off; what the guest said. GuestFailedError unless its status is 0."""
        status = self.wait_for("status", timeout)
        if status != "0":
            raise self._failure(f"its job ended with status {status}")
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            raise self._failure("did not power off") from None
        return dict(self.values)

    def close(self) -> None:
        """End the process if it runs, its children and the reader. Harmless when repeated."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        # User-mode Linux that dies early leaves the processes in which its guest's programs ran.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._reader.join()

    def _failure(self, what: str) -> GuestFailedError:
        tail = "\n".join(self._tail)
        return GuestFailedError(f"guest {self.name} {what} (log: {self.log})\n{tail}")

    def _read(self) -> None:
        output = self.process.stdout
        assert output is not None
        with output, self.log.open("wb") as copy:
            for raw in output:
                copy.write(raw)
                copy.flush()
                self._take_line(raw.decode(errors="replace").rstrip())
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _take_line(self, line: str) -> None:
        # A kernel message may stand before the mark on the same line.
        _, mark, said = line.partition(_MARK)
        key, equals, value = said.partition("=")
        with self._changed:
            self._tail = [*self._tail[1 - _TAIL_LINES :], line]
            if mark and equals:
                self.values[key] = value
            elif any(word in line for word in _FATAL) and "status" not in self.values:
                self._fatal = "its kernel panicked"
            self._changed.notify_all()
        if mark and equals:
            self._on_value(key, value)
