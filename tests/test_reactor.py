"""The reactor: fds, timers, posts, turns, polling and sleep."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from rings import Pair, make_pair

from hcd.dataplane.reactor import Reactor, Watch
from hcd.dataplane.virtqueue import Virtqueue

LIMIT = 20.0


class Running:
    """A reactor on its thread."""

    def __init__(self, poll_us: float = 0, slow_ms: float = 50) -> None:
        self.reactor = Reactor(poll_us, slow_ms)
        self.watches: list[Watch] = []
        self.thread = threading.Thread(target=self.reactor.run)
        self.thread.start()

    def do(self, call: object) -> None:
        """Run ``call`` on the reactor's thread, to its end."""
        done = threading.Event()
        self.reactor.post(lambda: (call(), done.set()))  # type: ignore[operator]
        assert done.wait(LIMIT)

    def close(self) -> None:
        self.reactor.stop()
        self.thread.join(LIMIT)
        assert not self.thread.is_alive()
        self.reactor.close()


@pytest.fixture(params=[0, 200], ids=["sleeping", "polling"])
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    made = Running(request.param)
    yield made
    made.close()


def serve(running: Running, pair: Pair, handler: object) -> int:
    """Give ``pair`` to the reactor; returns its kick eventfd."""
    kick, adopt = adoption(running, pair, handler)
    running.do(adopt)
    return kick


def adoption(running: Running, pair: Pair, handler: object) -> tuple[int, Callable[[], None]]:
    """What gives ``pair`` to the reactor on its thread, and the pair's kick eventfd."""
    kick = os.eventfd(0, os.EFD_NONBLOCK)
    queue = pair.queue
    queue.handler = handler  # type: ignore[assignment]

    def adopt() -> None:
        queue.own()
        queue.scheduler = running.reactor
        queue.set_kick(kick)
        running.watches.append(running.reactor.watch_kick(queue))
        running.reactor.schedule(queue)

    return kick, adopt


def test_posts_and_timers(running: Running) -> None:
    """Posted work runs on the reactor's thread; timers in the order of their time; a cancelled one never."""
    order: list[str] = []
    done = threading.Event()

    def arm() -> None:
        running.reactor.call_later(0.02, lambda: (order.append("later"), done.set()))
        running.reactor.call_later(0.01, lambda: order.append("sooner"))
        running.reactor.call_later(0.01, lambda: order.append("never")).cancel()

    running.reactor.post(arm)
    assert done.wait(LIMIT)
    assert order == ["sooner", "later"]


def test_watches(running: Running) -> None:
    """A readable fd calls back until the watch is cancelled; a callback that raises stops nothing."""
    read_end, write_end = os.pipe()
    got: list[bytes] = []
    seen = threading.Event()
    raised: list[Exception] = []
    running.reactor.on_error = raised.append

    def readable() -> None:
        got.append(os.read(read_end, 10))
        seen.set()
        raise RuntimeError("broken callback")

    watches: list[object] = []
    running.do(lambda: watches.append(running.reactor.watch(read_end, readable)))
    for _ in range(2):
        seen.clear()
        os.write(write_end, b"x")
        assert seen.wait(LIMIT)
    running.do(watches[0].cancel)  # type: ignore[attr-defined]
    os.write(write_end, b"y")
    running.do(lambda: None)
    assert got == [b"x", b"x"]
    assert [str(e) for e in raised] == ["broken callback"] * 2
    os.close(read_end)
    os.close(write_end)


def test_a_watch_that_is_cancelled_after_its_descriptor_was_closed_calls_nobody(running: Running) -> None:
    """A mistake that others notice nothing of. Somebody else has the file still, and epoll would report it for ever."""
    mine = os.eventfd(0, os.EFD_NONBLOCK)
    theirs = os.dup(mine)
    called: list[str] = []
    seen = threading.Event()

    def mistake() -> None:
        watch = running.reactor.watch(mine, lambda: called.append("the one that is cancelled"))
        os.close(mine)
        watch.cancel()

    def another() -> None:
        called.append("another")
        seen.set()

    before = os.eventfd(0, os.EFD_NONBLOCK)
    running.do(lambda: running.reactor.watch(before, another))
    running.do(mistake)
    others = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(20)]  # watches of these may lie where the old one was
    running.do(lambda: [running.reactor.watch(fd, another) for fd in others])
    os.eventfd_write(theirs, 1)
    for _ in range(3):
        running.do(lambda: None)
    assert called == []
    beats = running.reactor.beats
    time.sleep(0.1)
    assert running.reactor.beats <= beats + 2    # it sleeps
    os.eventfd_write(before, 1)
    assert seen.wait(LIMIT)
    for fd in (before, theirs, *others):
        os.close(fd)


