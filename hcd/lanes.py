"""Lanes: where the handlers of devices run, and how trio's side reaches them.

There are two. The *reactor lane* is the compiled loop on a thread of its own; devices with a plain ``process`` live
there. The *trio lane* is the trio thread; devices with an ``async process`` live there. A queue, its device and its
session's back end belong to one lane and are touched on its thread only. Sessions read messages in trio and carry
each over with :meth:`run`, which also brings the outcome back: a message is answered when it has taken effect.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import trio

from hcd.dataplane.bell import Bell
from hcd.dataplane.reactor import Reactor
from hcd.dataplane.virtqueue import Virtqueue
from hcd.device import DeviceBase, Handle
from hcd.errors import contained
from hcd.slow import SlowSteps, stepwise
from hcd.turns import check_turn

__all__ = ["AsyncVirtqueue", "BellHandle", "Lanes", "QueueLane", "ReactorLane", "TrioLane", "open_lanes"]

T = TypeVar("T")

_log = logging.getLogger("hcd.lanes")


class AsyncVirtqueue(Virtqueue):
    """The queue of a device whose ``process`` is async: the same, and it can be waited for."""

    ready: trio.Event
    #: when the last ring woke us (CLOCK_MONOTONIC, ns), until its turn begins
    rung: int = 0

    def begin(self) -> None:
        """A turn begins."""
        rung, self.rung = self.rung, 0
        self.disable_kicks()
        self.begin_turn(rung or time.monotonic_ns(), bool(rung), False)

    async def wait(self) -> None:
        """End the turn; return when the ring may hold requests, in a new one. A checkpoint."""
        self.end_turn()
        asleep = not self.enable_kicks() if self.passive else not self.available() and not self.enable_kicks()
        if asleep:
            self.ready = trio.Event()
            await self.ready.wait()
        else:
            await trio.lowlevel.checkpoint()
        self.begin()


class BellHandle(Protocol):
    """A raw doorbell that a lane serves."""

    def cancel(self) -> None:
        """Stop serving it; on the lane's thread. Rings that nobody took stay in its eventfd."""

    async def finish(self) -> None:
        """Hand over the rings that are there, wait for the handler, stop serving it; in trio."""


class QueueLane(Protocol):
    """What sessions need of a lane, beside what devices see of it (:class:`hcd.device.Lane`).

    All but :meth:`run` and :meth:`post` is for the lane's own thread.
    """

    shared: dict[str, Any]
    queue_type: type[Virtqueue]

    async def run(self, function: Callable[[], T]) -> T:
        """Call ``function`` on the lane's thread and return what it returns, or raise what it raises."""

    def post(self, callback: Callable[[], object]) -> None: ...

    def watch(self, fd: int, callback: Callable[[], None]) -> Handle: ...

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Handle: ...

    def attach(self, queue: Virtqueue) -> None:
        """``queue`` belongs to this lane now."""

    def watch_kick(self, queue: Virtqueue) -> Handle:
        """Give ``queue`` a turn whenever its kick fd is rung."""

    def schedule(self, queue: Virtqueue) -> None:
        """Give ``queue`` a turn although nobody rang."""

    def forget(self, queue: Virtqueue) -> None:
        """``queue`` is stopped."""

    def watch_bell(self, bell: Bell) -> BellHandle:
        """Call the handler of ``bell`` whenever it is rung. Until it is cancelled or finished its fd stays open."""


class _ReactorBell:
    """A raw doorbell in the reactor."""

    def __init__(self, lane: ReactorLane, bell: Bell) -> None:
        self._lane = lane
        self._bell = bell
        self._watch = lane.reactor.watch_bell(bell)

    def cancel(self) -> None:
        self._watch.cancel()

    async def finish(self) -> None:
        def last() -> None:
            self._lane.reactor.handle_bell(self._bell)
            self._watch.cancel()

        await self._lane.run(last)


class ReactorLane:
    """The lane of plain handlers."""

    queue_type: type[Virtqueue] = Virtqueue

    def __init__(self, reactor: Reactor, token: trio.lowlevel.TrioToken) -> None:
        self.reactor = reactor
        self.shared: dict[str, Any] = {}
        self._token = token
        self.post = reactor.post
        self.watch = reactor.watch
        self.call_later = reactor.call_later
        self.watch_kick = reactor.watch_kick
        self.schedule = reactor.schedule
        self.forget = reactor.forget

    async def run(self, function: Callable[[], T]) -> T:
        done = trio.Event()
        calls = [function]  # taken out: the reactor holds the job for a moment longer than its caller waits for it
        results: list[T] = []
        errors: list[Exception] = []

        def job() -> None:
            try:
                results.append(calls.pop()())
            except BaseException as error:
                errors.append(contained(error))
            self._token.run_sync_soon(done.set)

        self.reactor.post(job)
        with trio.CancelScope(shield=True):  # the job runs in any case; whoever asked must know its outcome
            await done.wait()
        if errors:
            # Taken out: this frame is in the traceback of the error. If it held on to it, both would keep the session
            # and the guest memory of whoever called until the next garbage collection, and an idle daemon has none.
            raise errors.pop()
        return results[0]

    def attach(self, queue: Virtqueue) -> None:
        queue.own()
        queue.scheduler = self.reactor

    def watch_bell(self, bell: Bell) -> BellHandle:
        return _ReactorBell(self, bell)


