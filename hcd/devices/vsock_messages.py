"""A connection of type SEQPACKET: messages instead of bytes, on a unix socket of type SOCK_SEQPACKET.

* A packet of the guest may hold a part of a message. The parts wait in the buffer, which the guest's credit limits,
  until the message is whole: it goes to the socket in one piece or not at all. A socket takes none that is longer than
  its own buffer; one for which there is no room in the kernel ends the connection.
* A message of the host is read whole, and goes to the guest in as many packets as its receive buffers and its credit
  make of it. One that is longer than MOST, or than the guest's whole buffer, ends the connection.
* A message of no bytes cannot be told from the end on the host's side, and is left out.
"""

from __future__ import annotations

import errno
import socket
from typing import Any

from hcd_protocols.virtio.vsock import Header, MessageFlag, Shutdown

from hcd.device import Request
from hcd.devices.vsock_channel import CHUNK, Channel

__all__ = ["MOST", "MessageChannel"]

#: bytes of the longest message of the host
MOST = CHUNK


class Lengths:
    """Numbers above 0 in a row, in as few bytes as they need: a guest may send as many messages as bytes."""

    def __init__(self) -> None:
        self._packed = bytearray()  # seven bits a byte, the low ones first; the last byte of a number is below 128

    def __len__(self) -> int:
        """Bytes that they take."""
        return len(self._packed)

    def append(self, number: int) -> None:
        while number > 127:
            self._packed.append(number & 127 | 128)
            number >>= 7
        self._packed.append(number)

    @property
    def first(self) -> int:
        number = 0
        for place, byte in enumerate(self._packed):
            number |= (byte & 127) << 7 * place
            if byte < 128:
                break
        return number

    def popleft(self) -> None:
        end = 0
        while self._packed[end] > 127:
            end += 1
        del self._packed[: end + 1]  # which moves nothing, as pop(0) would

    def clear(self) -> None:
        self._packed.clear()


class MessageChannel(Channel):
    """One connection with its socket."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        assert self._socket is not None
        if self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < 2 * self.connection.room:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.connection.room)  # doubled by the kernel
        self._whole = Lengths()  # of the messages in the buffer; behind them is the begun one
        self._begun = 0
        self._rest = b""  # of a message of the host

    # -- from the guest

    def deliver(self, request: Request, header: Header) -> None:
        if self._socket is None or self.connection.host_shut & Shutdown.RECEIVE:
            self.connection.forwarded(header.len)
            return
        self._buffer += request.read(header.len)
        self._begun += header.len
        if header.flags & MessageFlag.EOM and self._begun:
            others = bool(self._whole)
            self._whole.append(self._begun)
            self._begun = 0
            if not others:
                self._flush()
        self.connection.forwarded(0)  # for the rest of a message the guest may need what it was not told of yet

    @property
    def _unsent(self) -> bool:
        return bool(self._whole)

    def _flush(self) -> None:
        while self._whole and (sent := self._send(self._buffer[: self._whole.first])):
            self._whole.popleft()
            del self._buffer[:sent]
            self.connection.forwarded(sent)

    def _not_sent(self, error: OSError) -> None:
        super()._not_sent(error)
        if error.errno in (errno.EMSGSIZE, errno.ENOBUFS, errno.ENOMEM):
            self.connection.abort()  # the host is there, and would miss one of the messages

    def _forget(self) -> None:
        super()._forget()
        self._whole.clear()
        self._begun = 0

    # -- to the guest

    def _receive(self, request: Request, room: int) -> int:
        if not self._rest:
            assert self._socket is not None
            self._rest = self._socket.recv(MOST + 1)
            if len(self._rest) > min(MOST, self.connection.guest_room):
                self._rest = b""
                self.connection.abort()
                raise BlockingIOError  # nothing for the guest but that
        size = request.write(self._rest[:room])
        self._rest = self._rest[size:]
        return size

    def _data_flags(self) -> int:
        return 0 if self._rest else int(MessageFlag.EOM)
