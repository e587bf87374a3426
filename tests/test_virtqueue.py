"""The device side of virtqueues against the driver side of hcd.frontend, in one process."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from rings import Pair, make_pair, map_table

from hcd.dataplane.memory import MemoryTable
from hcd.dataplane.stats import DoorbellStats, QueueStats
from hcd.dataplane.virtqueue import Virtqueue
from hcd.errors import GuestError, ProtocolError
from hcd.frontend.memory import MemorySlot, SharedMemory
from hcd.frontend.ring_packed import PackedRing
from hcd.frontend.ring_split import SplitRing

NEXT, WRITE, INDIRECT = 1, 2, 4


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = make_pair(packed=request.param)
    yield made
    made.close()


def submit(pair: Pair, readable: list[Any], writable: list[Any], indirect: bool = False) -> int:
    token = pair.ring.add(readable, writable, indirect)
    pair.ring.publish()
    return token


# -- requests


def test_a_chain_becomes_a_request(pair: Pair) -> None:
    """Readable and writable bytes come out in order, whatever the pieces; the answer goes back with its length."""
    answer = [pair.room(3), pair.room(10)]
    token = submit(pair, [pair.put(b"ab"), pair.put(b"cdefg")], answer)
    request = pair.queue.pop()
    assert request is not None
    assert (request.readable, request.writable) == (7, 13)
    assert request.read(3) == b"abc"
    assert request.read() == b"defg"
    assert request.write(b"0123456789") == 10
    request.complete()
    pair.queue.flush()
    assert [(u.token, u.written) for u in pair.ring.used()] == [(token, 10)]
    assert pair.memory.read(answer[0][0], 3) + pair.memory.read(answer[1][0], 7) == b"0123456789"
    assert pair.queue.pop() is None


@pytest.mark.parametrize("split_at", range(1, 8))
def test_header_fields_may_lie_across_descriptors(pair: Pair, split_at: int) -> None:
    """Header access gathers from the pieces and checks the end."""
    data = struct.pack("<QIHB", 0x1122334455667788, 0xAABBCCDD, 0xEEFF, 0x42)
    submit(pair, [pair.put(data[:split_at]), pair.put(data[split_at:])], [])
    request = pair.queue.pop()
    assert request is not None
    assert request.u64(0) == 0x1122334455667788
    assert request.u32(8) == 0xAABBCCDD
    assert request.u16(12) == 0xEEFF
    assert request.u8(14) == 0x42
    with pytest.raises(GuestError, match="15 readable bytes"):
        request.u16(14)
    with pytest.raises(GuestError):
        request.u64((1 << 64) - 4)


def test_write_at_and_views(pair: Pair) -> None:
    """Absolute writes cross pieces; views show guest memory and outlive the request."""
    rooms = [pair.room(4), pair.room(4)]
    submit(pair, [pair.put(b"xy")], rooms)
    request = pair.queue.pop()
    assert request is not None
    request.write_at(2, b"1234")
    assert pair.memory.read(rooms[0][0], 4)[2:] + pair.memory.read(rooms[1][0], 4)[:2] == b"1234"
    with pytest.raises(GuestError):
        request.write_at(7, b"12")
    views = request.readable_views()
    request.writable_views()[1][:] = b"wxyz"
    assert pair.memory.read(rooms[1][0], 4) == b"wxyz"
    with pytest.raises(TypeError):
        views[0][0] = 0  # type: ignore[index]
    request.complete(8)
    assert bytes(views[0]) == b"xy"


def test_file_io_straight_to_guest_memory(pair: Pair, tmp_path: Any) -> None:
    """preadv and pwritev move whole scatter lists and say where the file ends."""
    file = tmp_path / "f"
    file.write_bytes(bytes(range(200)))
    fd = os.open(file, os.O_RDWR)
    rooms = [pair.room(50) for _ in range(3)]
    submit(pair, [pair.put(b"A" * 30), pair.put(b"B" * 30)], rooms)
    request = pair.queue.pop()
    assert request is not None
    assert request.preadv(fd, 10, 120) == 120
    assert request.preadv(fd, 190) == 10
    got = b"".join(pair.memory.read(*room) for room in rooms)
    assert got[:120] == bytes(range(10, 130))
    assert got[120:130] == bytes(range(190, 200))
    assert request.pwritev(fd, 5, 40) == 40
    assert request.readable == 20
    assert file.read_bytes()[:50] == bytes(range(5)) + b"A" * 30 + b"B" * 10 + bytes(range(45, 50))
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        request.preadv(fd, 0)


def test_copy_to_another_queue(pair: Pair) -> None:
    """Bytes go from one request into another, across the pieces of both."""
    other = make_pair()
    submit(pair, [pair.put(b"abc"), pair.put(b"defgh")], [])
    rooms = [other.room(5), other.room(5)]
    submit(other, [], rooms)
    source, target = pair.queue.pop(), other.queue.pop()
    assert source is not None
    assert target is not None
    source.skip(1)
    assert source.copy_to(target) == 7
    assert other.memory.read(rooms[0][0], 5) + other.memory.read(rooms[1][0], 2) == b"bcdefgh"
    with pytest.raises(GuestError):
        source.skip(1)
    other.close()


def test_buffers_may_overlap(pair: Pair) -> None:
    """A driver may hand out one place twice; the bytes that arrive are those that were there."""
    data = bytes(range(200))
    source, size = pair.put(data)
    submit(pair, [(source, size)], [])
    submit(pair, [], [(source + 7, size - 7)])
    one, other = pair.queue.pop(), pair.queue.pop()
    assert one is not None
    assert other is not None
    assert one.copy_to(other) == size - 7
    assert pair.memory.read(source + 7, size - 7) == data[: size - 7]


def test_completed_exactly_once(pair: Pair) -> None:
    """Whatever is done to a completed request is the device's mistake and harms nothing."""
    submit(pair, [pair.put(b"abc")], [pair.room(3)])
    request = pair.queue.pop()
    assert request is not None
    with pytest.raises(ValueError, match="room for 3"):
        request.complete(4)
    request.complete(3)
    with pytest.raises(ValueError, match="completed already"):
        request.complete()
    with pytest.raises(ValueError, match="completed already"):
        request.read()
    with pytest.raises(ValueError, match="completed already"):
        request.u8(0)
    assert request.completed