class _TaskHandle:
    """A timer or queue of the trio lane: a task that can be cancelled."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()

    def cancel(self) -> None:
        self.scope.cancel()


class _Watches:
    """The files that the trio lane waits on: in an epoll fd of their own, beside trio's.

    What a device does to its descriptors stays its own matter then, as in the reactor: one that cannot be waited on is
    refused to whoever asks, and one that is closed without a word is gone, whoever gets its number next.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._by_fd: dict[int, _Watch] = {}

    def add(self, fd: int, callback: Callable[[], None]) -> Handle:
        try:
            self._epoll.register(fd, select.EPOLLIN)
        except OSError as error:
            raise OSError(error.errno, f"cannot wait on fd {fd}: {error.strerror}") from None
        watch = self._by_fd[fd] = _Watch(self, fd, callback)
        return watch

    def remove(self, watch: _Watch) -> None:
        if self._by_fd.get(watch.fd) is watch:
            del self._by_fd[watch.fd]
            with suppress(OSError):  # it is closed already
                self._epoll.unregister(watch.fd)

    async def run(self) -> None:
        try:
            while True:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                for watch in [self._by_fd.get(fd) for fd, _ in self._epoll.poll(0)]:
                    if watch is not None and watch.live:
                        _guarded(watch.callback)
        finally:
            self._by_fd.clear()
            self._epoll.close()


class _Watch:
    def __init__(self, watches: _Watches, fd: int, callback: Callable[[], None]) -> None:
        self.fd = fd
        self.callback = callback
        self.live = True
        self._watches = watches

    def cancel(self) -> None:
        """The fd may be closed as soon as this returns."""
        self.live = False
        self._watches.remove(self)


class _TrioBell:
    """A raw doorbell in trio: one task, which waits for rings and runs the handler."""

    def __init__(self, bell: Bell, slow: SlowSteps) -> None:
        self._bell = bell
        self._slow = slow
        self._task = trio.CancelScope()
        self._waiting = trio.CancelScope()
        self._ending = False
        self._over = trio.Event()

    def cancel(self) -> None:
        self._task.cancel()
        trio.lowlevel.notify_closing(self._bell.fd)

    async def finish(self) -> None:
        self._ending = True
        self._waiting.cancel()  # not the handler
        await self._over.wait()

    async def run(self) -> None:
        try:
            with self._task, suppress(trio.ClosedResourceError):
                last = False
                while not (last or self._task.cancel_called):
                    last = self._ending  # what came while the handler ran is handed over too
                    with trio.CancelScope() as self._waiting:
                        if not last:
                            await trio.lowlevel.wait_readable(self._bell.fd)
                    if self._task.cancel_called:  # after it was woken: the fd is closed, or somebody else's by now
                        return
                    await self._handle()
        finally:
            self._over.set()

    async def _handle(self) -> None:
        bell = self._bell
        try:
            if count := bell.take():
                bell.enter()
                assert bell.handler is not None
                await stepwise(bell.handler(bell, count), lambda ns: self._slow.note_turn(bell, ns))
        except BaseException as raised:
            _blame(raised, bell)


