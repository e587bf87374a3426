"""Early interrupts that are dear are put off while there is enough to do: hcd/dataplane/_pace.pxi."""

from __future__ import annotations

import time

import pytest

from hcd.dataplane.memory import MemoryTable
from hcd.dataplane.virtqueue import Pace
from hcd.frontend.ring_split import SplitRing
from tests.rings import Pair, make_pair

NEVER_DRY = 10**9


def paced(*costs: int, now: int = 0) -> Pace:
    """One that was told of interrupts that took so long (ns), the last of which ended at ``now``."""
    pace = Pace()
    for cost in costs:
        pace.made(now - cost, now)
    return pace


def test_a_cheap_interrupt_is_followed_by_the_next_soon() -> None:
    """Eight times what one takes, at the least."""
    pace = paced(500, 500, 500, 500, now=9000)
    assert pace.holds(9000 + 8 * 500 - 1, NEVER_DRY)
    assert not pace.holds(9000 + 8 * 500, NEVER_DRY)


def test_none_is_put_off_when_the_device_is_about_to_run_dry() -> None:
    pace = paced(5000, 5000, 5000, 5000, now=9000)
    assert not pace.holds(9001, 3 * 5000)
    assert pace.holds(9001, 3 * 5000 + 1)


def test_the_first_four_are_made_early_and_the_cheapest_counts() -> None:
    """The first of them found a driver that had slept for long."""
    pace = paced(now=9000)
    for cost in (5000, 700, 900, 800):
        assert not pace.holds(9000, NEVER_DRY)
        pace.made(9000 - cost, 9000)
    assert pace.holds(9000 + 8 * 700 - 1, NEVER_DRY)
    assert not pace.holds(9000 + 8 * 700, NEVER_DRY)


def test_what_a_late_interrupt_costs_says_nothing_about_an_early_one() -> None:
    pace = paced(1000, 1000, 1000, 1000, 7000, 500, now=9000)
    assert pace.holds(9000 + 8 * 1000 - 1, NEVER_DRY)
    assert not pace.holds(9000 + 8 * 1000, NEVER_DRY)


def test_early_ones_are_tried_again_now_and_then() -> None:
    """Else one that was dear once would never be cheap again."""
    pace = paced(*[5000] * 4, now=9000)
    put_off = 0
    while pace.holds(9001, NEVER_DRY):
        put_off += 1
        pace.made(4000, 9000)
    assert put_off == 60
    for _ in range(4):
        assert not pace.holds(9001, NEVER_DRY)
        pace.made(8500, 9000)
    assert pace.holds(9000 + 8 * 500 - 1, NEVER_DRY)
    assert not pace.holds(9000 + 8 * 500, NEVER_DRY)


def test_a_thread_that_lost_its_processor_does_not_put_off_for_long() -> None:
    pace = paced(*[10**9] * 4, now=10**10)
    assert pace.holds(10**10 + 63_999, NEVER_DRY)
    assert not pace.holds(10**10 + 64_000, NEVER_DRY)


def dear(pair: Pair) -> None:
    """The driver of ``pair`` was interrupted last in ten seconds' time, and each time that took long."""
    later = time.monotonic_ns() + 10**10
    for _ in range(4):
        pair.queue.pace.made(later, later + 10**6)


def bring(pair: Pair, count: int) -> None:
    for i in range(count):
        pair.ring.add([pair.put(bytes([i]))], [])
    pair.ring.publish()


def batch(pair: Pair, count: int = 32) -> None:
    bring(pair, count)
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


def test_what_the_driver_brought_meanwhile_is_left_to_do_as_well() -> None:
    pair = make_pair(size=64)
    pair.ring.enable_interrupts()
    dear(pair)
    batch(pair, 8)
    slowly_complete(pair, 1)
    bring(pair, 8)
    slowly_complete(pair, 7)
    assert pair.calls() == 0
    slowly_complete(pair, 8)
    assert pair.calls() == 1
    assert len(pair.ring.used()) == 16
    pair.close()


@pytest.mark.parametrize("moved", [65, 0x10000 - 9])
def test_an_avail_index_that_jumps_while_completions_are_put_off_breaks_the_ring(moved: int) -> None:
    """Whoever asks how much waits does not take it for true, and leaves it to be found where it is looked for."""
    pair = make_pair(size=64)
    assert isinstance(pair.ring, SplitRing)
    pair.ring.enable_interrupts()
    dear(pair)
    batch(pair, 8)
    slowly_complete(pair, 1)
    pair.ring.avail_idx = 8 + moved
    slowly_complete(pair, 7)
    assert pair.calls() == 1
    assert pair.queue.pop() is None
    assert f"moved by {moved}" in pair.queue.broken
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
