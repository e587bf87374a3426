"""Death of a device process at a chosen point, and what the next one makes of what is left.

What a kill leaves is memory: the guest's, and the record of requests in flight. ``Rig`` has both, and the driver.
A device queue is opened on it and abandoned; ``Rig.copy`` is the same world again, at the moment of the copy, so that
one moment can be followed into several futures.
"""

from __future__ import annotations

import copy
import os
from typing import Any

from rings import EVENT_IDX, INDIRECT_DESC, RING_PACKED, VERSION_1, Scheduler, map_table

from hcd.dataplane.memory import MemoryTable
from hcd.dataplane.stats import DoorbellStats, QueueStats
from hcd.dataplane.virtqueue import Inflight, Request, Virtqueue
from hcd.frontend.errors import RingFull
from hcd.frontend.memory import SharedMemory
from hcd.frontend.ring import DriverRing
from hcd.frontend.ring_packed import PackedRing
from hcd.frontend.ring_split import SplitRing

MEMORY = 64 << 10
#: what a driver remembers of its ring, beside the memory
_DRIVER_STATE = (
    "free", "_next_token", "_unused", "_chains", "_order", "_next_avail", "_published", "_asked", "_last_used",
    "_ids", "_staged", "_avail_wrap", "_next_used", "_used_wrap", "_fresh",
)  # fmt: skip


class Rig:
    """A driver, its memory and a record of requests in flight. ``size``: entries of ring and record."""

    def __init__(self, *, packed: bool, size: int, event_idx: bool = True, record_size: int | None = None) -> None:
        self.packed, self.size, self.event_idx = packed, size, event_idx
        self.memory = SharedMemory.of_size(MEMORY)
        self.area = Inflight.create(1, record_size or size)
        kind = PackedRing if packed else SplitRing
        self.ring: DriverRing = kind(self.memory, size, event_idx=event_idx)
        #: token -> the number that the chain carries, and its buffers
        self._held: dict[int, tuple[int, list[int]]] = {}
        self._idle = [self.memory.alloc(8) for _ in range(size)]
        self._number = 0

    def close(self) -> None:
        self.area.close()
        self.memory.close()

    def copy(self, guest: bytes | None = None, record: bytes | None = None) -> Rig:
        """Another world that is this one now, or with memory as it was at some other moment."""
        other = Rig(packed=self.packed, size=self.size, event_idx=self.event_idx, record_size=self.area.queue_size)
        for name in _DRIVER_STATE:
            if hasattr(self.ring, name):
                setattr(other.ring, name, copy.deepcopy(getattr(self.ring, name)))
        other._held, other._idle, other._number = dict(self._held), list(self._idle), self._number
        other.memory.regions[0].view[:] = self.guest() if guest is None else guest
        os.pwrite(other.area.fd, self.record() if record is None else record, 0)
        return other

    def guest(self) -> bytes:
        return bytes(self.memory.regions[0].view)

    def record(self) -> bytes:
        return os.pread(self.area.fd, self.area.size, 0)

    # -- the driver

    def add(self, pieces: int = 1) -> int:
        """Make a chain of ``pieces`` descriptors available; returns its number, which is in its first 8 bytes.

        RingFull where there is no room for it.
        """
        if pieces > len(self._idle):
            raise RingFull(f"{pieces} buffers")
        slots = [self._idle.pop() for _ in range(pieces)]
        self._number += 1
        self.memory.write(slots[0], self._number.to_bytes(8, "little"))
        token = self.ring.add([(slots[0], 8)], [(slot, 8) for slot in slots[1:]])
        self._held[token] = self._number, slots
        self.ring.publish()
        return self._number

    @property
    def out(self) -> list[int]:
        """The numbers of the chains that the driver has not got back."""
        return sorted(number for number, _ in self._held.values())

    def used(self) -> list[tuple[int, int]]:
        """(number, written) of what the driver sees as completed since the last look."""
        found = []
        for done in self.ring.used():
            number, slots = self._held.pop(done.token)
            self._idle += slots
            found.append((number, done.written))
        return found

    # -- the device

    def open(self, *, resume: bool = True, base: int | None = None) -> Virtqueue:
        """A queue as a new process makes it: from ring and record."""
        queue = Virtqueue(0, DoorbellStats(), QueueStats(("request",)), 1024)
        queue.scheduler = Scheduler()
        queue.on_error = _raise
        queue.set_memory(map_table(self.memory))
        area = self.area
        queue.set_inflight(
            Inflight.map(os.dup(area.fd), area.offset, area.size, area.num_queues, area.queue_size), resume
        )
        features = VERSION_1 | INDIRECT_DESC | EVENT_IDX * self.event_idx | RING_PACKED * self.packed
        addresses = [self.memory.user_addr(a) for a in (self.ring.desc, self.ring.driver, self.ring.device)]
        queue.start(features, self.size, *addresses, self.ring.initial_base if base is None else base)
        queue.set_enabled(True)
        return queue


def _raise(queue: Virtqueue, error: Exception) -> None:
    raise error


def number(request: Request) -> int:
    return request.u64(0)


def answer(request: Request) -> int:
    """What a device writes for ``request``: depends on it, so that a mix-up shows."""
    return min(request.writable_size, number(request) % 8)


def abandon(queue: Virtqueue, requests: list[Request]) -> None:
    """The process is dead: nothing of the queue reaches the ring or the record any more."""
    queue.set_memory(MemoryTable())
    queue.set_inflight(None)
    queue.stop()
    for request in requests:
        if not request.completed:
            request.complete(0)


def expect_all_served(rig: Rig, taken: list[int], *, shuffle: Any = None) -> None:
    """A new device on ``rig`` serves exactly what the driver has not got back, once each, and the ring is sound.

    ``taken``: the numbers that the dead one had taken, oldest first; those still due come first, in this order.
    """
    seen_before = [number for number, _ in rig.used()]
    assert len(set(seen_before)) == len(seen_before)
    due = rig.out
    queue = rig.open()
    requests = queue.pop_many(2 * rig.size)
    numbers = [number(request) for request in requests]
    assert sorted(numbers) == due
    again = [n for n in taken if n in due]
    assert numbers[: len(again)] == again
    assert numbers[len(again) :] == [n for n in due if n not in again]
    answers = [(number(request), answer(request)) for request in requests]
    if shuffle is not None:
        order = list(range(len(requests)))
        shuffle(order)
        requests, answers = [requests[i] for i in order], [answers[i] for i in order]
    seen = []
    for i, request in enumerate(requests):
        request.complete(answer(request))
        if i % 3 == 0:  # the driver looks in between: what it sees is that much and no more
            queue.flush()
            seen += rig.used()
            assert seen == answers[: i + 1]
    queue.flush()
    assert seen + rig.used() == answers
    assert rig.ring.outstanding == 0
    for lap in range(3):  # the ring and the record go on
        sent = [rig.add(1 + (lap + i) % 3) for i in range(rig.size // 3)]
        requests = queue.pop_many(2 * rig.size)
        assert [number(request) for request in requests] == sent
        for request in reversed(requests):
            request.complete(answer(request))
        queue.flush()
        assert [done for done, _ in rig.used()] == sent[::-1]
    queue.stop()
