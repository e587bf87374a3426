"""Snapshots made by hand, for tests of what is shown of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hcd.control.snapshot import DeviceState, DoorbellState, Errors, PeerState, QueueState, Snapshot, Times

NO_TIMES = Times()


def times(count: int, seconds: float, bucket: int = 4) -> Times:
    """``count`` requests of ``seconds`` each, which the exported bucket ``bucket`` is the first to hold."""
    return Times(count, count * seconds, seconds, seconds, [0] * bucket + [count] * (22 - bucket))


def queue(**changes: Any) -> QueueState:
    made = QueueState(
        index=0, state="running", broken="", format="split", size=128, inflight=0, oldest=0.0,
        requests={"read": [10, 0, 0]}, found_by_ring=5, found_by_poll=5, bytes_from_guest=160, bytes_to_guest=5130,
        interrupts=10, interrupts_suppressed=0, drops=0, throttled=0.0, guest_errors=0, handler_errors=0,
        latency=times(10, 10e-6),
    )
    return replace(made, **changes)


def doorbell(**changes: Any) -> DoorbellState:
    made = DoorbellState(
        name="0", path="mmio", current=True, source="qmp", kind="modern", transport="vhost-user", address="",
        registered=None, rings=7, wakeups=6, dispatch=times(6, 2e-6), response=times(6, 20e-6), ring=NO_TIMES,
    )
    return replace(made, **changes)


def peer(**changes: Any) -> PeerState:
    return replace(PeerState(4711, "qemu-system-x86", 900.0, ["EVENT_IDX", "VERSION_1"], ["MQ"], True), **changes)


def device(name: str = "disk0", **changes: Any) -> DeviceState:
    made = DeviceState(
        name=name, type="blk", transport="vhost-user", lane="reactor", socket=f"/run/hcd/{name}.sock", peer=peer(),
        path_conflict=False, errors=Errors(0, 0, 0), capacity=1 << 30, limits={}, stuck_after=30.0,
        queues=[queue()], doorbells=[doorbell()],
    )
    return replace(made, **changes)


def snapshot(*devices: DeviceState, **changes: Any) -> Snapshot:
    made = Snapshot(
        hcd="0.1.0", pid=42, now=1000.0, started=100.0, config="/etc/hcd/hcd.toml", answers=True, reload=None,
        unserved=[], devices=list(devices),
    )
    return replace(made, **changes)
