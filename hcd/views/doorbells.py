"""``hcd doorbells``."""

from __future__ import annotations

from collections.abc import Sequence

from hcd.control.snapshot import DeviceState, DoorbellState, Snapshot
from hcd.views.text import align, duration

__all__ = ["COLUMNS", "doorbells"]

COLUMNS = ("DEVICE", "QUEUE", "PATH", "SOURCE", "KIND", "ADDRESS", "RINGS", "WAKEUPS", "P50", "P99")
_RIGHT = ("RINGS", "WAKEUPS", "P50", "P99")


def doorbells(snapshot: Snapshot) -> list[str]:
    """A line for each doorbell and path. P50 and P99 are of hcd_doorbell_response_seconds."""
    rows = [_row(device, bell) for device in snapshot.devices for bell in device.doorbells]
    return align(COLUMNS, rows, _RIGHT)


def _row(device: DeviceState, bell: DoorbellState) -> Sequence[str]:
    refused = bell.registered is False
    return (
        device.name,
        bell.name,
        bell.path,
        "refused" if refused else bell.source if bell.current else "before",
        bell.kind,
        bell.address,
        str(bell.rings),
        str(bell.wakeups),
        duration(bell.response.p50),
        duration(bell.response.p99),
    )
