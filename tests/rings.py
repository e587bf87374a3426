"""Both ends of one virtqueue in this process: hcd's device side on the memory that the front end's driver side uses."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from hcd.dataplane.memory import MemoryTable, Region
from hcd.dataplane.stats import DoorbellStats, QueueStats
from hcd.dataplane.virtqueue import Virtqueue
from hcd.frontend.memory import SharedMemory
from hcd.frontend.ring import DriverRing
from hcd.frontend.ring_packed import PackedRing
from hcd.frontend.ring_split import SplitRing

INDIRECT_DESC, EVENT_IDX, VERSION_1, RING_PACKED, IN_ORDER = (1 << bit for bit in (28, 29, 32, 34, 35))


def map_table(memory: SharedMemory) -> MemoryTable:
    """hcd's view of ``memory``."""
    return MemoryTable([Region(r.gpa, r.size, r.user_addr, r.mmap_offset, r.fd) for r in memory.regions])


class Scheduler:
    """Stands for a lane: remembers what the queue asks of it."""

    def __init__(self) -> None:
        self.to_flush: list[Virtqueue] = []
        self.completed: list[Virtqueue] = []

    def flush_later(self, queue: Virtqueue) -> None:
        self.to_flush.append(queue)

    def completions(self, queue: Virtqueue) -> None:
        self.completed.append(queue)


@dataclass
class Pair:
    """A driver's ring and the device's queue on it."""

    memory: SharedMemory
    ring: DriverRing
    queue: Virtqueue
    stats: QueueStats
    doorbell: DoorbellStats
    table: MemoryTable
    features: int
    scheduler: Scheduler = field(default_factory=Scheduler)
    errors: list[Exception] = field(default_factory=list)
    call_fd: int = -1
    err_fd: int = -1

    def close(self) -> None:
        self.queue.stop()
        self.queue.set_call(-1)
        os.close(self.call_fd)
        os.close(self.err_fd)
        self.memory.close()

    def start(self, base: int | None = None) -> None:
        user = self.memory.user_addr
        ring = self.ring
        self.queue.start(
            self.features, ring.size, user(ring.desc), user(ring.driver), user(ring.device),
            ring.initial_base if base is None else base,
        )
        self.queue.set_enabled(True)

    def put(self, data: bytes) -> tuple[int, int]:
        """``data`` in guest memory, as a buffer."""
        gpa = self.memory.alloc(len(data))
        self.memory.write(gpa, data)
        return gpa, len(data)

    def room(self, size: int) -> tuple[int, int]:
        """Room in guest memory, as a buffer."""
        return self.memory.alloc(size), size

    def calls(self) -> int:
        """Interrupts since the last look."""
        try:
            return os.eventfd_read(self.call_fd)
        except BlockingIOError:
            return 0


def make_pair(
    *,
    packed: bool = False,
    size: int = 16,
    event_idx: bool = True,
    in_order: bool = False,
    memory: SharedMemory | None = None,
    operations: tuple[str, ...] = ("request",),
) -> Pair:
    """A started, enabled queue of ``size`` entries."""
    memory = memory or SharedMemory.of_size(4 << 20)
    kind = PackedRing if packed else SplitRing
    ring = kind(memory, size, event_idx=event_idx, in_order=in_order)
    features = VERSION_1 | INDIRECT_DESC | EVENT_IDX * event_idx | RING_PACKED * packed | IN_ORDER * in_order
    stats, doorbell, table = QueueStats(operations), DoorbellStats(), map_table(memory)
    queue = Virtqueue(0, doorbell, stats, 1024)
    pair = Pair(memory, ring, queue, stats, doorbell, table, features)
    queue.scheduler = pair.scheduler
    queue.on_error = lambda _, error: pair.errors.append(error)
    pair.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    pair.err_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    queue.set_memory(table)
    queue.set_call(pair.call_fd)
    queue.set_err(pair.err_fd)
    pair.start()
    return pair