def test_a_kept_request_is_not_used_for_another(pair: Pair) -> None:
    """A reference to a completed request never turns into somebody else's request."""
    submit(pair, [pair.put(b"1")], [])
    first = pair.queue.pop()
    assert first is not None
    first.complete()
    for _ in range(5):
        submit(pair, [pair.put(b"2")], [])
        later = pair.queue.pop()
        assert later is not None
        assert later is not first
        later.complete()
        pair.queue.flush()
        pair.ring.used()
    with pytest.raises(ValueError, match="completed already"):
        first.complete()


def test_completion_from_other_threads(pair: Pair) -> None:
    """Another thread's completion travels to the owner, once per batch; nothing is published before."""
    for i in range(8):
        submit(pair, [pair.put(bytes([i]))], [pair.room(1)])
    requests = pair.queue.pop_many(8)
    thread = threading.Thread(target=lambda: [r.complete(1) for r in reversed(requests)])
    thread.start()
    thread.join()
    assert pair.scheduler.completed == [pair.queue]
    assert pair.queue.inflight == 8
    with pytest.raises(ValueError, match="completed already"):
        requests[0].complete(1)
    pair.queue.take_remote()
    pair.queue.flush()
    assert len(pair.ring.used()) == 8
    assert pair.queue.inflight == 0


@pytest.mark.parametrize("packed", [False, True])
def test_in_order(packed: bool) -> None:
    """With IN_ORDER the driver sees completions in its own order, whatever the device's."""
    pair = make_pair(packed=packed, in_order=True)
    tokens = [submit(pair, [pair.put(bytes([i]))], []) for i in range(4)]
    requests = pair.queue.pop_many(4)
    seen = []
    for i in (2, 0, 3, 1):
        requests[i].complete()
        pair.queue.flush()
        seen.append([u.token for u in pair.ring.used()])
    assert seen == [[], tokens[:1], [], tokens[1:]]
    pair.close()


def test_unpop(pair: Pair) -> None:
    """What was taken last can be put back, and what was taken before it then; they come again in their order."""
    for text in (b"1", b"22", b"333"):
        submit(pair, [pair.put(bytes([byte])) for byte in text], [])
    first, second, third = pair.queue.pop_many(3)
    with pytest.raises(ValueError, match="taken last"):
        pair.queue.unpop(second)
    pair.queue.unpop(third)
    pair.queue.unpop(second)
    assert [request.read() for request in pair.queue.pop_many(3)] == [b"22", b"333"]
    assert first.read() == b"1"
    assert pair.stats.found_by_poll == 3


