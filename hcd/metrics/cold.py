"""The cold families (see :mod:`hcd.metrics.names`), through prometheus_client."""

from __future__ import annotations

import operator
import platform
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hcd.doorbell import Doorbell, PathSource
from hcd.lab.results import load_saved, saved_candidates
from hcd.metrics.names import BY_NAME
from hcd.metrics.own import Counting, OwnCollector
from hcd.version import VERSION

__all__ = ["ColdCollector", "ColdText", "HostView", "Renderer"]


#: seconds
PROCESS_AGE = 1.0


class HostView(Counting, Protocol):
    """What the metrics read from a :class:`hcd.host.DeviceHost`."""

    @property
    def connected(self) -> bool: ...
    @property
    def kept(self) -> object | None: ...
    @property
    def handovers_resumed(self) -> int: ...
    @property
    def handovers_failed(self) -> int: ...
    @property
    def protocol_errors(self) -> int: ...
    @property
    def guest_errors(self) -> int: ...
    @property
    def handler_errors(self) -> int: ...
    @property
    def slow_steps(self) -> int: ...
    @property
    def stuck_requests(self) -> int: ...
    @property
    def path_conflict(self) -> bool: ...


class HotSource(Protocol):
    """What the metrics need from :class:`hcd.dataplane.stats.HotText`."""

    def render(self) -> memoryview: ...


Labels = Sequence[Sequence[str]]
#: of one family: the labels of each series, and their values
Samples = tuple[Labels, Sequence[float]]


class ColdCollector(Collector):
    """Reads hosts and doorbells at each scrape; keeps nothing of them."""

    def __init__(self, hosts: Collection[HostView], doorbells: Iterable[Doorbell]) -> None:
        self._hosts = hosts
        self._doorbells = doorbells
        self._path_costs = _PathCosts()

    def collect(self) -> Iterator[Metric]:
        return (_family(name, samples) for name, samples in self.samples())

    def samples(self) -> Iterator[tuple[str, Samples]]:
        """Every family with what it says now."""
        bells = list(self._doorbells)
        names = [(host.spec.name,) for host in self._hosts]
        yield "hcd_doorbell_info", (list(map(_INFO, bells)), [1] * len(bells))
        yield "hcd_doorbell_registered", _registered(bells)
        yield "hcd_connected", self._per_host(names, lambda host: host.connected)
        yield "hcd_handovers_total", self._handovers()
        yield "hcd_handover_ready", self._per_host(names, lambda host: host.kept is not None)
        yield "hcd_protocol_errors_total", self._per_host(names, lambda host: host.protocol_errors)
        yield "hcd_guest_errors_total", self._per_host(names, lambda host: host.guest_errors)
        yield "hcd_handler_errors_total", self._per_host(names, lambda host: host.handler_errors)
        yield "hcd_slow_steps_total", self._per_host(names, lambda host: host.slow_steps)
        yield "hcd_stuck_requests", self._per_host(names, lambda host: host.stuck_requests)
        yield "hcd_path_conflicts", self._per_host(names, lambda host: host.path_conflict)
        yield "hcd_path_cost_seconds", self._path_costs.samples()
        yield "hcd_build_info", ([(VERSION, _PYTHON)], [1])

    def _handovers(self) -> Samples:
        labels = [(host.spec.name, outcome) for outcome in ("resumed", "failed") for host in self._hosts]
        resumed = [host.handovers_resumed for host in self._hosts]
        return labels, resumed + [host.handovers_failed for host in self._hosts]

    def _per_host(self, names: Labels, value: Callable[[HostView], int]) -> Samples:
        return names, [int(value(host)) for host in self._hosts]


class ColdText:
    """The text of the cold families; that of a family is made again only when its samples are other ones.

    prometheus_client takes milliseconds for the doorbells of 64 devices, with the GIL held against the handlers.
    """

    def __init__(self, collector: ColdCollector, own: OwnCollector) -> None:
        self._collector = collector
        self._own = CollectorRegistry(auto_describe=False)
        self._own.register(own)
        self._made: dict[str, tuple[Samples, bytes]] = {}
        self._process = _ProcessText()

    def render(self) -> bytes:
        texts = [self._text(name, samples) for name, samples in self._collector.samples()]
        return b"".join([*texts, generate_latest(self._own), self._process.render()])

    def _text(self, name: str, samples: Samples) -> bytes:
        made = self._made.get(name)
        if made is None or made[0] != samples:
            made = self._made[name] = samples, generate_latest(_One(_family(name, samples)))
        return made[1]


class _ProcessText:
    """The process_* families, at most ``PROCESS_AGE`` seconds old: counting a thousand descriptors takes a while."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        self._text = b""
        self._made = -PROCESS_AGE

    def render(self) -> bytes:
        now = time.monotonic()
        if now - self._made >= PROCESS_AGE:
            self._text, self._made = generate_latest(self._registry), now
        return self._text


class _PathCosts:
    """What the last ``hcd lab`` found, which may run beside this daemon; read when its file is another one."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, int, int]] | None = None
        self._samples: Samples = [], []

    def samples(self) -> Samples:
        seen = [_file_id(path) for path in saved_candidates()]
        if seen != self._seen:
            costs = sorted(load_saved().items())
            self._samples = [labels for labels, _ in costs], [seconds for _, seconds in costs]
            self._seen = seen
        return self._samples


def _file_id(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0, 0
    return status.st_ino, status.st_mtime_ns, status.st_size


class _One(CollectorRegistry):
    """A registry of one family. One of its own for each: two daemons in one process must not meet in the global one."""

    def __init__(self, family: Metric) -> None:
        super().__init__(auto_describe=False)
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


class Renderer:
    """The whole text of /metrics, in pieces: the hot families as the data plane keeps them, then the cold ones."""

    def __init__(self, hot: HotSource, hosts: Collection[HostView], doorbells: Iterable[Doorbell]) -> None:
        self._hot = hot
        self._cold = ColdText(ColdCollector(hosts, doorbells), OwnCollector(hosts))

    def __call__(self) -> Sequence[bytes | memoryview]:
        return self._hot.render(), self._cold.render()


_PYTHON = platform.python_version()
_INFO: Callable[[Doorbell], tuple[str, ...]] = operator.attrgetter("info")


def _registered(bells: Iterable[Doorbell]) -> Samples:
    known = [bell for bell in bells if bell.source is PathSource.REGISTERED]
    return [(bell.device, bell.queue, bell.path) for bell in known], [int(bool(bell.registered)) for bell in known]


def _family(name: str, samples: Samples) -> Metric:
    declared = BY_NAME[name]
    make = CounterMetricFamily if declared.type == "counter" else GaugeMetricFamily
    family = make(declared.name, declared.help, labels=declared.labels)
    for labels, value in zip(*samples, strict=True):
        family.add_metric(labels, value)
    return family
