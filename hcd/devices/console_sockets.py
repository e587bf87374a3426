"""Unix sockets as ends of console ports: one that listens, one that connects. Each has one connection at a time."""

from __future__ import annotations

import os
import select
import socket

from hcd.device import ConfigError, Handle, Lane, UnixListener
from hcd.devices.connector import Connector
from hcd.devices.console_ends import Log
from hcd.devices.console_stream import StreamEnd

__all__ = ["ConnectEnd", "ListenEnd"]

#: seconds without accepting when that fails: a process that is out of descriptors must not spin
PAUSE = 1.0


class SocketEnd(StreamEnd):
    """What the two kinds of sockets have in common."""

    def __init__(self, path: str, log: Log) -> None:
        super().__init__(path, log)
        if len(os.fsencode(path)) > 107:
            raise ConfigError(f"{path}: longer than the 107 bytes that a unix socket's path may have")
        self._closed = False

    def _connected(self, sock: socket.socket) -> None:
        """``sock`` is the end's from here on, unless OSError is raised."""
        sock.setblocking(False)
        epoll = select.epoll()
        self._attach(sock.detach(), epoll)

    def _after_loss(self) -> None:
        self._close_fd()
        if not self._closed:
            self._await_next()

    def _await_next(self) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        self._closed = True
        super()._end()


class ListenEnd(SocketEnd):
    """Listens on ``path`` and serves one client after the other; the next ones wait in the backlog."""

    def __init__(self, path: str, log: Log) -> None:
        super().__init__(path, log)
        self._listener: UnixListener
        self._accepting: Handle | None = None
        self._retry: Handle | None = None

    def open(self, lane: Lane) -> None:
        super().open(lane)
        self._listener = UnixListener(self.path)
        self._listener.socket.setblocking(False)
        lane.post(self._await_next)

    def _await_next(self) -> None:
        if not self._closed:
            self._accepting = self.lane.watch(self._listener.socket.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.socket.accept()
        except (BlockingIOError, ConnectionError):
            return  # it went away again
        except OSError as error:
            self._pause(error)
            return
        self._stop_accepting()
        try:
            self._connected(client)
        except OSError as error:
            client.close()
            self._pause(error)

    def _pause(self, error: OSError) -> None:
        self.log.warning("listen:%s: %s", self.path, error.strerror)
        self._stop_accepting()
        self._retry = self.lane.call_later(PAUSE, self._await_next)

    def _stop_accepting(self) -> None:
        for handle in (self._accepting, self._retry):
            if handle is not None:
                handle.cancel()
        self._accepting = self._retry = None

    def _end(self) -> None:
        super()._end()
        self._stop_accepting()
        self._listener.close()


class ConnectEnd(SocketEnd):
    """Connects to ``path``, again each second while nobody listens there."""

    def __init__(self, path: str, log: Log) -> None:
        super().__init__(path, log)
        self._connector = Connector(path, f"connect:{path}", log, self._connected)

    def open(self, lane: Lane) -> None:
        super().open(lane)
        self._connector.start(lane)

    def _await_next(self) -> None:
        self._connector.again()

    def _end(self) -> None:
        self._connector.stop()
        super()._end()
