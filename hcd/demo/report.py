"""What the demo prints in the end: what every path of every device cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hcd.demo.hcd_process import Metrics

__all__ = ["Row", "rows_since", "table"]

HEADERS = (
    "device",
    "path",
    "source",
    "rings",
    "wake-ups",
    "requests",
    "dispatch p50",
    "p99",
    "response p50",
    "p99",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One device over one path. Quantiles are upper bounds of histogram buckets, in seconds."""

    device: str
    path: str
    source: str
    rings: int
    wakeups: int
    requests: int
    dispatch: tuple[float | None, float | None]
    response: tuple[float | None, float | None]

    def cells(self) -> tuple[str, ...]:
        counts = (str(self.rings), str(self.wakeups), str(self.requests))
        times = (*self.dispatch, *self.response)
        return (self.device, self.path, self.source, *counts, *(bound(value) for value in times))


def rows_since(before: Metrics, after: Metrics, devices: Iterable[str], path: str) -> list[Row]:
    """What ``devices`` did over ``path`` between two scrapes.

    Requests carry no path, so between the scrapes each device must have been rung over one path only.
    """
    rows = []
    for device in devices:
        known = after.series("hcd_doorbell_info", device=device, path=path)
        rows.append(
            Row(
                device,
                path,
                ", ".join(sorted({labels["source"] for labels, _ in known})) or "?",
                _growth(before, after, "hcd_doorbell_rings_total", device=device, path=path),
                _growth(before, after, "hcd_doorbell_wakeups_total", device=device, path=path),
                _growth(before, after, "hcd_requests_total", device=device),
                _quantiles(after, "hcd_doorbell_dispatch_seconds", device, path),
                _quantiles(after, "hcd_doorbell_response_seconds", device, path),
            )
        )
    return rows


def _growth(before: Metrics, after: Metrics, name: str, **labels: str) -> int:
    return round(after.total(name, **labels) - before.total(name, **labels))


def _quantiles(metrics: Metrics, name: str, device: str, path: str) -> tuple[float | None, float | None]:
    return (
        metrics.quantile(name, 0.50, device=device, path=path),
        metrics.quantile(name, 0.99, device=device, path=path),
    )


def bound(seconds: float | None) -> str:
    """A bucket's upper bound in the unit that reads best."""
    if seconds is None:
        return "-"
    if math.isinf(seconds):
        return ">1 s"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"<={seconds / size:.3g} {unit}"
    return f"<={seconds * 1e6:.3g} us"


def table(rows: Sequence[Row]) -> str:
    """The rows under their headers; words to the left, numbers to the right."""
    lines = [HEADERS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADERS))]
    words = 3
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