def test_a_watch_whose_descriptor_was_closed_takes_nothing_from_the_next_one_of_that_number(running: Running) -> None:
    """The same mistake. The number belongs to somebody else by the time that the watch is cancelled, or it never is."""
    mine = os.eventfd(0, os.EFD_NONBLOCK)
    theirs = os.dup(mine)
    called: list[str] = []
    seen = threading.Event()
    stale: list[Watch] = []
    running.do(lambda: stale.append(running.reactor.watch(mine, lambda: called.append("the one that was closed"))))
    os.close(mine)
    others = os.eventfd(0, os.EFD_NONBLOCK)
    assert others == mine
    running.do(lambda: running.reactor.watch(others, seen.set))
    os.eventfd_write(theirs, 1)
    running.do(lambda: None)
    running.do(stale[0].cancel)
    beats = running.reactor.beats
    time.sleep(0.1)
    assert (called, running.reactor.beats <= beats + 2) == ([], True)
    os.eventfd_write(others, 1)
    assert seen.wait(LIMIT)
    os.close(theirs)
    os.close(others)


@pytest.mark.parametrize("packed", [False, True])
def test_rings_are_served(running: Running, packed: bool) -> None:
    """A kick gives the queue a turn; what the handler completes, the driver sees, with an interrupt."""
    pair = make_pair(packed=packed)

    def handler(queue: Virtqueue) -> None:
        for request in queue:
            request.write(request.read())
            request.complete()

    kick = serve(running, pair, handler)
    for i in range(100):
        room = pair.room(1)
        pair.ring.add([pair.put(bytes([i]))], [room])
        pair.ring.publish()
        if pair.ring.kick_needed():
            os.eventfd_write(kick, 1)
        while not pair.ring.used():
            if not pair.ring.enable_interrupts():
                assert select.select([pair.call_fd], [], [], LIMIT)[0]
                os.eventfd_read(pair.call_fd)
        assert pair.memory.read(*room) == bytes([i])
    running.do(lambda: (running.reactor.forget(pair.queue), pair.close(), running.watches.pop().cancel()))
    os.close(kick)


def test_a_queue_that_never_runs_dry_does_not_keep_others_from_being_polled(running: Running) -> None:
    """A ring that was served has its kicks suppressed: it is looked at also while another one always has work."""
    busy, other = make_pair(size=256), make_pair(size=256)
    busy_buffer, other_buffer = busy.put(b"x"), other.put(b"x")
    served: list[int] = []  # how many turns the busy one had had when the other one had its
    at_the_end: list[int] = []  # how many of these there were when the busy one had enough
    kicks_wanted: list[bool] = []
    turns = 0
    done = threading.Event()

    def ask(pair: Pair, buffer: tuple[int, int], count: int) -> None:
        for _ in range(count):
            pair.ring.add([buffer], [])
        pair.ring.publish()

    def take_and_ask_again(queue: Virtqueue) -> None:
        nonlocal turns
        turns += 1
        if len(served) == 2 or (served and turns > served[0] + 100):
            at_the_end.append(len(served))
            done.set()  # and runs dry
        else:
            ask(busy, busy_buffer, len(busy.ring.used()))
        if served and turns == served[0] + 5:
            ask(other, other_buffer, 1)
            kicks_wanted.append(other.ring.kick_needed())
        for request in queue:
            request.complete()

    def take(queue: Virtqueue) -> None:
        served.append(turns)
        for request in queue:
            request.complete()

    ask(busy, busy_buffer, 200)
    ask(other, other_buffer, 1)
    other.ring.kick_needed()  # the next answer is about the next request alone
    given = [adoption(running, busy, take_and_ask_again), adoption(running, other, take)]
    running.do(lambda: [adopt() for _, adopt in given])  # at once: a busy reactor takes its time for more
    assert done.wait(LIMIT)
    assert at_the_end[0] == 2
    assert kicks_wanted == [False]
    for pair, (kick, _) in zip((busy, other), given, strict=True):
        watch = running.watches.pop(0)
        running.do(lambda pair=pair, watch=watch: (running.reactor.forget(pair.queue), pair.close(), watch.cancel()))
        os.close(kick)


