"""Early interrupts that are dear are put off while there is enough to do: hcd/dataplane/_pace.pxi."""

from __future__ import annotations

import time

import pytest

from hcd.dataplane.memory import MemoryTable
from hcd.dataplane.virtqueue import Pace
from tests.rings import Pair, make_pair

NEVER_DRY = 10**9


def test_a_cheap_interrupt_is_followed_by_the_next_soon() -> None:
    """Six times what the last one took, at the least."""
    pace = Pace()
    assert not pace.holds(1000, NEVER_DRY)
    pace.made(1000, 1500)
    assert pace.holds(1500 + 6 * 500 - 1, NEVER_DRY)
    assert not pace.holds(1500 + 6 * 500, NEVER_DRY)


def test_none_is_put_off_when_the_device_is_about_to_run_dry() -> None:
    pace = Pace()
    pace.made(0, 5000)
    assert not pace.holds(5001, 3 * 5000)
    assert pace.holds(5001, 3 * 5000 + 1)


def test_what_a_late_interrupt_costs_says_nothing_about_an_early_one() -> None:
    pace = Pace()
    pace.made(0, 1000)
    assert pace.holds(1001, NEVER_DRY)
    pace.made(2000, 7000)
    assert not pace.holds(7000 + 6 * 1000, NEVER_DRY)


def test_an_early_one_is_tried_again_now_and_then() -> None:
    """Else one that was dear once would never be cheap again."""
    pace = Pace()
    pace.made(0, 5000)
    put_off, now = 0, 5000
    while pace.holds(now + 1, NEVER_DRY):
        put_off += 1
        now += 100_000
        pace.made(now, now + 5000)
        now += 5000
    assert put_off == 15
    pace.made(now + 1, now + 501)
    assert not pace.holds(now + 501 + 6 * 500, NEVER_DRY)


def test_a_thread_that_lost_its_processor_does_not_put_off_for_long() -> None:
    pace = Pace()
    pace.made(0, 10**9)
    assert pace.holds(10**9 + 47_999, NEVER_DRY)
    assert not pace.holds(10**9 + 48_000, NEVER_DRY)


def dear(pair: Pair) -> None:
    """The driver of ``pair`` was interrupted last in ten seconds' time, which took long."""
    later = time.monotonic_ns() + 10**10
    pair.queue.pace.made(later, later + 10**6)


def batch(pair: Pair, count: int = 32) -> None:
    for i in range(count):
        pair.ring.add([pair.put(bytes([i]))], [])
    pair.ring.publish()
    pair.queue.begin_turn(1, False)


def interrupt(pair: Pair) -> None:
    """Once: the first interrupt of a ring is made without asking whether it is wanted."""
    batch(pair, 1)
    slowly_complete(pair, 1)
    pair.queue.end_turn()
    assert pair.calls() == 1
    pair.ring.used()
    pair.ring.enable_interrupts()


def slowly_complete(pair: Pair, count: int) -> None:
    """So that what is left takes longer than any interrupt."""
    time.sleep(0.001)
    for _ in range(count):
        request = pair.queue.pop()
        assert request is not None
        request.complete()


def test_a_driver_that_sleeps_is_interrupted_once_at_the_end_of_the_batch() -> None:
    pair = make_pair(size=64)
    pair.ring.enable_interrupts()
    dear(pair)
    batch(pair)
    slowly_complete(pair, 24)
    assert pair.calls() == 0
    slowly_complete(pair, 8)
    pair.queue.end_turn()
    assert pair.calls() == 1
    assert len(pair.ring.used()) == 32
    pair.close()


def test_a_driver_that_looks_by_itself_sees_completions_at_once() -> None:
    pair = make_pair(size=64)
    pair.ring.enable_interrupts()
    interrupt(pair)
    dear(pair)
    pair.ring.disable_interrupts()
    batch(pair)
    slowly_complete(pair, 6)
    assert len(pair.ring.used()) == 6
    pair.queue.end_turn()
    assert pair.calls() == 0
    pair.close()


@pytest.mark.parametrize("packed", [False, True])
def test_a_driver_whose_interrupts_are_cheap_is_interrupted_early(packed: bool) -> None:
    pair = make_pair(size=64, packed=packed)
    pair.ring.enable_interrupts()
    batch(pair)
    slowly_complete(pair, 6)
    assert pair.calls() == 1
    pair.queue.end_turn()
    pair.close()


def test_memory_that_goes_away_while_completions_are_put_off_is_not_read() -> None:
    """They are published when it is back."""
    pair = make_pair(size=64)
    pair.ring.enable_interrupts()
    interrupt(pair)
    dear(pair)
    batch(pair)
    taken = pair.queue.pop_many(16)
    time.sleep(0.001)
    for request in taken[:8]:
        request.complete()
    assert pair.calls() == 0
    pair.queue.set_memory(MemoryTable())
    for request in taken[8:]:
        request.complete()
    pair.queue.set_memory(pair.table)
    pair.queue.end_turn()
    assert pair.calls() == 1
    assert len(pair.ring.used()) == 8, "what was completed without memory has no ring to go to"
    pair.close()