def test_a_request_is_not_put_back_when_the_one_taken_after_it_is_answered(pair: Pair) -> None:
    """It is the newest in flight; but the ring would go back to the other's place, and that would be served twice."""
    for text in (b"1", b"2"):
        submit(pair, [pair.put(text)], [])
    first, second = pair.queue.pop_many(2)
    second.complete()
    with pytest.raises(ValueError, match="taken last"):
        pair.queue.unpop(first)
    assert pair.queue.pop() is None
    first.complete()


def test_a_request_of_an_earlier_ring_is_not_put_back_into_the_next(pair: Pair) -> None:
    submit(pair, [pair.put(b"1")], [])
    late = pair.queue.pop()
    assert late is not None
    pair.start(pair.queue.stop())
    with pytest.raises(ValueError, match="taken last"):
        pair.queue.unpop(late)
    late.complete()


# -- notifications


@pytest.mark.parametrize("packed", [False, True])
def test_completions_are_published_in_batches(packed: bool) -> None:
    """A turn ends in one publication and one interrupt, however many requests it completed."""
    pair = make_pair(packed=packed, event_idx=False)
    for i in range(5):
        submit(pair, [pair.put(bytes([i]))], [])
    pair.queue.begin_turn(1, False)
    for request in pair.queue:
        request.complete()
    assert pair.ring.used() == []
    pair.queue.end_turn()
    assert len(pair.ring.used()) == 5
    assert pair.calls() == 1
    pair.close()


def test_with_event_idx_the_driver_sees_the_first_half_early(pair: Pair) -> None:
    """It is interrupted once and can go on while the rest is served."""
    pair.ring.enable_interrupts()
    for i in range(16):
        submit(pair, [pair.put(bytes([i]))], [])
    pair.queue.begin_turn(1, False)
    for i, request in enumerate(pair.queue):
        request.complete()
        if i == 7:
            assert pair.calls() == 1
    pair.queue.end_turn()
    assert pair.calls() == 0
    assert len(pair.ring.used()) == 16


def test_suppressed_interrupts(pair: Pair) -> None:
    """A driver that wants no interrupt gets none, and one when it asks again."""
    pair.ring.disable_interrupts()
    submit(pair, [pair.put(b"x")], [])
    request = pair.queue.pop()
    assert request is not None
    request.complete()
    pair.queue.flush()
    first = pair.calls()
    pair.ring.used()
    pair.ring.enable_interrupts()
    submit(pair, [pair.put(b"x")], [])
    request = pair.queue.pop()
    assert request is not None
    request.complete()
    pair.queue.flush()
    assert pair.calls() == 1
    # With EVENT_IDX a split ring's driver cannot say "never", so the first decision may interrupt.
    assert first <= 1
    assert pair.stats.interrupts_sent + pair.stats.interrupts_suppressed == 2


def test_kicks_are_asked_for_and_not(pair: Pair) -> None:
    """While hcd looks at the ring the driver need not ring; asked again, it does."""
    assert not pair.queue.enable_kicks()
    pair.ring.add([pair.put(b"x")], [])
    pair.ring.publish()
    assert pair.ring.kick_needed()
    pair.queue.disable_kicks()
    pair.ring.add([pair.put(b"x")], [])
    pair.ring.publish()
    assert not pair.ring.kick_needed()
    assert pair.queue.enable_kicks()  # it came in between: the ring is to be looked at


def test_an_interrupt_waits_for_its_fd(pair: Pair) -> None:
    """CALL may come after the first completion; it is signalled then."""
    pair.queue.set_call(-1)
    submit(pair, [pair.put(b"x")], [])
    request = pair.queue.pop()
    assert request is not None
    request.complete()
    pair.queue.flush()
    assert pair.stats.interrupts_absent == 1
    pair.queue.set_call(pair.call_fd)
    assert pair.calls() == 1


def test_an_interrupt_on_an_fd_that_is_replaced_is_signalled_again(pair: Pair) -> None:
    """QEMU hands over an fd that nobody reads, enables the ring, and only then the one that counts."""
    other = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        for signalled in (1, 0):
            pair.queue.set_call(other)
            if signalled:
                submit(pair, [pair.put(b"x")], [])
                request = pair.queue.pop()
                assert request is not None
                request.complete()
                pair.queue.flush()
            pair.queue.set_call(pair.call_fd)
            assert pair.calls() == signalled
    finally:
        os.close(other)


