"""Virtio-net frames over a pair of queues (virtio 1.3, 5.1.6).

Every frame has a virtio header in front: 12 bytes with VERSION_1 or MRG_RXBUF, else 10. With MRG_RXBUF a
received frame may be spread over several buffers, of which the first's header says how many.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence

from hcd_protocols.virtio.features import NetFeature
from hcd_protocols.virtio.net import header_size

from hcd.frontend.errors import BackendError
from hcd.frontend.memory import SharedMemory
from hcd.frontend.queue import Queue

__all__ = ["NET_FEATURES", "NetDriver"]

#: what this driver can live with; mask the features with it
NET_FEATURES = (
    NetFeature.MTU | NetFeature.MAC | NetFeature.MRG_RXBUF | NetFeature.STATUS | NetFeature.MQ
)
#: where num_buffers is in the header
_COUNT_OFFSET = 10


class NetDriver:
    """Sends and receives on one queue pair; the receive queue is kept filled with ``buffers`` buffers."""

    def __init__(
        self,
        memory: SharedMemory,
        rx: Queue,
        tx: Queue,
        *,
        features: int,
        buffers: int = 32,
        buffer_size: int = 2048,
        big_endian: bool = False,
        timeout: float = 20.0,
    ) -> None:
        self.memory, self.rx, self.tx = memory, rx, tx
        self.timeout = timeout
        self.header_size = header_size(features)
        self.mergeable = bool(features & NetFeature.MRG_RXBUF)
        self._count = struct.Struct(">H" if big_endian else "<H")
        self._buffer_size = buffer_size
        self._receiving: dict[int, int] = {}
        self._sending: dict[int, int] = {}
        self._idle: list[int] = []
        self._frames: list[bytes] = []
        self._partial: list[bytes] = []
        self._missing = 0
        for _ in range(min(buffers, rx.ring.size)):
            self._post(memory.alloc(buffer_size))
        rx.publish()

    def send(self, *frames: bytes) -> None:
        """Put every frame on the wire and wait until the device has taken them."""
        self.start(frames)
        while self._sending:
            self._reap(self.tx.wait(self.timeout))

    def start(self, frames: Sequence[bytes]) -> None:
        """Publish frames with at most one kick; ``send()`` with none waits for them. RingFull if too many."""
        for frame in frames:
            packet = bytes(self.header_size) + frame
            if not self._idle:
                self._idle.append(self.memory.alloc(max(self._buffer_size, len(packet))))
            gpa = self._idle.pop() if len(packet) <= self._buffer_size else self.memory.alloc(len(packet))
            self.memory.write(gpa, packet)
            self._sending[self.tx.ring.add([(gpa, len(packet))], [])] = gpa
        self.tx.publish()

    def receive(self, timeout: float | None = None) -> bytes:
        """The next frame, without its header. BackendError when none comes in ``timeout`` seconds."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while not self._frames:
            self._collect(max(0.0, deadline - time.monotonic()))
        return self._frames.pop(0)

    def pending(self) -> list[bytes]:
        """The frames that are here already; does not wait."""
        for done in self.rx.used():
            self._take(done.token, done.written)
        self.rx.publish()
        frames, self._frames = self._frames, []
        return frames

    def _collect(self, timeout: float) -> None:
        for done in self.rx.wait(timeout):
            self._take(done.token, done.written)
        self.rx.publish()

    def _take(self, token: int, written: int) -> None:
        gpa = self._receiving.pop(token)
        data = self.memory.read(gpa, written)
        self._post(gpa)
        if not self._missing:
            if written < self.header_size:
                raise BackendError(f"a received frame of {written} bytes has no room for its header")
            self._missing = self._count.unpack_from(data, _COUNT_OFFSET)[0] if self.mergeable else 1
            data = data[self.header_size :]
        self._partial.append(data)
        self._missing -= 1
        if not self._missing:
            self._frames.append(b"".join(self._partial))
            self._partial.clear()

    def _post(self, gpa: int) -> None:
        self._receiving[self.rx.ring.add([], [(gpa, self._buffer_size)])] = gpa

    def _reap(self, used: Sequence[tuple[int, int]]) -> None:
        for token, _ in used:
            self._idle.append(self._sending.pop(token))
