"""A scrape looks at series again only where a version moved, so whatever counts has to raise it: each step is told."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread

import pytest
from rings import Pair, make_pair

from hcd.dataplane.bell import Bell, Interrupt
from hcd.dataplane.stats import DoorbellStats, HotText, InterruptStats
from hcd.dataplane.virtqueue import Limit, Request

CLOCK = b"hcd_oldest_request_seconds{"


@dataclass
class Followed:
    """A text that is kept, and what adds the same series to a new one."""

    add: Callable[[HotText], None]
    kept: HotText = field(default_factory=HotText)

    def __post_init__(self) -> None:
        self.add(self.kept)
        self.last = self.text(self.kept)

    @contextmanager
    def step(self) -> Iterator[None]:
        """What happens inside counts something, and the kept text says the same as a new one afterwards."""
        yield
        fresh = HotText()
        self.add(fresh)
        wanted = self.text(fresh)
        assert wanted != self.last, "nothing was counted"
        self.last = self.text(self.kept)
        assert self.last == wanted

    def text(self, hot: HotText) -> list[bytes]:
        """Its lines; ages are another each time, so they are 0 or something."""
        lines = b"".join(hot.render()).splitlines()
        return [line if not line.startswith(CLOCK) or line.endswith(b" 0.000000000") else CLOCK for line in lines]


def follow(pair: Pair) -> Followed:
    def add(hot: HotText) -> None:
        hot.add_device("d", pair.stats.device)
        hot.add_queue("d", "0", pair.stats)
        hot.add_doorbell("d", "0", "pio", pair.doorbell)

    return Followed(add)


def offer(pair: Pair, count: int = 1) -> None:
    for i in range(count):
        pair.ring.add([pair.put(bytes(10 + i))], [pair.room(5)])
    pair.ring.publish()


def take(pair: Pair) -> Request:
    request = pair.queue.pop()
    assert request is not None
    return request


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("in_order", [False, True])
def test_what_a_queue_counts(packed: bool, in_order: bool) -> None:
    pair = make_pair(packed=packed, in_order=in_order, event_idx=False)
    queue, followed = pair.queue, follow(pair)
    kick = os.eventfd(0, os.EFD_NONBLOCK)
    queue.set_kick(kick)
    offer(pair, 4)
    os.eventfd_write(kick, 3)
    with followed.step():
        assert queue.read_kick() == 3
    with followed.step():
        queue.begin_turn(1, True)
    with followed.step():
        first = take(pair)
    with followed.step():
        second = take(pair)
    with followed.step():
        queue.unpop(second)
    with followed.step():
        second = take(pair)
    with followed.step():
        second.complete(3)
    with followed.step():
        first.complete(2)
    with followed.step():
        queue.end_turn()
    pair.ring.used()
    pair.ring.disable_interrupts()
    with followed.step():
        third = take(pair)
    with followed.step():
        third.status = 1
        third.complete()
    with followed.step():
        queue.flush()
    assert pair.stats.interrupts_suppressed == 1
    with followed.step():
        fourth = take(pair)
    thread = Thread(target=fourth.complete, args=(1,))
    thread.start()
    thread.join()
    with followed.step():
        queue.take_remote()
    os.close(kick)
    pair.close()


def test_what_becomes_of_interrupts() -> None:
    pair = make_pair(event_idx=False)
    followed = follow(pair)
    offer(pair, 4)

    def answer() -> None:
        take(pair).complete()
        followed.last = followed.text(followed.kept)  # what comes then is the interrupt alone

    for call_fd, counted in ((-1, "absent"), (pair.call_fd, "sent")):
        pair.queue.set_call(call_fd)
        answer()
        with followed.step():
            pair.queue.flush()
        assert getattr(pair.stats, f"interrupts_{counted}") >= 1
    pair.calls()
    os.eventfd_write(pair.call_fd, (1 << 64) - 2)
    answer()
    with followed.step():
        pair.queue.flush()
    assert pair.stats.interrupts_pending == 1
    os.set_blocking(pair.call_fd, True)
    answer()
    with followed.step():
        pair.queue.flush()
    assert pair.queue.broken
    pair.close()


def test_a_ring_that_breaks_and_mistakes_that_others_count() -> None:
    pair = make_pair()
    followed = follow(pair)
    pair.memory.write(pair.ring.driver + 2, b"\xff\x7f")  # the available index, far ahead
    with followed.step():
        assert pair.queue.pop() is None
    assert pair.stats.device.guest_errors == pair.stats.guest_errors == 1
    with followed.step():
        pair.stats.guest_errors += 2
    with followed.step():
        pair.stats.handler_errors += 2
    with followed.step():
        pair.stats.device.add_handler_errors()
    assert (pair.stats.device.guest_errors, pair.stats.device.handler_errors) == (3, 3)
    pair.close()


def test_the_time_that_a_limit_holds_a_queue_back() -> None:
    class Lane:
        woken: list[Callable[[], object]]

        def call_later(self, seconds: float, callback: Callable[[], object]) -> object:
            self.woken = [callback]
            return self

        def cancel(self) -> None:
            pass

        def flush_later(self, queue: object) -> None:
            pass

        schedule = completions = flush_later

    pair, lane, limit = make_pair(), Lane(), Limit()
    pair.queue.scheduler = lane
    limit.set(requests=0.001, requests_burst=1)
    pair.queue.set_limit(limit)
    followed = follow(pair)
    offer(pair, 3)
    with followed.step():
        take(pair).complete()
        pair.queue.flush()
    assert pair.queue.pop() is None
    with followed.step():
        lane.woken.pop()()
    with followed.step():
        pair.queue.stop()
    pair.close()


def test_what_a_doorbell_device_counts() -> None:
    stats, told = DoorbellStats(), InterruptStats()

    def add(hot: HotText) -> None:
        hot.add_doorbell("d", "go", "mmio", stats)
        hot.add_interrupt("d", "line", told)

    fd, line_fd = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
    bell, line, followed = Bell("go", fd, stats), Interrupt("line", told), Followed(add)
    os.eventfd_write(fd, 2)
    with followed.step():
        assert bell.take() == 2
    with followed.step():
        bell.enter()
    with followed.step():
        assert not line.signal(bell)
    line.set_fd(line_fd)
    with followed.step():
        assert line.signal(bell)
    assert stats.response.count == 1
    os.eventfd_write(line_fd, (1 << 64) - 3)
    with followed.step():
        assert line.signal()
    assert told.pending == 1
    with followed.step():
        stats.ring.observe(700)
    other = DoorbellStats()
    other.add_rings(4)
    with followed.step():
        stats.merge(other)
    os.close(fd)
    os.close(line_fd)