def test_a_full_call_eventfd_blocks_nobody(pair: Pair) -> None:
    """A front end may leave the eventfd at its limit: an interrupt is pending then already."""
    os.eventfd_write(pair.call_fd, (1 << 64) - 2)
    submit(pair, [pair.put(b"x")], [])
    request = pair.queue.pop()
    assert request is not None
    request.complete()
    pair.queue.flush()
    assert pair.stats.interrupts_pending == 1


def test_a_call_eventfd_that_put_hcd_to_sleep_is_not_touched_again(pair: Pair) -> None:
    """It is full, and the front end made it blocking: once is enough to know. All devices wait meanwhile."""
    os.eventfd_write(pair.call_fd, (1 << 64) - 2)
    os.set_blocking(pair.call_fd, True)
    pair.ring.add([pair.put(b"x")], [])
    submit(pair, [pair.put(b"y")], [])
    requests = pair.queue.pop_many(2)
    for request in requests:
        pair.ring.used()
        pair.ring.enable_interrupts()
        request.complete()
        pair.queue.flush()
    assert pair.queue.broken == "the front end made the call eventfd block"
    assert (pair.stats.interrupts_pending, pair.stats.interrupts_absent) == (1, 1)


def test_a_kick_eventfd_that_the_front_end_emptied_is_read_without_sleeping(pair: Pair) -> None:
    """Although it is blocking: RWF_NOWAIT counts for the call, whatever is done to the file."""
    kick = os.eventfd(0)
    pair.queue.set_kick(kick)
    assert pair.queue.read_kick() == 0
    os.eventfd_write(kick, 3)
    assert pair.queue.read_kick() == 3
    assert not pair.queue.broken
    os.close(kick)


def test_rings_are_counted_by_value(pair: Pair) -> None:
    """The eventfd's value is the number of rings, less the one that QEMU invents."""
    kick = os.eventfd(1, os.EFD_NONBLOCK)
    pair.queue.set_kick(kick, True)
    assert pair.queue.read_kick() == 0
    os.eventfd_write(kick, 5)
    assert pair.queue.read_kick() == 5
    assert (pair.doorbell.rings, pair.doorbell.wakeups) == (5, 1)
    os.close(kick)


# -- set-up


@pytest.mark.parametrize("size", [0, 3, 2048, 1 << 31])
def test_ring_sizes_that_are_refused(size: int) -> None:
    """A split ring has a power of two of entries, up to the device's limit."""
    with SharedMemory.of_size(1 << 20) as memory:
        queue = Virtqueue(0, DoorbellStats(), QueueStats(("x",)), 1024)
        queue.set_memory(map_table(memory))
        base = memory.user_addr(memory.regions[0].gpa)
        with pytest.raises(ProtocolError, match=f"ring of {size} entries"):
            queue.start(1 << 32, size, base, base + 4096, base + 8192, 0)


@pytest.mark.parametrize(("desc", "driver", "device"), [(8, 4096, 8192), (0, 4097, 8192), (0, 4096, 8194)])
def test_misaligned_rings_are_refused(desc: int, driver: int, device: int) -> None:
    """Two-byte fields are accessed whole, so they must be aligned."""
    with SharedMemory.of_size(1 << 20) as memory:
        queue = Virtqueue(0, DoorbellStats(), QueueStats(("x",)), 1024)
        queue.set_memory(map_table(memory))
        base = memory.user_addr(memory.regions[0].gpa)
        with pytest.raises(ProtocolError, match="misaligned"):
            queue.start(1 << 32, 16, base + desc, base + driver, base + device, 0)


def test_a_ring_outside_memory_is_refused_and_one_that_loses_it_rests(pair: Pair) -> None:
    """The whole ring must be mapped; when the table changes under it, it pauses and comes back."""
    pair.queue.set_memory(MemoryTable())
    assert not pair.queue.running
    submit(pair, [pair.put(b"x")], [])
    assert pair.queue.pop() is None
    pair.queue.set_memory(pair.table)
    assert pair.queue.running
    assert pair.queue.pop() is not None
    end = pair.memory.user_addr(pair.memory.regions[0].gpa) + pair.memory.regions[0].size
    with pytest.raises(ProtocolError, match="outside the shared memory"):
        pair.queue.start(pair.features, 16, end - 16 * 15, end - 8192, end - 4096, 0)


