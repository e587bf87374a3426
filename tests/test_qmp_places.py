"""Where doorbells are: the rules, and devices that QEMU names only by bus and slot."""

from __future__ import annotations

from typing import Any

import pytest

from hcd.qmp_client import QmpRefused
from hcd.qmp_places import NOWHERE, Place, Whereabouts, find

ROOT = "/machine/q35/pcie.0"


class Tree:
    """QEMU's answers, from dictionaries."""

    def __init__(self, objects: dict[str, dict[str, Any]], pci: object = None) -> None:
        self.objects = objects
        self.pci = pci

    async def execute(self, command: str, **arguments: Any) -> Any:
        if command == "query-pci" and self.pci is not None:
            return self.pci
        found = self.objects.get(arguments.get("path", ""), {})
        if command == "qom-list" and found:
            return [{"name": name, "type": value} for name, value in found.items()]
        if command == "qom-get" and arguments["property"] in found:
            return found[arguments["property"]]
        raise QmpRefused(command)


def pci_device(slot: int, bars: dict[int, tuple[str, int]], qdev_id: str = "", behind: Any = None) -> dict[str, Any]:
    regions = [{"bar": bar, "type": kind, "address": address} for bar, (kind, address) in bars.items()]
    entry = {"bus": 0, "slot": slot, "function": 0, "qdev_id": qdev_id, "regions": regions}
    return entry | ({"pci_bridge": {"bus": {}, "devices": behind}} if behind else {})


FAR = pci_device(3, {4: ("memory", 0x30000)})
PCI = [
    {
        "bus": 0,
        "devices": [
            pci_device(1, {0: ("io", 0xC000), 4: ("memory", 0x10000)}, "known"),
            pci_device(3, {4: ("memory", 0x20000)}),
            pci_device(4, {}, "bridge", [pci_device(5, {}, "", [FAR])]),
            pci_device(6, {0: ("io", -1), 4: ("memory", -1)}, "unplaced"),
        ],
    }
]
BUSES = {
    "/machine/peripheral/bridge/down": {"type": "PCIE"},
    "/machine/peripheral-anon/device[0]": {"parent_bus": ROOT, "addr": 3 << 3, "page-per-vq": True},
    "/machine/peripheral-anon/device[1]": {"parent_bus": "/machine/peripheral/bridge/down", "addr": 5 << 3},
    "/machine/peripheral-anon/device[2]": {"parent_bus": "/machine/peripheral-anon/device[1]/down", "addr": 3 << 3},
}


@pytest.mark.parametrize(
    ("device", "modern"),
    [
        ("/machine/peripheral/known", 0x10000),
        ("/machine/peripheral-anon/device[0]", 0x20000),
        ("/machine/peripheral-anon/device[2]", 0x30000),
        ("/machine/peripheral/unplaced", None),
        ("/machine/peripheral/nobody", None),
        ("/machine/peripheral-anon/device[9]", None),
    ],
)
async def test_a_device_is_known_by_its_id_or_by_its_bus_and_slot(device: str, modern: int | None) -> None:
    """Also behind a bridge without an id that is behind a bridge with one, where another device has its slot."""
    found = await find(Tree(BUSES, PCI), device, ROOT, "PCIE")  # type: ignore[arg-type]
    assert found.modern_bar == modern
    assert found.legacy_bar == (0xC000 if device.endswith("known") else None)
    assert found.page_per_queue == device.endswith("[0]")


@pytest.mark.parametrize(
    "pci",
    [None, [], {}, "text", [None], [{"devices": 5}], [{"devices": [None, {"qdev_id": "known"}]}],
     [{"devices": [{"qdev_id": "known", "regions": [None, {}, {"bar": "4", "type": 1, "address": None}]}]}]],
)
async def test_what_qemu_does_not_say_is_not_known(pci: object) -> None:
    assert await find(Tree({}, pci), "/machine/peripheral/known", ROOT, "PCIE") == NOWHERE  # type: ignore[arg-type]


async def test_the_registers_of_virtio_mmio_are_where_its_memory_region_is() -> None:
    tree = Tree({
        "/machine/unattached/device[7]": {"virtio-mmio[0]": "child<memory-region>", "bus": "child<virtio-mmio-bus>"},
        "/machine/unattached/device[7]/virtio-mmio[0]": {"addr": 0xFEB00E00},
    })
    bus = "/machine/unattached/device[7]/virtio-mmio-bus.0"
    found = await find(tree, "/machine/peripheral/d0", bus, "virtio-mmio-bus")  # type: ignore[arg-type]
    assert found == Whereabouts(mmio=0xFEB00E00)


EVERYWHERE = Whereabouts(0xC000, 0xC100, 0xFE000000, False, 0xFEB00E00, "fe.0.0001")


@pytest.mark.parametrize(
    ("kind", "address"),
    [
        ("legacy", "0xc010/2=3"),
        ("modern-pio", "0xc100/2=3"),
        ("modern", "0xfe00300c/2"),
        ("virtio-mmio", "0xfeb00e50/4=3"),
        ("ccw", "fe.0.0001=3"),
    ],
)
def test_the_address_of_a_queue(kind: str, address: str) -> None:
    place = EVERYWHERE.of(kind)
    assert place is not None
    assert place.of(3) == address
    assert NOWHERE.of(kind) is None


def test_a_page_for_each_queue() -> None:
    assert Whereabouts(modern_bar=0x10000, page_per_queue=True).of("modern") == Place(0x13000, 2, 4096)
