"""echo: answers the rings of each doorbell with that doorbell's interrupt.

The interrupt of a doorbell has its name. With ``stamps`` each doorbell has 16 bytes of the shared memory, in the order
of the doorbells: the guest's stamp (u64), and the number of rings answered since the VMM attached (u64), written
before the interrupt is sent, for guests that would rather look than be interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hcd.device import Bell, InterruptDecl
from hcd.devices.bells import BellDevice

__all__ = ["Echo"]


class Echo(BellDevice):
    description = "raw doorbells that are answered with an interrupt each"

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        self._words: memoryview | None = None  # the shared memory
        self._counts = {one.name: one.stamp // 8 + 1 for one in self.doorbells if one.stamp is not None}

    @property
    def interrupts(self) -> Sequence[InterruptDecl]:
        return [InterruptDecl(one.name) for one in self.doorbells]

    def connect(self) -> None:
        if self.memory is not None:
            self._words = self.memory.cast("Q")
            for index in self._counts.values():
                self._words[index] = 0

    def disconnect(self) -> None:
        if self._words is not None:
            self._words.release()
            self._words = None

    def ring(self, doorbell: Bell, count: int) -> None:
        if self._words is not None:
            index = self._counts[doorbell.name]
            self._words[index] = (self._words[index] + count) % (1 << 64)
        self.interrupt(doorbell.name, doorbell)
