"""The driver of a socket device (virtio 1.3, 5.10), packet by packet: for tests that say what no kernel would."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from hcd_protocols.virtio.vsock import HEADER_SIZE, HOST_CID, RX_QUEUE, TX_QUEUE, Header, Op, SocketType

from hcd.frontend.client import Frontend
from hcd.frontend.errors import BackendError

__all__ = ["VsockDriver"]


@dataclass(slots=True)
class VsockDriver:
    """Sends and receives packets on a :class:`~hcd.frontend.client.Frontend` whose queues run.

    ``buffers`` of ``size`` bytes are given to the receive queue at the beginning, and again when they come back unless
    ``refill`` is off. ``alloc`` is what packets claim as room in the guest.
    """

    front: Frontend
    cid: int = 3
    buffers: int = 16
    size: int = 4096
    alloc: int = 1 << 18
    refill: bool = True
    #: payload received by each connection, (guest port, host port)
    received: dict[tuple[int, int], int] = field(default_factory=dict)
    _waiting: dict[int, int] = field(default_factory=dict)
    _arrived: deque[tuple[Header, bytes]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        for _ in range(self.buffers):
            self.give(self.front.memory.alloc(self.size))

    def give(self, buffer: int) -> None:
        """Let the device have the receive buffer at ``buffer``."""
        token = self.front.queues[RX_QUEUE].submit([], [(buffer, self.size)])
        self._waiting[token] = buffer

    def send(self, op: int, guest_port: int, host_port: int, data: bytes = b"", **fields: Any) -> None:
        """One packet; returns when the device has taken it. ``fields`` replace those of the header."""
        key = (guest_port, host_port)
        header = {
            "src_cid": self.cid, "dst_cid": HOST_CID, "src_port": guest_port, "dst_port": host_port, "len": len(data),
            "type": SocketType.STREAM, "op": op, "buf_alloc": self.alloc, "fwd_cnt": self.received.get(key, 0),
        }
        self.send_raw(Header(**(header | fields)).to_bytes() + data)

    def send_raw(self, packet: bytes) -> None:
        memory, queue = self.front.memory, self.front.queues[TX_QUEUE]
        buffer = memory.alloc(max(1, len(packet)))
        memory.write(buffer, packet)
        queue.wait_for(queue.submit([(buffer, len(packet))], []), self.front.timeout)
        memory.free(buffer)

    def next(self, timeout: float | None = None) -> tuple[Header, bytes]:
        """The next packet of the device. BackendError when none comes."""
        deadline = time.monotonic() + (self.front.timeout if timeout is None else timeout)
        while not self._arrived:
            for used in self.front.queues[RX_QUEUE].wait(deadline - time.monotonic()):
                self._take(used.token, used.written)
        return self._arrived.popleft()

    def _take(self, token: int, written: int) -> None:
        buffer = self._waiting.pop(token)
        packet = self.front.memory.read(buffer, written)
        header, data = Header.from_bytes(packet), packet[HEADER_SIZE:]
        if header.len != len(data):
            raise BackendError(f"a packet of {len(data)} bytes says that it has {header.len}")
        key = (header.dst_port, header.src_port)
        self.received[key] = (self.received.get(key, 0) + len(data)) & 0xFFFFFFFF
        self._arrived.append((header, data))
        if self.refill:
            self.give(buffer)

    def expect(self, op: Op, timeout: float | None = None) -> tuple[Header, bytes]:
        """The next packet, which is an ``op``."""
        header, data = self.next(timeout)
        if header.op != op:
            raise BackendError(f"expected {op.name}, got {header} with {data[:20]!r}")
        return header, data

    def read(self, guest_port: int, host_port: int, size: int) -> bytes:
        """Exactly ``size`` bytes of one connection; credit updates between them are passed over."""
        data = b""
        while len(data) < size:
            header, part = self.next()
            if (header.dst_port, header.src_port) != (guest_port, host_port):
                raise BackendError(f"a packet for another connection: {header}")
            if header.op == Op.RW:
                data += part
            elif header.op != Op.CREDIT_UPDATE:
                raise BackendError(f"{header} after {len(data)} of {size} bytes")
        return data

    def silent(self) -> bool:
        """Whether nothing has arrived by now."""
        for used in self.front.queues[RX_QUEUE].used():
            self._take(used.token, used.written)
        return not self._arrived
