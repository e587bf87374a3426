"""Requests in flight survive the death of the device's process: the record of vhost-user, split and packed."""

from __future__ import annotations

import os
import random
import re
import struct
from collections.abc import Iterator

import pytest
from crash import Rig, abandon, answer, expect_all_served, number
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from hcd.dataplane.virtqueue import Request, Virtqueue
from hcd.errors import GuestError, ProtocolError
from hcd.frontend.errors import RingFull


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(packed=request.param, size=8)
    yield made
    made.close()


def test_what_was_taken_is_taken_again_in_order(rig: Rig) -> None:
    """Out of six, two were completed and published, one completed only; four come again, then a new one."""
    queue = rig.open(resume=False)
    for _ in range(6):
        rig.add()
    requests = queue.pop_many(6)
    requests[3].complete()
    requests[0].complete()
    queue.flush()
    requests[2].complete()
    rig.add()
    abandon(queue, requests)
    second = rig.open()
    assert second.recovered == second.waiting == 4
    again = second.pop_many(9)
    assert second.waiting == 0
    assert [number(request) for request in again] == [2, 3, 5, 6, 7]
    for request in again:
        request.complete()
    second.flush()
    assert [n for n, _ in rig.used()] == [4, 1, 2, 3, 5, 6, 7]


def test_a_recovered_request_can_be_put_back(rig: Rig) -> None:
    """As a receive queue does that finds no frame for its buffers; a second death finds them again."""
    queue = rig.open(resume=False)
    for pieces in (2, 1, 1):
        rig.add(pieces)
    abandon(queue, queue.pop_many(2))
    second = rig.open()
    first, middle, last = second.pop_many(3)
    for request in (last, middle, first):
        second.unpop(request)
    assert second.waiting == 2
    assert second.available()
    third_copy = rig.copy()
    assert [number(r) for r in second.pop_many(9)] == [1, 2, 3]
    expect_all_served(third_copy, [1, 2])
    third_copy.close()


def test_a_queue_that_is_resumed_interrupts(rig: Rig) -> None:
    """The last process may have died between publishing a completion and interrupting the driver for it."""
    queue = rig.open(resume=False)
    rig.add()
    queue.pop_many(1)[0].complete()
    queue.flush()
    abandon(queue, [])
    second = rig.open()
    call = os.eventfd(0, os.EFD_NONBLOCK)
    second.set_call(call)
    assert os.eventfd_read(call) == 1
    os.close(call)


def test_without_resume_the_base_counts_and_the_record_begins_anew(rig: Rig) -> None:
    """A ring that the driver set up again has nothing of its past."""
    queue = rig.open(resume=False)
    for _ in range(3):
        rig.add()
    abandon(queue, queue.pop_many(2))
    second = rig.open(resume=False)
    assert second.recovered == 0
    assert [number(r) for r in second.pop_many(9)] == [1, 2, 3]


def test_chains_that_were_lost_before_the_record_began_stay_lost(rig: Rig) -> None:
    """The base may be ahead of the used position: an earlier drain gave requests up. A resumed ring knows that."""
    queue = rig.open(resume=False)
    for _ in range(3):
        rig.add()
    lost = queue.pop_many(2)
    base = queue.base
    abandon(queue, lost)
    second = rig.open(resume=False, base=base)
    third = second.pop_many(9)
    assert [number(r) for r in third] == [3]
    abandon(second, third)
    assert [number(r) for r in rig.open().pop_many(9)] == [3]


def test_a_ring_smaller_than_the_record(rig: Rig) -> None:
    """The front end asks for the largest ring; the driver may choose a smaller one."""
    small = Rig(packed=rig.packed, size=4, record_size=16)
    queue = small.open(resume=False)
    taken = []
    for lap in range(7):
        small.add(1 + lap % 2)
        requests = queue.pop_many(9)
        if lap % 2:
            requests[0].complete(answer(requests[0]))
            queue.flush()
            small.used()
        else:
            held = requests
            taken = [number(requests[0])]
        if lap % 2:
            for request in held:
                request.complete(answer(request))
            queue.flush()
            small.used()
            taken = []
    abandon(queue, requests)
    expect_all_served(small, taken)
    small.close()


# -- records that somebody else wrote

SPLIT_FIELDS = {"version": 8, "desc_num": 10, "last_batch_head": 12, "used_idx": 14}
PACKED_FIELDS = {"version": 8, "desc_num": 10, "free_head": 12, "old_free_head": 14, "used_idx": 16, "old_used_idx": 18}


def with_four_in_flight(packed: bool) -> Rig:
    rig = Rig(packed=packed, size=8)
    queue = rig.open(resume=False)
    for pieces in (1, 2, 1, 2, 1):
        rig.add(pieces)
    requests = queue.pop_many(5)
    requests[1].complete()
    queue.flush()
    abandon(queue, requests)
    return rig


