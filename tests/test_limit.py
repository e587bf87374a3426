"""Rate limits: token buckets in the data plane, shared by the queues of a device."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import trio
from rings import Pair, Scheduler, make_pair

from hcd import limits
from hcd.dataplane.reactor import Reactor
from hcd.dataplane.virtqueue import Limit, Request, Virtqueue
from hcd.lanes import AsyncVirtqueue, open_lanes
from hcd.limits import Limits

LIMIT = 20.0
#: a wait that no test reaches: tokens that come meanwhile don't count
SLOW = 0.001


class Lane(Scheduler):
    """Stands for a lane: notes turns that are asked for, and timers, which fire when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: list[Virtqueue] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def schedule(self, queue: Virtqueue) -> None:
        self.turns.append(queue)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Lane:
        self.timers.append((seconds, callback))
        return self

    def cancel(self) -> None:
        self.timers.clear()

    def fire(self) -> None:
        self.timers.pop()[1]()


@pytest.fixture
def lane() -> Lane:
    return Lane()


@pytest.fixture
def limited(lane: Lane) -> Iterator[Callable[..., Pair]]:
    """``limited(limit)``: a queue under ``limit``, whose driver offers 16 requests of 100 bytes."""
    pairs: list[Pair] = []

    def make(limit: Limit, **how: bool) -> Pair:
        pair = make_pair(size=64, **how)
        pairs.append(pair)
        pair.queue.scheduler = lane
        pair.queue.set_limit(limit)
        offer(pair, 16)
        return pair

    yield make
    for pair in pairs:
        pair.close()


def offer(pair: Pair, count: int, size: int = 90, room: int = 10) -> None:
    for _ in range(count):
        pair.ring.add([pair.put(bytes(size))], [pair.room(room)])
    pair.ring.publish()


def set_limit(**given: float) -> Limit:
    limit = Limit()
    limit.set(**given)
    return limit


def taken(queue: Virtqueue) -> list[Request]:
    return queue.pop_many(1000)


@pytest.mark.parametrize("packed", [False, True])
def test_a_burst_may_be_taken_and_no_more(limited: Callable[..., Pair], lane: Lane, packed: bool) -> None:
    """Then the ring counts as empty for everybody, its kicks stay off, and there is one timer."""
    pair = limited(set_limit(requests=SLOW, requests_burst=5), packed=packed)
    assert pair.ring.kick_needed()
    pair.queue.disable_kicks()
    assert len(taken(pair.queue)) == 5
    assert not pair.queue.available()
    assert not pair.queue.enable_kicks()
    offer(pair, 1)
    assert not pair.ring.kick_needed()
    assert taken(pair.queue) == []
    assert len(lane.timers) == 1
    assert pair.stats.inflight == 5


def test_without_a_limit_everything_may_be_taken(limited: Callable[..., Pair], lane: Lane) -> None:
    limit = Limit()
    pair = limited(limit)
    assert not limit.active
    assert len(taken(pair.queue)) == 16
    assert lane.timers == []


def test_bytes_are_charged_when_taken_and_what_the_answer_left_is_given_back(limited: Callable[..., Pair]) -> None:
    """The bucket may go into debt by one request, so large requests are served too."""
    limit = set_limit(bytes=SLOW, bytes_burst=250)
    pair = limited(limit)
    requests = taken(pair.queue)
    assert len(requests) == 3
    for request in requests:
        request.complete(0)  # 30 bytes unused: the debt of 50 is one of 20
    limit.set(bytes=SLOW, bytes_burst=251)  # wakes it
    assert taken(pair.queue) == []
    assert pair.stats.bytes_from_guest == 270


def test_a_request_that_is_put_back_costs_nothing(limited: Callable[..., Pair]) -> None:
    pair = limited(set_limit(requests=SLOW, requests_burst=2))
    for _ in range(5):
        request = pair.queue.pop()
        assert request is not None
        pair.queue.unpop(request)
    del request
    assert len(taken(pair.queue)) == 2


def test_the_timer_gives_the_queue_a_turn_and_counts_the_time(limited: Callable[..., Pair], lane: Lane) -> None:
    limit = set_limit(requests=1000, requests_burst=5)
    pair = limited(limit)
    assert len(taken(pair.queue)) >= 5
    ((wait, _),) = lane.timers
    assert 0 < wait <= 0.002
    assert limit.throttled == 1
    while not lane.turns:  # tokens are there after a few milliseconds
        lane.fire()
    assert lane.turns == [pair.queue]
    assert limit.throttled == 0
    assert pair.queue.available()
    assert pair.stats.throttled_ns > 0


def test_what_came_while_the_bucket_was_full_is_not_saved_up(limited: Callable[..., Pair]) -> None:
    """Time before the first request is worth one burst, not one more when that is used up."""
    limit = set_limit(requests=1000, requests_burst=100)
    pairs = [limited(limit) for _ in range(20)]
    time.sleep(0.15)
    began = time.monotonic()
    count = sum(len(taken(pair.queue)) for pair in pairs)
    assert count <= 101 + 1000 * (time.monotonic() - began)


