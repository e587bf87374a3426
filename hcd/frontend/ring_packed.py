"""The driver's side of a packed virtqueue (virtio 1.3, 2.8).

One ring of 16-byte descriptors that both sides write, and two event areas of 4 bytes. A descriptor is
available when its AVAIL bit equals the driver's wrap counter and its USED bit does not; used when both
equal the device's. The flags of a chain's first descriptor are stored last, as one 16-bit access: from then
on the device owns the chain. ``publish`` stores them for the last chain first, so the device sees a batch
whole or not at all.

Only the last descriptor of a chain carries the buffer id. The others are filled with :data:`NO_ID` on
purpose: a device that reads the id there is wrong.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import NamedTuple

from hcd.frontend.errors import DeviceRingError
from hcd.frontend.memory import SharedMemory, full_fence
from hcd.frontend.ring import INDIRECT, NEXT, WRITE, Buffers, Chain, DriverRing, Segment, Used, need_event

__all__ = ["PackedDescriptor", "PackedRing"]

AVAIL, USED = 1 << 7, 1 << 15
NO_ID = 0xFFFF
WRAP = 1 << 15
#: what an event area's flags ask for (virtio 1.3 2.8.10)
EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC = 0, 1, 2

_DESCRIPTOR = struct.Struct("<QIHH")


class PackedDescriptor(NamedTuple):
    """One entry of a packed ring."""

    addr: int
    length: int
    id: int
    flags: int


class PackedRing(DriverRing):
    """A packed ring in ``memory``. ``size``: anything up to 32768. The host must be little-endian."""

    packed = True
    initial_base = 0x8000_8000

    def __init__(
        self,
        memory: SharedMemory,
        size: int,
        *,
        event_idx: bool = False,
        in_order: bool = False,
        region: int | None = None,
    ) -> None:
        super().__init__(memory, size, event_idx=event_idx, in_order=in_order)
        self.desc = memory.alloc(16 * size, 16, region=region)
        self.driver = memory.alloc(4, 4, region=region)
        self.device = memory.alloc(4, 4, region=region)
        self._ring = memory.view(self.desc, 16 * size)
        self._ring16 = self._ring.cast("H")
        self._driver = memory.view(self.driver, 4).cast("H")
        self._device = memory.view(self.device, 4).cast("H")
        self._ring[:] = bytes(16 * size)
        self._driver[0] = self._driver[1] = self._device[0] = self._device[1] = 0
        self._ids = deque(range(size))
        self._staged: list[tuple[int, int]] = []
        self._next_avail, self._avail_wrap = 0, 1
        self._next_used, self._used_wrap = 0, 1
        self._fresh = 0  # descriptors published since kick_needed was last asked

    # -- adding

    def add(self, readable: Buffers, writable: Buffers, indirect: bool = False) -> int:
        segments = self._segments(readable, writable)
        table = None
        self._take_slots(1 if indirect else len(segments))
        if indirect:
            table = self._indirect_table(segments)
            segments = [Segment(table, 16 * len(segments), INDIRECT)]
        buffer_id = self._ids.popleft()
        for i, segment in enumerate(segments):
            last = i + 1 == len(segments)
            flags = segment.flags | (0 if last else NEXT)
            self._stage(segment, buffer_id if last else NO_ID, flags, head=i == 0)
        token = self._token()
        writable_bytes = sum(length for _, length in writable)
        return self._add(buffer_id, Chain(token, len(segments), (buffer_id,), table, writable_bytes))

    def _stage(self, segment: Segment, buffer_id: int, flags: int, *, head: bool) -> None:
        """Write one descriptor; the flags of a head only when it is published."""
        slot, flags = self._next_avail, flags | self.available_flags
        if head:
            self._staged.append((slot, flags))
            stale = self._ring16[8 * slot + 7]
            self.write_descriptor(slot, segment.gpa, segment.length, buffer_id, stale)
        else:
            self.write_descriptor(slot, segment.gpa, segment.length, buffer_id, flags)
        self._advance_avail(1)

    def _advance_avail(self, count: int) -> None:
        self._fresh += count
        self._next_avail += count
        if self._next_avail >= self.size:
            self._next_avail -= self.size
            self._avail_wrap ^= 1

    def _indirect_table(self, segments: list[Segment]) -> int:
        table = self.memory.alloc(16 * len(segments), 16)
        view = self.memory.view(table, 16 * len(segments))
        for i, segment in enumerate(segments):
            _DESCRIPTOR.pack_into(view, 16 * i, segment.gpa, segment.length, 0, segment.flags)
        return table

    def publish(self) -> int:
        count = len(self._staged)
        for slot, flags in reversed(self._staged):
            self._ring16[8 * slot + 7] = flags
        self._staged.clear()
        return count

    def kick_needed(self) -> bool:
        if self._staged:
            raise ValueError("publish() what was added before asking whether to kick")
        fresh, self._fresh = self._fresh, 0
        if not fresh:
            return False
        full_fence()
        off_wrap, wish = self.device_event
        if wish != EVENT_DESC:
            return wish == EVENT_ENABLE
        event = off_wrap & ~WRAP
        if off_wrap >> 15 != self._avail_wrap:
            event -= self.size
        return need_event(event & 0xFFFF, self._next_avail, (self._next_avail - fresh) & 0xFFFF)

    # -- taking out

    def used(self) -> list[Used]:
        done: list[Used] = []
        while self._next_is_used():
            _, written, buffer_id, flags = self.read_descriptor(self._next_used)
            if buffer_id not in self._chains:
                raise DeviceRingError(f"used buffer id {buffer_id} is not out")
            self._finish(buffer_id, written if flags & WRITE else 0, done)
        return done

    def _next_is_used(self) -> bool:
        flags = self._ring16[8 * self._next_used + 7]
        return bool(self._chains) and bool(flags & AVAIL) == bool(flags & USED) == bool(self._used_wrap)

    def _pass(self, chain: Chain) -> None:
        self._ids.extend(chain.ids)
        self._next_used += chain.slots
        if self._next_used >= self.size:
            self._next_used -= self.size
            self._used_wrap ^= 1

    def enable_interrupts(self) -> bool:
        if self.event_idx:
            self._driver[0] = self._next_used | self._used_wrap << 15
            self._driver[1] = EVENT_DESC
        else:
            self._driver[1] = EVENT_ENABLE
        full_fence()
        return self._next_is_used()

    def disable_interrupts(self) -> None:
        self._driver[1] = EVENT_DISABLE

    def rewind(self) -> int:
        position = self._next_used | self._used_wrap << 15
        return position | position << 16

    # -- the raw ring, for whoever wants to break it

    @property
    def available_flags(self) -> int:
        """The AVAIL and USED bits that make the next descriptor available."""
        return AVAIL if self._avail_wrap else USED

    @property
    def next_position(self) -> int:
        """Where the next descriptor goes: offset | wrap << 15."""
        return self._next_avail | self._avail_wrap << 15

    def write_descriptor(self, slot: int, addr: int, length: int, buffer_id: int, flags: int) -> None:
        """Store one descriptor, flags last."""
        at = 16 * slot
        self._ring[at : at + 14] = _DESCRIPTOR.pack(addr, length, buffer_id, 0)[:14]
        self._ring16[8 * slot + 7] = flags

    def read_descriptor(self, slot: int) -> PackedDescriptor:
        return PackedDescriptor(*_DESCRIPTOR.unpack_from(self._ring, 16 * slot))

    def offer(self, descriptors: list[PackedDescriptor]) -> None:
        """Make these available as they stand, with no bookkeeping: ``used`` will not know them.

        AVAIL and USED are added to the flags.
        """
        stores = []
        for descriptor in descriptors:
            flags = descriptor.flags | self.available_flags
            stores.append((self._next_avail, descriptor.addr, descriptor.length, descriptor.id, flags))
            self._advance_avail(1)
        for store in reversed(stores):
            self.write_descriptor(*store)

    @property
    def device_event(self) -> tuple[int, int]:
        """What the device asks for: (offset | wrap << 15, EVENT_*)."""
        return self._device[0], self._device[1]

    def set_driver_event(self, off_wrap: int, flags: int) -> None:
        self._driver[0] = off_wrap
        self._driver[1] = flags
