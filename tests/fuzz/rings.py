"""Rings under a hostile driver: what ``Virtqueue`` makes of any bytes in guest memory.

An *episode* is one set-up of one queue, split or packed, at a random base and with random features, and some turns of
it. A *case* is one look at the ring: the driver made chains available, broken or sound, and the queue pops. What holds:

* Nothing but the documented exceptions comes out, and no memory outside the shared regions is ever in a request.
* While nobody else writes, the queue takes exactly the chains that the model in hostile.c finds, with its sizes and
  bytes, and breaks exactly where the model says that the driver broke the rules.
* Every request that was taken goes back once: with a driver that leaves the used ring alone it is read from there.
* The work of one pop is bounded by the ring and the regions.
* In racing episodes a thread changes rings and tables all the while; in some it truncates the memory under everything,
  in some the memory is revoked while requests are held.
"""

from __future__ import annotations

import ctypes
import os
import random
import threading
from collections import deque
from contextlib import suppress
from typing import Any

from hcd.dataplane.stats import DoorbellStats, QueueStats
from hcd.dataplane.virtqueue import Request, Virtqueue
from hcd.errors import GuestError, ProtocolError
from tests.fuzz.guest import Arena, library

__all__ = ["RingFuzz"]

INDIRECT_DESC, EVENT_IDX, VERSION_1, RING_PACKED, IN_ORDER = (1 << bit for bit in (28, 29, 32, 34, 35))
SPLIT_SIZES = (1, 2, 4, 8, 16, 64, 256, 1024)
PACKED_SIZES = (1, 2, 3, 5, 8, 16, 63, 256, 1000, 1024)
CHAOS = (0, 0, 6, 24, 96)


class _Scheduler:
    """Stands for a lane."""

    def __init__(self) -> None:
        self.dirty: list[Virtqueue] = []

    def flush_later(self, queue: Virtqueue) -> None:
        self.dirty.append(queue)

    def completions(self, queue: Virtqueue) -> None:
        pass  # looked at in each turn


