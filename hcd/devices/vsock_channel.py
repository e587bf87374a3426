"""A connection and the host's socket for it: bytes from one to the other, within the guest's credit and hcd's.

This is a stream; for messages there is :mod:`hcd.devices.vsock_messages`.

* Bytes of the guest go straight from its memory into the socket; what the socket does not take is kept, as much as
  the guest has credit for, and goes when the socket takes more.
* Bytes of the host are read straight into the guest's receive buffers, and only when there is one, and credit: what
  the guest does not take stays in the socket and holds its sender back.
* The socket hangs up when its peer closed it, or when both directions are shut. Then nothing can be written any more,
  but what the peer sent before is still there to be read.
* A guest that is gone does not take back what it sent: a channel without a guest lingers until the socket took it.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable

from hcd_protocols.virtio.vsock import HEADER_SIZE, Header, Op, Shutdown

from hcd.device import Handle, Request
from hcd.devices.vsock_connection import BOTH, Connection, State
from hcd.devices.vsock_host import IN, OUT, Poller

__all__ = ["CHUNK", "Channel"]

#: bytes of one packet for the guest at most, and of one write to the host
CHUNK = 64 << 10


class Channel:
    """One connection with its socket. ``changed`` is called when the socket has news of it."""

    def __init__(
        self, connection: Connection, sock: socket.socket, poller: Poller, changed: Callable[[Channel], None]
    ) -> None:
        self.connection = connection
        #: stands in the queue of those who have something to say to the guest (the table's)
        self.queued = False
        #: ends a connection that the guest does not answer (the table's)
        self.timer: Handle | None = None
        self._socket: socket.socket | None = sock
        self._poller = poller
        self._changed = changed
        self._buffer = bytearray()  # of the guest, for the host
        self._readable = False
        self._at_end = False  # everything of the host is read
        self._hung_up = False
        self._shut: set[int] = set()
        self._events = 0
        poller.add(sock.fileno(), 0, self._ready)

    @property
    def over(self) -> bool:
        """Whether neither side has it any more."""
        return self._socket is None

    # -- from the guest

    def opened(self) -> None:
        """The guest accepted what somebody on the host asked for."""
        self._send(b"OK %d\n" % self.connection.host_port)

    def deliver(self, request: Request, header: Header) -> None:
        """The payload of ``header``, the next bytes to be read from ``request``, goes to the host."""
        size, written = header.len, 0
        if self._socket is None or self.connection.host_shut & Shutdown.RECEIVE:
            written = size
        elif not self._buffer:
            try:
                written = request.pwritev(self._socket.fileno(), -1, size)
            except BlockingIOError:
                pass
            except OSError:
                self._host_takes_no_more()
                written = size
        if written < size:
            self._buffer += request.read(size - written)
        self.connection.forwarded(written)

    @property
    def _unsent(self) -> bool:
        """Whether the socket is to be waited for, to get more bytes of the guest."""
        return bool(self._buffer)

    def settle(self) -> None:
        """Bring the socket, and what is waited for, to the state of the connection."""
        connection = self.connection
        if self._socket is None:
            return
        if connection.state is State.GONE and (self._hung_up or not self._unsent):
            self._close()
            return
        if connection.guest_shut & Shutdown.SEND and not self._unsent:
            self._shutdown(socket.SHUT_WR)
        if connection.guest_shut & Shutdown.RECEIVE:
            self._shutdown(socket.SHUT_RD)
        events = OUT if self._unsent else 0
        if connection.may_send and not self._readable and not self._at_end:
            events |= IN
        if events != self._events and not self._hung_up:
            self._events = events
            self._poller.change(self._socket.fileno(), events)

    def leave(self) -> None:
        """The guest has it no more. What it sent goes on to the host."""
        self.connection.state = State.GONE
        self.settle()

    def end(self) -> None:
        """It is over for both sides, now."""
        self._forget()
        self.leave()

    # -- to the guest

    @property
    def wants_to_speak(self) -> bool:
        connection = self.connection
        return connection.next_op() is not None or (self._has_data and (connection.credit > 0 or not connection.short))

    @property
    def _has_data(self) -> bool:
        return self._readable and self.connection.may_send and self._socket is not None

    def speak(self, request: Request) -> int | None:
        """Say the next thing in a receive buffer whose cursor is behind the header. Bytes of data that it has; None:
        there is nothing to say."""
        connection = self.connection
        while True:
            if (op := connection.next_op()) is not None:
                return self._complete(request, op, 0)
            if not self._has_data:
                return None
            if not connection.credit:
                connection.out_of_credit()
                if connection.next_op() is None:
                    return None
            elif size := self._read(request, min(connection.credit, request.writable, CHUNK)):
                return self._complete(request, Op.RW, size)

    def _complete(self, request: Request, op: Op, size: int) -> int:
        request.write_at(0, self.connection.header(op, size, self._data_flags() if op is Op.RW else 0).to_bytes())
        request.complete(HEADER_SIZE + size)
        self.settle()
        return size

    def _read(self, request: Request, room: int) -> int:
        """Bytes of the host into ``request``; 0 when there are none now, or will be none."""
        try:
            size = self._receive(request, room)
            ended = size == 0
        except BlockingIOError:
            size, ended = 0, False
        except OSError:
            size, ended = 0, True
        if ended:
            self._at_end = True
            self.connection.shut(BOTH if self._hung_up else Shutdown.SEND)
        if ended or (size < room and not self._hung_up):
            self._readable = False
        self.settle()
        return size

    def _receive(self, request: Request, room: int) -> int:
        """The same; 0 is the end. BlockingIOError, OSError."""
        assert self._socket is not None
        return request.preadv(self._socket.fileno(), -1, room)

    def _data_flags(self) -> int:
        """Of the packet with what was received last."""
        return 0

    # -- the socket

    def _ready(self, events: int) -> None:
        if events & (select.EPOLLHUP | select.EPOLLERR):
            self._hang_up()
        elif events & IN:
            self._readable = True
        if events & OUT and self._unsent:
            self._flush()
        self.settle()
        self._changed(self)

    def _hang_up(self) -> None:
        assert self._socket is not None
        self._hung_up = True
        self._poller.remove(self._socket.fileno())  # it would be told for ever
        self._host_takes_no_more()
        connection = self.connection
        if connection.state is State.ASKING:
            connection.abort()
        elif self._at_end or connection.guest_shut & Shutdown.RECEIVE:
            connection.shut(BOTH)
        else:
            self._readable = True

    def _flush(self) -> None:
        sent = self._send(self._buffer[:CHUNK])
        del self._buffer[:sent]
        self.connection.forwarded(sent)

    def _send(self, data: bytes | bytearray) -> int:
        assert self._socket is not None
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._not_sent(error)
            return 0

    def _not_sent(self, error: OSError) -> None:
        self._host_takes_no_more()

    def _host_takes_no_more(self) -> None:
        self.connection.shut(Shutdown.RECEIVE)
        self.connection.forwarded(len(self._buffer))
        self._forget()

    def _forget(self) -> None:
        """Drop what the host has not got of the guest."""
        self._buffer.clear()

    def _shutdown(self, how: int) -> None:
        if how in self._shut or self._hung_up:
            return
        assert self._socket is not None
        self._shut.add(how)
        try:
            self._socket.shutdown(how)
        except OSError:  # the peer has gone meanwhile
            self._host_takes_no_more()

    def _close(self) -> None:
        assert self._socket is not None
        self._poller.remove(self._socket.fileno())
        self._socket.close()
        self._socket = None