def test_stop_and_go_on_at_the_base(pair: Pair) -> None:
    """GET_VRING_BASE and SET_VRING_BASE carry a ring over, through more than one wrap."""
    for round_ in range(50):
        for _ in range(1 + round_ % 7):
            submit(pair, [pair.put(b"x"), pair.put(b"y")], [])
            request = pair.queue.pop()
            assert request is not None
            request.complete()
            pair.queue.flush()
        assert len(pair.ring.used()) == 1 + round_ % 7
        pair.start(pair.queue.stop())


@pytest.mark.parametrize("base", [0x80008000, 0x00008000, 0])
def test_bases_of_a_new_packed_ring(base: int) -> None:
    """QEMU sends both wrap counters, DPDK's virtio-user the driver's alone, user-mode Linux none; all mean 1."""
    pair = make_pair(packed=True)
    pair.queue.stop()
    pair.start(base)
    submit(pair, [pair.put(b"x")], [])
    request = pair.queue.pop()
    assert request is not None
    request.complete()
    pair.queue.flush()
    assert len(pair.ring.used()) == 1
    pair.close()


def test_a_packed_ring_stopped_after_its_second_lap_goes_on_there() -> None:
    """Base 0 is a real position too: both wrap counters 0, at the first slot."""
    pair = make_pair(packed=True, size=4)
    for _ in range(4):
        submit(pair, [pair.put(b"x")], [])
        request = pair.queue.pop()
        assert request is not None
        request.complete()
        pair.queue.flush()
        pair.ring.used()
    assert pair.queue.stop() == 0
    pair.start(0)
    submit(pair, [pair.put(b"y")], [])
    request = pair.queue.pop()
    assert request is not None
    assert request.read() == b"y"
    request.complete()
    pair.queue.flush()
    assert len(pair.ring.used()) == 1
    pair.close()


def test_a_packed_ring_whose_first_slot_lies_inside_a_chain_goes_on_at_base_0() -> None:
    """Such a slot looks like one of a new ring: made available in a lap that has gone by, and never marked used."""
    pair = make_pair(packed=True, size=4)

    def serve(descriptors: int) -> None:
        submit(pair, [pair.put(b"x") for _ in range(descriptors)], [])
        request = pair.queue.pop()
        assert request is not None
        assert request.read() == b"x" * descriptors
        request.complete()
        pair.queue.flush()
        assert len(pair.ring.used()) == 1

    for descriptors in (4, 3, 2, 3):  # the third goes on from the last slot to the first
        serve(descriptors)
    assert pair.queue.stop() == 0
    pair.start(0)
    assert pair.queue.pop() is None
    serve(3)
    pair.close()


def test_late_completion_after_stop_is_forgotten(pair: Pair) -> None:
    """A request that outlives its ring changes nothing in the ring that follows."""
    submit(pair, [pair.put(b"x")], [pair.room(1)])
    late = pair.queue.pop()
    assert late is not None
    base = pair.queue.stop()
    pair.start(base)
    late.complete(1)
    pair.queue.flush()
    assert pair.ring.used() == []
    assert pair.queue.inflight == 0


def test_legacy_big_endian_ring() -> None:
    """SET_VRING_ENDIAN big: ring fields and header fields are in the guest's order."""
    with SharedMemory.of_size(1 << 20) as memory:
        ring = SplitRing(memory, 16, event_idx=True, big_endian=True)
        queue = Virtqueue(0, DoorbellStats(), QueueStats(("x",)), 1024)
        queue.set_memory(map_table(memory))
        user = memory.user_addr
        queue.start(1 << 29, 16, user(ring.desc), user(ring.driver), user(ring.device), 0, big_endian=True)
        queue.set_enabled(True)
        source, target = memory.alloc(8), memory.alloc(8)
        memory.write(source, struct.pack(">Q", 77))
        for _ in range(20):
            ring.add([(source, 8)], [(target, 8)])
            assert not queue.enable_kicks()
            ring.publish()
            assert ring.kick_needed()
            request = queue.pop()
            assert request is not None
            assert request.u64(0) == 77
            request.complete(8)
            queue.flush()
            assert [u.written for u in ring.used()] == [8]
        queue.stop()


# -- drivers that break the rules

GPA = 0x10000


