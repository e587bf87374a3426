"""The metrics that devices declare themselves (:mod:`hcd.instruments`), through prometheus_client."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from itertools import accumulate
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Samples
from prometheus_client.registry import Collector

from hcd.instruments import PREFIX, Histogram, Instrument, Instruments, Metric
from hcd.log import RateLimited

__all__ = ["Counting", "OwnCollector"]

_log = RateLimited(logging.getLogger("hcd.metrics"), limit=1)

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class Named(Protocol):
    @property
    def name(self) -> str: ...


class Counting(Protocol):
    """What is read from a host."""

    @property
    def spec(self) -> Named: ...
    @property
    def instruments(self) -> Instruments: ...


class OwnCollector(Collector):
    """Reads the hosts that are there at each scrape: a device's series go with it."""

    def __init__(self, hosts: Collection[Counting]) -> None:
        self._hosts = hosts

    def collect(self) -> Iterator[Samples]:
        families: dict[str, tuple[Metric, Family]] = {}
        for host in self._hosts:
            for declared, series in host.instruments.families():
                first, family = families.setdefault(declared.name, (declared, _make_family(declared)))
                if (declared.kind, *declared.labels) != (first.kind, *first.labels):
                    name = f"{PREFIX}{declared.name}"
                    _log.error(name, "%s of device %s is left out: another device type declares it otherwise",
                               name, host.spec.name)
                    continue
                for values, instrument in series.items():
                    try:
                        _add(family, [host.spec.name, *values], instrument)
                    except (TypeError, ValueError) as error:  # a plug-in's; the others' must be told all the same
                        name = f"{PREFIX}{declared.name}"
                        _log.error((name, host.spec.name), "%s of device %s is left out: what it counted is no number: "
                                   "%s", name, host.spec.name, error)
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
