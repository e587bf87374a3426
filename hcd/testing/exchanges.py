"""What the conformance check sends, and the ways in which a driver may lay it out in descriptors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hcd.device import Device

__all__ = ["SHAPES", "Exchange", "Shape", "exchanges_for", "probes"]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request that must work: ``data`` with ``room`` bytes for the answer, on ``queue``.

    ``answer`` is what must come back; None: whatever the device likes. The same exchange is made many times over.
    """

    data: bytes = b""
    room: int = 0
    answer: bytes | None = None
    queue: int = 0

    def __post_init__(self) -> None:
        if self.room < 0:
            raise ValueError(f"room for {self.room} bytes")

    def __str__(self) -> str:
        return f"{len(self.data)} bytes with room for {self.room} on queue {self.queue}"


@dataclass(frozen=True, slots=True)
class Shape:
    """A way to cut a request: the sizes of its first descriptors (readable and writable alike)."""

    name: str
    pieces: tuple[int, ...] = ()
    indirect: bool = False


#: devices must not care (virtio 1.3, 2.7.4)
SHAPES = (
    Shape("in one piece"),
    Shape("cut after the first byte", (1,)),
    Shape("cut into single bytes at first", (1,) * 12),
    Shape("cut after 3 and 16 bytes", (3, 13)),
    Shape("in an indirect table", (8, 8), indirect=True),
)

#: sizes of requests that mean nothing: readable, writable
_PROBE_SIZES = ((1, 0), (0, 1), (3, 1), (16, 17), (16, 513), (64, 0), (0, 64), (1000, 1500))


def probes(device: Device) -> list[Exchange]:
    """Requests without a meaning, for every queue: a device survives whatever a driver sends."""
    return [
        Exchange(bytes([fill]) * readable, writable, queue=queue)
        for queue in range(device.num_queues)
        for readable, writable in _PROBE_SIZES
        for fill in ((0, 0xFF) if readable else (0,))
    ]


def exchanges_for(exchanges: Sequence[Exchange], queue: int) -> list[Exchange]:
    return [exchange for exchange in exchanges if exchange.queue == queue]