@pytest.mark.parametrize(
    ("packed", "field", "value", "why"),
    [
        (False, "version", 2, "has version 2"),
        (False, "desc_num", 16, "is for 16 entries"),
        (False, "used_idx", 0x8000, "ends at used index 32768, the ring of 8 at 1"),
        (True, "version", 0xFFFF, "has version 65535"),
        (True, "desc_num", 0, "is for 0 entries"),
        (True, "used_idx", 8, "slot 8"),
        (True, "old_used_idx", 0xFFFF, "65535 of a ring of 8"),
        (True, "old_used_idx", 7, "moves from slot 7 to 2"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(packed: bool, field: str, value: int, why: str) -> None:
    """It is the front end's fault, and the message says what is wrong."""
    rig = with_four_in_flight(packed)
    offset = (PACKED_FIELDS if packed else SPLIT_FIELDS)[field]
    os.pwrite(rig.area.fd, struct.pack("<H", value), offset)
    with pytest.raises(ProtocolError, match=re.escape(why)):
        rig.open()
    rig.close()


def test_a_batch_that_names_a_descriptor_outside_is_refused() -> None:
    """The list of completions is followed only as far as it is sound."""
    rig = with_four_in_flight(packed=False)
    os.pwrite(rig.area.fd, struct.pack("<HH", 0xFFFF, 0), 12)
    with pytest.raises(ProtocolError, match="names descriptor 65535 as completed"):
        rig.open()
    rig.close()


@pytest.mark.parametrize(
    ("at", "value", "why"),
    [
        (4, 0xFFFF, "a chain that ends at entry"),
        (6, 0, "a chain of 0 descriptors"),
        (6, 9, "a chain of 9 descriptors"),
        (6, 8, "has a chain through entry"),
    ],
)
def test_a_chain_that_is_none_is_refused(at: int, value: int, why: str) -> None:
    """``last`` and ``num`` of the first entry in flight."""
    rig = with_four_in_flight(packed=True)
    os.pwrite(rig.area.fd, struct.pack("<H", value), 32 + at)
    with pytest.raises(ProtocolError, match=why):
        rig.open()
    rig.close()


def test_a_free_list_that_loops_is_refused() -> None:
    rig = with_four_in_flight(packed=True)
    free = struct.unpack("<H", os.pread(rig.area.fd, 2, 12))[0]
    os.pwrite(rig.area.fd, struct.pack("<H", free), 32 + 32 * free + 2)
    with pytest.raises(ProtocolError, match="free list that loops"):
        rig.open()
    rig.close()


@settings(max_examples=300)
@given(
    packed=st.booleans(),
    scribbles=st.lists(st.tuples(st.integers(0, 320), st.sampled_from([0, 1, 2, 7, 8, 0x80, 0xFF])), max_size=12),
    noise=st.binary(max_size=24),
    at=st.integers(0, 300),
)
def test_any_record_is_refused_or_harmless(
    packed: bool, scribbles: list[tuple[int, int]], noise: bytes, at: int
) -> None:
    """Whatever stands there: an error that says whose fault it is, or requests that end. Nothing outside is touched."""
    rig = with_four_in_flight(packed)
    for offset, value in scribbles:
        os.pwrite(rig.area.fd, bytes([value]), min(offset, rig.area.size - 1))
    os.pwrite(rig.area.fd, noise[: rig.area.size - at], at)
    try:
        queue = rig.open()
    except ProtocolError:
        rig.close()
        return
    try:
        for _ in range(3):
            requests = queue.pop_many(3 * rig.size)
            assert len(requests) <= rig.size
            for request in reversed(requests):
                request.complete(0)
            queue.flush()
    except GuestError:
        assert queue.broken
    queue.stop()
    rig.close()


# -- the state of the driver and of the device in any order, and a crash between any two calls


class Lives(RuleBasedStateMachine):
    """One driver, one device after the other."""

    packed = False

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(packed=self.packed, size=8)
        self.queue: Virtqueue = self.rig.open(resume=False)
        self.taken: list[Request] = []
        self.order: list[int] = []  # numbers as they were taken, completed ones too

    def teardown(self) -> None:
        rig = self.rig.copy()
        expect_all_served(rig, self.order, shuffle=random.Random(1).shuffle)
        rig.close()
        abandon(self.queue, self.taken)
        self.rig.close()

    @rule(pieces=st.integers(1, 3), count=st.integers(1, 4))
    def add(self, pieces: int, count: int) -> None:
        for _ in range(count):
            try:
                self.rig.add(pieces)
            except RingFull:
                return

    @rule(most=st.integers(1, 6))
    def take(self, most: int) -> None:
        requests = self.queue.pop_many(most)
        self.taken += requests
        self.order += [number(request) for request in requests]

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        for request in data.draw(st.lists(st.sampled_from(self.taken), unique=True, min_size=1)):
            self.taken.remove(request)
            request.complete(answer(request))

    @precondition(lambda self: self.taken and self.order[-1] == number(self.taken[-1]))
    @rule()
    def put_back(self) -> None:
        """The one that was taken last."""
        self.order.pop()
        self.queue.unpop(self.taken.pop())

    @rule()
    def flush(self) -> None:
        self.queue.flush()

    @rule()
    def look(self) -> None:
        self.rig.used()

    @rule()
    def die(self) -> None:
        """What is completed and not published comes again; so the new queue may hold more than was taken."""
        expected = [number(request) for request in self.taken]
        abandon(self.queue, self.taken)
        self.queue = self.rig.open()
        self.taken = self.queue.pop_many(self.queue.waiting)
        self.order = again = [number(request) for request in self.taken]
        assert [n for n in again if n in expected] == expected
        assert len(set(again)) == len(again)


class PackedLives(Lives):
    packed = True


TestSplitLives = Lives.TestCase
TestPackedLives = PackedLives.TestCase
TestSplitLives.settings = TestPackedLives.settings = settings(max_examples=150, stateful_step_count=40)
