"""hcd's /metrics as the experiment reads them: rings counted, and histograms of what happened between two scrapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hcd.demo.hcd_process import Metrics
from hcd.lab.results import QUANTILES, Row

__all__ = ["Scrape", "histogram_rows", "interpolate"]

_RINGS = "hcd_doorbell_rings_total"
_RING_SECONDS = "hcd_doorbell_ring_seconds"
_DISPATCH_SECONDS = "hcd_doorbell_dispatch_seconds"

Buckets = Sequence[tuple[float, float]]


class Scrape:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.metrics = Metrics(text)

    def rings(self, ring: Mapping[str, str]) -> int:
        return int(self.metrics.total(_RINGS, **_labels(ring)))

    def buckets(self, name: str, ring: Mapping[str, str]) -> dict[float, float]:
        """Cumulative counts by upper bound."""
        found: dict[float, float] = {}
        for labels, count in self.metrics.series(f"{name}_bucket", **_labels(ring)):
            found[float(labels["le"])] = found.get(float(labels["le"]), 0) + count
        return found

    def total(self, name: str, ring: Mapping[str, str]) -> float:
        return self.metrics.total(name, **_labels(ring))


def histogram_rows(row: Row, ring: Mapping[str, str], before: Scrape, after: Scrape) -> None:
    """Fill ``row`` with the time from the guest's stamp to the handler: to the wake-up, and the mean from there."""
    old = before.buckets(_RING_SECONDS, ring)
    buckets = [(le, count - old.get(le, 0)) for le, count in sorted(after.buckets(_RING_SECONDS, ring).items())]
    if not buckets or not buckets[-1][1]:
        row.why = "hcd measured none: the stamps made no sense to it"
        return
    dispatch = _mean(_DISPATCH_SECONDS, ring, before, after)
    row.rings = int(buckets[-1][1])
    row.mean = _mean(_RING_SECONDS, ring, before, after) + dispatch
    row.per_second = 1 / row.mean
    row.quantiles = {f"{q:g}": interpolate(buckets, q) + dispatch for q in QUANTILES}
    row.note = f"from hcd's histogram, interpolated; the last {dispatch * 1e6:.2f} us are those from wake-up to handler"


def interpolate(buckets: Buckets, q: float) -> float:
    """Quantile ``q`` of cumulative ``buckets``, as Prometheus' histogram_quantile() has it."""
    rank = q * buckets[-1][1]
    lower, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= rank and count > below:
            if bound == float("inf"):
                return lower
            return lower + (bound - lower) * (rank - below) / (count - below)
        lower, below = bound, count
    return lower


def _mean(name: str, ring: Mapping[str, str], before: Scrape, after: Scrape) -> float:
    count = after.total(f"{name}_count", ring) - before.total(f"{name}_count", ring)
    return (after.total(f"{name}_sum", ring) - before.total(f"{name}_sum", ring)) / count if count else 0.0


def _labels(ring: Mapping[str, str]) -> dict[str, str]:
    """The labels of a doorbell: it is called what queues are called on a virtio device."""
    return {"device": ring["device"], "queue": ring["doorbell"]}
