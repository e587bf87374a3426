"""A doorbell device written for device API 1. Not to be changed: see test_api_stability.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hcd.device import Bell, DoorbellDecl, DoorbellDevice, InterruptDecl, Lane, Metric, Option, Path


class Lighthouse(DoorbellDevice):
    """Answers the rings of "ship" with the interrupt "light", and writes their number into the shared memory."""

    api_version = 1
    description = "answers ships"
    options = (Option("port", "int", "the I/O port", 0x510, minimum=0, maximum=0xFFFF),)
    metrics = (Metric("lighthouse_ships_total", "counter", "Ships that rang."),)

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        self.ships = self.counter("lighthouse_ships_total")

    @property
    def doorbells(self) -> Sequence[DoorbellDecl]:
        return [DoorbellDecl("ship", Path.PIO, self.option["port"], width=4)]

    @property
    def interrupts(self) -> Sequence[InterruptDecl]:
        return [InterruptDecl("light")]

    @property
    def memory_size(self) -> int:
        return 4096

    def open(self, lane: Lane) -> None:
        self.lane = lane

    def connect(self) -> None:
        self.add_doorbells([DoorbellDecl("boat", Path.MMIO, 0xFE000000)])

    def disconnect(self) -> None:
        self.remove_doorbells(["boat"])

    def ring(self, doorbell: Bell, count: int) -> None:
        self.ships.inc(count)
        if self.memory is not None:
            self.memory[:8] = int(self.ships.value).to_bytes(8, "little")
        self.interrupt("light", doorbell)