class RingFuzz:
    """The target ``rings``. ``run_one(number)`` plays episode ``number`` of ``seed``."""

    name = "rings"

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.cases = self.sound = self.broken = self.races = 0
        self._lib = library()
        self._arena = Arena()
        self._queue = self._make_queue()
        self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._file = os.memfd_create("fuzz")
        os.ftruncate(self._file, 1 << 16)
        self._held: list[Request] = []
        self._settled: list[tuple[int, int]] = []
        self._heads: dict[Request, int] = {}
        self._errors: list[Exception] = []
        self._over: deque[Request] = deque(maxlen=6)  # completed, and still known to somebody

    def _make_queue(self) -> Virtqueue:
        queue = Virtqueue(0, DoorbellStats(), QueueStats(("request",)), 1024)
        queue.scheduler = _Scheduler()
        queue.on_error = lambda _, error: self._errors.append(error)
        self._call = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        queue.set_call(self._call)
        queue.set_memory(self._arena.table)
        return queue

    def close(self) -> None:
        for fd in (*self._pipe, self._file, self._call):
            os.close(fd)
        self._arena.close()

    def describe(self) -> str:
        return f"{self.sound} chains taken, {self.broken} rings broken, {self.races} races"

    # -- an episode

    def run_one(self, number: int) -> None:
        chance = self._chance = random.Random(f"{self.seed}/{number}")
        self._start(chance)
        kind = chance.random()
        if kind < 0.97:
            for _ in range(chance.randrange(1, 24)):
                if not self._turn(exact=True):
                    break
        elif kind < 0.994:
            self._race()
        elif kind < 0.997:
            self._revoke()
        else:
            self._truncate()
        self._end()

    def _start(self, chance: random.Random) -> None:
        arena, h = self._arena, self._arena.hostile
        packed = chance.random() < 0.5
        features = VERSION_1 | EVENT_IDX * chance.getrandbits(1) | INDIRECT_DESC * (chance.random() < 0.8)
        features |= IN_ORDER * (chance.random() < 0.2)
        big = not packed and chance.random() < 0.1
        if packed:
            features |= RING_PACKED
        if big:
            features &= ~VERSION_1
        size = chance.choice(PACKED_SIZES if packed else SPLIT_SIZES)
        arena.lay_out(
            size=size, packed=packed, event_idx=bool(features & EVENT_IDX), indirect=bool(features & INDIRECT_DESC),
            swap=big,
        )
        h.random, h.chaos = chance.getrandbits(64) | 1, chance.choice(CHAOS)
        base = chance.choice((0, 1, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF, chance.getrandbits(16)))
        if packed:
            half = base % size | (base & 0x8000)
            base = half | half << 16
        self._lib.hostile_reset(arena.at, base)
        self._features, self._base = features, base
        self._heads.clear()
        self._settled.clear()
        self._errors.clear()
        self._completed = 0
        user = arena.memory.user_addr
        self._queue.start(features, size, user(h.desc), user(h.driver), user(h.device), base, big)
        self._queue.set_enabled(True)

    def _end(self) -> None:
        """Some requests outlive their ring."""
        for request in self._held:
            if self._chance.random() < 0.7:
                request.complete(0)
        if self._chance.random() < 0.5:
            self._queue.halt()
        self._queue.stop()
        for request in self._held:
            if not request.completed:
                request.complete(0)
        self._held.clear()
        assert self._queue.inflight == 0, f"{self._queue.inflight} requests in flight after all were completed"

    # -- turns

    def _turn(self, *, exact: bool, fill: bool = True) -> bool:
        """One turn of the device; False when the ring is broken. ``exact``: the model must agree."""
        queue, lib, at, chance = self._queue, self._lib, self._arena.at, self._chance
        if fill:
            lib.hostile_fill(at, 1 + chance.getrandbits(3))
        queue.begin_turn(1, False, True)
        self._seen = queue.inflight  # and taken in this turn
        for _ in range(12):
            expected = 0
            full = queue.inflight >= queue.size
            if exact:
                expected = lib.hostile_expect(at)
            self.cases += 1
            request = queue.pop()
            if exact and not full:
                self._compare(expected, request)
            if request is None:
                break
            assert not (exact and full), "more requests in flight than the ring has entries"
            assert not any(request is over for over in self._over), "a request that was completed comes again"
            self.sound += 1
            self._seen += 1
            self._heads[request] = self._arena.hostile.head
            self._treat(request, exact)
        queue.take_remote()
        queue.end_turn()
        if exact and self._arena.hostile.chaos == 0:
            self._check_used()
        bits = chance.getrandbits(3)
        if bits == 0:
            queue.enable_kicks()
        elif bits == 1:
            queue.disable_kicks()
        if queue.broken:
            self._expect_broken()
            return False
        return True

    def _compare(self, expected: int, request: Request | None) -> None:
        h, queue = self._arena.hostile, self._queue
        if expected and queue.broken.startswith("more chains"):
            # Completions that the driver cannot see yet count too; some of this turn's may have been shown already.
            assert self._seen >= queue.size, queue.broken
        elif expected < 0:
            assert request is None, f"the model refuses a chain that the queue took: {request}"
            assert queue.broken, "the model refuses a chain, and the queue says nothing"
        elif expected == 0:
            assert request is None, f"the model finds no chain, the queue found {request}"
            assert not queue.broken, f"the model finds nothing wrong; the queue: {queue.broken}"
        else:
            assert request is not None, f"the model finds a chain; the queue: {queue.broken or 'nothing'}"
            found = (request.readable_size, request.writable_size)
            assert found == (h.out_size, h.in_size), f"{found}; by the model {(h.out_size, h.in_size)}"

    def _expect_broken(self) -> None:
        self.broken += 1
        assert [type(error) for error in self._errors] == [GuestError], self._errors
        assert not self._queue.running
        assert self._queue.pop() is None

    def _check_used(self) -> None:
        """What the driver finds in its used ring is what was completed, in that order."""
        settled, self._settled = self._settled, []
        h, memory = self._arena.hostile, self._arena.memory
        if self._features & IN_ORDER or not settled:
            return
        if not h.packed:
            order = "big" if h.swap else "little"
            index = int.from_bytes(memory.read(h.device + 2, 2), order)
            start = self._base + self._completed & 0xFFFF
            self._completed += len(settled)
            assert index == self._base + self._completed & 0xFFFF, "the used index is not what was completed"
            for i, (head, written) in enumerate(settled[-h.size :], max(0, len(settled) - h.size)):
                at = h.device + 4 + 8 * ((start + i) % 0x10000 % h.size)
                entry = memory.read(at, 8)
                found = int.from_bytes(entry[:4], order), int.from_bytes(entry[4:], order)
                assert found == (head, written), f"used entry {found}, completed {(head, written)}"

    # -- what a device may do with a request

    def _treat(self, request: Request, exact: bool) -> None:
        chance = self._chance
        bits = chance.getrandbits(16)
        if exact and bits & 3 == 0 and request.readable_size < 1 << 20:
            data = request.read()
            assert self._lib.hostile_sum(data, len(data)) == self._arena.hostile.sum, "other bytes than the driver's"
        action = _ACTIONS[bits >> 8 & 31]
        with suppress(GuestError):
            action(self, request, chance)
        if request.completed:
            return
        if bits & 0x3C == 0:
            self._check_views(request)
        if bits & 0xC0 == 0 and len(self._held) < 40:
            request.hold()
            self._held.append(request)
            return
        self._complete(request)
        if self._held and bits & 0x40:
            held = self._held.pop(bits % len(self._held))
            if not held.completed:
                self._complete(held)

    def _complete(self, request: Request) -> None:
        written = min(request.writable_size, self._chance.getrandbits(10))
        self._settled.append((self._heads.pop(request, 0), written))
        if not written & 3:
            self._over.append(request)
        request.complete(written)

    def _check_views(self, request: Request) -> None:
        """All that a request offers lies in the shared memory, and adds up to its sizes."""
        pieces = 0
        for views, size in (
            (request.readable_views(), request.readable_size), (request.writable_views(), request.writable_size)
        ):
            pieces += len(views)
            total = 0
            for view in views:
                total += len(view)
                assert self._arena.holds(_address(view), len(view)), "a piece outside the shared memory"
            assert total == size
        most = 2 * self._queue.size + self._arena.hostile.n_regions
        assert pieces <= most, f"{pieces} pieces in a ring of {self._queue.size}"

    def _nothing(self, request: Request, chance: random.Random) -> None:
        pass

    def _headers(self, request: Request, chance: random.Random) -> None:
        for read in (request.u8, request.u16, request.u32, request.u64):
            offset = chance.choice((0, 1, 3, 7, 8, 15, chance.getrandbits(10), request.readable_size - 1, 1 << 63))
            try:
                read(offset % (1 << 64))
            except GuestError:
                assert offset % (1 << 64) + 8 > request.readable_size

    def _read(self, request: Request, chance: random.Random) -> None:
        before = request.readable
        assert len(request.read(chance.getrandbits(12))) <= before
        request.skip(chance.getrandbits(8))

    def _write(self, request: Request, chance: random.Random) -> None:
        wanted = chance.getrandbits(12)
        room = request.writable
        assert request.write(b"\x5a" * wanted) == min(wanted, room)

    def _write_at(self, request: Request, chance: random.Random) -> None:
        offset = chance.choice((0, chance.getrandbits(11), max(0, request.writable_size - 1), (1 << 64) - 4))
        request.write_at(offset, bytes(chance.getrandbits(6)))

    def _copy(self, request: Request, chance: random.Random) -> None:
        for other in self._held[:1]:
            if other.completed:
                return
            most = min(request.readable, other.writable)
            if most < 1 << 20:
                assert request.copy_to(other) == most

    def _files(self, request: Request, chance: random.Random) -> None:
        offset = chance.getrandbits(16)
        moved = request.preadv(self._file, offset, chance.getrandbits(12))
        assert moved <= max(0, (1 << 16) - offset)
        os.ftruncate(self._file, 1 << 16)
        request.pwritev(self._file, offset, chance.getrandbits(12))
        os.ftruncate(self._file, 1 << 16)

    def _stream(self, request: Request, chance: random.Random) -> None:
        with suppress(BlockingIOError):
            request.pwritev(self._pipe[1], -1, 4000)
            request.preadv(self._pipe[0], -1, 4000)

    def _twice(self, request: Request, chance: random.Random) -> None:
        self._complete(request)
        for again in (request.complete, request.read, request.readable_views):
            try:
                again()
            except ValueError:
                continue
            raise AssertionError("a completed request can still be used")

    def _too_much(self, request: Request, chance: random.Random) -> None:
        try:
            request.complete(request.writable_size + 1)
        except ValueError:
            return
        raise AssertionError("more was written than there is room for")

    def _unpop(self, request: Request, chance: random.Random) -> None:
        slots = self._arena.hostile.slots
        self._queue.unpop(request)
        self._heads.pop(request, None)
        self._lib.hostile_back(self._arena.at, slots)

    def _elsewhere(self, request: Request, chance: random.Random) -> None:
        """Another thread completes it."""
        if chance.getrandbits(4) == 0:
            thread = threading.Thread(target=self._complete, args=(request,))
            thread.start()
            thread.join()
            self._queue.take_remote()

    # -- with somebody else at work

    def _race(self) -> None:
        self.races += 1
        self._arena.hostile.chaos = 64
        self._lib.hostile_race(self._arena.at, -1)
        try:
            for _ in range(60):
                if not self._turn(exact=False):
                    self._again()
        finally:
            self._lib.hostile_rest(self._arena.at)

    def _again(self) -> None:
        """Set the broken ring up again, while the thread goes on."""
        self._errors.clear()
        base = self._queue.stop()
        h, user = self._arena.hostile, self._arena.memory.user_addr
        try:
            self._queue.start(self._features, h.size, user(h.desc), user(h.driver), user(h.device), base, bool(h.swap))
        except ProtocolError:
            self._queue.start(self._features, h.size, user(h.desc), user(h.driver), user(h.device), self._base)

    def _revoke(self) -> None:
        """The session's memory is taken away while requests are held and a ring runs."""
        for _ in range(3):
            self._turn(exact=False)
        old = self._arena.table
        self._arena.remap()
        self._queue.set_memory(self._arena.table)
        old.revoke()
        for request in list(self._held):
            if not request.completed:
                self._treat_revoked(request)
        self._held.clear()
        self._turn(exact=False)

    def _treat_revoked(self, request: Request) -> None:
        with suppress(GuestError):
            if request.readable_size < 1 << 20:
                request.read()
            request.write(bytes(5000))
            request.preadv(self._file, 0, 5000)
        if not request.completed:
            request.complete(0)

    def _truncate(self) -> None:
        """A front end cuts its memory off under everything. It is of no use afterwards."""
        self.races += 1
        lib, arena = self._lib, self._arena
        lib.hostile_fill(arena.at, 64)
        lib.hostile_race(arena.at, arena.memory.regions[0].fd)
        for _ in range(200):
            if not self._turn(exact=False, fill=False):
                self._again()
            if os.fstat(arena.memory.regions[0].fd).st_size == 0:
                break
        lib.hostile_rest(arena.at)
        os.ftruncate(arena.memory.regions[0].fd, 0)
        self._turn(exact=False, fill=False)
        assert arena.table.poisoned, "nobody noticed that the memory was truncated"
        for request in self._held:
            if not request.completed:
                request.complete(0)
        self._held.clear()
        self._queue.stop()
        arena.close()
        self._arena = Arena()
        self._queue.set_memory(self._arena.table)
        self._start(self._chance)


def _address(view: memoryview) -> int:
    """Where the bytes of ``view`` are."""
    buffer = (ctypes.c_byte * 120)()  # Py_buffer
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
    address = ctypes.c_void_p.from_buffer(buffer).value
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return address or 0


_MEANT: tuple[tuple[Any, int], ...] = (
    (RingFuzz._nothing, 8), (RingFuzz._headers, 4), (RingFuzz._read, 4), (RingFuzz._write, 4), (RingFuzz._write_at, 3),
    (RingFuzz._copy, 2), (RingFuzz._files, 1), (RingFuzz._stream, 1), (RingFuzz._twice, 1), (RingFuzz._too_much, 1),
    (RingFuzz._unpop, 2), (RingFuzz._elsewhere, 1),
)
_ACTIONS = tuple(action for action, times in _MEANT for _ in range(times))
