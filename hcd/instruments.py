"""A device's own metrics: what a class declares, and what its instances count with.

Declarations stand on the class, so that the names, and every combination of label values, are known before anything
happened: a series is there from the first scrape on, and cannot grow in number while a guest does odd things. Values
are plain Python numbers that the device's lane writes and a scrape reads.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import isfinite, prod

__all__ = ["DEFAULT_BUCKETS", "PREFIX", "Counter", "Gauge", "Histogram", "Instruments", "Metric", "faults"]

#: what hcd puts before the name that a device declares
PREFIX = "hcd_device_"
KINDS = ("counter", "gauge", "histogram")
#: seconds; those of hcd's own histograms, a little coarser
DEFAULT_BUCKETS = (
    1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0,
)
#: series that one device may have: enough for any honest use, and a scrape stays short
MAX_SERIES = 200

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", re.ASCII)
#: labels that hcd or the format uses
_TAKEN_LABELS = ("device", "le", "quantile")


@dataclass(frozen=True, slots=True)
class Metric:
    """One family of metrics of a device type; /metrics shows it as ``hcd_device_NAME`` with the label ``device``.

    ``name`` begins with a word of the type's own ("vsock_connections"): types of one daemon share the space of names.
    Base units (seconds, bytes); counters end in ``_total``. ``kind`` is counter, gauge or histogram. ``labels`` names
    all values that each label can have; every combination is a series. ``buckets``: upper bounds of a histogram,
    ascending.
    """

    name: str
    kind: str
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = DEFAULT_BUCKETS


class Counter:
    """A number that only rises."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self, by: float = 1) -> None:
        """ValueError for less than nothing."""
        if by < 0:
            raise ValueError(f"a counter never falls; inc({by})")
        self.value += by


class Gauge:
    """A number that rises and falls."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def set(self, value: float) -> None:
        """TypeError or ValueError for what is no number."""
        self.value = float(value)

    def inc(self, by: float = 1) -> None:
        self.value += by

    def dec(self, by: float = 1) -> None:
        self.value -= by


class Histogram:
    """How values are distributed over buckets."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last one: above every bound
        self.sum: float = 0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


Instrument = Counter | Gauge | Histogram


class Instruments:
    """The instruments of one device, made from its class's declarations; all of them at zero."""

    def __init__(self, declared: Iterable[Metric]) -> None:
        self._families = {metric.name: (metric, _make_series(metric)) for metric in declared}

    def find(self, name: str, kind: str, labels: Mapping[str, str]) -> Instrument:
        """The instrument of one series. LookupError when nothing like it is declared."""
        if name not in self._families:
            raise LookupError(f'no metric "{name}" is declared; declared are: {", ".join(self._families) or "none"}')
        metric, series = self._families[name]
        if metric.kind != kind:
            raise LookupError(f'metric "{name}" is declared as a {metric.kind}, not a {kind}')
        found = series.get(tuple(labels.get(label, "") for label in metric.labels))
        if found is None or labels.keys() != metric.labels.keys():
            raise LookupError(f'metric "{name}" has no series {dict(labels)}; its labels are {dict(metric.labels)}')
        return found

    def __len__(self) -> int:
        """How many families."""
        return len(self._families)

    def families(self) -> Iterator[tuple[Metric, Mapping[tuple[str, ...], Instrument]]]:
        """Every declaration with its series, by the values of its labels in their order."""
        yield from self._families.values()


def _make_series(metric: Metric) -> dict[tuple[str, ...], Instrument]:
    return {values: _make(metric) for values in product(*metric.labels.values())}


def _make(metric: Metric) -> Instrument:
    if metric.kind == "histogram":
        return Histogram(metric.buckets)
    return Counter() if metric.kind == "counter" else Gauge()


def _ascend(buckets: Sequence[float]) -> bool:
    """Whether these are upper bounds; that of the last bucket, infinity, is not one of them."""
    numbers = all(isinstance(bound, int | float) and isfinite(bound) for bound in buckets)
    return bool(buckets) and numbers and list(buckets) == sorted(set(buckets))


def faults(declared: Iterable[object]) -> Iterator[str]:
    """What is wrong with the declarations of one device type."""
    seen: set[str] = set()
    count = 0
    for metric in declared:
        if not isinstance(metric, Metric):
            yield f"declares {metric!r} as a metric; expected a hcd.device.Metric"
            continue
        if metric.name in seen:
            yield f'declares metric "{metric.name}" twice'
        seen.add(metric.name)
        count += prod(len(values) for values in metric.labels.values())
        yield from (f'metric "{metric.name}" {text}' for text in _metric_faults(metric))
    if count > MAX_SERIES:
        yield f"declares {count} series of metrics; {MAX_SERIES} at most"


def _metric_faults(metric: Metric) -> Iterator[str]:
    if not _NAME.fullmatch(metric.name):
        yield "has a name that is none; expected words of lower-case letters and digits, joined by _"
    if metric.kind not in KINDS:
        yield f'has the unknown kind "{metric.kind}"; expected {", ".join(KINDS)}'
    if (metric.kind == "counter") != metric.name.endswith("_total"):
        yield "has a name that ends in _total, or should: counters do, and nothing else"
    if metric.kind == "histogram" and not _ascend(metric.buckets):
        yield "has buckets that are not numbers, or do not ascend"
    if not metric.help.strip() or "\n" in metric.help:
        yield "has no help, or more than a line of it"
    for label, values in metric.labels.items():
        if not _NAME.fullmatch(label) or label in _TAKEN_LABELS:
            yield f'has a label "{label}", which is not for devices'
        if not values or len(set(values)) != len(values) or not all(isinstance(value, str) for value in values):
            yield f'has no values for its label "{label}", or one twice'
