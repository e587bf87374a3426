"""The host's side of a socket device: unix sockets, all of them waited for through one epoll fd.

Whoever wants to reach a guest connects to the device's socket and says ``CONNECT PORT``; the answer is ``OK`` and the
port of the host's end, and from there on the bytes are the guest's. Whoever wants to be reached listens on the path
of that socket with ``_PORT`` behind it. Firecracker and vhost-device-vsock have the same convention.
"""

from __future__ import annotations

import re
import select
import socket
from collections.abc import Callable

from hcd.device import Handle, Lane, UnixListener

__all__ = ["IN", "MAX_SUFFIX", "OUT", "Door", "Greeting", "Poller", "reach"]

IN, OUT = select.EPOLLIN, select.EPOLLOUT
#: bytes that the longest "_PORT" adds to the path of the socket
MAX_SUFFIX = len("_4294967295")

#: events taken at a time: then it is the turn of other devices
_EVENTS = 64
#: bytes of the longest greeting that makes sense, and seconds to say it
_MAX_GREETING = 32
_GREETING_TIME = 10.0
#: seconds without accepting when that fails: a process that is out of descriptors must not spin
_PAUSE = 1.0
_CONNECT = re.compile(rb"CONNECT ([0-9]{1,10})\r?\n", re.ASCII)


class Poller:
    """Calls back for many fds over one watch of the lane. On the lane's thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._watch: Handle | None = None

    def start(self, lane: Lane) -> None:
        self._watch = lane.watch(self._epoll.fileno(), self._ready)

    def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._epoll.close()

    def add(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Call ``callback`` with what is ready of ``events``; hang-ups are told unasked, until the fd is removed."""
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def change(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Before it is closed."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _ready(self) -> None:
        for fd, events in self._epoll.poll(0, _EVENTS):
            if callback := self._callbacks.get(fd):  # an earlier one may have removed it
                callback(events)


class Door:
    """A socket of the device, for streams or for messages. ``enter`` gets whoever comes in."""

    def __init__(self, path: str, kind: socket.SocketKind, enter: Callable[[socket.socket], None]) -> None:
        self._listener = UnixListener(path, kind)
        self._listener.socket.setblocking(False)
        self._enter = enter
        self._lane: Lane
        self._poller: Poller | None = None
        self._timer: Handle | None = None

    def start(self, lane: Lane, poller: Poller) -> None:
        self._lane, self._poller = lane, poller
        poller.add(self._listener.socket.fileno(), IN, self._knock)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._poller is not None:
            self._poller.remove(self._listener.socket.fileno())
        self._listener.close()

    def _knock(self, events: int) -> None:
        try:
            sock, _ = self._listener.socket.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError:
            assert self._poller is not None
            self._poller.remove(self._listener.socket.fileno())
            self._timer = self._lane.call_later(_PAUSE, self._again)
            return
        sock.setblocking(False)
        self._enter(sock)

    def _again(self) -> None:
        self._timer = None
        assert self._poller is not None
        self._poller.add(self._listener.socket.fileno(), IN, self._knock)


class Greeting:
    """Somebody who came in and has not said yet where to. ``decided`` gets this and the port, None for no good one.

    Who gets it owns the socket from then on, which is not polled any more.
    """

    def __init__(
        self, sock: socket.socket, lane: Lane, poller: Poller, decided: Callable[[Greeting, int | None], None]
    ) -> None:
        self.socket = sock
        self._poller = poller
        self._decided = decided
        self._said = b""
        self._timer = lane.call_later(_GREETING_TIME, lambda: self._decide(None))
        poller.add(sock.fileno(), IN, self._hear)

    def stop(self) -> None:
        """Listen no more."""
        self._timer.cancel()
        self._poller.remove(self.socket.fileno())

    def _decide(self, port: int | None) -> None:
        self.stop()
        self._decided(self, port)

    def _hear(self, events: int) -> None:
        try:
            waiting = self.socket.recv(_MAX_GREETING - len(self._said), socket.MSG_PEEK)
            # What follows the line is for the guest, and stays in the socket. Of a message nothing would stay.
            whole = self.socket.type is socket.SOCK_SEQPACKET
            line = self.socket.recv(_MAX_GREETING if whole else waiting.find(b"\n") + 1 or len(waiting))
        except BlockingIOError:
            return
        except OSError:
            line = b""
        self._said += line
        if match := _CONNECT.fullmatch(self._said):
            port = int(match[1])
            self._decide(port if port <= 0xFFFFFFFF else None)
        elif not line or b"\n" in line or len(self._said) >= _MAX_GREETING:
            self._decide(None)


def reach(path: str, port: int, kind: socket.SocketKind) -> socket.socket:
    """A connection to whoever listens for ``port`` with a socket of this kind. OSError when nobody does."""
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.connect(f"{path}_{port}")
    except BaseException:
        sock.close()
        raise
    return sock
