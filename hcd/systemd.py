"""What systemd and its services say to each other: the notify protocol, and sockets handed over at the start.

Theory of operation. The manager puts the address of a datagram socket into NOTIFY_SOCKET; each datagram is a few lines
KEY=VALUE (sd_notify(3)). Inherited sockets are the descriptors from 3 on; LISTEN_FDS is their number, LISTEN_FDNAMES
their names, LISTEN_PID the process that they are meant for (sd_listen_fds(3)). Both are stable interfaces. What is
read from the environment is taken out of it, so that no child takes it for its own.

Nothing here fails because the manager does not listen: a daemon goes on without it.
"""

from __future__ import annotations

import array
import logging
import os
import socket
import time
from collections.abc import MutableMapping
from dataclasses import dataclass

from hcd.errors import ConfigError

__all__ = ["Inherited", "Notifier", "take_listen_fds", "take_watchdog"]

#: the first descriptor that is handed over
FIRST_FD = 3
#: how long (seconds) a message that must not be lost waits for room in the manager's queue
PATIENCE = 1.0
#: how systemd calls a descriptor whose unit gives it no name: "unknown", or the name of the socket unit itself
_NO_NAME = "unknown"
_SOCKET_SUFFIX = ".socket"

_log = logging.getLogger("hcd.systemd")

Environment = MutableMapping[str, str]


class Notifier:
    """Tells the service manager how this process is. ``address`` "" or None: there is none, all is silently dropped.

    An address that begins with "@" is in the abstract namespace. Not for several threads at once.
    """

    def __init__(self, address: str | None = None) -> None:
        self._address: str | bytes = ""
        self._socket: socket.socket | None = None
        self._failed = False
        if not address:
            return
        if address[0] not in "/@":  # AF_VSOCK, of managers in virtual machines
            _log.warning('NOTIFY_SOCKET "%s" is of a kind that is not supported', address)
            return
        self._address = b"\0" + os.fsencode(address[1:]) if address[0] == "@" else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    @classmethod
    def take(cls, environment: Environment = os.environ) -> Notifier:
        """The one that NOTIFY_SOCKET names."""
        return cls(environment.pop("NOTIFY_SOCKET", None))

    def __bool__(self) -> bool:
        """Whether anybody is told."""
        return self._socket is not None

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ready(self, status: str) -> None:
        """Started, or reloaded."""
        self._send("READY=1", _status(status))

    def status(self, text: str) -> None:
        """One line for people; for `systemctl status`."""
        self._send(_status(text), patience=0)

    def reloading(self) -> None:
        """The configuration is being read again; :meth:`ready` must follow, whatever comes of it.

        systemd ties it to the reload that it asked for by the time, CLOCK_MONOTONIC in microseconds.
        """
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """Everything makes progress."""
        self._send("WATCHDOG=1", patience=0)

    def extend_timeout(self, seconds: float) -> None:
        """Starting or stopping takes up to ``seconds`` from now; without word by then it has failed."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def store(self, name: str, fd: int, *, poll: bool) -> bool:
        """Keep ``fd`` for the next process of this service, as ``name``; whether the message went out.

        ``poll``: not beyond the moment when it hangs up or is in error. Whether the manager does keep it is not told.
        """
        lines = ("FDSTORE=1", f"FDNAME={name}", *(() if poll else ("FDPOLL=0",)))
        return self._send(*lines, fds=(fd,))

    def unstore(self, name: str) -> None:
        """Keep what is stored as ``name`` no longer."""
        self._send("FDSTOREREMOVE=1", f"FDNAME={name}")

    def barrier(self) -> int:
        """A descriptor, the caller's to close, that hangs up when the manager has come to this point."""
        reached, passed = os.pipe2(os.O_CLOEXEC)
        try:
            self._send("BARRIER=1", fds=(passed,))  # nothing else may stand in this message
        finally:
            os.close(passed)
        return reached

    def _send(self, *lines: str, patience: float = PATIENCE, fds: tuple[int, ...] = ()) -> bool:
        if self._socket is None:
            return False
        self._socket.settimeout(patience)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._socket.sendmsg(["\n".join(lines).encode()], ancillary, 0, self._address)
        except OSError as error:
            if not self._failed:  # once: the next would fail likewise
                _log.warning("the service manager cannot be told %s: %s", lines[0], error.strerror or error)
            self._failed = True
        else:
            self._failed = False
        return not self._failed


def _status(text: str) -> str:
    return f"STATUS={' '.join(text.split())}"


def take_watchdog(environment: Environment = os.environ) -> float | None:
    """The seconds within which the manager wants to hear of progress; None if it does not."""
    text, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
    if not text.isascii() or not text.isdigit() or not int(text) or pid not in ("", str(os.getpid())):
        return None
    return int(text) / 1e6


@dataclass(frozen=True, slots=True)
class Inherited:
    """A descriptor handed over by the manager. ``name`` "": its unit gives it none."""

    fd: int
    name: str

    def __str__(self) -> str:
        return f'file descriptor {self.fd} ("{self.name}")' if self.name else f"file descriptor {self.fd}"


def take_listen_fds(environment: Environment = os.environ) -> list[Inherited]:
    """The descriptors that were handed over to this process, closed on exec from now on. They are the caller's.

    None when LISTEN_PID names another process: then they are not ours. ConfigError for nonsense.
    """
    pid, count, names = (environment.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if not pid or pid != str(os.getpid()):
        return []
    if not count.isascii() or not count.isdigit() or int(count) > 4096:
        raise ConfigError(f'LISTEN_FDS: expected a number of descriptors, found "{count}"')
    given = names.split(":") if names else []
    if given and len(given) != int(count):
        raise ConfigError(f"LISTEN_FDNAMES has {len(given)} names for {count} descriptors")
    fds = range(FIRST_FD, FIRST_FD + int(count))
    for fd in fds:
        try:
            os.set_inheritable(fd, False)
        except OSError as exc:
            raise ConfigError(f"LISTEN_FDS: file descriptor {fd} is not open") from exc
    return [Inherited(fd, _name(name)) for fd, name in zip(fds, given or [""] * len(fds), strict=True)]


def _name(given: str) -> str:
    return "" if given == _NO_NAME or given.endswith(_SOCKET_SUFFIX) else given