def split_case(pair: Pair, *descriptors: tuple[int, int, int, int], head: int = 0, idx: int = 1) -> None:
    ring = pair.ring
    assert isinstance(ring, SplitRing)
    for i, descriptor in enumerate(descriptors):
        ring.write_descriptor(i, *descriptor)
    ring.write_avail(0, head)
    ring.avail_idx = idx


def table_of(pair: Pair, *entries: tuple[int, int, int, int]) -> int:
    gpa = pair.memory.alloc(16 * len(entries))
    pair.memory.write(gpa, b"".join(struct.pack("<QIHH", *entry) for entry in entries))
    return gpa


def expect_broken(pair: Pair, text: str) -> None:
    """The ring breaks with ``text``, says so once, takes nothing more, and works when it is set up again."""
    assert pair.queue.pop() is None
    assert text in pair.queue.broken
    assert [type(error) for error in pair.errors] == [GuestError]
    assert os.eventfd_read(pair.err_fd) == 1
    assert not pair.queue.running
    assert pair.queue.pop() is None
    assert pair.stats.guest_errors == 1
    assert pair.queue.inflight == 0


SPLIT_SINS: dict[str, tuple[str, Any]] = {
    "head out of range": ("outside a ring of 16", lambda p, g: split_case(p, (g, 4, 0, 0), head=16)),
    "next out of range": ("next descriptor 16", lambda p, g: split_case(p, (g, 4, NEXT, 16))),
    "loop of one": ("longer than the ring", lambda p, g: split_case(p, (g, 4, NEXT, 0))),
    "loop of two": ("longer than the ring", lambda p, g: split_case(p, (g, 4, NEXT, 1), (g, 4, NEXT, 0))),
    "zero length": ("zero length", lambda p, g: split_case(p, (g, 0, 0, 0))),
    "four gigabytes": ("outside the guest memory", lambda p, g: split_case(p, (g, 0xFFFFFFFF, 0, 0))),
    "address outside": ("outside the guest memory", lambda p, g: split_case(p, (1 << 40, 4, 0, 0))),
    "address wraps": ("outside the guest memory", lambda p, g: split_case(p, ((1 << 64) - 2, 4, 0, 0))),
    "writable before readable": (
        "comes after a device-writable", lambda p, g: split_case(p, (g, 4, NEXT | WRITE, 1), (g, 4, 0, 0))),
    "avail index jumps": ("moved by 17", lambda p, g: split_case(p, (g, 4, 0, 0), idx=17)),
    "avail index goes back": ("moved by 65535", lambda p, g: split_case(p, (g, 4, 0, 0), idx=0xFFFF)),
    "indirect with next": ("NEXT flag", lambda p, g: split_case(p, (g, 16, INDIRECT | NEXT, 1))),
    "indirect of odd size": ("table of 17 bytes", lambda p, g: split_case(p, (g, 17, INDIRECT, 0))),
    "indirect of size zero": ("table of 0 bytes", lambda p, g: split_case(p, (g, 0, INDIRECT, 0))),
    "indirect longer than the ring": ("table of 272", lambda p, g: split_case(p, (g, 16 * 17, INDIRECT, 0))),
    "indirect outside": ("indirect table at", lambda p, g: split_case(p, (1 << 40, 16, INDIRECT, 0))),
    "indirect nested": (
        "holds an indirect", lambda p, g: split_case(p, (table_of(p, (g, 16, INDIRECT, 0)), 16, INDIRECT, 0))),
    "indirect loop": (
        "longer than", lambda p, g: split_case(p, (table_of(p, (g, 4, NEXT, 0)), 16, INDIRECT, 0))),
    "indirect next out of range": (
        "next descriptor 9", lambda p, g: split_case(p, (table_of(p, (g, 4, NEXT, 9)), 16, INDIRECT, 0))),
}


@pytest.mark.parametrize("sin", SPLIT_SINS)
def test_split_sins(sin: str) -> None:
    """Each breaks its ring with an error that says what was wrong."""
    text, commit = SPLIT_SINS[sin]
    pair = make_pair()
    commit(pair, pair.put(b"data")[0])
    expect_broken(pair, text)
    pair.close()


def packed_case(pair: Pair, *descriptors: tuple[int, int, int, int]) -> None:
    """(addr, length, id, flags without AVAIL and USED)."""
    ring = pair.ring
    assert isinstance(ring, PackedRing)
    for i in reversed(range(len(descriptors))):
        addr, length, buffer_id, flags = descriptors[i]
        ring.write_descriptor(i, addr, length, buffer_id, flags | 0x80)


