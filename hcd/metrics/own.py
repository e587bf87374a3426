"""The metrics that devices declare themselves (:mod:`hcd.instruments`), through prometheus_client."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Samples
from prometheus_client.registry import Collector

from hcd.instruments import PREFIX, Histogram, Instrument, Instruments, Metric
from hcd.log import RateLimited

__all__ = ["OwnCollector"]

_log = RateLimited(logging.getLogger("hcd.metrics"), limit=1)

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class OwnCollector(Collector):
    """Reads the devices that are there at each scrape, by name: a device's series go with it."""

    def __init__(self, devices: Callable[[], Iterable[tuple[str, Instruments]]]) -> None:
        self._devices = devices

    def collect(self) -> Iterator[Samples]:
        families: dict[str, tuple[Metric, Family]] = {}
        for device, instruments in self._devices():
            for declared, series in instruments.families():
                first, family = families.setdefault(declared.name, (declared, _make_family(declared)))
                if (declared.kind, *declared.labels) != (first.kind, *first.labels):
                    name = f"{PREFIX}{declared.name}"
                    _log.error(name, "%s of device %s is left out: another device type declares it otherwise",
                               name, device)
                    continue
                for values, instrument in series.items():
                    try:
                        _add(family, [device, *values], instrument)
                    except (TypeError, ValueError) as error:  # a plug-in's; the others' must be told all the same
                        name = f"{PREFIX}{declared.name}"
                        _log.error((name, device), "%s of device %s is left out: what it counted is no number: %s",
                                   name, device, error)
        yield from (family for _, family in families.values())


def _make_family(declared: Metric) -> Family:
    labels = ["device", *declared.labels]
    if declared.kind == "histogram":
        return HistogramMetricFamily(PREFIX + declared.name, declared.help, labels=labels)
    make = CounterMetricFamily if declared.kind == "counter" else GaugeMetricFamily
    return make(PREFIX + declared.name, declared.help, labels=labels)


def _add(family: Family, labels: list[str], instrument: Instrument) -> None:
    if isinstance(instrument, Histogram):
        assert isinstance(family, HistogramMetricFamily)
        bounds = [*map(str, map(float, instrument.bounds)), "+Inf"]
        buckets = list(zip(bounds, map(float, accumulate(instrument.counts)), strict=True))
        family.add_metric(labels, buckets, float(instrument.sum))
    else:
        assert not isinstance(family, HistogramMetricFamily)
        family.add_metric(labels, float(instrument.value))