class TrioLane:
    """The lane of async handlers: one task for each queue."""

    queue_type: type[Virtqueue] = AsyncVirtqueue

    def __init__(self, nursery: trio.Nursery, token: trio.lowlevel.TrioToken, slow: SlowSteps | None = None) -> None:
        self.shared: dict[str, Any] = {}
        self._slow = slow or SlowSteps()
        self._nursery = nursery
        self._token = token
        self._tasks: dict[Virtqueue, _TaskHandle] = {}
        self._watches = _Watches()
        self._thread = threading.get_ident()
        nursery.start_soon(self._watches.run)

    async def run(self, function: Callable[[], T]) -> T:
        # Not cancelled before the call: what the function was to take over (descriptors) would be lost.
        try:
            result = function()
        except BaseException as error:
            raise contained(error) from error.__cause__
        await trio.lowlevel.cancel_shielded_checkpoint()
        return result

    def post(self, callback: Callable[[], object]) -> None:
        self._token.run_sync_soon(_guarded, callback)

    def watch(self, fd: int, callback: Callable[[], None]) -> Handle:
        self._check_thread()
        return self._watches.add(fd, callback)

    def _check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise RuntimeError("a lane is for its own thread; lane.post() is what others may use")

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Handle:
        self._check_thread()
        handle = _TaskHandle()
        self._nursery.start_soon(self._call_later, handle, seconds, callback)
        return handle

    async def _call_later(self, handle: _TaskHandle, seconds: float, callback: Callable[[], None]) -> None:
        with handle.scope:
            await trio.sleep(seconds)
            if not handle.scope.cancel_called:
                _guarded(callback)

    # -- queues

    def attach(self, queue: Virtqueue) -> None:
        assert isinstance(queue, AsyncVirtqueue)
        queue.own()
        queue.scheduler = self
        queue.ready = trio.Event()
        handle = self._tasks[queue] = _TaskHandle()
        self._nursery.start_soon(self._serve, handle, queue)

    def watch_kick(self, queue: Virtqueue) -> Handle:
        def rung() -> None:
            assert isinstance(queue, AsyncVirtqueue)
            if queue.read_kick():
                queue.rung = time.monotonic_ns()
            self.schedule(queue)

        return self.watch(queue.kick_fd, rung)

    def schedule(self, queue: Virtqueue) -> None:
        assert isinstance(queue, AsyncVirtqueue)
        queue.ready.set()

    def watch_bell(self, bell: Bell) -> BellHandle:
        served = _TrioBell(bell, self._slow)
        self._nursery.start_soon(served.run)
        return served

    def forget(self, queue: Virtqueue) -> None:
        if handle := self._tasks.pop(queue, None):
            handle.cancel()

    def flush_later(self, queue: Virtqueue) -> None:
        """Called by the queue when a completion waits to be published."""
        self._token.run_sync_soon(queue.flush)

    def completions(self, queue: Virtqueue) -> None:
        """Called by the queue, on any thread, when another thread completed requests."""
        self._token.run_sync_soon(_guarded, queue.take_remote)

    async def _serve(self, handle: _TaskHandle, queue: AsyncVirtqueue) -> None:
        def slow(ns: int) -> None:
            self._slow.note_turn(queue, ns)

        with handle.scope:
            while True:
                await queue.ready.wait()
                queue.ready = trio.Event()
                while queue.running:
                    queue.begin()
                    try:
                        await stepwise(queue.handler(queue), slow)
                        check_turn(queue, None)
                    except BaseException as raised:
                        _blame(raised, queue)
                    queue.end_turn()
                    await trio.lowlevel.checkpoint()
                    if queue.passive:
                        queue.enable_kicks()
                        break
                    if not queue.available() and not queue.enable_kicks():
                        break


def _blame(raised: BaseException, source: Virtqueue | Bell) -> None:
    """The handler of ``source`` raised: tell of what is its own, and raise again what trio wants to see because the
    handler is being cancelled. Nothing of it stays referred to."""
    cancelled: BaseException | None = raised if isinstance(raised, trio.Cancelled) else None
    own: BaseException | None = None if cancelled else raised
    if isinstance(raised, BaseExceptionGroup):
        cancelled, own = raised.split(trio.Cancelled)
    if own is not None:
        if source.on_error is None:
            raise own
        source.on_error(source, contained(own))  # type: ignore[arg-type]
    if cancelled is not None:
        raise cancelled


def _guarded(callback: Callable[[], object]) -> None:
    try:
        callback()
    except BaseException:
        _log.exception("a device's callback failed")


@dataclass(frozen=True, slots=True)
class Lanes:
    """The lanes of one daemon."""

    reactor: ReactorLane
    trio: TrioLane
    slow: SlowSteps

    def of(self, device: DeviceBase) -> QueueLane:
        """The lane that ``device`` belongs to, by the colour of its handler."""
        return self.trio if device.is_async() else self.reactor


@asynccontextmanager
async def open_lanes(poll_us: float = 32) -> AsyncIterator[Lanes]:
    """Run the reactor on its own thread for as long as the block lasts."""
    token = trio.lowlevel.current_trio_token()
    reactor = Reactor(poll_us)
    slow = SlowSteps()
    reactor.on_slow = slow.note_turn
    thread = threading.Thread(target=reactor.run, name="hcd-reactor", daemon=True)
    async with trio.open_nursery() as nursery:
        thread.start()
        try:
            yield Lanes(ReactorLane(reactor, token), TrioLane(nursery, token, slow), slow)
        finally:
            reactor.stop()
            thread.join()
            reactor.close()
            nursery.cancel_scope.cancel()
