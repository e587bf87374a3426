"""The record of requests in flight, in memory that a front end may write as it likes, and rings resumed from it.

A step is two lives of one queue. The first records what it does and is cut off in the middle, as a kill does. Then the
record is damaged: not at all, here and there, or wholly. The second life resumes from it and goes on, while the record
is damaged further. A *case* is a resumption, or a look at the ring after it. What holds: a region or a record that
cannot be is a ProtocolError; nothing else comes out than from rings without a record; a record that nobody touched
gives back exactly the chains that were in flight, in their order.
"""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable
from typing import Any

from hcd.dataplane.memory import MemoryTable
from hcd.dataplane.stats import DoorbellStats, QueueStats
from hcd.dataplane.virtqueue import Inflight, Request, Virtqueue
from hcd.errors import GuestError, ProtocolError
from tests.fuzz.guest import Arena, library
from tests.fuzz.mutate import INTERESTING

__all__ = ["InflightFuzz"]

INDIRECT_DESC, EVENT_IDX, VERSION_1, RING_PACKED, IN_ORDER = (1 << bit for bit in (28, 29, 32, 34, 35))
REGION = 1 << 17
ENTRIES = (4, 16, 64, 256, 1024)


#: what a front end may hand over in the place of a region, among them the right file
_FILES: tuple[Callable[[int], int], ...] = (
    os.dup,
    os.dup,
    lambda _: os.dup(0),
    lambda _: os.eventfd(0),
    lambda _: os.open("/", os.O_RDONLY),
    lambda _: os.open("/dev/zero", os.O_RDWR),
)


class _Lane:
    def flush_later(self, queue: Virtqueue) -> None: ...
    def completions(self, queue: Virtqueue) -> None: ...


