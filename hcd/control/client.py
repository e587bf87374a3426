"""A client of the control socket, for the commands: it blocks, and its errors say what to do.

Nothing here needs trio; a command that a script runs often starts quickly.
"""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

from hcd.control import settings
from hcd.control.protocol import MAX_ANSWER, VERSION, CallError, Lines, LineTooLong, encode
from hcd.control.snapshot import Snapshot, from_json
from hcd.errors import HcdError

__all__ = ["Client", "NoDaemonError", "connect", "take_snapshot"]

#: how long (seconds) a daemon may take to greet, and to answer what changes nothing
PATIENCE = 10.0
#: opening devices may wait for the locks of their images
LONG_PATIENCE = 300.0


class NoDaemonError(HcdError):
    """Nobody answers. ``denied``: a socket is there, but not for us."""

    def __init__(self, text: str, *, denied: bool = False) -> None:
        super().__init__(text)
        self.denied = denied


class TurnedAwayError(NoDaemonError):
    """A daemon is there, and does not talk to us now."""


class Client:
    """A connection to the daemon that listens at ``path``. NoDaemonError when there is none."""

    def __init__(self, path: str, patience: float = PATIENCE) -> None:
        self.path = path
        #: called before each wait for the daemon, with the socket's descriptor
        self.on_wait: Callable[[int], None] = lambda fd: None
        self._lines = Lines(MAX_ANSWER)
        self._patience = patience
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(patience)
        try:
            self._socket.connect(path)
            greeting = self._receive()
        except (OSError, CallError) as error:
            self._socket.close()
            denied = isinstance(error, PermissionError)
            raise NoDaemonError(f"{path}: {_reason(error)}", denied=denied) from None
        except BaseException:
            self._socket.close()
            raise
        self._check(greeting)

    def _check(self, greeting: dict[str, Any]) -> None:
        if "error" in greeting:
            self._socket.close()
            raise TurnedAwayError(f"{self.path}: {greeting['error'].get('text')}")
        if greeting.get("protocol") != VERSION:
            self._socket.close()
            found = f"hcd {greeting['hcd']} with another version of the protocol" if "hcd" in greeting else "not hcd"
            raise NoDaemonError(f"{self.path}: who answers is {found}")

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, name: str, patience: float | None = None, **arguments: Any) -> dict[str, Any]:
        """The result. CallError when it is refused, NoDaemonError when the daemon goes away or is silent."""
        self._socket.settimeout(self._patience if patience is None else patience)
        answer = self._ask({"call": name, **arguments})
        result: dict[str, Any] = answer["result"]
        return result

    def stream(self, name: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """The events, for ever. CallError when the call is refused, NoDaemonError when the daemon goes away."""
        self._socket.settimeout(None)
        answer = self._ask({"call": name, **arguments})
        while True:
            yield answer["event"]
            answer = self._take()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            self._socket.sendall(encode(message))
        except OSError as error:
            raise NoDaemonError(f"{self.path}: {_reason(error)}") from None
        return self._take()

    def _take(self) -> dict[str, Any]:
        try:
            answer = self._receive()
        except OSError as error:
            raise NoDaemonError(f"{self.path}: {_reason(error)}") from None
        if "error" in answer:
            raise CallError(answer["error"]["kind"], answer["error"]["text"])
        return answer

    def _receive(self) -> dict[str, Any]:
        try:
            while (line := self._lines.next_line()) is None:
                self.on_wait(self._socket.fileno())
                data = self._socket.recv(65536)
                if not data:
                    raise ConnectionResetError(errno.ECONNRESET, "")
                self._lines.feed(data)
            found = json.loads(line)
        except (ValueError, LineTooLong):
            raise NoDaemonError(f"{self.path}: who answers is not hcd") from None
        if not isinstance(found, dict):
            raise NoDaemonError(f"{self.path}: who answers is not hcd")
        return found


def connect(given: str | None) -> Client:
    """The daemon that ``given`` names (a path, an instance), or the one of this machine.

    NoDaemonError says where none was found.
    """
    tried: list[str] = []
    denied = False
    for path in settings.candidates(given):
        try:
            return Client(path)
        except TurnedAwayError:
            raise
        except NoDaemonError as error:
            tried.append(f"no daemon answers at {error}")
            denied = denied or error.denied
    raise NoDaemonError("\n".join([*tried, *([] if denied else _advice(given))]), denied=denied)


def _advice(given: str | None) -> Iterator[str]:
    if given:
        yield "is it running, and is that the [control] path of its configuration? systemctl status hcd"
        return
    if instances := list(settings.find_instances()):
        listed = ", ".join(f"--control={name}" for name in instances)
        yield f"instances of hcd@.service are here: {listed}"
    yield (
        'start one with "systemctl start hcd" or "hcd run FILE", or point to one with --control=PATH '
        f"or {settings.VARIABLE}: its [control] path, or what hcd device was given as --control"
    )


def _reason(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "there is no such socket"
        case ConnectionRefusedError():
            return "nobody listens there; the daemon has ended without removing it"
        case PermissionError():
            return "permission denied; ask as root, as the account of hcd, or as a member of the socket's group"
        case TimeoutError():
            return "the daemon does not answer: it hangs"
        case ConnectionResetError() | BrokenPipeError():
            return "the daemon hung up"
        case OSError():
            return error.strerror or str(error)
    return str(error)


def take_snapshot(given: str | None) -> Snapshot:
    """NoDaemonError, CallError."""
    with connect(given) as client:
        try:
            return from_json(client.call("snapshot"))
        except ValueError as error:
            raise NoDaemonError(f"{client.path}: {error}") from None
