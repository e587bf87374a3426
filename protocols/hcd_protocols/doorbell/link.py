"""What both ends of a doorbell connection have in common: packets in, descriptors accounted for, errors that last.

Every descriptor that comes in leaves once: in one event, or through ``take_unclaimed_fds``. Descriptors that are to be
sent stay their owner's: the kernel duplicates them.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Sequence

from hcd_protocols.doorbell.messages import Error, Message, Table, decode, encode
from hcd_protocols.errors import ProtocolError

__all__ = ["Link", "Packet"]

#: a message and the descriptors that go with it
Packet = tuple[bytes, tuple[int, ...]]


class Link:
    """One end of a connection, as far as both ends are the same."""

    def __init__(self) -> None:
        self._packets: deque[Packet] = deque()
        self._unclaimed: list[int] = []
        self._due: deque[Packet] = deque()
        self._failure: str | None = None
        self._ended = False

    def receive_data(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        """One packet of the socket with the descriptors that came with it. Raises nothing."""
        if self._failure is not None or self._ended:
            self._unclaimed += fds
        else:
            self._packets.append((packet, tuple(fds)))

    def receive_eof(self) -> None:
        """The peer hung up: what came before is still handled, nothing comes after it."""
        self._ended = True

    def take_unclaimed_fds(self) -> list[int]:
        """The descriptors that no event is going to bring, for the caller to close. Ends the connection."""
        self._ended = True
        while self._packets:
            self._unclaimed += self._packets.popleft()[1]
        taken, self._unclaimed = self._unclaimed, []
        return taken

    def data_to_send(self) -> list[Packet]:
        """Packets that are due, each for one sendmsg(2). Cleared by the call."""
        due = list(self._due)
        self._due.clear()
        return due

    def send_error(self, text: str, code: int = errno.EPROTO) -> None:
        """Tell the peer why this end is about to close. ``code`` is an errno."""
        plain = "".join(c if c.isprintable() else "?" for c in text)
        self._due.clear()
        self._due.append((encode(Error(code, plain)), ()))

    # -- for both ends

    def _fail(self, text: str) -> None:
        """Enter the error state for good."""
        self._failure = text
        while self._packets:
            self._unclaimed += self._packets.popleft()[1]

    def _next_message(self) -> tuple[Message, tuple[int, ...]] | None:
        """The next message and its descriptors, which are the caller's from now on. ProtocolError: see there."""
        if self._failure is not None:
            raise ProtocolError(self._failure)
        if not self._packets:
            return None
        packet, fds = self._packets.popleft()
        try:
            message = decode(packet)
            expected = message.held.count(False) if isinstance(message, Table) else 0
            if len(fds) != expected:
                raise ProtocolError(
                    f"{_name(message)}: expected {expected} file descriptors, got {len(fds)}"
                )
        except ProtocolError as error:
            self._unclaimed += fds
            self._fail(str(error))
            raise
        return message, fds

    def _refuse(self, fds: Sequence[int], text: str) -> ProtocolError:
        """The error to raise for a message that is legal by itself and came at the wrong time."""
        self._unclaimed += fds
        self._fail(text)
        return ProtocolError(text)


def _name(message: Message) -> str:
    if isinstance(message, Table):
        return f"{'HOLD ' if message.hold else ''}{message.items[0].reference.kind.name}"
    return type(message).__name__.upper()
