"""``hcd trace``: what one device says and does, live.

Theory of operation. A trace is an observer of the device's messages (in trio) and a wrapper around its requests or
rings (on the lane). Without one neither is there, and the data plane makes the one comparison that it makes anyway.
With one each request costs two calls of Python, and a line if it is told of. The lane never waits for the reader:
lines go into a buffer of limited length, and so many a second are made at most. What does not fit is counted, and the
number is told in its place.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio
from hcd_protocols.doorbell.text import message_text as doorbell_text
from hcd_protocols.vhost_user.text import message_text as vhost_user_text

from hcd.doorbell_host import DoorbellHost
from hcd.host import DeviceHost, HostBase
from hcd.wrappers.narrate import RequestNarrator, RingNarrator

__all__ = ["DEFAULT_RATE", "Feed", "trace"]

#: requests, rings and interrupts that are told of in a second
DEFAULT_RATE = 500
MAX_RATE = 100_000
#: lines that wait for the reader
ROOM = 2000
#: how long (seconds) it may take until lost lines are told of, when none comes after them
LOST_PAUSE = 1.0

Event = dict[str, Any]


class Feed:
    """Lines on their way to one reader: ``admits`` and ``put`` are for any thread, ``take`` for trio.

    ``rate``: so many requests, or rings and interrupts, a second are admitted.
    """

    def __init__(self, rate: int = DEFAULT_RATE, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = float(rate)
        self._clock = clock
        self._credit = self._rate
        self._seen = clock()
        self._lock = threading.Lock()
        self._lines: list[Event] = []
        self._lost = 0
        self._token = trio.lowlevel.current_trio_token()
        self._filled = trio.Event()

    def admits(self) -> bool:
        """Whether something more may be told of; if not, it is counted as lost."""
        with self._lock:
            now = self._clock()
            self._credit = min(self._rate, self._credit + (now - self._seen) * self._rate)
            self._seen = now
            admitted = self._credit >= 1 and len(self._lines) < ROOM
            self._credit -= admitted
            self._lost += not admitted
        return admitted

    def put(self, what: str, **fields: Any) -> None:
        """One line, if there is room; else it is counted."""
        with self._lock:
            if len(self._lines) >= ROOM:
                self._lost += 1
                return
            self._tell_lost()
            self._lines.append({"at": time.time(), "what": what, **fields})
        self._token.run_sync_soon(self._wake, idempotent=True)

    def _tell_lost(self) -> None:
        if self._lost:
            self._lines.append({"at": time.time(), "what": "lost", "lines": self._lost})
            self._lost = 0

    def _wake(self) -> None:
        self._filled.set()

    async def take(self) -> list[Event]:
        """What there is to tell, in its order; after a while perhaps nothing."""
        with trio.move_on_after(LOST_PAUSE):
            await self._filled.wait()
        self._filled = trio.Event()
        with self._lock:
            self._tell_lost()
            lines, self._lines = self._lines, []
        return lines


class _RequestTap(RequestNarrator):
    """Puts requests into a feed. For the lane's thread."""

    def __init__(self, host: DeviceHost, feed: Feed) -> None:
        super().__init__(host.device, {}, host.log)
        self._feed = feed

    def wants(self) -> bool:
        return self._feed.admits()

    def begun(self, queue: int, number: int, text: str) -> None:
        self._feed.put("request", queue=queue, number=number, text=text)

    def ended(self, queue: int, number: int, op: str, status: str, written: int, took: float) -> None:
        self._feed.put("done", queue=queue, number=number, op=op, status=status, written=written, seconds=took)


class _RingTap(RingNarrator):
    """The same for rings and interrupts."""

    def __init__(self, host: DoorbellHost, feed: Feed) -> None:
        super().__init__(host.device, {}, host.log)
        self._feed = feed

    def wants(self) -> bool:
        return self._feed.admits()

    def begun(self, doorbell: str, number: int, text: str) -> None:
        self._feed.put("rung", doorbell=doorbell, number=number, text=text)

    def ended(self, doorbell: str, number: int, outcome: str, took: float) -> None:
        self._feed.put("handled", doorbell=doorbell, number=number, outcome=outcome, seconds=took)

    def signalled(self, interrupt: str, outcome: str, answers: str) -> None:
        self._feed.put("interrupt", interrupt=interrupt, outcome=outcome, answers=answers)


def _tap(host: HostBase, feed: Feed) -> tuple[Callable[[], None], Callable[[], None]]:
    """What begins to put what ``host`` does into ``feed``, and what ends it, both on the lane."""
    if isinstance(host, DoorbellHost):
        rings = _RingTap(host, feed)
        return partial(host.wrapping.add, rings), partial(host.wrapping.remove, rings)
    assert isinstance(host, DeviceHost)
    requests = _RequestTap(host, feed)
    return partial(host.add_wrapper, requests), partial(host.remove_wrapper, requests)


@asynccontextmanager
async def trace(host: HostBase, rate: int = DEFAULT_RATE) -> AsyncIterator[Feed]:
    """What ``host`` says and does, for as long as the block lasts. It begins with who is connected."""
    feed = Feed(rate)
    begin, end = _tap(host, feed)
    observer = _Observer(host, feed)
    observer.connection("tracing")
    host.observers.append(observer)
    try:
        await host.lane.run(begin)
        yield feed
    finally:
        host.observers.remove(observer)
        with trio.CancelScope(shield=True):
            await host.lane.run(end)


class _Observer:
    """Puts the messages of a device into a feed (:class:`hcd.host.Observer`)."""

    def __init__(self, host: HostBase, feed: Feed) -> None:
        self._host = host
        self._feed = feed

    def message(self, direction: str, data: bytes, fds: int) -> None:
        if self._host.transport == "kvm":
            text = doorbell_text(data, fds)
        else:
            text = vhost_user_text(data, fds, back_channel=direction == "back")
        self._feed.put("message", direction=direction, text=text)

    def connection(self, what: str) -> None:
        session = self._host.session
        peer = None if session is None else session.peer
        self._feed.put(
            what,
            device=self._host.spec.name,
            transport=self._host.transport,
            pid=None if peer is None else peer.pid,
            command="" if peer is None else peer.command,
        )