@pytest.mark.parametrize(("size", "per_turn"), [(1, 64), (64 << 10, 32), (1 << 20, 4)])
def test_a_busy_queue_leaves_turns_to_others(size: int, per_turn: int) -> None:
    """A turn takes at most its budget, of requests and of bytes, so a queue that always has work does not starve
    another."""
    running = Running()
    busy, other = make_pair(size=256), make_pair(size=256)
    order: list[str] = []
    done = threading.Event()

    def take(name: str) -> object:
        def handler(queue: Virtqueue) -> None:
            count = 0
            for request in queue:
                request.complete()
                count += 1
            order.append(f"{name}{count}")
            if sum(int(entry[1:]) for entry in order) == 400:
                done.set()
        return handler

    for pair in (busy, other):
        buffer = pair.room(size)
        for _ in range(200):
            pair.ring.add([], [buffer])
        pair.ring.publish()
    gate = threading.Event()
    running.reactor.post(lambda: gate.wait(LIMIT))
    kicks = []
    for pair, name in ((busy, "a"), (other, "b")):
        kick = os.eventfd(0, os.EFD_NONBLOCK)
        kicks.append(kick)
        pair.queue.handler = take(name)  # type: ignore[assignment]

        def adopt(pair: Pair = pair, kick: int = kick) -> None:
            pair.queue.own()
            pair.queue.scheduler = running.reactor
            pair.queue.set_kick(kick)
            running.reactor.watch_kick(pair.queue)
            running.reactor.schedule(pair.queue)

        running.reactor.post(adopt)
    gate.set()
    assert done.wait(LIMIT)
    turns = [per_turn] * (200 // per_turn) + [200 % per_turn] * (200 % per_turn > 0)
    assert order == [f"{name}{count}" for count in turns for name in "ab"]
    running.close()
    for pair, kick in zip((busy, other), kicks, strict=True):
        pair.close()
        os.close(kick)


def test_a_slow_handler_is_named() -> None:
    """A turn that takes long delays every device of the process, so somebody is told."""
    running = Running(slow_ms=1)
    pair = make_pair()
    told: list[int] = []
    heard = threading.Event()
    running.reactor.on_slow = lambda queue, ns: (told.append(ns), heard.set())  # type: ignore[assignment]
    pause = threading.Event()

    def handler(queue: Virtqueue) -> None:
        pause.wait(0.01)
        for request in queue:
            request.complete()

    kick = serve(running, pair, handler)
    os.eventfd_write(kick, 1)
    assert heard.wait(LIMIT)
    assert told[0] >= 10_000_000
    running.close()
    pair.close()
    os.close(kick)


def test_idle_means_asleep(running: Running) -> None:
    """Without work the loop stands still: it goes round for what was posted and not more."""
    running.do(lambda: None)
    running.do(lambda: None)
    beats = running.reactor.beats
    running.do(lambda: None)
    assert running.reactor.beats - beats <= 3


def test_polling_is_turned_off_and_on_while_it_runs() -> None:
    """Without polling, work that comes right after work is waited for; with it, it is found by looking."""
    running = Running(200)
    pair = make_pair()
    done = threading.Event()

    def handler(queue: Virtqueue) -> None:
        for request in queue:
            request.complete()
            done.set()

    kick = serve(running, pair, handler)

    def sleeps(poll_us: float) -> int:
        """How often the reactor slept for 200 requests, each offered as soon as the last one is done."""
        running.do(lambda: running.reactor.set_poll_us(poll_us))
        before = running.reactor.sleeps
        for _ in range(200):
            done.clear()
            pair.ring.add([], [pair.room(1)])
            pair.ring.publish()
            if pair.ring.kick_needed():
                os.eventfd_write(kick, 1)
            assert done.wait(LIMIT)
            while not pair.ring.used():
                pass
        return running.reactor.sleeps - before

    assert sleeps(0) >= 150
    assert sleeps(1_000_000) < 150
    running.do(lambda: (running.reactor.forget(pair.queue), pair.close(), running.watches.pop().cancel()))
    running.close()
    os.close(kick)
