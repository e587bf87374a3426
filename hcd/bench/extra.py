"""Single measurements: what a ratio to another back end does not show. ``python -m hcd.bench --extra``."""

from __future__ import annotations

import fnmatch
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from hcd.bench import backends
from hcd.demo.hcd_process import HcdProcess
from hcd.demo.packages import MissingToolError
from hcd.errors import ConfigError

__all__ = ["Context", "Measured", "Measurement", "choose", "judged", "run"]


@dataclass(frozen=True, slots=True)
class Measured:
    """One row: in words, against a limit ("" where there is none); ``numbers`` is for the JSON file."""

    name: str
    value: str
    limit: str = ""
    verdict: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


def judged(name: str, value: str, limit: str, good: bool, **numbers: float) -> Measured:
    return Measured(name, value, limit, "met" if good else "MISSED", numbers)


@dataclass(slots=True)
class Context:
    """Where and how long to measure. The process runs on ``front``; ``daemon`` starts hcd on ``back``."""

    directory: Path
    rounds: int
    seconds: float
    front: int
    back: int
    _count: int = 0

    def daemon(
        self, devices: Callable[[Path], str], *, plugins: Path | None = None, metrics_port: int | None = None
    ) -> AbstractContextManager[Daemon]:
        """hcd with a configuration, in a directory of its own. ``devices`` gets that directory; ``plugins`` is put in
        front of Python's path; /metrics is on a unix socket, or on ``metrics_port`` of 127.0.0.1."""
        self._count += 1
        directory = self.directory / f"d{self._count}"
        directory.mkdir()
        return Daemon(directory, devices(directory), self.back, plugins, metrics_port)


class Daemon:
    """A running hcd. ``directory`` has its sockets and its log."""

    def __init__(self, directory: Path, devices: str, cpu: int, plugins: Path | None, metrics_port: int | None) -> None:
        self.directory = directory
        before = os.environ.get("PYTHONPATH")
        if plugins is not None:
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(plugins), before]))
        try:
            with backends.pin(cpu):
                self.process = HcdProcess.from_config(directory, devices, metrics_port=metrics_port)
        finally:
            if plugins is not None:
                del os.environ["PYTHONPATH"]
                if before is not None:
                    os.environ["PYTHONPATH"] = before

    @property
    def pid(self) -> int:
        return self.process.process.pid

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self.process.stop()
        else:
            self.process.kill()


@dataclass(frozen=True, slots=True)
class Measurement:
    """``measure`` gives one row or several."""

    name: str
    measure: Callable[[Context], Sequence[Measured]]


def _all() -> tuple[Measurement, ...]:
    from hcd.bench import extra_handler, extra_idle, extra_net, extra_reload, extra_scale

    return (
        Measurement("handler", extra_handler.null_handler),
        Measurement("fairness", extra_handler.fairness),
        Measurement("slow-handler", extra_handler.slow_handler),
        Measurement("idle", extra_idle.idle),
        Measurement("start", extra_idle.start),
        Measurement("capabilities", extra_idle.capabilities),
        Measurement("reload", extra_reload.reload),
        Measurement("scraper", extra_scale.scraper),
        Measurement("scraper-file", extra_scale.scraper_of_file),
        Measurement("devices", extra_scale.devices),
        Measurement("ring-size", extra_scale.ring_sizes),
        Measurement("regions", extra_scale.regions),
        Measurement("hub", extra_net.hub),
        Measurement("testpmd", extra_net.testpmd),
    )


def choose(patterns: str) -> list[Measurement]:
    """Those that match one of the comma-separated shell patterns. ConfigError for a pattern without any."""
    known = _all()
    wanted = [pattern for pattern in patterns.split(",") if pattern]
    for pattern in wanted:
        if not any(fnmatch.fnmatchcase(one.name, pattern) for one in known):
            raise ConfigError(f"nothing is called {pattern}; there are {', '.join(one.name for one in known)}")
    return [one for one in known if any(fnmatch.fnmatchcase(one.name, pattern) for pattern in wanted)]


def run(
    chosen: Sequence[Measurement], directory: Path, *, rounds: int, seconds: float, say: Callable[[str], None]
) -> list[Measured]:
    """All of them, one after the other; what cannot run for want of a program is a row that says so."""
    front, back = backends.on_processors()
    context = Context(directory, rounds, seconds, front, back)
    found: list[Measured] = []
    with backends.pin(front):
        for one in chosen:
            try:
                rows = list(one.measure(context))
            except MissingToolError as exc:
                rows = [Measured(one.name, f"not measured: {exc}")]
            for row in rows:
                say(f"{row.name}: {row.value} {row.verdict}".rstrip())
            found += rows
    return found


def median_of(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")
