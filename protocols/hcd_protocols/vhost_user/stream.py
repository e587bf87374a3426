"""Bytes and file descriptors in, messages out.

The kernel hands over file descriptors together with the bytes of the sendmsg that carried them, and a
recvmsg ends at the latest behind those bytes. So descriptors that came with a chunk belong to the *last*
message that begins in the chunk. A chunk that holds descriptors and no beginning of a message breaks the
rule that descriptors ride on the first byte of a header (vhost-user.rst "Communication").

Every descriptor has one owner. It comes in through ``feed`` and leaves once: with its message, or in
``unclaimed``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hcd_protocols.errors import ProtocolError
from hcd_protocols.vhost_user.layouts import HEADER_SIZE
from hcd_protocols.vhost_user.messages import Header, RequestSpec, parse_header

__all__ = ["Message", "MessageStream"]


@dataclass(frozen=True, slots=True)
class Message:
    """One whole message."""

    header: Header
    payload: bytes
    fds: tuple[int, ...]


@dataclass(slots=True)
class _Batch:
    """Descriptors of one chunk; ``start`` and ``end`` are the chunk's place in the stream."""

    start: int
    end: int
    fds: tuple[int, ...]


class MessageStream:
    """Cuts a stream into messages. ``reply``: the peer sends replies, not requests."""

    def __init__(self, table: Mapping[int, RequestSpec], *, reply: bool = False) -> None:
        self._table = table
        self._reply = reply
        self._buffer = bytearray()
        self._start = 0  # place of the buffer's first byte in the stream
        self._batches: deque[_Batch] = deque()
        self._ended = False
        self.unclaimed: list[int] = []

    def message_length(self, header: bytes) -> int:
        """Length in bytes, header included, of the message that begins with ``header``. ProtocolError if
        illegal.
        """
        return HEADER_SIZE + parse_header(header, self._table, reply=self._reply).size

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> None:
        start = self._start + len(self._buffer)
        self._buffer += data
        if fds and data:
            self._batches.append(_Batch(start, start + len(data), tuple(fds)))
        else:
            self.unclaimed += fds

    def end(self) -> None:
        """The peer sends nothing more. From now on an incomplete message is an error."""
        self._ended = True

    def peek_header(self) -> Header | None:
        """The header of the next message, once its 12 bytes are there. ProtocolError if illegal."""
        if len(self._buffer) < HEADER_SIZE:
            return None
        return parse_header(bytes(self._buffer[:HEADER_SIZE]), self._table, reply=self._reply)

    def next_message(self) -> Message | None:
        """The next whole message. Its descriptors belong to the caller."""
        header = self.peek_header()
        if header is None or len(self._buffer) < HEADER_SIZE + header.size:
            self._check_end(header)
            return None
        length = HEADER_SIZE + header.size
        fds = self._take_fds(header, self._start, self._start + length)
        payload = bytes(self._buffer[HEADER_SIZE:length])
        del self._buffer[:length]
        self._start += length
        return Message(header, payload, fds)

    def is_cut_short(self) -> bool:
        """Whether the next message is illegal or only a part of it is there."""
        try:
            header = self.peek_header()
        except ProtocolError:
            return True
        return bool(self._buffer) and (header is None or len(self._buffer) < HEADER_SIZE + header.size)

    def discard(self) -> None:
        """Forget what is buffered; its descriptors become unclaimed."""
        self._start += len(self._buffer)
        self._buffer.clear()
        while self._batches:
            self.unclaimed += self._batches.popleft().fds

    def take_unclaimed(self) -> list[int]:
        taken, self.unclaimed = self.unclaimed, []
        return taken

    def _check_end(self, header: Header | None) -> None:
        if self._ended and self._buffer:
            what = header.spec.name if header else "a header"
            expected = HEADER_SIZE + (header.size if header else 0)
            raise ProtocolError(f"{what}: expected {expected} bytes, got {len(self._buffer)} and the end of the stream")

    def _take_fds(self, header: Header, first: int, end: int) -> tuple[int, ...]:
        """The descriptors of the message in [first, end). Nothing changes if it raises."""
        fds: tuple[int, ...] = ()
        count = 0
        for batch in self._batches:
            if batch.end > end:
                break  # a later message begins in that chunk
            if batch.start > first:
                raise ProtocolError(
                    f"{header.spec.name}: expected file descriptors with the first byte of a message, "
                    f"got {len(batch.fds)} in the middle of one"
                )
            fds += batch.fds
            count += 1
        for _ in range(count):
            self._batches.popleft()
        return fds
