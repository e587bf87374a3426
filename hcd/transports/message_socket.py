"""Whole vhost-user messages from and to a stream socket.

Theory of operation. A message is taken off the socket only when it is there whole: its header is looked at with
MSG_PEEK and without a control buffer, the kernel is asked how much has come (SIOCINQ), then recvmsg takes exactly that
message. Reading further would glue the next message's descriptors to this one, reading less would take descriptors
before their message; so a connection is never in the middle of a message, and could be handed over at any time.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import termios
from collections.abc import Callable, Sequence

import trio
from hcd_protocols.vhost_user import BackendConnection

from hcd.errors import ProtocolError
from hcd.sockets import close_all, received_fds
from hcd.transports.accept import hung_up

__all__ = ["Answers", "HungUp", "MessageSocket"]

HEADER_SIZE = 12
#: no message brings more than one per memory region of the largest table; rust-vmm allows 32 as well
MAX_FDS = 32
#: how often (seconds) a message that came in part is looked at again
PARTIAL_PAUSE = 0.005
#: how long (seconds) the answer to a message that ends the connection may take
LAST_WORDS = 1.0


#: messages, each with its descriptors
Answers = Sequence[tuple[bytes, tuple[int, ...]]]


class HungUp(Exception):
    """The peer hung up; ``middle``: in the middle of a message."""

    def __init__(self, *, middle: bool) -> None:
        super().__init__("in the middle of a message" if middle else "between messages")
        self.middle = middle


class MessageSocket:
    """Carries messages between ``sock``, which it owns, and a sans-IO connection.

    ``observe`` sees each that passed: its direction ("in", "out"), its bytes, the number of its descriptors.
    """

    def __init__(
        self,
        sock: trio.socket.SocketType,
        connection: BackendConnection,
        observe: Callable[[str, bytes, int], None] = lambda direction, data, fds: None,
    ) -> None:
        self._sock = sock
        self._connection = connection
        self._observe = observe

    def hung_up(self) -> bool:
        """Whether the peer closed its end, even if that has not been read yet."""
        return hung_up(self._sock.fileno())

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    # -- in

    async def wait(self) -> None:
        """Return when a whole message is there, or as much of one as can be seen without taking any of it.

        HungUp or ProtocolError. The connection can be handed over as long as nothing was taken.
        """
        if await self._sock.recv(1, socket.MSG_PEEK) == b"":
            raise HungUp(middle=False)
        await self._until(HEADER_SIZE)
        header = await self._sock.recv(HEADER_SIZE, socket.MSG_PEEK)
        if len(header) == HEADER_SIZE:
            await self._until(self._connection.message_length(header))

    async def receive(self) -> None:
        """After :meth:`wait`: take one whole message and hand it to the connection. HungUp or ProtocolError."""
        header = await self._sock.recv(HEADER_SIZE, socket.MSG_PEEK)
        seen, fds = b"", 0
        if len(header) < HEADER_SIZE:
            # Sent in pieces with descriptors on the first: peeking ends there. Take it as it is.
            header, fds = await self._take_exactly(HEADER_SIZE)
            seen = header
        length = self._connection.message_length(header) - len(seen)
        await self._until(length)
        rest, more = await self._take_exactly(length)
        self._observe("in", seen + rest, fds + more)

    async def _until(self, wanted: int) -> None:
        """Return when ``wanted`` bytes can be read; HungUp when the peer closed its end before."""
        while self._readable() < wanted:
            # Readiness cannot be waited for: the socket is readable all the time with what is there already.
            if self.hung_up():
                if self._readable() >= wanted:
                    return
                raise HungUp(middle=True)
            await trio.sleep(PARTIAL_PAUSE)

    def _readable(self) -> int:
        count = array.array("i", [0])
        fcntl.ioctl(self._sock.fileno(), termios.FIONREAD, count)
        return count[0]

    async def _take_exactly(self, length: int) -> tuple[bytes, int]:
        """The bytes, and how many descriptors came with them; the connection has both."""
        taken, count = b"", 0
        while len(taken) < length:
            data, fds = await self._take(length - len(taken))
            self._connection.receive_data(data, fds)
            taken += data
            count += len(fds)
        return taken, count

    async def _take(self, most: int) -> tuple[bytes, list[int]]:
        data, ancillary, flags, _ = await self._sock.recvmsg(
            most, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
        )
        fds = received_fds(ancillary)
        if flags & socket.MSG_CTRUNC:
            close_all(fds)
            raise ProtocolError(
                f"a message brought more than {MAX_FDS} descriptors, or more than this process may open"
            )
        if not data:
            close_all(fds)
            raise HungUp(middle=True)
        return data, fds

    # -- out

    async def send(self, answers: Answers) -> None:
        """Send what the connection had to say (``data_to_send``)."""
        for data, fds in answers:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            self._observe("out", data, len(fds))
            sent = await self._sock.sendmsg([data], ancillary)
            while sent < len(data):
                sent += await self._sock.send(data[sent:])

    async def send_file(self, fd: int, length: int, answers: Answers = ()) -> None:
        """Send ``length`` bytes from the position of file ``fd``, which moves along: they are ``answers``."""
        for data, fds in answers:
            self._observe("out", data, len(fds))
        while length:
            try:
                sent = os.sendfile(self._sock.fileno(), fd, None, length)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)
                continue
            if not sent:
                raise OSError(errno.EIO, "the answer ends early")
            length -= sent

    async def send_last(self) -> None:
        """The answer to the message that broke the protocol, if the peer still takes it."""
        with trio.move_on_after(LAST_WORDS):
            try:
                await self.send(self._connection.data_to_send())
            except OSError:
                return
