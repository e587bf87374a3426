"""``kill -9`` between any two machine instructions of what a queue does, and of its recovery.

The compiled code itself is run under single-step; each state of memory that a kill could leave is followed into a
future in which a new process serves the rest. See stepping.py and crash.py.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

import pytest
from crash import Rig, expect_all_served
from stepping import Stepped

pytestmark = pytest.mark.long

Snapshot = tuple[bytes, bytes]


class Watch:
    """Collects each different state of ring and record."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        ring, size = rig.ring, rig.size
        lengths = (16 * size, 4, 4) if rig.packed else (16 * size, 6 + 2 * size, 6 + 8 * size)
        self._views = [
            rig.memory.view(address, length)
            for address, length in zip((ring.desc, ring.driver, ring.device), lengths, strict=True)
        ]
        self._views.append(memoryview(mmap.mmap(rig.area.fd, rig.area.size)))
        self._last = self._look()
        self.found: list[Snapshot] = []

    def _look(self) -> list[bytes]:
        return [bytes(view) for view in self._views]

    def __call__(self) -> None:
        now = self._look()
        if now != self._last:
            self._last = now
            self.found.append((self.rig.guest(), self.rig.record()))

    def take(self) -> list[Snapshot]:
        found, self.found = self.found, []
        return found


def rotate(order: list[int], by: int) -> None:
    order[:] = order[by:] + order[:by]


class Life:
    """One device process on one rig, stepped, with every state on the way followed into its future."""

    def __init__(self, rig: Rig, *, resume: bool = False, taken: list[int] | None = None) -> None:
        self.rig = rig
        self.watch = Watch(rig)
        self.process = Stepped(rig, resume=resume)
        self.taken = taken or []
        self.checked = 0

    def step(self, operation: str) -> list[Snapshot]:
        """Carry it out; returns what states it went through, all of which are checked."""
        name, *words = operation.split()
        if name == "take":
            self.taken.append(int(words[0]))
            operation = name
        self.process.run(operation, self.watch)
        found = self.watch.take()
        for guest, record in found:
            for first in (0, 2):  # the next process may complete them in another order
                future = self.rig.copy(guest, record)
                try:
                    expect_all_served(future, self.taken, shuffle=lambda order, n=first: rotate(order, n))
                finally:
                    future.close()
        self.checked += len(found)
        if name == "put-back":
            self.taken.pop()
        return found


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(packed=request.param, size=8)


@pytest.fixture
def live(rig: Rig) -> Callable[..., Life]:
    def make(rig: Rig = rig, **options: object) -> Life:
        return Life(rig, **options)  # type: ignore[arg-type]

    return make


def test_at_every_instruction(rig: Rig, live: Callable[..., Life]) -> None:
    """Taking, putting back, and batches out of order that go round the end of the ring."""
    life = live()
    with life.process:
        life.process.run("start")
        for pieces in (1, 2, 1, 3):
            rig.add(pieces)
        for number in (1, 2, 3, 4):
            assert life.step(f"take {number}")
        assert life.step("put-back")
        life.step("complete 2")
        assert len(life.step("flush")) >= 4
        assert [done for done, _ in rig.used()] == [2]
        rig.add(2)
        life.step("take 4")
        life.step("complete 4 1")
        life.step("take 5")
        life.step("complete 3")
        assert len(life.step("flush")) >= 6, "a batch of three is published in several steps"
        assert [done for done, _ in rig.used()] == [4, 1, 3]
        for pieces in (1, 3, 2):  # with the one of two pieces that is in flight: the whole ring, in one batch
            rig.add(pieces)
        for number in (6, 7, 8):
            life.step(f"take {number}")
        life.step("complete 7 5 8 6")
        life.step("flush")
        assert [done for done, _ in rig.used()] == [7, 5, 8, 6]
    assert life.checked > 50
    rig.close()


def test_at_every_instruction_of_a_recovery(rig: Rig, live: Callable[..., Life]) -> None:
    """From each state that publishing a batch goes through, a recovery that is cut at any instruction itself."""
    life = live()
    with life.process:
        life.process.run("start")
        for pieces in (2, 1, 3, 1):
            rig.add(pieces)
        for number in (1, 2, 3, 4):
            life.step(f"take {number}")
        life.step("complete 3 1 2")
        states = life.step("flush")
    assert len(states) >= 6
    checked = 0
    for guest, record in states:
        world = rig.copy(guest, record)
        second = live(world, resume=True, taken=[1, 2, 3, 4])
        with second.process:
            second.step("start")
        checked += second.checked
        world.close()
    assert checked > len(states)
    rig.close()


def test_at_every_instruction_of_a_beginning(rig: Rig, live: Callable[..., Life]) -> None:
    """A record that is not begun yet says nothing: the base of the front end counts."""
    for pieces in (1, 2):
        rig.add(pieces)
    life = live()
    with life.process:
        life.step("start")
    rig.close()