class InflightFuzz:
    """The target ``inflight``."""

    name = "inflight"

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.cases = self.resumed = self.refused = self.recovered = self.exact = 0
        self._lib = library()
        self._arena = Arena()
        self._make_file()
        self._queues = [self._make_queue(), self._make_queue()]
        self._errors: list[Exception] = []

    def _make_queue(self) -> Virtqueue:
        queue = Virtqueue(1, DoorbellStats(), QueueStats(("request",)), 1024)
        queue.scheduler = _Lane()
        queue.on_error = lambda _, error: self._errors.append(error)
        return queue

    def _make_file(self) -> None:
        self._file = os.memfd_create("record")
        os.ftruncate(self._file, REGION)
        self._record = mmap.mmap(self._file, REGION)

    def close(self) -> None:
        self._record.close()
        os.close(self._file)
        self._arena.close()

    def describe(self) -> str:
        return (f"{self.resumed} rings resumed with {self.recovered} chains, {self.exact} of them from a record that "
                f"nobody touched, {self.refused} records refused")

    def run_one(self, number: int) -> None:
        chance = self._chance = random.Random(f"{self.seed}/{number}")
        if chance.random() < 0.1:
            self._odd_region()
            return
        self._lay_out(chance)
        before = self._first_life()
        damaged = self._damage()
        self._second_life(before, damaged)

    def _odd_region(self) -> None:
        """Regions of any size and place, of any kind of file."""
        chance = self._chance
        fd = chance.choice(_FILES)(self._file)
        numbers = [chance.choice((0, 1, 64, 4096, REGION, chance.choice(INTERESTING))) for _ in range(2)]
        counts = [chance.choice((0, 1, 2, 256, 1024, 32768, 65535)) for _ in range(2)]
        self.cases += 1
        try:
            Inflight.map(fd, *numbers, *counts).close()
        except ProtocolError:
            self.refused += 1

    def _lay_out(self, chance: random.Random) -> None:
        arena, h = self._arena, self._arena.hostile
        packed = chance.getrandbits(1)
        self._entries = chance.choice(ENTRIES)
        size = chance.choice([size for size in (1, 2, 4, 16, 64, 256, 1024) if size <= self._entries])
        self._features = VERSION_1 | EVENT_IDX * chance.getrandbits(1) | INDIRECT_DESC | RING_PACKED * packed
        self._features |= IN_ORDER * (chance.random() < 0.2)
        arena.lay_out(
            size=size, packed=bool(packed), event_idx=bool(self._features & EVENT_IDX), indirect=True, swap=False
        )
        h.random, h.chaos = chance.getrandbits(64) | 1, 0
        self._base = 0x80008000 if packed else 0
        self._lib.hostile_reset(arena.at, self._base)
        self._errors.clear()

    def _start(self, queue: Virtqueue, resume: bool, base: int) -> None:
        h, user = self._arena.hostile, self._arena.memory.user_addr
        queue.set_memory(self._arena.table)
        area = Inflight.map(os.dup(self._file), 0, REGION, 2, self._entries)
        queue.set_inflight(area, resume)
        queue.start(self._features, h.size, user(h.desc), user(h.driver), user(h.device), base)
        queue.set_enabled(True)

    def _first_life(self) -> list[int] | None:
        """Up to a kill; the heads of the chains in flight, oldest first, None where the model cannot tell."""
        queue, chance, h = self._queues[0], self._chance, self._arena.hostile
        self._start(queue, False, self._base)
        held: list[tuple[Request, int]] = []
        certain = True
        for _ in range(chance.randrange(1, 8)):
            room = h.size - queue.inflight
            waiting = (h.avail - h.last) & 0xFFFF if not h.packed else 0
            self._lib.hostile_fill(self._arena.at, max(0, min(chance.randrange(4), room - waiting)))
            queue.begin_turn(1, False, True)
            for _ in range(min(room, chance.randrange(8))):
                certain &= self._lib.hostile_expect(self._arena.at) >= 0
                request = queue.pop()
                if request is None:
                    break
                if h.head in (head for _, head in held):
                    certain = False  # the driver gave out one head twice: the record has one place for it
                held.append((request, h.head))
            while held and chance.getrandbits(1):
                held.pop(chance.randrange(len(held)))[0].complete(0)
                certain &= not self._features & IN_ORDER
            if chance.random() < 0.3:
                certain = False  # cut off before completions were published
                break
            queue.end_turn()
        queue.set_memory(MemoryTable())
        queue.stop()
        for request, _ in held:
            request.complete(0)
        return None if not certain or queue.broken or h.packed else [head for _, head in held]

    def _damage(self) -> bool:
        """Change the record; False: it is as it was left."""
        chance = self._chance
        kind = chance.random()
        each = len(self._record) if kind > 0.97 else 32 + 32 * self._entries
        if kind < 0.2:
            return False
        if kind > 0.97:
            self._record[: 1 << 14] = chance.randbytes(1 << 14)
            return True
        for _ in range(chance.choice((1, 1, 2, 8))):
            self._poke(each)
        return True

    def _poke(self, each: int) -> None:
        """One field of the queue's record, its header often."""
        chance = self._chance
        start = -(-(32 + 32 * self._entries if self._arena.hostile.packed else 16 + 16 * self._entries) // 64) * 64
        width = chance.choice((1, 2, 2, 2, 8))
        span = chance.choice((32, 32 + 32 * min(8, self._entries), each))
        at = start + chance.randrange(span) // width * width
        value = chance.choice((*INTERESTING, 1, 1, chance.randrange(self._entries)))
        self._record[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")

    def _second_life(self, before: list[int] | None, damaged: bool) -> None:
        queue, chance, h = self._queues[1], self._chance, self._arena.hostile
        self._errors.clear()
        self.cases += 1
        why = ""
        try:
            self._start(queue, True, chance.choice((self._base, 0, chance.getrandbits(32))))
        except ProtocolError as error:
            why = str(error)
        if why:
            assert damaged or before is None or "base" in why, f"nobody touched the record: {why}"
            self.refused += 1
            return
        self.resumed += 1
        self.recovered += queue.recovered
        assert queue.recovered <= h.size
        if before is not None and not damaged:
            self.exact += 1
            assert queue.recovered == len(before), f"{queue.recovered} chains recovered, {len(before)} were in flight"
        held: list[Request] = []
        if chance.random() < 0.002:
            self._cut_off()
        for _ in range(chance.randrange(1, 6)):
            if damaged and chance.random() < 0.3:
                self._poke(32 + 32 * self._entries)
            self._turn(queue, held)
            if queue.broken:
                assert [type(error) for error in self._errors] == [GuestError], self._errors
                break
        queue.halt()
        for request in held:
            request.complete(0)
        queue.stop()
        assert queue.inflight == 0

    def _cut_off(self) -> None:
        """The front end truncates the region while the ring records in it. The next life gets a new one."""
        os.ftruncate(self._file, 0)
        self._record.close()
        os.close(self._file)
        self._make_file()

    def _turn(self, queue: Virtqueue, held: list[Request]) -> None:
        chance = self._chance
        queue.begin_turn(1, False, True)
        for _ in range(chance.randrange(1, 40)):
            self.cases += 1
            request: Any = queue.pop()
            if request is None:
                break
            request.write(b"answer")
            if chance.random() < 0.1:
                queue.unpop(request)
            elif chance.random() < 0.3:
                held.append(request)
            else:
                request.complete(0)
        queue.end_turn()
        self._lib.hostile_fill(self._arena.at, chance.randrange(4))