PACKED_SINS: dict[str, tuple[str, Any]] = {
    "id out of range": ("buffer id 16", lambda p, g: packed_case(p, (g, 4, 16, 0))),
    "chain without end": ("longer than the ring", lambda p, g: packed_case(p, *[(g, 4, 0, NEXT)] * 16)),
    "zero length": ("zero length", lambda p, g: packed_case(p, (g, 0, 0, 0))),
    "address outside": ("outside the guest memory", lambda p, g: packed_case(p, (1 << 40, 4, 0, 0))),
    "writable before readable": (
        "comes after a device-writable", lambda p, g: packed_case(p, (g, 4, 0, NEXT | WRITE), (g, 4, 0, 0))),
    "indirect with next": ("NEXT flag", lambda p, g: packed_case(p, (g, 16, 0, INDIRECT | NEXT))),
    "indirect of odd size": ("table of 15 bytes", lambda p, g: packed_case(p, (g, 15, 0, INDIRECT))),
    "indirect nested": (
        "holds an indirect", lambda p, g: packed_case(p, (table_of(p, (g, 4, 0, INDIRECT)), 16, 0, INDIRECT))),
}


@pytest.mark.parametrize("sin", PACKED_SINS)
def test_packed_sins(sin: str) -> None:
    """Each breaks its ring with an error that says what was wrong."""
    text, commit = PACKED_SINS[sin]
    pair = make_pair(packed=True)
    commit(pair, pair.put(b"data")[0])
    expect_broken(pair, text)
    pair.close()


@pytest.mark.parametrize("packed", [False, True])
def test_a_chain_has_so_many_pieces_at_most(packed: bool) -> None:
    """A driver cannot make a short ring into a long scatter list by crossing region borders over and over."""
    regions = [MemorySlot(0x100000, 0x10000)] + [MemorySlot(0x200000 + 64 * n, 64, mmap_offset=0) for n in range(30)]
    with SharedMemory(regions) as memory:
        pair = make_pair(packed=packed, memory=memory, size=16)
        across = [(0x200000, 64 * 30)]
        pair.ring.add(across + [(0x200000 + 64 * n + 32, 64) for n in range(15)], [])
        pair.ring.publish()
        request = pair.queue.pop()
        assert request is not None
        assert len(request.readable_views()) == 30 + 2 * 15
        request.complete()
        pair.queue.flush()
        pair.ring.used()
        pair.ring.add(across * 3, [])
        pair.ring.publish()
        expect_broken(pair, "more than 63 pieces")
        pair.queue.stop()


def test_a_request_that_names_the_same_memory_over_and_over_is_not_copied_whole() -> None:
    """A guest of little memory does not make the daemon allocate much, unless a device asks for it."""
    with SharedMemory([MemorySlot(0x100000, 4 << 20)]) as memory:
        pair = make_pair(memory=memory, size=64)
        piece = pair.room(1 << 20)
        submit(pair, [piece] * 17, [])
        request = pair.queue.pop()
        assert request is not None
        with pytest.raises(GuestError, match="17825792 readable bytes left, more than 16777216"):
            request.read()
        assert len(request.read(1 << 20)) == 1 << 20
        assert len(request.read()) == 16 << 20
        request.complete()
        pair.queue.stop()


def test_a_ring_that_breaks_leaves_the_handler_what_it_has(pair: Pair) -> None:
    """Whoever hears of it must not fail the request that the handler still holds: it looked for one more."""
    seen: list[Any] = []
    pair.queue.on_error = lambda queue, error: seen.append(queue.unfinished())
    submit(pair, [pair.put(b"sound")], [])
    first = pair.queue.pop()
    assert first is not None
    assert pair.queue.unfinished() is first
    submit(pair, [(1 << 40, 4)], [])
    assert pair.queue.pop() is None
    assert pair.queue.broken
    assert seen == [None]
    assert pair.queue.unfinished() is first
    pair.queue.unpop(first)


def test_indirect_without_negotiation() -> None:
    """INDIRECT is refused where it was not agreed on."""
    pair = make_pair()
    pair.queue.stop()
    pair.features &= ~(1 << 28)
    pair.start(0)
    gpa, _ = pair.put(b"data")
    split_case(pair, (table_of(pair, (gpa, 4, 0, 0)), 16, INDIRECT, 0))
    expect_broken(pair, "not negotiated")
    pair.close()


