"""A configured device as QEMU will plug it in: what arguments and libvirt's XML both start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hcd import plugins
from hcd.config import DeviceSpec
from hcd.device import Device
from hcd.doorbell import Path
from hcd.errors import ConfigError
from hcd.qemu.devices import FrontEnd, Version, front_end

__all__ = ["Plug", "Wishes", "make_plug", "pluggable"]

#: QEMU's virtio-mmio lets drivers take rings of this size; only what it was told itself is recorded while in flight
MMIO_RING = 1024


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the operator wants beside the configuration.

    ``queue_size`` None leaves QEMU's default; ``kvm`` False: the machine runs under TCG.
    """

    version: Version
    packed: bool = False
    queue_size: int | None = None
    reconnect: bool = True
    kvm: bool = True


@dataclass(frozen=True, slots=True)
class Plug:
    """One device of hcd and the device of QEMU in front of it. ``properties`` without id and chardev."""

    spec: DeviceSpec
    device: Device
    front: FrontEnd
    bus: str
    properties: dict[str, str]
    reconnects: bool

    @property
    def driver(self) -> str:
        """QEMU's name of the device."""
        return self.front.names[self.bus]


def pluggable(spec: DeviceSpec) -> bool:
    """Whether QEMU can have the device at all: raw doorbells are another transport."""
    return issubclass(plugins.load(spec.type), Device)


def make_plug(spec: DeviceSpec, wishes: Wishes) -> Plug:
    """``spec`` in QEMU. ConfigError when that version has no such device, on no such bus, or not with such rings."""
    device = plugins.create(spec.type, spec.name, spec.options)
    if not isinstance(device, Device):
        raise ConfigError(f'"{spec.name}": type {spec.type} has raw doorbells; QEMU has no device for them')
    front, bus = front_end(device.virtio_id), _bus(spec)
    _check(spec, device, front, bus, wishes)
    properties = front.queues(device)
    size = wishes.queue_size
    if size is None and bus == "mmio" and not front.netdev:
        size = MMIO_RING
    if size is not None and front.size is not None:
        properties |= front.size(size)
    if wishes.packed:
        properties["packed"] = "on"
    properties |= _way(spec, front, bus)
    if front.netdev and bus == "pci" and not wishes.kvm:
        # Without KVM, QEMU 7.2 dies of SIGSEGV when a guest uses MSI-X on a vhost-user network card.
        properties["vectors"] = "0"
    reconnects = wishes.reconnect and wishes.version >= front.reconnects
    return Plug(spec, device, front, bus, properties, reconnects)


def _bus(spec: DeviceSpec) -> str:
    if spec.bus is not None:
        return spec.bus
    return "ccw" if spec.path is Path.HYPERCALL else "pci"


def _check(spec: DeviceSpec, device: Device, front: FrontEnd, bus: str, wishes: Wishes) -> None:
    what = f'"{spec.name}": '
    if wishes.version < front.since:
        raise ConfigError(
            f"{what}QEMU {_shown(wishes.version)} has no vhost-user device with virtio id {int(device.virtio_id)}; "
            f"{front.names['pci']} comes with {_shown(front.since)}"
        )
    if bus not in front.names:
        raise ConfigError(f"{what}QEMU has no {front.names['pci']} for {bus}; it goes on {_listed(tuple(front.names))}")
    if spec.path is Path.HYPERCALL and bus != "ccw":
        raise ConfigError(f'{what}path "hypercall" is that of bus "ccw", not "{bus}"')
    if wishes.queue_size is None:
        return
    if wishes.queue_size > device.max_queue_size:
        raise ConfigError(f"{what}rings of {wishes.queue_size} entries; type {spec.type} takes {device.max_queue_size}")
    if front.netdev and not 256 <= wishes.queue_size <= 1024:
        raise ConfigError(f"{what}rings of {wishes.queue_size} entries; QEMU's network card takes 256 to 1024")


def _way(spec: DeviceSpec, front: FrontEnd, bus: str) -> dict[str, str]:
    """Properties that make the doorbells ring over the path that the configuration declares."""
    if bus != "pci" or spec.path not in (Path.PIO, Path.MMIO):
        return {}
    way = {"disable-legacy": "on"} if front.legacy else {}
    if spec.path is Path.PIO:
        way["modern-pio-notify"] = "on"
    return way


def _shown(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(words)
