"""What the driver's sides of split and packed rings have in common.

A driver *adds* chains (they get descriptors but the device cannot see them yet), *publishes* them all at
once, asks whether the device wants a *kick*, and later takes *used* chains out. One thread owns a ring.
"""

from __future__ import annotations

import abc
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from hcd.frontend.errors import RingFull
from hcd.frontend.memory import SharedMemory

__all__ = ["INDIRECT", "NEXT", "WRITE", "Buffers", "DriverRing", "Segment", "Used", "need_event"]

#: descriptor flags, virtio 1.3 2.7.5 and 2.8.1
NEXT, WRITE, INDIRECT = 1, 2, 4

#: (guest-physical address, length in bytes) each
Buffers = Sequence[tuple[int, int]]


class Segment(NamedTuple):
    """One descriptor's worth of a chain."""

    gpa: int
    length: int
    flags: int


class Used(NamedTuple):
    """A chain that came back: the token that ``add`` gave out, and the bytes that the device wrote."""

    token: int
    written: int


class Chain(NamedTuple):
    """A chain between ``add`` and ``used``."""

    token: int
    slots: int
    ids: tuple[int, ...]
    table: int | None
    writable: int


def need_event(event: int, new: int, old: int) -> bool:
    """Whether the other side, waiting for index ``event``, is to be told of the step from ``old`` to ``new``.

    All three are 16 bits wide and wrap: virtio 1.3 2.7.7.
    """
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF


class DriverRing(abc.ABC):
    """One virtqueue, seen by its driver.

    ``desc``, ``driver`` and ``device`` are the guest-physical addresses of its three areas (in a split
    ring: descriptor table, available ring, used ring). ``initial_base`` is what SET_VRING_BASE carries for
    a new ring.
    """

    packed: bool
    initial_base: int
    desc: int
    driver: int
    device: int

    def __init__(self, memory: SharedMemory, size: int, *, event_idx: bool, in_order: bool) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.in_order = in_order
        self.free = size
        self._next_token = 0
        #: what is out, by the number that the device gives back; and those numbers, as they were added
        self._chains: dict[int, Chain] = {}
        self._order: deque[int] = deque()

    @property
    def outstanding(self) -> int:
        """How many chains are added and not yet taken out as used."""
        return len(self._chains)

    @abc.abstractmethod
    def add(self, readable: Buffers, writable: Buffers, indirect: bool = False) -> int:
        """Put one chain into free descriptors and return its token, which is never given out again.

        ``indirect`` puts it into a table of its own behind one descriptor. RingFull if it does not fit.
        """

    @abc.abstractmethod
    def publish(self) -> int:
        """Make all that was added visible to the device at once; returns how many chains that were."""

    @abc.abstractmethod
    def kick_needed(self) -> bool:
        """Whether the device wants to hear of what was published since this was last asked."""

    @abc.abstractmethod
    def used(self) -> list[Used]:
        """Take out every chain that the device has finished. DeviceRingError if it finished another one."""

    @abc.abstractmethod
    def enable_interrupts(self) -> bool:
        """Ask for a call at the next used chain. True if one is there already: then none may come for it."""

    @abc.abstractmethod
    def disable_interrupts(self) -> None:
        """Say that calls are not wanted. A hint: some may still come."""

    @abc.abstractmethod
    def rewind(self) -> int:
        """The SET_VRING_BASE value for a back end that knows nothing of this ring, after the last one died.

        It starts at the first chain that is not used yet. Right where the last back end finished chains in
        the order in which they were made available.
        """

    def close(self) -> None:
        """Give the ring's memory back. The device must not use the ring any more."""
        for gpa in (self.desc, self.driver, self.device):
            self.memory.free(gpa)

    def _segments(self, readable: Buffers, writable: Buffers) -> list[Segment]:
        segments = [Segment(gpa, length, 0) for gpa, length in readable]
        segments += [Segment(gpa, length, WRITE) for gpa, length in writable]
        if not segments:
            raise ValueError("a chain needs at least one buffer")
        return segments

    def _take_slots(self, count: int) -> None:
        if count > self.free:
            raise RingFull(f"{count} descriptors wanted, {self.free} of {self.size} free")
        self.free -= count

    def _add(self, number: int, chain: Chain) -> int:
        self._chains[number] = chain
        self._order.append(number)
        return chain.token

    def _finish(self, number: int, written: int, done: list[Used]) -> None:
        """The device is done with this chain; with IN_ORDER those before it too, wholly written (2.7.9, 2.8.9)."""
        while self.in_order and self._order[0] != number:
            self._take_out(self._order[0], self._chains[self._order[0]].writable, done)
        self._take_out(number, written, done)

    def _take_out(self, number: int, written: int, done: list[Used]) -> None:
        chain = self._chains.pop(number)
        if self._order[0] == number:
            self._order.popleft()
        else:
            self._order.remove(number)
        self.free += chain.slots
        if chain.table is not None:
            self.memory.free(chain.table)
        self._pass(chain)
        done.append(Used(chain.token, written))

    @abc.abstractmethod
    def _pass(self, chain: Chain) -> None:
        """``chain`` is taken out: its descriptors are free, and the ring goes on behind it."""

    def _token(self) -> int:
        self._next_token += 1
        return self._next_token
