"""The cold families (see :mod:`hcd.metrics.names`), through prometheus_client."""

from __future__ import annotations

import operator
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hcd.doorbell import Doorbell, PathSource, Registry
from hcd.lab.results import load_saved, saved_candidates
from hcd.metrics.names import BY_NAME
from hcd.metrics.own import OwnCollector
from hcd.version import VERSION

__all__ = ["ColdText", "Renderer"]


#: seconds
PROCESS_AGE = 5.0


class HotSource(Protocol):
    """What the metrics need from :class:`hcd.dataplane.stats.HotText`."""

    def render(self) -> Sequence[memoryview]: ...


Labels = Sequence[Sequence[str]]
#: of one family: the labels of each series, and their values
Samples = tuple[Labels, Sequence[float]]


class ColdText:
    """The text of the cold families.

    That of the doorbells is made again only when something about them has changed: prometheus_client takes milliseconds
    for those of 64 devices, with the GIL held against the handlers.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._own = CollectorRegistry(auto_describe=False)
        self._own.register(OwnCollector(registry.instruments))
        self._seen: object = None
        self._doorbells = b""
        self._path_costs = _PathCosts()
        self._build = _text("hcd_build_info", ([(VERSION, _PYTHON)], [1]))
        self._process = _ProcessText()

    def render(self) -> bytes:
        if (version := self._registry.version) is not self._seen:
            self._doorbells = b"".join(_text(*family) for family in _doorbells(list(self._registry)))
            self._seen = version
        own = generate_latest(self._own) if self._registry.instruments() else b""
        return b"".join([self._doorbells, self._path_costs.render(), self._build, own, self._process.render()])


def _doorbells(bells: Sequence[Doorbell]) -> Iterator[tuple[str, Samples]]:
    yield "hcd_doorbell_info", (list(map(_INFO, bells)), [1] * len(bells))
    known = [bell for bell in bells if bell.source is PathSource.REGISTERED]
    yield "hcd_doorbell_registered", (list(map(_PLACE, known)), [int(bool(bell.registered)) for bell in known])


class _ProcessText:
    """The process_* families, at most ``PROCESS_AGE`` seconds old: to make them takes longer than all the others."""

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
        self._paths = list(map(str, saved_candidates()))
        self._seen: list[tuple[int, int, int]] | None = None
        self._text = b""

    def render(self) -> bytes:
        seen = list(map(_file_id, self._paths))
        if seen != self._seen:
            costs = sorted(load_saved().items())
            samples = [labels for labels, _ in costs], [seconds for _, seconds in costs]
            self._text, self._seen = _text("hcd_path_cost_seconds", samples), seen
        return self._text


def _file_id(path: str) -> tuple[int, int, int]:
    try:
        status = os.stat(path)
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

    def __init__(self, hot: HotSource, registry: Registry) -> None:
        self._hot = hot
        self._cold = ColdText(registry)

    def __call__(self) -> Sequence[bytes | memoryview]:
        return *self._hot.render(), self._cold.render()


_PYTHON = platform.python_version()
_INFO: Callable[[Doorbell], tuple[str, ...]] = operator.attrgetter(*BY_NAME["hcd_doorbell_info"].labels)
_PLACE: Callable[[Doorbell], tuple[str, ...]] = operator.attrgetter(*BY_NAME["hcd_doorbell_registered"].labels)


def _text(name: str, samples: Samples) -> bytes:
    declared = BY_NAME[name]
    make = CounterMetricFamily if declared.type == "counter" else GaugeMetricFamily
    family = make(declared.name, declared.help, labels=declared.labels)
    for labels, value in zip(*samples, strict=True):
        family.add_metric(labels, value)
    return generate_latest(_One(family))
