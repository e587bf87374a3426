"""``hcd status``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hcd.control.snapshot import DeviceState, PeerState, QueueState, Snapshot
from hcd.views.problems import find_problems
from hcd.views.text import align, bytes_, duration, printable, time_ago, wrap_words

__all__ = ["DEVICE_COLUMNS", "QUEUE_COLUMNS", "status"]

DEVICE_COLUMNS = ("DEVICE", "TYPE", "FRONT END", "PATH", "SOURCE", "REQUESTS", "FAILED", "ERRORS", "SIZE", "SOCKET")
QUEUE_COLUMNS = ("DEVICE", "QUEUE", "STATE", "RING", "SIZE", "IN FLIGHT", "OLDEST", "REQUESTS", "FAILED", "P50", "P99")
_RIGHT = ("QUEUE", "REQUESTS", "FAILED", "ERRORS", "SIZE", "IN FLIGHT", "OLDEST", "P50", "P99")


def status(snapshot: Snapshot) -> list[str]:
    """The daemon in a line, what is wrong, a table of devices, one of queues, and what was negotiated."""
    return [
        *_head(snapshot),
        "",
        *align(DEVICE_COLUMNS, map(_device_row, snapshot.devices), _RIGHT),
        *_queue_table(snapshot.devices),
        *_details(snapshot),
    ]


def _head(snapshot: Snapshot) -> Iterator[str]:
    connected = sum(device.peer is not None for device in snapshot.devices)
    where = f", {snapshot.config}" if snapshot.config else ""
    count = len(snapshot.devices)
    yield printable(
        f"hcd {snapshot.hcd}, pid {snapshot.pid}, up {time_ago(snapshot.uptime)}{where}: "
        f"{count} device{'s' if count != 1 else ''}, {connected} connected"
    )
    if not (problems := find_problems(snapshot)):
        yield "all is well"
        return
    yield "wrong:"
    for problem in problems:
        yield f"    {printable(problem)}"


# -- devices


def _device_row(device: DeviceState) -> Sequence[str]:
    errors = device.errors
    return (
        device.name,
        device.type,
        "-" if device.peer is None else _peer(device.peer),
        _listed(bell.path for bell in device.doorbells if bell.current),
        _listed(bell.source for bell in device.doorbells if bell.current),
        str(sum(queue.done for queue in device.queues)) if device.queues else "-",
        str(sum(queue.failed for queue in device.queues)) if device.queues else "-",
        str(errors.protocol + errors.guest + errors.handler),
        bytes_(device.capacity),
        device.socket,
    )


def _peer(peer: PeerState) -> str:
    pid = "?" if peer.pid is None else str(peer.pid)
    return f"{peer.command} ({pid})" if peer.command else f"pid {pid}"


def _listed(values: Iterator[str]) -> str:
    return ",".join(dict.fromkeys(values))


# -- queues


def _queue_table(devices: Sequence[DeviceState]) -> Iterator[str]:
    """Of queues that have something to tell."""
    rows = [
        _queue_row(device, queue)
        for device in devices
        for queue in device.queues
        if queue.state != "none" or queue.inflight
    ]
    if rows:
        yield ""
        yield from align(QUEUE_COLUMNS, rows, _RIGHT)


def _queue_row(device: DeviceState, queue: QueueState) -> Sequence[str]:
    return (
        device.name,
        str(queue.index),
        queue.state,
        queue.format or "-",
        "-" if queue.size is None else str(queue.size),
        str(queue.inflight),
        duration(queue.oldest),
        str(queue.done),
        str(queue.failed),
        duration(queue.latency.p50),
        duration(queue.latency.p99),
    )


# -- what was negotiated, and whose errors there were


def _details(snapshot: Snapshot) -> Iterator[str]:
    lines = [line for device in snapshot.devices for line in _detail(device, snapshot.now)]
    if lines:
        yield ""
        yield from map(printable, lines)


def _detail(device: DeviceState, now: float) -> Iterator[str]:
    errors, peer = device.errors, device.peer
    if peer is not None:
        yield f"{device.name}: connected for {time_ago(now - peer.since)}"
        if peer.features:
            yield from wrap_words("    features:", peer.features)
        if peer.protocol_features:
            yield from wrap_words("    protocol:", peer.protocol_features)
    if device.limits:
        limits = ", ".join(f"{key}={value}" for key, value in device.limits.items())
        held = max((queue.throttled for queue in device.queues), default=0.0)
        yield f"{device.name}: limits: {limits}; they have held it back for {held:.1f} s"
    parts = [("front end", errors.protocol), ("guest", errors.guest), ("device type", errors.handler)]
    if any(number for _, number in parts):
        listed = ", ".join(f"{number} of the {whose}" for whose, number in parts if number)
        yield f"{device.name}: errors since the start: {listed}"
