"""Which device of QEMU stands in front of which device of hcd: the one table.

A row for each virtio id: the stem of QEMU's names, where that device can be plugged in, how it is told of queues and
of its chardev, from which version on it takes a chardev that reconnects. For another in-tree device add a row;
devices of other ids are plugged in with QEMU's generic front end, which can be created from 10.2 on.

What a device makes of ``reconnect`` matters: a chardev with it connects in the background, so a device that does
not wait for the connection when it is created fails ("Failed to set msg fds"), and QEMU 7.2 even aborts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hcd_protocols.virtio.ids import DeviceId

from hcd.device import Device

__all__ = ["GENERIC", "TABLE", "FrontEnd", "Version", "front_end"]

Version = tuple[int, int]
Properties = dict[str, str]

NEVER: Version = (1 << 16, 0)
ALWAYS: Version = (0, 0)


@dataclass(frozen=True, slots=True)
class FrontEnd:
    """One device of QEMU. ``names`` by bus; ``queues`` and ``size`` give the properties for a device and a ring."""

    names: Mapping[str, str]
    queues: Callable[[Device], Properties]
    size: Callable[[int], Properties] | None = None  # None: QEMU has decided how large the rings are
    netdev: bool = False  # the chardev belongs to a netdev, which the device names
    legacy: bool = True  # it can be told what to be: disable-legacy, disable-modern
    reconnects: Version = NEVER  # the first version whose device waits for its chardev
    since: Version = ALWAYS  # the first version that can create it


def _blk(device: Device) -> Properties:
    return {"num-queues": str(device.num_queues)}


def _scsi(device: Device) -> Properties:
    return {"num_queues": str(device.num_queues - 2)}  # beside the control and the event queue


def _net(device: Device) -> Properties:
    """QEMU answers for the configuration space of network cards, so it is told what hcd was told."""
    pairs = device.num_queues // 2
    told: Properties = {"mq": "on"} if pairs > 1 else {}
    for option, name in (("mac", "mac"), ("mtu", "host_mtu")):
        if device.option.get(option) is not None:
            told[name] = str(device.option[option])
    return told


def _generic(device: Device) -> Properties:
    told = {"virtio-id": str(int(device.virtio_id)), "num_vqs": str(device.num_queues)}
    if size := _config_size(device):
        told["config_size"] = str(size)
    return told


def _config_size(device: Device) -> int:
    try:
        return len(device.config())
    except Exception:  # it is not open, and some know their configuration space only then
        return 0


def _none(_: Device) -> Properties:
    return {}


TABLE: Mapping[int, FrontEnd] = {
    DeviceId.NET: FrontEnd(
        {"pci": "virtio-net-pci", "mmio": "virtio-net-device", "ccw": "virtio-net-ccw"},
        _net,
        lambda size: {"rx_queue_size": str(size), "tx_queue_size": str(size)},
        netdev=True,
        reconnects=ALWAYS,
    ),
    DeviceId.BLOCK: FrontEnd(
        {"pci": "vhost-user-blk-pci", "mmio": "vhost-user-blk"},
        _blk,
        lambda size: {"queue-size": str(size)},
        reconnects=ALWAYS,
    ),
    DeviceId.ENTROPY: FrontEnd({"pci": "vhost-user-rng-pci", "mmio": "vhost-user-rng"}, _none, legacy=False),
    DeviceId.SCSI: FrontEnd(
        {"pci": "vhost-user-scsi-pci", "mmio": "vhost-user-scsi"},
        _scsi,
        lambda size: {"virtqueue_size": str(size)},
        reconnects=(8, 2),
    ),
    DeviceId.VSOCK: FrontEnd({"pci": "vhost-user-vsock-pci", "mmio": "vhost-user-vsock-device"}, _none),
}

#: any virtio id. QEMU knows nothing of the device, so nothing it does for others (boot order, migration) is there
GENERIC = FrontEnd(
    {"pci": "vhost-user-test-device-pci", "mmio": "vhost-user-test-device"},
    _generic,
    lambda size: {"vq_size": str(size)},
    legacy=False,
    since=(10, 2),
)


def front_end(virtio_id: int) -> FrontEnd:
    """QEMU's device for ``virtio_id``."""
    return TABLE.get(virtio_id, GENERIC)