def test_a_long_wait_is_cut_so_that_the_metric_goes_on(limited: Callable[..., Pair], lane: Lane) -> None:
    pair = limited(set_limit(requests=SLOW, requests_burst=1))
    assert len(taken(pair.queue)) == 1
    assert lane.timers[0][0] == 1.0
    lane.fire()
    assert lane.turns == []
    assert len(lane.timers) == 1
    assert pair.stats.throttled_ns > 0


def test_another_limit_takes_effect_at_once(limited: Callable[..., Pair], lane: Lane) -> None:
    limit = set_limit(requests=SLOW, requests_burst=1)
    pair = limited(limit)
    assert len(taken(pair.queue)) == 1
    limit.set(requests=SLOW, requests_burst=4)
    assert lane.turns == []  # a larger burst is room, not tokens
    limit.set()
    assert lane.turns == [pair.queue]
    assert lane.timers == []
    assert len(taken(pair.queue)) == 15


@pytest.mark.parametrize("end", ["halt", "stop", "disable", "unlimited"])
def test_a_queue_that_ends_while_it_is_throttled_leaves_nothing_behind(
    limited: Callable[..., Pair], lane: Lane, end: str
) -> None:
    limit = set_limit(requests=SLOW, requests_burst=1)
    pair = limited(limit)
    assert len(taken(pair.queue)) == 1
    if end == "halt":
        pair.queue.halt()
    elif end == "stop":
        pair.queue.stop()
    elif end == "disable":
        pair.queue.set_enabled(False)
    else:
        pair.queue.set_limit(None)
    assert limit.throttled == 0
    lane.fire()
    assert lane.turns == []
    if end == "unlimited":
        assert len(taken(pair.queue)) == 15


def run_until(lane: Lane, done: Callable[[], bool], queues: dict[Virtqueue, Callable[[], None]]) -> None:
    """What a lane does: turns for queues that have one, timers when nobody has."""
    deadline = time.monotonic() + LIMIT
    while not done():
        assert time.monotonic() < deadline
        if lane.turns:
            queues[lane.turns.pop(0)]()
        elif lane.timers:
            lane.fire()


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        pytest.param({"requests": 20_000, "requests_burst": 100}, (90, 90), id="requests"),
        pytest.param({"bytes": 8_000_000, "bytes_burst": 80_000}, (32_000, 500), id="bytes"),
    ],
)
def test_queues_of_a_device_share_evenly(lane: Lane, given: dict[str, float], sizes: tuple[int, int]) -> None:
    """Both always have work. What is short is shared by halves, whatever the size of their requests.

    Not to the byte: while this process gets no processor, tokens gather, and whoever is first takes them. By turns
    alone the sizes below would share 64 to 1.
    """
    limit = set_limit(**given)
    pairs = [make_pair(size=64) for _ in sizes]
    served = {pair.queue: 0 for pair in pairs}
    cost = {pair.queue: size if "bytes" in given else 1 for pair, size in zip(pairs, sizes, strict=True)}
    buffers = {pair.queue: (pair.put(bytes(size - 10)), pair.room(10)) for pair, size in zip(pairs, sizes, strict=True)}

    def turn(pair: Pair) -> Callable[[], None]:
        def take() -> None:
            for request in pair.queue.pop_many(8):
                request.complete(10)
                served[pair.queue] += cost[pair.queue]
            pair.queue.flush()
            refill(pair, len(pair.ring.used()))
            if pair.queue.available():
                lane.schedule(pair.queue)

        return take

    def refill(pair: Pair, count: int) -> None:
        out, room = buffers[pair.queue]
        for _ in range(count):
            pair.ring.add([out], [room])
        pair.ring.publish()

    for pair in pairs:
        pair.queue.scheduler = lane
        pair.queue.set_limit(limit)
        refill(pair, 8)
        lane.schedule(pair.queue)
    total = 4000 * cost[pairs[1].queue] if "bytes" in given else 4000
    enough = 2_000_000 if "bytes" in given else total
    run_until(lane, lambda: sum(served.values()) >= enough, {pair.queue: turn(pair) for pair in pairs})
    first, second = served.values()
    assert abs(first - second) < 0.3 * (first + second), served
    for pair in pairs:
        pair.close()


def test_a_queue_alone_may_use_all_there_is(limited: Callable[..., Pair], lane: Lane) -> None:
    """Another queue that has been there and has nothing to do keeps nothing for itself."""
    limit = set_limit(requests=SLOW, requests_burst=20)
    first, second = limited(limit), limited(limit)
    assert len(second.queue.pop_many(4)) == 4
    assert len(taken(first.queue)) == 16


# -- the reactor and trio