def test_a_broken_ring_works_when_set_up_again() -> None:
    """The driver resets the device and starts over."""
    pair = make_pair()
    split_case(pair, (pair.put(b"data")[0], 0, 0, 0))
    expect_broken(pair, "zero length")
    pair.queue.stop()
    pair.ring = SplitRing(pair.memory, 16, event_idx=True)
    pair.start()
    submit(pair, [pair.put(b"good")], [])
    request = pair.queue.pop()
    assert request is not None
    assert request.read() == b"good"
    pair.close()


@pytest.mark.parametrize("packed", [False, True])
def test_buffers_may_span_regions(packed: bool) -> None:
    """A descriptor, and an indirect table, that lie across two adjacent regions are legal."""
    memory = SharedMemory([MemorySlot(0x100000, 0x10000), MemorySlot(0x110000, 0x10000, 0x7000000)])
    pair = make_pair(packed=packed, memory=memory)
    memory.write(0x10FFF8, b"12345678abcdefgh")
    pair.ring.add([(0x10FFF8, 16)], [])
    pair.ring.publish()
    request = pair.queue.pop()
    assert request is not None
    assert request.read() == b"12345678abcdefgh"
    pair.close()


# -- any order of everything


class RingMachine(RuleBasedStateMachine):
    """Driver and device do whatever they may; no buffer is lost, doubled, or answered wrongly, and no side sleeps
    while the other has something for it."""

    packed = False

    def __init__(self) -> None:
        super().__init__()
        self.pair = make_pair(packed=self.packed, size=8)
        self.sent: dict[int, bytes] = {}
        self.rooms: dict[int, tuple[int, int]] = {}
        self.slots: dict[int, int] = {}
        self.held: list[Any] = []
        self.next = self.completed = 0

    def teardown(self) -> None:
        self.pair.close()

    @rule(pieces=st.integers(1, 3), answers=st.integers(0, 2), indirect=st.booleans())
    def add(self, pieces: int, answers: int, indirect: bool) -> None:
        need = 1 if indirect else pieces + bool(answers)
        if self.used_slots + need > 8:
            return
        data = struct.pack("<I", self.next) * pieces
        self.next += 1
        source, _ = self.pair.put(data)
        room = self.pair.room(64)
        readable = [(source + 4 * i, 4) for i in range(pieces)]
        token = self.pair.ring.add(readable, [room] if answers else [], indirect)
        self.sent[token] = data
        self.rooms[token] = (room[0], 64 if answers else 0)
        self.slots[token] = need

    @rule()
    def publish(self) -> None:
        self.pair.ring.publish()
        self.pair.ring.kick_needed()

    @rule(n=st.integers(1, 8))
    def pop(self, n: int) -> None:
        self.held += self.pair.queue.pop_many(n)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 7))
    def complete(self, which: int) -> None:
        self.completed += 1
        request = self.held.pop(which % len(self.held))
        data = request.read()
        written = request.write(data)
        request.complete(written)

    @rule()
    def flush(self) -> None:
        self.pair.queue.flush()

    @precondition(lambda self: not self.held)
    @rule()
    def restart(self) -> None:
        self.pair.start(self.pair.queue.stop())

    @rule()
    def collect(self) -> None:
        for used in self.pair.ring.used():
            data = self.sent.pop(used.token)
            gpa, size = self.rooms.pop(used.token)
            self.slots.pop(used.token)
            expected = data[:size]
            assert used.written == len(expected)
            assert self.pair.memory.read(gpa, used.written) == expected

    @rule()
    def sleep_of_the_device(self) -> None:
        """When the device is told that it may sleep, the ring is empty, or a kick is on its way."""
        if not self.pair.queue.enable_kicks():
            assert self.pair.queue.pop() is None
        else:
            self.pair.queue.disable_kicks()

    @property
    def used_slots(self) -> int:
        return sum(self.slots.values())

    @invariant()
    def sound(self) -> None:
        assert self.pair.queue.broken == ""
        assert self.pair.queue.inflight == len(self.held)
        assert self.pair.stats.requests(0, 0) == self.completed


class PackedMachine(RingMachine):
    packed = True


MACHINE_SETTINGS = settings(max_examples=60, stateful_step_count=40)
TestSplitMachine = RingMachine.TestCase
TestSplitMachine.settings = MACHINE_SETTINGS
TestPackedMachine = PackedMachine.TestCase
TestPackedMachine.settings = MACHINE_SETTINGS
