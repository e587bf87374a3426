"""The cold families (see :mod:`hcd.metrics.names`), through prometheus_client."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hcd.doorbell import Doorbell, PathSource
from hcd.lab.results import load_saved
from hcd.metrics.names import BY_NAME
from hcd.metrics.own import Counting, OwnCollector
from hcd.version import VERSION

__all__ = ["ColdCollector", "HostView", "Renderer", "cold_registry"]


class HostView(Counting, Protocol):
    """What the metrics read from a :class:`hcd.host.DeviceHost`."""

    @property
    def connected(self) -> bool: ...
    @property
    def protocol_errors(self) -> int: ...
    @property
    def guest_errors(self) -> int: ...
    @property
    def handler_errors(self) -> int: ...
    @property
    def slow_steps(self) -> int: ...
    @property
    def path_conflict(self) -> bool: ...


class HotSource(Protocol):
    """What the metrics need from :class:`hcd.dataplane.stats.HotText`."""

    def render(self) -> bytes: ...


class ColdCollector(Collector):
    """Reads hosts and doorbells at each scrape; keeps nothing itself."""

    def __init__(self, hosts: Collection[HostView], doorbells: Iterable[Doorbell]) -> None:
        self._hosts = hosts
        self._doorbells = doorbells

    def collect(self) -> Iterator[Metric]:
        yield self._doorbell_info()
        yield self._doorbell_registered()
        yield self._per_host("hcd_connected", lambda host: host.connected)
        yield self._per_host("hcd_protocol_errors_total", lambda host: host.protocol_errors)
        yield self._per_host("hcd_guest_errors_total", lambda host: host.guest_errors)
        yield self._per_host("hcd_handler_errors_total", lambda host: host.handler_errors)
        yield self._per_host("hcd_slow_steps_total", lambda host: host.slow_steps)
        yield self._per_host("hcd_path_conflicts", lambda host: host.path_conflict)
        yield self._path_costs()
        build = _family("hcd_build_info")
        build.add_metric([VERSION, platform.python_version()], 1)
        yield build

    def _doorbell_info(self) -> Metric:
        family = _family("hcd_doorbell_info")
        for bell in self._doorbells:
            labels = [
                bell.device,
                bell.queue,
                bell.path,
                bell.source,
                bell.kind,
                bell.transport,
                bell.address,
            ]
            family.add_metric(labels, 1)
        return family

    def _doorbell_registered(self) -> Metric:
        family = _family("hcd_doorbell_registered")
        for bell in self._doorbells:
            if bell.source is PathSource.REGISTERED:
                family.add_metric([bell.device, bell.queue, bell.path], int(bool(bell.registered)))
        return family

    def _path_costs(self) -> Metric:
        """Read at each scrape: the experiment may run beside a daemon."""
        family = _family("hcd_path_cost_seconds")
        for labels, seconds in sorted(load_saved().items()):
            family.add_metric(labels, seconds)
        return family

    def _per_host(self, name: str, value: Callable[[HostView], int]) -> Metric:
        family = _family(name)
        for host in self._hosts:
            family.add_metric([host.spec.name], int(value(host)))
        return family


class Renderer:
    """The whole text of /metrics: the hot families as the data plane renders them, then the cold ones."""

    def __init__(self, hot: HotSource, cold: CollectorRegistry) -> None:
        self._hot = hot
        self._cold = cold

    def __call__(self) -> bytes:
        return self._hot.render() + generate_latest(self._cold)


def cold_registry(hosts: Collection[HostView], doorbells: Iterable[Doorbell]) -> CollectorRegistry:
    """A registry of its own: two daemons in one process must not meet in prometheus_client's global one."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ColdCollector(hosts, doorbells))
    registry.register(OwnCollector(hosts))
    ProcessCollector(registry=registry)
    return registry


def _family(name: str) -> CounterMetricFamily | GaugeMetricFamily:
    declared = BY_NAME[name]
    make = CounterMetricFamily if declared.type == "counter" else GaugeMetricFamily
    return make(declared.name, declared.help, labels=declared.labels)