class Load:
    """A driver that offers ``count`` requests, and a handler that completes them."""

    def __init__(self, pair: Pair, count: int) -> None:
        self.pair = pair
        self.count = count
        self.left = count
        self.turns = 0
        self.done = threading.Event()
        self.buffer = pair.put(bytes(100)), pair.room(4)
        self.offer(16)

    def offer(self, most: int) -> None:
        for _ in range(min(most, self.left)):
            self.pair.ring.add([self.buffer[0]], [self.buffer[1]])
            self.left -= 1
        self.pair.ring.publish()

    def handle(self, queue: Virtqueue) -> None:
        self.turns += 1
        while (request := queue.pop()) is not None:
            request.complete(4)
            self.count -= 1
        queue.flush()
        self.offer(len(self.pair.ring.used()))
        if self.count == 0:
            self.done.set()


@pytest.mark.parametrize("poll_us", [0, 200], ids=["sleeping", "polling"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_reactor_serves_no_faster_than_the_limit(poll_us: int, packed: bool) -> None:
    """600 requests at 1000 a second and 100 at once: half a second at least. Between, the reactor sleeps."""
    pair = make_pair(packed=packed, size=64)
    load = Load(pair, 600)
    pair.queue.set_limit(set_limit(requests=1000, requests_burst=100))
    pair.queue.handler = load.handle
    reactor = Reactor(poll_us)
    kick = os.eventfd(0, os.EFD_NONBLOCK)
    thread = threading.Thread(target=reactor.run)

    def begin() -> None:
        pair.queue.own()
        pair.queue.scheduler = reactor
        pair.queue.set_kick(kick)
        watches.append(reactor.watch_kick(pair.queue))
        reactor.schedule(pair.queue)

    watches: list[object] = []
    began = time.monotonic()
    reactor.post(begin)
    thread.start()
    assert load.done.wait(LIMIT)
    seconds = time.monotonic() - began
    reactor.stop()
    thread.join(LIMIT)
    assert seconds >= 0.5
    assert pair.stats.throttled_ns > 0
    assert reactor.sleeps > 10
    assert reactor.beats < 50 * load.turns  # it does not spin while there are no tokens
    reactor.close()
    pair.close()
    os.close(kick)


async def test_an_async_device_serves_no_faster_than_the_limit() -> None:
    """It may wait for its queue in the middle of process(), and wakes when there are tokens."""
    pair = make_pair(size=64)
    queue = AsyncVirtqueue(0, pair.doorbell, pair.stats, 1024)
    pair.queue = queue
    queue.on_error = lambda _, error: pair.errors.append(error)
    queue.set_memory(pair.table)
    queue.set_call(pair.call_fd)
    pair.start()
    load = Load(pair, 300)
    done = trio.Event()
    waits = 0

    async def process(queue: AsyncVirtqueue) -> None:
        nonlocal waits
        load.handle(queue)
        while not load.done.is_set():
            await queue.wait()
            waits += 1
            load.handle(queue)
        done.set()

    queue.set_limit(set_limit(requests=1000, requests_burst=100))
    queue.handler = process
    began = time.monotonic()
    async with open_lanes(0) as lanes:
        lanes.trio.attach(queue)
        lanes.trio.schedule(queue)
        with trio.fail_after(LIMIT):
            await done.wait()
        lanes.trio.forget(queue)
    assert time.monotonic() - began >= 0.2
    assert waits < 300
    assert pair.errors == []
    assert queue.stats.throttled_ns > 0
    pair.close()


# -- the configuration


def test_a_table_of_limits_is_read() -> None:
    found, problems = limits.parse(
        {"requests_per_second": 1000, "requests_burst": 7, "bytes_per_second": "64M", "bytes_burst": 4096}
    )
    assert problems == []
    assert found == Limits(1000, 7, 64 << 20, 4096)
    assert found.arguments() == (1000, 7, 64 << 20, 4096)
    assert Limits(1000).arguments() == (1000, 100, 0, 0)
    assert not limits.parse({})[0].given
    assert str(found) == f"1000 requests/s and {64 << 20} bytes/s"


@pytest.mark.parametrize(
    ("table", "key", "text"),
    [
        (3, "", "expected a table, found 3"),
        ({"requests": 3}, "requests", 'is not a known key; expected requests_per_second'),
        ({"requests_per_second": 0}, "requests_per_second", "expected a whole number above 0, found 0"),
        ({"requests_per_second": 1.5}, "requests_per_second", "found 1.5"),
        ({"requests_per_second": True}, "requests_per_second", "found true"),
        ({"bytes_per_second": "fast"}, "bytes_per_second", 'expected a size such as'),
        ({"bytes_burst": 3}, "bytes_burst", "needs bytes_per_second"),
    ],
)  # fmt: skip
def test_a_mistake_in_limits_is_named(table: object, key: str, text: str) -> None:
    _, problems = limits.parse(table)
    assert [(found, text in said) for found, said in problems] == [(key, True)]
