"""Where QEMU has put a device's doorbells: ports, guest-physical addresses, a subchannel.

- virtio-pci: the guest's firmware and kernel place the BARs, and ``query-pci`` tells them (-1: not placed yet). QEMU's
  layout within them is fixed: a legacy driver rings at port 16 of BAR 0 (virtio 1.3 4.1.4.10), a modern one at 0x3000
  of BAR 4, 4 bytes a queue (a page with "page-per-vq"), and with "modern-pio-notify" at BAR 2.
- virtio-mmio: the transport's memory region is its child in QOM, and "addr" is where it starts; QueueNotify is the
  register at 0x50 (virtio 1.3 4.2.2).
- ccw: the subchannel, as "subch_id".

A legacy or ccw driver rings every queue at one place, and the value says which: that is the ``=N`` of an address.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hcd.qmp_client import QmpClient, QmpRefused
from hcd.qom import PERIPHERALS, children, get

__all__ = ["NOWHERE", "Place", "Whereabouts", "find"]

_LEGACY_BAR, _PORT_BAR, _MODERN_BAR = 0, 2, 4
_LEGACY_NOTIFY, _MODERN_NOTIFY, _MMIO_NOTIFY = 16, 0x3000, 0x50
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Place:
    """The doorbells of one device. ``base``: of queue 0; ``width`` in bytes, 0 without one; ``stride``: from one queue
    to the next, 0 where all ring at ``base`` and the value tells the queue."""

    base: int | str
    width: int
    stride: int = 0

    def of(self, queue: int) -> str:
        """As logs and metrics show it, like the raw doorbells' ``0x510/2=7``: address, width, value."""
        width = f"/{self.width}" if self.width else ""
        if isinstance(self.base, int) and self.stride:
            return f"{self.base + queue * self.stride:#x}{width}"
        return f"{self.base:#x}{width}={queue}" if isinstance(self.base, int) else f"{self.base}={queue}"


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """What QEMU tells of one device's place; None where it has no such place, or has not got it yet."""

    legacy_bar: int | None = None
    port_bar: int | None = None
    modern_bar: int | None = None
    page_per_queue: bool = False
    mmio: int | None = None
    subchannel: str | None = None

    def of(self, kind: str) -> Place | None:
        """Where doorbells of ``kind`` (as in hcd_doorbell_info) are."""
        match kind:
            case "legacy" if self.legacy_bar is not None:
                return Place(self.legacy_bar + _LEGACY_NOTIFY, 2)
            case "modern-pio" if self.port_bar is not None:
                return Place(self.port_bar, 2)
            case "modern" if self.modern_bar is not None:
                return Place(self.modern_bar + _MODERN_NOTIFY, 2, _PAGE if self.page_per_queue else 4)
            case "virtio-mmio" if self.mmio is not None:
                return Place(self.mmio + _MMIO_NOTIFY, 4)
            case "ccw" if self.subchannel is not None:
                return Place(self.subchannel, 0)
        return None


NOWHERE = Whereabouts()


async def find(qmp: QmpClient, device: str, bus: str, bus_type: str) -> Whereabouts:
    """The place of the device at QOM path ``device``, on the bus at ``bus``."""
    if bus_type == "virtio-mmio-bus":
        return Whereabouts(mmio=await _mmio_base(qmp, bus.rpartition("/")[0]))
    if bus_type == "virtual-css-bus":
        subchannel = await get(qmp, device, "subch_id")
        return Whereabouts(subchannel=subchannel if isinstance(subchannel, str) else None)
    try:
        roots = await qmp.execute("query-pci")
    except QmpRefused:
        return NOWHERE
    entry = await _pci_entry(qmp, device, list(_devices_of(roots)))
    bars = dict(_bars(entry))
    return Whereabouts(
        legacy_bar=bars.get((_LEGACY_BAR, "io")),
        port_bar=bars.get((_PORT_BAR, "io")),
        modern_bar=bars.get((_MODERN_BAR, "memory")),
        page_per_queue=await get(qmp, device, "page-per-vq") is True,
    )


async def _mmio_base(qmp: QmpClient, transport: str) -> int | None:
    regions = [path for path, type_ in await children(qmp, transport) if type_ == "memory-region"]
    base = await get(qmp, regions[0], "addr") if len(regions) == 1 else None
    return base if isinstance(base, int) else None


# -- query-pci: buses, with devices, of which bridges have a bus of their own

Entry = Mapping[str, Any]


async def _pci_entry(qmp: QmpClient, device: str, roots: list[Entry]) -> Entry:
    """What query-pci has of a device; empty if it cannot be told. One without an id is known by its place."""
    container, _, name = device.rpartition("/")
    if container == PERIPHERALS[0]:
        return next((entry for entry in _below(roots) if entry.get("qdev_id") == name), {})
    bus, number = await get(qmp, device, "parent_bus"), await get(qmp, device, "addr")
    if not isinstance(bus, str) or not isinstance(number, int):
        return {}
    siblings = roots
    bridge = bus.rpartition("/")[0]
    if bridge.rpartition("/")[0] in PERIPHERALS:
        siblings = list(_behind(await _pci_entry(qmp, bridge, roots)))
    at = (number >> 3, number & 7)
    return next((entry for entry in siblings if (entry.get("slot"), entry.get("function")) == at), {})


def _devices_of(buses: object) -> Iterator[Entry]:
    for bus in buses if isinstance(buses, list) else []:
        found = bus.get("devices") if isinstance(bus, dict) else None
        yield from (entry for entry in (found if isinstance(found, list) else []) if isinstance(entry, dict))


def _behind(entry: Entry) -> Iterator[Entry]:
    return _devices_of([entry.get("pci_bridge")])


def _below(entries: Iterable[Entry]) -> Iterator[Entry]:
    for entry in entries:
        yield entry
        yield from _below(_behind(entry))


def _bars(entry: Entry) -> Iterator[tuple[tuple[int, str], int]]:
    """((number, "io" or "memory"), address) of every BAR that is placed."""
    regions = entry.get("regions")
    for region in regions if isinstance(regions, list) else []:
        match region:
            case {"bar": int(number), "type": str(kind), "address": int(address)} if address >= 0:
                yield (number, kind), address
