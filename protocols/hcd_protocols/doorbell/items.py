"""What the messages of the doorbell protocol are about: doorbells, interrupts, shared memory; and what became of them.

Every item is checked when it is made, with ValueError for what the protocol cannot say or no kernel could register.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

__all__ = [
    "Capability",
    "DoorbellItem",
    "Held",
    "InterruptItem",
    "Item",
    "Kind",
    "MemoryItem",
    "Outcome",
    "Place",
    "Reference",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,30}", re.ASCII)


class Capability(enum.IntFlag):
    """What the VMM's kernel can register (HELLO)."""

    PIO = 1 << 0
    MMIO = 1 << 1
    #: MMIO doorbells of width 0 (KVM_CAP_IOEVENTFD_NO_LENGTH)
    MMIO_ANY_LENGTH = 1 << 2
    #: port doorbells of width 0 (KVM_CAP_IOEVENTFD_ANY_LENGTH)
    PIO_ANY_LENGTH = 1 << 3
    HYPERV = 1 << 4
    XEN = 1 << 5
    IRQFD = 1 << 6
    #: the VMM maps shared memory into the guest
    MEMORY = 1 << 7


class Place(enum.IntEnum):
    """Where a doorbell is; says what its address means."""

    #: I/O port
    PIO = 1
    #: guest-physical address
    MMIO = 2
    #: Hyper-V connection id, rung by HvSignalEvent
    HYPERV = 3
    #: Xen event channel port, rung by EVTCHNOP_send
    XEN = 4


class Kind(enum.IntEnum):
    """Kinds of items. Each has ids of its own."""

    DOORBELL = 1
    INTERRUPT = 2
    MEMORY = 3


@dataclass(frozen=True, slots=True)
class Reference:
    """Names an item."""

    kind: Kind
    id: int

    def __str__(self) -> str:
        return f"{self.kind.name.lower()} {self.id}"


#: place: (highest address, widths)
_RANGES = {
    Place.PIO: (0xFFFF, (0, 1, 2, 4)),
    Place.MMIO: ((1 << 64) - 1, (0, 1, 2, 4, 8)),
    Place.HYPERV: (0xFFFFFF, (0,)),
    Place.XEN: (0xFFFFFFFF, (0,)),
}


@dataclass(frozen=True, slots=True)
class DoorbellItem:
    """One doorbell. ``width`` in bytes, 0: any.

    ``datamatch`` None: every value that is written rings. ``stamp``: offset in the shared memory, where the guest
    writes its TSC (u64) before it rings; None: it does not.
    """

    id: int
    name: str
    place: Place
    address: int
    width: int = 0
    datamatch: int | None = None
    stamp: int | None = None

    def __post_init__(self) -> None:
        _check_common(self.id, self.name)
        most, widths = _RANGES[self.place]
        if self.width not in widths:
            raise ValueError(f'doorbell "{self.name}": width {self.width}; expected one of {widths}')
        if not 0 <= self.address <= most - max(self.width - 1, 0):
            raise ValueError(f'doorbell "{self.name}": address {self.address:#x} is beyond {most:#x}')
        if self.place is Place.XEN and self.address == 0:
            raise ValueError(f'doorbell "{self.name}": Xen has no port 0')
        if self.datamatch is not None and (not self.width or not 0 <= self.datamatch < 1 << 8 * self.width):
            raise ValueError(f'doorbell "{self.name}": datamatch {self.datamatch} does not fit width {self.width}')
        if self.stamp is not None and not (0 <= self.stamp < 1 << 32 and self.stamp % 8 == 0):
            raise ValueError(f'doorbell "{self.name}": stamp at {self.stamp}; expected a multiple of 8')

    @property
    def reference(self) -> Reference:
        return Reference(Kind.DOORBELL, self.id)

    def __str__(self) -> str:
        """As logs and metrics show the place: ``0x510/2=7`` is address, width and datamatch."""
        text = f"{self.address:#x}"
        if self.width:
            text += f"/{self.width}"
        return text if self.datamatch is None else f"{text}={self.datamatch:#x}"


@dataclass(frozen=True, slots=True)
class InterruptItem:
    """One interrupt: hcd signals its eventfd, the VMM makes an irqfd of it."""

    id: int
    name: str

    def __post_init__(self) -> None:
        _check_common(self.id, self.name)

    @property
    def reference(self) -> Reference:
        return Reference(Kind.INTERRUPT, self.id)


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """The shared memory of a device: a memfd, sealed against shrinking. ``size`` in bytes, whole pages.

    ``wanted``: the guest-physical address that the device asks for, 0 where the VMM chooses.
    """

    id: int
    size: int
    wanted: int = 0

    def __post_init__(self) -> None:
        _check_common(self.id, "memory")
        if not 0 < self.size < 1 << 48 or self.size % 4096:
            raise ValueError(f"shared memory of {self.size} bytes; expected whole pages, below 2^48")
        if not 0 <= self.wanted <= (1 << 64) - self.size or self.wanted % 4096:
            raise ValueError(f"shared memory at {self.wanted:#x}; expected the start of a page")

    @property
    def reference(self) -> Reference:
        return Reference(Kind.MEMORY, self.id)


Item = DoorbellItem | InterruptItem | MemoryItem


@dataclass(frozen=True, slots=True)
class Held:
    """An item that the VMM has from an earlier connection, with its descriptor."""

    item: Item
    fd: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the VMM did with one item. ``error`` 0: done; else the errno.

    ``value``: for memory the guest-physical address, for an interrupt its GSI, else 0.
    """

    reference: Reference
    error: int = 0
    value: int = 0


def _check_common(number: int, name: str) -> None:
    if not 1 <= number < 1 << 32:
        raise ValueError(f"id {number}; expected 1 to 2^32 - 1")
    if not _NAME.fullmatch(name):
        raise ValueError(f'the name "{name[:80]}"; expected letters, digits and any of "_.:-", 31 at most')
