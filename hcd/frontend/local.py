"""A driver's rings and a device in one process, without socket and session: for tests and measurements of devices.

``LocalQueue`` joins one driver's ring to one :class:`~hcd.dataplane.virtqueue.Virtqueue`; turns are given by hand.
``LocalDevice`` runs a whole device on a reactor thread, the way the daemon does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

from hcd_protocols.virtio.features import RingFeature

from hcd.dataplane.memory import MemoryTable, Region
from hcd.dataplane.reactor import Reactor
from hcd.dataplane.stats import DoorbellStats, QueueStats
from hcd.dataplane.virtqueue import Virtqueue
from hcd.device import Device, Handle
from hcd.errors import GuestError
from hcd.frontend.memory import SharedMemory
from hcd.frontend.queue import Queue
from hcd.frontend.ring import DriverRing
from hcd.frontend.ring_packed import PackedRing
from hcd.frontend.ring_split import SplitRing

__all__ = ["LocalDevice", "LocalLane", "LocalQueue", "Scheduler", "map_memory"]

T = TypeVar("T")


def map_memory(memory: SharedMemory) -> MemoryTable:
    """The memory as a back end sees it: second mappings of the same files."""
    return MemoryTable([Region(r.gpa, r.size, r.user_addr, r.mmap_offset, r.fd) for r in memory.regions])


class Scheduler:
    """Stands for a lane: collects what queues ask for."""

    def __init__(self) -> None:
        self.dirty: list[Virtqueue] = []
        self.scheduled: list[Virtqueue] = []

    def flush_later(self, queue: Virtqueue) -> None:
        self.dirty.append(queue)

    def completions(self, queue: Virtqueue) -> None:
        queue.take_remote()

    def schedule(self, queue: Virtqueue) -> None:
        self.scheduled.append(queue)

    def flush(self) -> None:
        """Publish what was completed outside turns: the end of a reactor's round."""
        dirty, self.dirty = self.dirty, []
        for queue in dirty:
            queue.flush()


class LocalQueue:
    """One queue, both sides. ``driver`` is the driver's end, ``device`` the device's.

    ``features`` are as negotiated: RING_PACKED, EVENT_IDX, IN_ORDER, and VERSION_1, without which the ring is legacy
    and ``big_endian`` may be set. What goes wrong in the device is in ``errors``.
    """

    def __init__(
        self,
        memory: SharedMemory,
        table: MemoryTable,
        index: int = 0,
        *,
        features: int = int(RingFeature.VERSION_1),
        size: int = 256,
        operations: tuple[str, ...] = ("request",),
        scheduler: Any = None,
        big_endian: bool = False,
    ) -> None:
        event_idx = bool(features & RingFeature.EVENT_IDX)
        in_order = bool(features & RingFeature.IN_ORDER)
        ring: DriverRing
        if features & RingFeature.RING_PACKED:
            ring = PackedRing(memory, size, event_idx=event_idx, in_order=in_order)
        else:
            ring = SplitRing(memory, size, event_idx=event_idx, in_order=in_order, big_endian=big_endian)
        self.driver = Queue(index, ring)
        self.stats = QueueStats(operations)
        self.errors: list[Exception] = []
        self.scheduler = scheduler or Scheduler()
        self.device = device = Virtqueue(index, DoorbellStats(), self.stats)
        device.scheduler = self.scheduler
        device.on_error = self._on_error
        device.set_memory(table)
        device.set_kick(self.driver.kick_fd)
        device.set_call(self.driver.call_fd)
        desc, avail, used = (memory.user_addr(gpa) for gpa in (ring.desc, ring.driver, ring.device))
        device.start(features, size, desc, avail, used, ring.initial_base, big_endian)
        device.set_enabled(True)

    def _on_error(self, queue: Virtqueue, error: Exception) -> None:
        """Counts bad requests, as a back end does; rings that break are counted by the queue itself."""
        self.errors.append(error)
        if isinstance(error, GuestError) and not queue.broken:
            self.stats.guest_errors += 1

    def turn(self, handler: Callable[[Virtqueue], object]) -> Any:
        """One turn of the device, as a reactor gives it: completions are visible when this returns."""
        self.device.read_kick()
        self.device.begin_turn(1, False)
        try:
            return handler(self.device)
        finally:
            self.device.end_turn()
            if isinstance(self.scheduler, Scheduler):
                self.scheduler.flush()

    def close(self) -> None:
        self.device.stop()
        self.driver.close()


