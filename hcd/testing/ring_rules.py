"""The rules of the conformance check for doorbell devices: each plays one scene with VMMs of its own.

The check knows nothing of the device but its doorbells, interrupts and memory. It plays VMMs and guests that are legal
and inconvenient: they register some of the table, ring often or at once, fill the memory with anything, go while their
rings wait, come back. What a ring is for, only the author can tell (:class:`Ring`).
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from hcd_protocols.doorbell import Item, Kind

from hcd.frontend.errors import BackendError
from hcd.testing.scene import Broken, MisfitError, Scene, reconnect
from hcd.testing.serving import ServedDoorbells
from hcd.testing.vmm import Vmm

__all__ = ["PATIENCE", "RULES", "Ring", "RingRun", "signalled"]

#: how long (seconds) to listen for interrupts that nobody asked for
PATIENCE = 0.1
#: how often a doorbell is rung at once: a guest does that while hcd is busy for a tenth of a second
COUNTS = (1, 2, 100_000)
#: what the guest fills the shared memory with
FILLS = (0xFF, 0x00, 0x80)


@dataclass(frozen=True, slots=True)
class Ring:
    """``doorbell`` is rung ``count`` times at once, and the device must answer by ``interrupt``.

    ``memory``: what the guest writes into the shared memory before, by offset; ``answer``: what must be there when the
    interrupt comes. The same is done many times over.
    """

    doorbell: str
    interrupt: str
    count: int = 1
    memory: Mapping[int, bytes] = field(default_factory=dict)
    answer: Mapping[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"{self.doorbell} is rung {self.count} times")

    def __str__(self) -> str:
        return f"{self.count} rings of {self.doorbell}" if self.count > 1 else f"a ring of {self.doorbell}"


class RingRun(Scene):
    """A doorbell device and the VMM that plays the scene."""

    def __init__(self, served: ServedDoorbells, exchanges: Sequence[Ring], timeout: float) -> None:
        super().__init__(served, exchanges, timeout)
        self.vmm: Vmm

    def connect(self, refuse: Callable[[Item], int] = lambda item: 0) -> Vmm:
        """``refuse``: the errno with which the VMM cannot have an item, or 0."""
        self.close()
        self.vmm = self.served.vmm(register=refuse)
        self._open.append(self.vmm)
        return self.vmm

    def close(self) -> None:
        """Hang up; what was rung before is still handled."""
        super().close()
        self.served.wait_disconnected()

    def ring_all(self, counts: Sequence[int] = (1,)) -> None:
        """Every doorbell, without waiting for answers."""
        for count in counts:
            for name in self.vmm.names(Kind.DOORBELL):
                self.vmm.ring(name, count)

    def fill(self, value: int) -> None:
        """Write ``value`` to every byte of the shared memory, where there is some."""
        if self.served.host.memory is not None:
            with self.vmm.map_memory() as memory:
                memory[:] = bytes([value]) * len(memory)

    def must_answer(self, ring: Ring) -> None:
        """An exchange of the author's."""
        vmm = self.vmm
        self._fits(ring)
        for offset, data in ring.memory.items():
            with vmm.map_memory() as memory:
                memory[offset : offset + len(data)] = data
        signalled(vmm, (ring.interrupt,), 0)  # what came before
        vmm.ring(ring.doorbell, ring.count)
        try:
            vmm.wait_interrupt(ring.interrupt, self.timeout)
        except BackendError as error:
            raise Broken(f"{ring}, {self.step}: no answer ({error})", "answer") from None
        for offset, expected in ring.answer.items():
            with vmm.map_memory() as memory:
                found = memory[offset : offset + len(expected)]
            if found != expected:
                raise Broken(f"{ring}, {self.step}: at {offset:#x} of the memory is {found!r}; expected {expected!r}",
                             "answer")

    def _fits(self, ring: Ring) -> None:
        """MisfitError unless the device has what ``ring`` is about."""
        for kind, name in ((Kind.DOORBELL, ring.doorbell), (Kind.INTERRUPT, ring.interrupt)):
            if name not in (names := self.vmm.names(kind)):
                found = ", ".join(names) or "none"
                raise MisfitError(f'{ring}: the device has no {kind.name.lower()} "{name}"; it has {found}')
        memory = self.served.host.memory
        size = 0 if memory is None else memory.size
        for offset, data in (*ring.memory.items(), *ring.answer.items()):
            if not 0 <= offset <= size - len(data):
                raise MisfitError(f"{ring}: {len(data)} bytes at {offset:#x}; the shared memory has {size} bytes")

    def work_once(self) -> None:
        for ring in self.exchanges:
            self.must_answer(ring)

    def signals(self) -> int:
        """How often the device has signalled interrupts so far, whether there was somebody to hear it or not."""
        stats = [one.line.stats for one in self.served.host.interrupts.values()]
        return sum(one.sent + one.pending + one.absent for one in stats)


