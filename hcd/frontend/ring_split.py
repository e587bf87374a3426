"""The driver's side of a split virtqueue (virtio 1.3, 2.7).

Three areas: descriptor table (16 bytes each), available ring (the driver writes), used ring (the device
writes). The two ``idx`` fields are the only thing that both sides race on, so each is read and written as
one 16-bit access through a cast memoryview. On x86 plain stores keep their order; between publishing
``avail.idx`` and reading the device's wish for a kick lies a full fence, or both sides could miss each
other.

Big-endian rings exist with legacy drivers alone (virtio 1.3 2.7.3); every field of the ring is swapped then.
"""

from __future__ import annotations

import struct
import sys
from collections import deque
from typing import NamedTuple

from hcd.frontend.errors import DeviceRingError
from hcd.frontend.memory import SharedMemory, full_fence
from hcd.frontend.ring import INDIRECT, NEXT, Buffers, Chain, DriverRing, Segment, Used, need_event

__all__ = ["Descriptor", "SplitRing"]

NO_INTERRUPT = 1
NO_NOTIFY = 1


class Descriptor(NamedTuple):
    """One entry of a descriptor table."""

    addr: int
    length: int
    flags: int
    next: int


class SplitRing(DriverRing):
    """A split ring in ``memory``. ``size``: a power of two up to 32768, or one to be refused."""

    packed = False
    initial_base = 0

    def __init__(
        self,
        memory: SharedMemory,
        size: int,
        *,
        event_idx: bool = False,
        in_order: bool = False,
        big_endian: bool = False,
        region: int | None = None,
    ) -> None:
        super().__init__(memory, size, event_idx=event_idx, in_order=in_order)
        order = ">" if big_endian else "<"
        self._swap = (sys.byteorder == "big") != big_endian
        self._descriptor = struct.Struct(order + "QIHH")
        self._element = struct.Struct(order + "II")
        avail_size, used_size = 6 + 2 * size, 6 + 8 * size
        self.desc = memory.alloc(16 * size, 16, region=region)
        self.driver = memory.alloc(avail_size, 2, region=region)
        self.device = memory.alloc(used_size, 4, region=region)
        self._desc = memory.view(self.desc, 16 * size)
        self._avail = memory.view(self.driver, avail_size).cast("H")
        self._used = memory.view(self.device, used_size)
        self._used16 = self._used.cast("H")
        for area in (self._desc, self._avail.cast("B"), self._used):
            area[:] = bytes(len(area))
        self._unused = deque(range(size))
        self._next_avail = 0
        self._published = 0
        self._asked = 0
        self._last_used = 0

    # -- adding

    def add(self, readable: Buffers, writable: Buffers, indirect: bool = False) -> int:
        segments = self._segments(readable, writable)
        table = None
        self._take_slots(1 if indirect else len(segments))
        if indirect:
            table = self._indirect_table(segments)
            segments = [Segment(table, 16 * len(segments), INDIRECT)]
        ids = tuple(self._unused.popleft() for _ in segments)
        for i, (index, segment) in enumerate(zip(ids, segments, strict=True)):
            more = i + 1 < len(ids)
            self.write_descriptor(
                index, segment.gpa, segment.length, segment.flags | more * NEXT, ids[i + 1] if more else 0
            )
        token = self._token()
        self.write_avail(self._next_avail % self.size, ids[0])
        self._next_avail = (self._next_avail + 1) & 0xFFFF
        return self._add(ids[0], Chain(token, len(ids), ids, table, sum(length for _, length in writable)))

    def _indirect_table(self, segments: list[Segment]) -> int:
        table = self.memory.alloc(16 * len(segments), 16)
        view = self.memory.view(table, 16 * len(segments))
        for i, segment in enumerate(segments):
            more = i + 1 < len(segments)
            flags = segment.flags | more * NEXT
            self._descriptor.pack_into(view, 16 * i, segment.gpa, segment.length, flags, i + 1 if more else 0)
        return table

    def publish(self) -> int:
        count = (self._next_avail - self._published) & 0xFFFF
        self.avail_idx = self._published = self._next_avail
        return count

    def kick_needed(self) -> bool:
        old, self._asked = self._asked, self._published
        if old == self._asked:
            return False
        full_fence()
        if self.event_idx:
            return need_event(self.avail_event, self._asked, old)
        return not self.used_flags & NO_NOTIFY

    # -- taking out

    def used(self) -> list[Used]:
        done: list[Used] = []
        idx = self.used_idx
        if (idx - self._last_used) & 0xFFFF > len(self._chains):
            out = len(self._chains)
            raise DeviceRingError(f"used.idx went from {self._last_used} to {idx} with {out} chains out")
        while self._last_used != idx:
            head, written = self.read_used(self._last_used % self.size)
            if head not in self._chains:
                raise DeviceRingError(f"used descriptor {head} does not start a chain that is out")
            self._finish(head, written, done)
        return done

    def _pass(self, chain: Chain) -> None:
        self._unused.extend(chain.ids)
        self._last_used = (self._last_used + 1) & 0xFFFF

    def enable_interrupts(self) -> bool:
        if self.event_idx:
            self.used_event = self._last_used
        else:
            self.avail_flags = 0
        full_fence()
        return self.used_idx != self._last_used

    def disable_interrupts(self) -> None:
        if self.event_idx:
            # avail.flags must stay 0 with EVENT_IDX. An index just passed comes round after 65535 others.
            self.used_event = (self._last_used - 1) & 0xFFFF
        else:
            self.avail_flags = NO_INTERRUPT

    def rewind(self) -> int:
        return self.used_idx

    # -- the raw ring, for whoever wants to break it

    def write_descriptor(self, index: int, addr: int, length: int, flags: int, next_index: int = 0) -> None:
        self._descriptor.pack_into(self._desc, 16 * index, addr, length, flags, next_index)

    def read_descriptor(self, index: int) -> Descriptor:
        return Descriptor(*self._descriptor.unpack_from(self._desc, 16 * index))

    def write_avail(self, slot: int, head: int) -> None:
        self._avail[2 + slot] = self._to(head)

    def read_used(self, slot: int) -> tuple[int, int]:
        head, written = self._element.unpack_from(self._used, 4 + 8 * slot)
        return head, written

    def offer(self, head: int) -> None:
        """Make ``head`` available as it stands, with no bookkeeping: ``used`` will not know it."""
        self.write_avail(self._next_avail % self.size, head)
        self._next_avail = (self._next_avail + 1) & 0xFFFF
        self.publish()

    def _to(self, value: int) -> int:
        return (value & 0xFF) << 8 | value >> 8 if self._swap else value

    @property
    def avail_flags(self) -> int:
        return self._to(self._avail[0])

    @avail_flags.setter
    def avail_flags(self, value: int) -> None:
        self._avail[0] = self._to(value)

    @property
    def avail_idx(self) -> int:
        return self._to(self._avail[1])

    @avail_idx.setter
    def avail_idx(self, value: int) -> None:
        self._avail[1] = self._to(value)

    @property
    def used_event(self) -> int:
        """With EVENT_IDX: the driver wants a call when the used index passes this."""
        return self._to(self._avail[2 + self.size])

    @used_event.setter
    def used_event(self, value: int) -> None:
        self._avail[2 + self.size] = self._to(value)

    @property
    def used_flags(self) -> int:
        return self._to(self._used16[0])

    @property
    def used_idx(self) -> int:
        return self._to(self._used16[1])

    @property
    def avail_event(self) -> int:
        """With EVENT_IDX: the device wants a kick when the available index passes this."""
        return self._to(self._used16[2 + 4 * self.size])
