"""Doorbell devices with one mistake each, for the conformance check to find; and the device that they were made from.

Each class says in ``BREAKS`` which rule its mistake breaks.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import trio

from hcd.device import Bell, DoorbellDecl, DoorbellDevice, Handle, InterruptDecl, Lane, Path


class Adder(DoorbellDevice):
    """Adds the byte at 0 of the shared memory to the one at 1, once a ring, and answers. Nothing is wrong with it."""

    BREAKS: ClassVar[str] = ""

    description = "adds"

    @property
    def doorbells(self) -> Sequence[DoorbellDecl]:
        return [DoorbellDecl("add", Path.PIO, 0x510, width=4), DoorbellDecl("clear", Path.MMIO, 0xD0000)]

    @property
    def interrupts(self) -> Sequence[InterruptDecl]:
        return [InterruptDecl("done")]

    @property
    def memory_size(self) -> int:
        return 4096

    def open(self, lane: Lane) -> None:
        self.lane = lane

    def ring(self, doorbell: Bell, count: int) -> Any:
        self.handle(doorbell, count)

    def handle(self, doorbell: Bell, count: int) -> None:
        if self.memory is not None:
            self.memory[1] = 0 if doorbell.name == "clear" else (self.memory[1] + count * self.memory[0]) % 256
        self.answer(doorbell)

    def answer(self, doorbell: Bell) -> None:
        self.interrupt("done", doorbell)


class AsyncAdder(Adder):
    """The same in trio; it may take its time."""

    async def ring(self, doorbell: Bell, count: int) -> None:
        await trio.sleep(0.001)
        self.handle(doorbell, count)


class Ticker(Adder):
    """Interrupts without being rung, for as long as a VMM is attached: that is legal."""

    timer: Handle | None = None

    def connect(self) -> None:
        self.timer = self.lane.call_later(0.002, self.tick)

    def tick(self) -> None:
        self.interrupt("done")
        self.connect()

    def disconnect(self) -> None:
        assert self.timer is not None
        self.timer.cancel()


# -- rings


class Raises(Adder):
    """Raises in ``ring``."""

    BREAKS = "handler"

    def answer(self, doorbell: Bell) -> None:
        raise ZeroDivisionError


class UnknownInterrupt(Adder):
    """Signals an interrupt that it does not have."""

    BREAKS = "handler"

    def answer(self, doorbell: Bell) -> None:
        self.interrupt("finished", doorbell)


class NeedsItsInterrupt(Adder):
    """Does not expect that a VMM could not register the interrupt."""

    BREAKS = "handler"

    def answer(self, doorbell: Bell) -> None:
        assert self.interrupt("done", doorbell)


class NeedsItsMemory(Adder):
    """Does not expect that a VMM maps no memory."""

    BREAKS = "handler"

    def handle(self, doorbell: Bell, count: int) -> None:
        assert self.memory is not None
        super().handle(doorbell, count)


class Trusts(Adder):
    """Believes what is in the shared memory."""

    BREAKS = "handler"

    def handle(self, doorbell: Bell, count: int) -> None:
        if self.memory is not None:
            bytes(self.memory[:256]).decode()
        super().handle(doorbell, count)


class Silent(Adder):
    """Answers the first VMM only."""

    BREAKS = "answer"
    vmms = 0

    def connect(self) -> None:
        self.vmms += 1

    def answer(self, doorbell: Bell) -> None:
        if self.vmms < 2:
            super().answer(doorbell)


class OnceIsEnough(Adder):
    """Takes many rings for one."""

    BREAKS = "answer"

    def handle(self, doorbell: Bell, count: int) -> None:
        super().handle(doorbell, 1)


class CountsDown(Adder):
    """Does its work ring by ring, and takes its time for each."""

    BREAKS = "blocking"

    def handle(self, doorbell: Bell, count: int) -> None:
        time.sleep(min(count * 1e-5, 0.3))
        super().handle(doorbell, count)


class AsyncBlocks(AsyncAdder):
    """Blocks trio, after many rings."""

    BREAKS = "blocking"

    def handle(self, doorbell: Bell, count: int) -> None:
        time.sleep(min(count * 1e-5, 0.3))
        super().handle(doorbell, count)


class NeverEnds(AsyncAdder):
    """Waits for ever, after many rings."""

    BREAKS = "stop"

    async def ring(self, doorbell: Bell, count: int) -> None:
        if count > 1000:
            await trio.sleep_forever()
        await super().ring(doorbell, count)


# -- what stays behind


class Later(Adder):
    """Answers by a timer, and does not mind when the VMM has gone."""

    BREAKS = "late"

    def answer(self, doorbell: Bell) -> None:
        self.lane.call_later(0.02, lambda: self.interrupt("done", doorbell))


class KeepsTicking(Ticker):
    """Goes on after close()."""

    BREAKS = "late"

    def disconnect(self) -> None:
        """The timer stays."""


class KeepsMemory(Adder):
    """Keeps a view of the shared memory."""

    BREAKS = "memory"

    def connect(self) -> None:
        if self.memory is not None:
            self.words = self.memory.cast("Q")


class KeepsFds(Adder):
    """Opens something for every VMM."""

    BREAKS = "leaks"

    def connect(self) -> None:
        os.memfd_create("leak")


class KeepsThread(Adder):
    """Leaves a thread behind when it is closed."""

    BREAKS = "leaks"

    def open(self, lane: Lane) -> None:
        super().open(lane)
        threading.Thread(target=threading.Event().wait, daemon=True).start()  # one that ends would hide another


# -- what is not about rings


class RaisesInConnect(Adder):
    """Raises where nobody rang."""

    BREAKS = "life"

    def connect(self) -> None:
        raise OSError("nobody home")


class RaisesInTimer(Adder):
    """Raises in a callback."""

    BREAKS = "callback"

    def connect(self) -> None:
        self.lane.call_later(0, self.fail)

    def fail(self) -> None:
        raise RuntimeError("in a timer")


class CannotClose(Adder):
    """Raises in ``close``."""

    BREAKS = "life"

    def close(self) -> None:
        raise OSError("stuck")


class AsyncConnect(Adder):
    """Nobody awaits it."""

    BREAKS = "declaration"

    async def connect(self) -> None:  # type: ignore[override]
        await trio.lowlevel.checkpoint()


class SamePlace(Adder):
    """Two doorbells at one port."""

    BREAKS = "life"

    @property
    def doorbells(self) -> Sequence[DoorbellDecl]:
        return [DoorbellDecl(name, Path.PIO, 0x510, width=4) for name in ("add", "clear")]


class TwiceTheName(Adder):
    """Two interrupts of one name."""

    BREAKS = "declaration"

    @property
    def interrupts(self) -> Sequence[InterruptDecl]:
        return [InterruptDecl("done"), InterruptDecl("done")]


class HalfAPage(Adder):
    """Memory that no VMM can map."""

    BREAKS = "life"

    @property
    def memory_size(self) -> int:
        return 2000


class Wandering(Adder):
    """Its doorbells are elsewhere whenever one looks."""

    BREAKS = "declaration"

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        self.looks = 0

    @property
    def doorbells(self) -> Sequence[DoorbellDecl]:
        self.looks += 1
        return [DoorbellDecl("add", Path.PIO, 0x500 + 4 * (self.looks % 64), width=4)]


GOOD = (Adder, AsyncAdder, Ticker)
FAULTY = tuple(
    kind for kind in list(vars().values()) if isinstance(kind, type) and issubclass(kind, Adder) and kind.BREAKS
)