class LocalLane:
    """A reactor on a thread of its own, as :class:`hcd.device.Lane`."""

    def __init__(self, poll_us: float = 0) -> None:
        self.shared: dict[str, Any] = {}
        self.errors: list[Exception] = []
        self.reactor = Reactor(poll_us)
        self.reactor.on_error = self.errors.append
        self._thread = threading.Thread(target=self.reactor.run, name="local-reactor")
        self._thread.start()

    def watch(self, fd: int, callback: Callable[[], None]) -> Handle:
        return self.reactor.watch(fd, callback)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Handle:
        return self.reactor.call_later(seconds, callback)

    def post(self, callback: Callable[[], None]) -> None:
        self.reactor.post(callback)

    def run(self, function: Callable[[], T]) -> T:
        """Call ``function`` on the reactor's thread and return what it returns."""
        done: Future[T] = Future()

        def job() -> None:
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

        self.reactor.post(job)
        return done.result(10)

    def close(self) -> None:
        self.reactor.stop()
        self._thread.join()
        self.reactor.close()


class LocalDevice:
    """A device on a lane, with a driver's end for each of its queues. A context manager."""

    def __init__(
        self,
        device: Device,
        lane: LocalLane,
        *,
        features: int = int(RingFeature.VERSION_1),
        size: int = 256,
        memory: SharedMemory | None = None,
    ) -> None:
        self.device = device
        self.lane = lane
        self.memory = memory or SharedMemory.of_size(8 << 20)
        self.queues: list[LocalQueue] = []
        self._features = features
        self._size = size
        self._watches: list[Handle] = []
        self._closed = False
        self._table = map_memory(self.memory)
        device.open(lane)
        lane.run(lambda: device.connect(features))

    def __enter__(self) -> LocalDevice:
        for index in range(self.device.num_queues):
            self.start_queue(index)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start_queue(self, index: int) -> LocalQueue:
        """Set queue ``index`` up on the lane's thread."""

        def start() -> LocalQueue:
            queue = LocalQueue(
                self.memory,
                self._table,
                index,
                features=self._features,
                size=self._size,
                operations=self.device.operations,
                scheduler=self.lane.reactor,
            )
            queue.device.device = self.device
            queue.device.handler = self.device.process
            self._watches.append(self.lane.reactor.watch_kick(queue.device))
            self.device.start_queue(queue.device)
            self.lane.reactor.schedule(queue.device)
            return queue

        queue = self.lane.run(start)
        self.queues.append(queue)
        return queue

    def stop_queue(self, queue: LocalQueue) -> None:
        """Drain and stop; what the device holds back is given up by it."""

        def stop() -> None:
            queue.device.halt()
            self.device.stop_queue(queue.device)
            self.lane.reactor.forget(queue.device)
            queue.device.stop()

        self.lane.run(stop)

    def close(self) -> None:
        """Stop the queues, end the connection, close the device. Again without harm."""
        if self._closed:
            return
        self._closed = True
        for queue in self.queues:
            self.stop_queue(queue)
        for watch in self._watches:
            self.lane.run(watch.cancel)
        self.lane.run(self.device.disconnect)
        self.device.close()
        self.lane.run(lambda: None)  # close() may have posted its last steps
        for queue in self.queues:
            queue.driver.close()
        self.queues.clear()
        self.memory.close()
