"""A stream of frames over a unix socket as the other end of the guest's cable: QEMU's ``-netdev stream``, passt.

Theory of operation.

* Each frame has its length before it (u32, big-endian). hcd connects; while nobody listens it tries again each
  second, and the guest sees its link down.
* A peer that reads slowly holds the guest back: a transmit queue whose frame the socket does not take gets no turns
  until the socket does (the queue is passive meanwhile). The lane waits for readability alone, so an epoll
  fd, which is readable when the socket is writable, stands for that.
* A guest without receive buffers holds the peer back the same way: the socket is not read until it kicks.
* A length that no frame can have means that the two sides are out of step: the connection is given up and made anew.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from typing import Any

from hcd.device import ConfigError, Handle, Lane, Virtqueue
from hcd.devices.connector import Connector
from hcd.devices.net_link import Link

__all__ = ["StreamLink"]

READ_SIZE = 1 << 17


class StreamLink(Link):
    """``path``: the unix socket of the peer."""

    up = False

    def __init__(self, path: str, *common: Any) -> None:
        super().__init__(*common)
        self._path = path
        self._lane: Lane
        self._socket: socket.socket | None = None
        self._writable: select.epoll | None = None
        self._read_watch: Handle | None = None
        self._write_watch: Handle | None = None
        self._buffer = bytearray()
        self._receiving: set[Virtqueue] = set()
        self._held: set[Virtqueue] = set()
        self._connector = Connector(path, f"stream {path}", self.log, self._connected)

    def open(self, lane: Lane, pairs: int) -> None:
        self._lane = lane
        if len(os.fsencode(self._path)) > 107:
            raise ConfigError(f"stream {self._path}: longer than the 107 bytes that a unix socket's path may have")
        self._connector.start(lane)

    def close(self) -> None:
        self._lane.post(self._end)

    # -- the connection

    def _connected(self, sock: socket.socket) -> None:
        writable = select.epoll()  # OSError: without it there is no connection
        writable.register(sock.fileno(), select.EPOLLOUT)
        self._read_watch = self._lane.watch(sock.fileno(), self._readable)
        self._socket, self._writable = sock, writable
        self.log.info("stream %s: connected", self._path)
        self.up = True
        self.changed()

    def _disconnect(self) -> None:
        """Close the connection; the guest's frames are dropped from here on."""
        self._stop_reading()
        self._stop_writing()
        if self._writable:
            self._writable.close()
            self._writable = None
        if self._socket:
            self._socket.close()
            self._socket = None
        self._buffer.clear()
        self.port.forget_stream()
        self._let_go()

    def _lost(self, why: str) -> None:
        self.log.warning("stream %s: %s; connecting again", self._path, why)
        self._disconnect()
        self.up = False
        self.changed()
        self._connector.again()

    def _end(self) -> None:
        self._connector.stop()
        self._disconnect()

    # -- to the guest

    def start_receiving(self, queue: Virtqueue) -> None:
        super().start_receiving(queue)
        self._receiving.add(queue)
        self.refilled(queue)

    def stop_receiving(self, queue: Virtqueue) -> None:
        self._receiving.discard(queue)
        super().stop_receiving(queue)
        self.refilled(queue)  # what waited for this queue's buffers waits no longer

    def refilled(self, queue: Virtqueue) -> None:
        if self._socket and not self._read_watch:
            self._read_watch = self._lane.watch(self._socket.fileno(), self._readable)
            self._deliver()

    def _readable(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(error.strerror or str(error))
            return
        if not data:
            self._lost("the peer closed the connection")
            return
        self._buffer += data
        self._deliver()

    def _deliver(self) -> None:
        """Give the frames that are whole to the guest; stop reading while it has no buffers."""
        try:
            if not self._feed():
                return
            for queue in self._receiving:
                queue.enable_kicks()
            if self._feed():  # buffers may have come just before kicks were asked for
                self._stop_reading()
        except ValueError as error:
            self._lost(f"the peer sends {error}")

    def _feed(self) -> bool:
        used, starved = self.port.feed(self._buffer)
        del self._buffer[:used]
        return starved

    def _stop_reading(self) -> None:
        if self._read_watch:
            self._read_watch.cancel()
            self._read_watch = None

    # -- from the guest

    def transmit(self, queue: Virtqueue) -> None:
        if self._socket is None:
            super().transmit(queue)
            return
        if not self.port.blocked:
            try:
                self.port.send_stream(queue, self._socket.fileno())
            except OSError as error:
                self._lost(error.strerror or str(error))
                return
        if self.port.blocked:
            queue.passive = True
            self._held.add(queue)
            self._await_writable()

    def stop_sending(self, queue: Virtqueue) -> None:
        self._held.discard(queue)

    def announce(self, frame: bytes) -> None:
        if self._socket is None or self.port.blocked:
            return
        with contextlib.suppress(OSError):  # the next read tells of a connection that is gone
            self.port.put_stream(frame, self._socket.fileno())
        if self.port.blocked:
            self._await_writable()

    def _await_writable(self) -> None:
        if not self._write_watch:
            assert self._writable is not None
            self._write_watch = self._lane.watch(self._writable.fileno(), self._on_writable)

    def _on_writable(self) -> None:
        assert self._socket is not None
        try:
            through = self.port.flush_stream(self._socket.fileno())
        except OSError as error:
            self._lost(error.strerror or str(error))
            return
        if through:
            self._stop_writing()
            self._let_go()

    def _stop_writing(self) -> None:
        if self._write_watch:
            self._write_watch.cancel()
            self._write_watch = None

    def _let_go(self) -> None:
        """The queues that were held back get their turns again."""
        held, self._held = self._held, set()
        for queue in held:
            queue.passive = False
            queue.schedule()
