"""Socket device (virtio 1.3, 5.10): configuration space, packets and events. Everything is little-endian, always."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

__all__ = [
    "CONFIG",
    "EVENT",
    "EVENT_QUEUE",
    "HEADER_SIZE",
    "HOST_CID",
    "MAX_CID",
    "MIN_CID",
    "NUM_QUEUES",
    "RX_QUEUE",
    "TX_QUEUE",
    "Event",
    "Header",
    "MessageFlag",
    "Op",
    "Shutdown",
    "SocketType",
]

#: queues (5.10.2)
RX_QUEUE, TX_QUEUE, EVENT_QUEUE = range(3)
NUM_QUEUES = 3

#: guest_cid (5.10.4); the upper 32 bits are reserved and zero
CONFIG = struct.Struct("<Q")
#: context ids (5.10.4): 0, 1 and 2 have meanings of their own, and so has the largest
HOST_CID = 2
MIN_CID, MAX_CID = 3, 0xFFFFFFFE
#: id of what happened (5.10.6.7)
EVENT = struct.Struct("<I")

#: src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt (5.10.6)
_HEADER = struct.Struct("<QQIIIHHIII")
HEADER_SIZE = _HEADER.size


class Op(enum.IntEnum):
    """5.10.6, field "op"."""

    INVALID = 0
    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class SocketType(enum.IntEnum):
    """5.10.6.4, field "type"."""

    STREAM = 1
    SEQPACKET = 2


class MessageFlag(enum.IntFlag):
    """5.10.6.6.1, field "flags" of RW in SEQPACKET connections: a message ends here; so does a record."""

    EOM = 1
    EOR = 2


class Shutdown(enum.IntFlag):
    """5.10.6.6, field "flags" of SHUTDOWN: the sender will not receive, will not send any more."""

    RECEIVE = 1
    SEND = 2


class Event(enum.IntEnum):
    """5.10.6.7: every connection is gone, and the CID may be another one."""

    TRANSPORT_RESET = 0


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the payload of a packet. ``op`` and ``type`` may be numbers that nobody knows."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int = 0
    buf_alloc: int = 0
    fwd_cnt: int = 0

    def to_bytes(self) -> bytes:
        """HEADER_SIZE bytes. ValueError for a number that does not fit."""
        try:
            return _HEADER.pack(
                self.src_cid, self.dst_cid, self.src_port, self.dst_port, self.len, self.type, self.op, self.flags,
                self.buf_alloc, self.fwd_cnt,
            )
        except struct.error as error:
            raise ValueError(f"socket packet: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes) -> Header:
        """From the first HEADER_SIZE bytes of a packet. ValueError when there are fewer."""
        if len(data) < HEADER_SIZE:
            raise ValueError(f"a socket packet has {HEADER_SIZE} bytes at least, not {len(data)}")
        return cls(*_HEADER.unpack_from(data))
