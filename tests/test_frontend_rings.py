"""The driver's sides of split and packed rings, against a plain model of a device.

The models are written from the specification with ``struct`` alone and share no code with the rings under
test. They run in lock step with the driver, so orders of memory accesses are not tested here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hcd.frontend.errors import DeviceRingError, RingFull
from hcd.frontend.memory import MemorySlot, SharedMemory
from hcd.frontend.ring import DriverRing, Used, need_event
from hcd.frontend.ring_packed import PackedDescriptor, PackedRing
from hcd.frontend.ring_split import SplitRing

NEXT, WRITE, INDIRECT = 1, 2, 4


@dataclass
class Popped:
    """What a model device took out of a ring."""

    key: int
    slots: int = 1
    readable: list[tuple[int, int]] = field(default_factory=list)
    writable: list[tuple[int, int]] = field(default_factory=list)

    def take(self, addr: int, length: int, flags: int) -> None:
        (self.writable if flags & WRITE else self.readable).append((addr, length))


class SplitDevice:
    """A device on a split ring: virtio 1.3 2.7, one field at a time."""

    def __init__(self, ring: SplitRing, big_endian: bool = False) -> None:
        self.memory, self.size = ring.memory, ring.size
        self.desc, self.avail, self.used = ring.desc, ring.driver, ring.device
        self.order = ">" if big_endian else "<"
        self.event_idx = ring.event_idx
        self.seen = 0
        self.done = 0
        self.told = 0

    def get(self, gpa: int, code: str) -> tuple[int, ...]:
        code = self.order + code
        return struct.unpack(code, self.memory.read(gpa, struct.calcsize(code)))

    def put(self, gpa: int, code: str, *values: int) -> None:
        self.memory.write(gpa, struct.pack(self.order + code, *values))

    def pop(self) -> Popped | None:
        if self.get(self.avail + 2, "H")[0] == self.seen:
            return None
        (head,) = self.get(self.avail + 4 + 2 * (self.seen % self.size), "H")
        self.seen = (self.seen + 1) & 0xFFFF
        chain = Popped(head)
        table, index = self.desc, head
        while True:
            addr, length, flags, following = self.get(table + 16 * index, "QIHH")
            if flags & INDIRECT:
                assert table == self.desc
                assert not flags & (NEXT | WRITE)
                table, index = addr, 0
                continue
            chain.take(addr, length, flags)
            if not flags & NEXT:
                return chain
            index = following

    def finish(self, chain: Popped, written: int, batch: int = 1) -> None:
        self.put(self.used + 4 + 8 * (self.done % self.size), "II", chain.key, written)
        self.done = (self.done + batch) & 0xFFFF
        self.put(self.used + 2, "H", self.done)

    def wants_to_call(self) -> bool:
        old, self.told = self.told, self.done
        if not self.event_idx:
            return old != self.done and not self.get(self.avail, "H")[0] & 1
        (event,) = self.get(self.avail + 4 + 2 * self.size, "H")
        return any((old + i) & 0xFFFF == event for i in range((self.done - old) & 0xFFFF))

    def want_kicks(self, wanted: bool) -> None:
        if not self.event_idx:
            self.put(self.used, "H", 0 if wanted else 1)
        else:
            event = self.seen if wanted else self.seen - 1
            self.put(self.used + 4 + 8 * self.size, "H", event & 0xFFFF)


class PackedDevice:
    """A device on a packed ring: virtio 1.3 2.8."""

    def __init__(self, ring: PackedRing) -> None:
        self.memory, self.size, self.event_idx = ring.memory, ring.size, ring.event_idx
        self.ring, self.driver, self.device = ring.desc, ring.driver, ring.device
        self.seen, self.seen_wrap = 0, 1
        self.done, self.done_wrap = 0, 1
        self.told: list[int] = []

    def descriptor(self) -> tuple[int, ...]:
        return struct.unpack("<QIHH", self.memory.read(self.ring + 16 * self.seen, 16))

    def pop(self) -> Popped | None:
        flags = self.descriptor()[3]
        if flags >> 7 & 1 != self.seen_wrap or flags >> 15 == self.seen_wrap:
            return None
        chain = Popped(-1, slots=0)
        while True:
            addr, length, key, flags = self.descriptor()
            assert flags >> 7 & 1 == self.seen_wrap, "the rest of a chain is available when its head is"
            assert flags >> 15 != self.seen_wrap
            self.seen += 1
            chain.slots += 1
            if self.seen == self.size:
                self.seen, self.seen_wrap = 0, self.seen_wrap ^ 1
            if flags & INDIRECT:
                assert not flags & NEXT
                for at in range(0, length, 16):
                    chain.take(*struct.unpack("<QI2xH", self.memory.read(addr + at, 16)))
            else:
                chain.take(addr, length, flags)
            if not flags & NEXT:
                chain.key = key
                return chain

    def finish(self, chain: Popped, written: int, slots: int | None = None) -> None:
        slots = chain.slots if slots is None else slots
        flags = (1 << 7 | 1 << 15) * self.done_wrap | (WRITE if written else 0)
        self.memory.write(self.ring + 16 * self.done, struct.pack("<QIHH", 0xDEAD, written, chain.key, flags))
        for _ in range(slots):
            self.told.append(self.done | self.done_wrap << 15)
            self.done += 1
            if self.done == self.size:
                self.done, self.done_wrap = 0, self.done_wrap ^ 1

    def wants_to_call(self) -> bool:
        told, self.told = self.told, []
        event, wish = struct.unpack("<HH", self.memory.read(self.driver, 4))
        return {0: bool(told), 1: False, 2: event in told}[wish]

    def want_kicks(self, wanted: bool) -> None:
        wish = 1 if not wanted else 2 if self.event_idx else 0
        self.memory.write(self.device, struct.pack("<HH", self.seen | self.seen_wrap << 15, wish))


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    with SharedMemory.of_size(1 << 20) as shared:
        yield shared


def make_split(memory: SharedMemory, size: int = 8, **options: bool) -> tuple[SplitRing, SplitDevice]:
    ring = SplitRing(memory, size, **options)
    return ring, SplitDevice(ring, options.get("big_endian", False))


def make_packed(memory: SharedMemory, size: int = 8, **options: bool) -> tuple[PackedRing, PackedDevice]:
    ring = PackedRing(memory, size, **options)
    return ring, PackedDevice(ring)


Buffers = list[tuple[int, int]]


class RingMachine(RuleBasedStateMachine):
    """A driver and a model device do anything legal in any order; every chain comes back once, as it was."""

    packed = False

    @initialize(
        size=st.sampled_from([1, 2, 4, 8, 16]),
        odd_size=st.integers(1, 17),
        event_idx=st.booleans(),
        in_order=st.booleans(),
        big_endian=st.booleans(),
    )
    def start(self, size: int, odd_size: int, event_idx: bool, in_order: bool, big_endian: bool) -> None:
        self.memory = SharedMemory.of_size(1 << 20)
        self.ring: DriverRing
        if self.packed:
            self.ring, self.device = make_packed(
                self.memory, odd_size, event_idx=event_idx, in_order=in_order
            )
        else:
            self.ring, self.device = make_split(
                self.memory, size, event_idx=event_idx, in_order=in_order, big_endian=big_endian
            )
        self.in_order = in_order
        self.added: list[tuple[int, Buffers, Buffers]] = []
        self.published: list[tuple[int, Buffers, Buffers]] = []
        self.at_device: list[tuple[int, Popped]] = []
        self.finished: dict[int, int] = {}
        self.free = self.ring.size
        self.cost: dict[int, int] = {}
        self.device_awaits_kick = True
        self.driver_awaits_call = False
        self.device.want_kicks(True)

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.memory.close()

    # What is in a buffer does not matter, so few kinds are drawn; how events follow each other does.
    buffers = st.lists(st.sampled_from([(1, 0), (2**64 - 1, 2**32 - 1), (0x1000, 512)]), max_size=3)
    chains = st.lists(st.tuples(buffers, buffers, st.booleans()), min_size=1, max_size=6)

    @rule(chains=chains, publish=st.booleans())
    def add_several(self, chains: list[tuple[Buffers, Buffers, bool]], publish: bool) -> None:
        for readable, writable, indirect in chains:
            self.add(readable, writable, indirect)
        if publish:
            self.publish_and_kick()

    def add(self, readable: Buffers, writable: Buffers, indirect: bool) -> None:
        count = len(readable) + len(writable)
        if not count:
            return
        cost = 1 if indirect else count
        if cost > self.free:
            with pytest.raises(RingFull):
                self.ring.add(readable, writable, indirect)
            return
        token = self.ring.add(readable, writable, indirect)
        assert token not in self.cost
        self.free -= cost
        self.cost[token] = cost
        self.added.append((token, readable, writable))

    @rule()
    def publish_and_kick(self) -> None:
        assert self.ring.publish() == len(self.added)
        new = bool(self.added)
        self.published += self.added
        self.added.clear()
        kick = self.ring.kick_needed()
        if new and self.device_awaits_kick:
            assert kick, "the device waits for a kick and there is something new"
        if not new:
            assert not kick
        if kick:
            self.device_awaits_kick = False

    @rule(most=st.integers(1, 8))
    def device_takes_some(self, most: int) -> None:
        for _ in range(min(most, len(self.published) + 1)):
            self.device_takes_one()

    def device_takes_one(self) -> None:
        chain = self.device.pop()
        if not self.published:
            assert chain is None
            return
        assert chain is not None
        token, readable, writable = self.published.pop(0)
        assert (chain.readable, chain.writable) == (readable, writable)
        self.at_device.append((token, chain))
        self.device_awaits_kick = False

    @precondition(lambda self: not self.published)
    @rule()
    def device_falls_asleep(self) -> None:
        assert self.device.pop() is None
        self.device.want_kicks(True)
        self.device_awaits_kick = True

    @rule()
    def device_wants_no_kicks(self) -> None:
        self.device.want_kicks(False)
        self.device_awaits_kick = False

    @rule(data=st.data())
    def device_finishes_some(self, data: st.DataObject) -> None:
        if not self.at_device:
            return
        count = data.draw(st.integers(1, len(self.at_device)))
        if self.in_order:
            self._finish_batch(count, data)
        for _ in range(0 if self.in_order else count):
            token, chain = self.at_device.pop(data.draw(st.integers(0, len(self.at_device) - 1)))
            written = self._written(chain, data)
            self.device.finish(chain, written)
            self.finished[token] = written
        called = self.device.wants_to_call()
        if self.driver_awaits_call:
            assert called, "the driver waits for a call"
            self.driver_awaits_call = False

    def _written(self, chain: Popped, data: st.DataObject) -> int:
        return data.draw(st.integers(0, min(2**32 - 1, sum(n for _, n in chain.writable))))

    def _finish_batch(self, count: int, data: st.DataObject) -> None:
        batch, self.at_device = self.at_device[:count], self.at_device[count:]
        for token, chain in batch:
            self.finished[token] = sum(n for _, n in chain.writable)
        token, chain = batch[-1]
        self.finished[token] = self._written(chain, data)
        step = sum(c.slots for _, c in batch) if self.packed else count
        self.device.finish(chain, self.finished[token], step)

    @rule()
    def driver_takes_used(self) -> None:
        used = self.ring.used()
        assert {u.token: u.written for u in used} == self.finished
        assert len(used) == len(self.finished)
        for token in self.finished:
            self.free += self.cost[token]
        self.finished.clear()

    @rule()
    def driver_falls_asleep(self) -> None:
        """With interrupts on and nothing used, the next used chain must bring a call."""
        assert self.ring.enable_interrupts() == bool(self.finished)
        self.driver_awaits_call = not self.finished

    @rule()
    def driver_wants_no_calls(self) -> None:
        self.ring.disable_interrupts()
        self.driver_awaits_call = False

    @invariant()
    def descriptors_are_conserved(self) -> None:
        if hasattr(self, "ring"):
            assert self.ring.free == self.free


class PackedMachine(RingMachine):
    packed = True


Make = Callable[..., tuple[Any, Any]]
BOTH = pytest.mark.parametrize("make", [make_split, make_packed])


@BOTH
def test_a_chain_keeps_its_order_of_buffers(memory: SharedMemory, make: Make) -> None:
    ring, device = make(memory)
    token = ring.add([(1, 2), (3, 4)], [(5, 6)])
    assert device.pop() is None, "nothing may show before publish()"
    assert ring.publish() == 1
    chain = device.pop()
    assert chain is not None
    assert (chain.readable, chain.writable) == ([(1, 2), (3, 4)], [(5, 6)])
    device.finish(chain, 6)
    assert ring.used() == [Used(token, 6)]
    assert ring.outstanding == 0


@BOTH
def test_an_indirect_chain_takes_one_descriptor_and_gives_its_table_back(
    memory: SharedMemory, make: Make
) -> None:
    ring, device = make(memory, 1)
    for length in range(1, 6):
        ring.add([(0x1000, n + 1) for n in range(length)], [(0x2000, 1)], indirect=True)
        assert ring.free == 0
        ring.publish()
        chain = device.pop()
        assert chain is not None
        assert len(chain.readable) == length
        device.finish(chain, 1)
        ring.used()
    probe = memory.alloc(16)
    memory.free(probe)
    assert probe == memory.alloc(16), "free memory is found again"


@BOTH
def test_a_full_ring_says_so_and_stays_as_it_was(memory: SharedMemory, make: Make) -> None:
    ring, device = make(memory, 2)
    ring.add([(1, 1)], [])
    with pytest.raises(RingFull, match="2 descriptors wanted, 1 of 2 free"):
        ring.add([(2, 1)], [(3, 1)])
    ring.publish()
    assert device.pop() is not None
    assert device.pop() is None


@BOTH
def test_an_empty_chain_is_refused(memory: SharedMemory, make: Make) -> None:
    ring, _ = make(memory)
    with pytest.raises(ValueError, match="at least one buffer"):
        ring.add([], [])
    assert ring.free == ring.size


@BOTH
def test_kick_needed_is_asked_once_per_publish(memory: SharedMemory, make: Make) -> None:
    ring, _ = make(memory)
    ring.add([(1, 1)], [])
    ring.publish()
    assert ring.kick_needed()
    assert not ring.kick_needed()


@pytest.mark.parametrize("event_idx", [False, True])
@BOTH
def test_a_device_that_polls_gets_no_kicks(memory: SharedMemory, make: Make, event_idx: bool) -> None:
    ring, device = make(memory, event_idx=event_idx)
    device.want_kicks(False)
    ring.add([(1, 1)], [])
    ring.publish()
    assert not ring.kick_needed()


def test_need_event_wraps_at_16_bits() -> None:
    assert need_event(0xFFFF, 0, 0xFFFF)
    assert not need_event(0, 0, 0xFFFF)
    assert need_event(5, 6, 5)
    assert not need_event(5, 5, 4)
    assert not need_event(4, 6, 5)


def test_split_indexes_run_past_65535(memory: SharedMemory) -> None:
    ring, device = make_split(memory, 2)
    for _ in range(66_000):
        token = ring.add([(1, 1)], [])
        ring.publish()
        chain = device.pop()
        assert chain is not None
        device.finish(chain, 0)
        assert ring.used() == [Used(token, 0)]


def test_a_used_index_beyond_what_is_out_is_the_devices_fault(memory: SharedMemory) -> None:
    ring, device = make_split(memory)
    ring.add([(1, 1)], [])
    ring.publish()
    device.put(ring.device + 2, "H", 2)
    with pytest.raises(DeviceRingError, match=r"used\.idx went from 0 to 2 with 1 chains out"):
        ring.used()


def test_an_unknown_used_descriptor_is_the_devices_fault(memory: SharedMemory) -> None:
    ring, device = make_split(memory)
    ring.add([(1, 1)], [])
    ring.publish()
    device.finish(Popped(7), 0)
    with pytest.raises(DeviceRingError, match="descriptor 7"):
        ring.used()


def test_an_unknown_used_buffer_id_is_the_devices_fault(memory: SharedMemory) -> None:
    ring, device = make_packed(memory)
    ring.add([(1, 1)], [])
    ring.publish()
    device.finish(Popped(7), 0)
    with pytest.raises(DeviceRingError, match="buffer id 7"):
        ring.used()


def test_a_packed_batch_shows_whole_or_not_at_all(memory: SharedMemory) -> None:
    ring, device = make_packed(memory)
    ring.add([(1, 1), (2, 1)], [])
    ring.add([(3, 1)], [])
    assert device.pop() is None
    with pytest.raises(ValueError, match="publish"):
        ring.kick_needed()
    ring.publish()
    assert [device.pop() is not None for _ in range(3)] == [True, True, False]


def test_offered_descriptors_reach_the_device_as_they_are(memory: SharedMemory) -> None:
    split, device = make_split(memory)
    split.write_descriptor(3, 0x1234, 5, NEXT, 6)
    split.write_descriptor(6, 0x5678, 9, WRITE)
    assert split.read_descriptor(3) == (0x1234, 5, NEXT, 6)
    split.offer(3)
    assert device.pop() == Popped(3, readable=[(0x1234, 5)], writable=[(0x5678, 9)])


def test_offered_packed_descriptors_wrap_like_any_other(memory: SharedMemory) -> None:
    ring, device = make_packed(memory, 3)
    for lap in range(5):
        same = PackedDescriptor(0x1000, lap, 7, 0)
        ring.offer([same._replace(flags=NEXT), same])
        assert device.pop() == Popped(7, slots=2, readable=[(0x1000, lap)] * 2)
        device.finish(Popped(7, slots=2), 0)


def test_memory_reads_and_writes_across_adjacent_regions() -> None:
    slots = [MemorySlot(0x1000, 0x1000), MemorySlot(0x2000, 0x1000, user_addr=0x9000, mmap_offset=0x3000)]
    with SharedMemory(slots) as memory:
        memory.write(0x1FFE, b"abcd")
        assert memory.read(0x1FFE, 4) == b"abcd"
        assert bytes(memory.regions[1].view[:2]) == b"cd"
        assert memory.user_addr(0x2001) == 0x9001
        with pytest.raises(ValueError, match="leave the region"):
            memory.view(0x1FFE, 4)
        with pytest.raises(ValueError, match="no memory at guest address 0x3000"):
            memory.read(0x2FFF, 2)


def test_the_allocator_hands_out_disjoint_aligned_pieces_until_nothing_is_left() -> None:
    with SharedMemory([MemorySlot(0x1000, 0x1000), MemorySlot(0x8010, 0x1000)]) as memory:
        pieces = [memory.alloc(100, 64) for _ in range(50)]
        assert all(gpa % 64 == 0 for gpa in pieces)
        assert all(b - a >= 100 for a, b in zip(sorted(pieces), sorted(pieces)[1:], strict=False))
        assert memory.alloc(16, region=1) >= 0x8010
        with pytest.raises(MemoryError, match="no 5000 bytes"):
            memory.alloc(5000)
        for gpa in pieces:
            memory.free(gpa)
        assert memory.alloc(0xF00) == 0x1040, "neighbouring holes join"


TestSplitRing = RingMachine.TestCase
TestPackedRing = PackedMachine.TestCase
TestSplitRing.settings = settings(max_examples=100, stateful_step_count=60)
TestPackedRing.settings = settings(max_examples=100, stateful_step_count=60)
