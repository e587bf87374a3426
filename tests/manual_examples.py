"""The daemon that docs/operations.md shows: its numbers, so that a test can print the manual's examples again."""

from __future__ import annotations

from dataclasses import replace

import snapshots as make

from hcd.control.collect import feature_names
from hcd.control.snapshot import DeviceState, DoorbellState, QueueState, Snapshot, Times
from hcd.qmp_places import Place

__all__ = ["a_second_later", "snapshot"]

RING_FEATURES = 0x1_7000_0000  # INDIRECT_DESC, EVENT_IDX, PROTOCOL_FEATURES, VERSION_1
BLK_FEATURES = 0x7E44  # SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES
PROTOCOL = ["MQ", "REPLY_ACK", "BACKEND_REQ", "CROSS_ENDIAN", "RESET_DEVICE", "CONFIGURE_MEM_SLOTS", "STATUS"]
US = 1e-6


def times(p50: float, p99: float, count: int = 1) -> Times:
    """Seconds. The buckets are those of a histogram whose values all lie at ``p99``."""
    bounds = [(1 << k) / 1e9 for k in range(10, 31)]
    return Times(count, count * p50, p50, p99, [count if bound >= p99 else 0 for bound in bounds] + [count])


def queue(index: int, done: int, latency: Times, size: int = 128) -> QueueState:
    return make.queue(index=index, requests={"read": [done, 0, 0]}, size=size, latency=latency)


def bell(name: str, rings: int, response: Times, source: str = "qmp") -> DoorbellState:
    address = Place(0xFE003000, 2, 4).of(int(name)) if source == "qmp" else ""
    return make.doorbell(name=name, source=source, address=address, rings=rings, wakeups=rings, response=response)


def silent(name: str) -> DoorbellState:
    nothing = Times()
    return make.doorbell(name=name, path="unknown", source="none", kind="virtqueue", rings=0, wakeups=0,
                         dispatch=nothing, response=nothing)


def device(name: str, kind: str, features: int, protocol: list[str], **changes: object) -> DeviceState:
    virtio_id = {"blk": 2}.get(kind, 0)
    peer = make.peer(pid=2147, since=888.0, features=feature_names(features, virtio_id), protocol_features=protocol)
    return replace(make.device(name), type=kind, peer=peer, capacity=None, **changes)  # type: ignore[arg-type]


def snapshot() -> Snapshot:
    disk = device(
        "disk0", "blk", RING_FEATURES | BLK_FEATURES, [*PROTOCOL[:4], "CONFIG", *PROTOCOL[4:]],
        queues=[queue(0, 8490, times(29 * US, 459 * US)), queue(1, 13127, times(2.6 * US, 164 * US))],
        doorbells=[bell("0", 7873, times(41 * US, 655 * US)), bell("1", 11407, times(6.1 * US, 229 * US))],
    )
    disk = replace(disk, capacity=1 << 30)
    rng = device(
        "rng0", "rng", RING_FEATURES, PROTOCOL,
        queues=[queue(0, 2121, times(3.6 * US, 20 * US), 4)],
        doorbells=[bell("0", 2106, times(12 * US, 229 * US), "negotiated")],
    )
    idle = [make.queue(index=index, state="none", requests={}, latency=Times()) for index in range(2)]
    net = replace(make.device("net0"), type="net", peer=None, capacity=None, queues=idle,
                  doorbells=[silent("0"), silent("1")])
    return make.snapshot(disk, rng, net, pid=2110, started=988.0 - 100, now=1000.0 - 100)


def a_second_later(before: Snapshot) -> tuple[Snapshot, Snapshot]:
    """What ``hcd top --once`` compares."""
    before = replace(before, now=before.now + 1)
    disk, rng, net = before.devices
    later = [
        _busier(disk, 2800, 2600, 8 << 20, int(46.8 * (1 << 20)), 0.4, 3e-3),
        _busier(rng, 443, 440, 28365, 0, 0.0, 20 * US),
        net,
    ]
    return before, replace(before, now=before.now + 1, devices=later)


def _busier(
    device: DeviceState, requests: int, rings: int, to_guest: int, from_guest: int, load: float, p99: float
) -> DeviceState:
    first, *rest = device.queues
    bells, added = device.doorbells, times(p99, p99, requests)
    old = first.latency
    latency = replace(
        old, count=old.count + requests, sum=old.sum + load,
        buckets=[a + b for a, b in zip(old.buckets, added.buckets, strict=True)],
    )
    first = replace(
        first, requests={"read": [first.done + requests, 0, 0]}, bytes_to_guest=first.bytes_to_guest + to_guest,
        bytes_from_guest=first.bytes_from_guest + from_guest, latency=latency,
    )
    rung = replace(bells[0], rings=bells[0].rings + rings)
    return replace(device, queues=[first, *rest], doorbells=[rung, *bells[1:]])
