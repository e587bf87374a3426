"""The same devices as libvirt's XML: a ``<domain>`` with the elements to merge into a definition.

libvirt knows disks and network cards with a vhost-user back end. Everything else goes through
``<qemu:commandline>``, for which libvirt marks the domain as tainted; so does a disk or card that must ring over a
certain path, which libvirt has no words for.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence

from hcd_protocols.virtio.ids import DeviceId

from hcd.doorbell import Path
from hcd.qemu.arguments import device_arguments, monitor_arguments
from hcd.qemu.devices import Version
from hcd.qemu.plugs import Plug

__all__ = ["domain"]

QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
_RECONNECT = {"enabled": "yes", "timeout": "1"}


def domain(plugs: Sequence[Plug], version: Version, *, kvm: bool) -> str:
    """The text of a ``<domain>`` element that holds shared memory and ``plugs``, and nothing else."""
    ET.register_namespace("qemu", QEMU)
    root = ET.Element("domain", {"type": "kvm" if kvm else "qemu"})
    memory = ET.SubElement(root, "memoryBacking")
    ET.SubElement(memory, "source", {"type": "memfd"})
    ET.SubElement(memory, "access", {"mode": "shared"})
    devices = ET.SubElement(root, "devices")
    words: list[str] = []
    disks = 0
    for plug in plugs:
        if plug.spec.path in (Path.PIO, Path.MMIO) and plug.bus == "pci":
            words += device_arguments(plug, version)
        elif plug.device.virtio_id == DeviceId.BLOCK:
            _disk(devices, plug, f"vd{_letters(disks)}")
            disks += 1
        elif plug.device.virtio_id == DeviceId.NET:
            _interface(devices, plug)
        else:
            words += device_arguments(plug, version)
    words += monitor_arguments(plugs)
    if not len(devices):
        root.remove(devices)
    if words:
        line = ET.SubElement(root, f"{{{QEMU}}}commandline")
        for word in words:
            ET.SubElement(line, f"{{{QEMU}}}arg", {"value": word})
    ET.indent(root)
    return ET.tostring(root, encoding="unicode")


def _disk(devices: ET.Element, plug: Plug, target: str) -> None:
    disk = ET.SubElement(devices, "disk", {"type": "vhostuser", "device": "disk"})
    driver = {"name": "qemu", "type": "raw", "queues": str(plug.device.num_queues)}
    ET.SubElement(disk, "driver", driver | _rings(plug, {"queue-size": "queue_size"}))
    source = ET.SubElement(disk, "source", {"type": "unix", "path": os.path.abspath(plug.spec.socket)})
    if plug.reconnects:
        ET.SubElement(source, "reconnect", _RECONNECT)
    ET.SubElement(disk, "target", {"dev": target, "bus": "virtio"})
    _address(disk, plug)


def _interface(devices: ET.Element, plug: Plug) -> None:
    card = ET.SubElement(devices, "interface", {"type": "vhostuser"})
    if "mac" in plug.properties:
        ET.SubElement(card, "mac", {"address": plug.properties["mac"].replace("-", ":")})
    path = os.path.abspath(plug.spec.socket)
    source = ET.SubElement(card, "source", {"type": "unix", "path": path, "mode": "client"})
    if plug.reconnects:
        ET.SubElement(source, "reconnect", _RECONNECT)
    ET.SubElement(card, "model", {"type": "virtio"})
    sizes = _rings(plug, {"rx_queue_size": "rx_queue_size", "tx_queue_size": "tx_queue_size"})
    pairs = plug.device.num_queues // 2
    driver = ({"queues": str(pairs)} if pairs > 1 else {}) | sizes
    if driver:
        ET.SubElement(card, "driver", driver)
    if "host_mtu" in plug.properties:
        ET.SubElement(card, "mtu", {"size": plug.properties["host_mtu"]})
    _address(card, plug)


def _rings(plug: Plug, names: dict[str, str]) -> dict[str, str]:
    """Attributes of <driver> for what QEMU is told of the rings; ``names`` from its properties to libvirt's."""
    rings = {to: plug.properties[name] for name, to in names.items() if name in plug.properties}
    return rings | ({"packed": "on"} if "packed" in plug.properties else {})


def _address(element: ET.Element, plug: Plug) -> None:
    """libvirt chooses an address for PCI by itself, and the bus of the machine; the others are named."""
    if plug.bus != "pci":
        ET.SubElement(element, "address", {"type": "virtio-mmio" if plug.bus == "mmio" else "ccw"})


def _letters(index: int) -> str:
    """a, b ... z, aa, ab ...: how Linux names disks."""
    text = ""
    index += 1
    while index:
        index, digit = divmod(index - 1, 26)
        text = chr(ord("a") + digit) + text
    return text