def signalled(vmm: Vmm, names: Collection[str], seconds: float) -> list[str]:
    """Those of the interrupts ``names`` that come within ``seconds``, or have come before."""
    deadline = time.monotonic() + seconds
    found = []
    for name in names:
        try:
            vmm.wait_interrupt(name, max(0.0, deadline - time.monotonic()))
        except BackendError:
            continue
        found.append(name)
    return found


# -- the rules


def late(run: RingRun) -> None:
    """Answers are for the VMM that rang: after disconnect() there are none, also not for the next one."""
    names = run.connect().names(Kind.INTERRUPT)
    if not names or signalled(run.vmm, names, PATIENCE):
        return  # it interrupts without being rung
    run.ring_all()
    run.close()
    before = run.signals()
    vmm = run.connect()
    heard = signalled(vmm, names, PATIENCE)
    if heard or run.signals() > before:
        raise Broken(f"a VMM that rang nothing is interrupted ({', '.join(heard) or 'as if it had'}): "
                     "the answer to the one before came after disconnect()")
    run.ring_all()
    run.close()
    before = run.signals()
    time.sleep(PATIENCE)
    if run.signals() > before:
        raise Broken("the device interrupts after disconnect()")


def attach(run: RingRun) -> None:
    """A VMM attaches and goes, without a ring; exchanges work as soon as it is attached."""
    run.connect()
    run.close()
    run.connect()
    run.step = "at the first ring"
    run.work_once()


def rings(run: RingRun) -> None:
    """A doorbell may be rung any number of times before the device hears of it."""
    for count in COUNTS:
        run.connect()
        run.ring_all((count,))
    run.connect()
    run.ring_all(COUNTS)
    run.connect()
    run.step = "after many rings"
    run.work_once()


def garbage(run: RingRun) -> None:
    """The shared memory holds what the guest likes."""
    for value in FILLS:
        run.connect()
        run.fill(value)
        run.ring_all()
        run.fill(value ^ 0xFF)
        run.close()
    run.connect()
    run.fill(0)
    run.step = "after rings with the memory full of garbage"
    run.work_once()


def refused(run: RingRun) -> None:
    """A VMM registers what it can: no interrupts, no memory, some of the doorbells."""
    for kinds in ((Kind.INTERRUPT,), (Kind.MEMORY,), (Kind.INTERRUPT, Kind.MEMORY)):
        run.connect(lambda item, kinds=kinds: errno.ENOSPC if item.reference.kind in kinds else 0)  # type: ignore[misc]
        run.ring_all()
    for name in list(run.served.host.doorbells):
        run.connect(lambda item, name=name: errno.EEXIST if getattr(item, "name", "") == name else 0)  # type: ignore[misc]
        run.ring_all()
    run.connect(lambda item: errno.EOPNOTSUPP)
    run.connect()
    run.step = "with a VMM that registers all, after others that did not"
    run.work_once()


def hang_up(run: RingRun) -> None:
    """A VMM goes while its rings wait; the next one finds the device as the first did."""
    for _ in range(3):
        run.connect()
        run.ring_all((3,))
        run.close()
        run.connect()
        run.step = "on the connection after one that ended while rings waited"
        run.work_once()


RULES: dict[str, Callable[[RingRun], None]] = {
    "late": late,  # first: it looks what a device does that was never rung
    "attach": attach,
    "rings": rings,
    "garbage": garbage,
    "refused": refused,
    "hang-up": hang_up,
    "reconnect": reconnect,
}
