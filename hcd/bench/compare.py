"""Rounds over the back ends of a case, and the ratios between neighbours.

A machine's speed drifts; two runs side by side share most of the drift. So every round runs each back end once, in
turn, and what is kept is the ratio within a round: its median over the rounds, and the smallest and largest.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcd.bench import backends, blk
from hcd.bench.cases import Case
from hcd.bench.peer import cpu_seconds
from hcd.bench.second import SecondFrontend

__all__ = ["Bench", "CaseResult", "Ratio", "ratio"]

MEASURES = ("per_second", "p50", "p99", "cpu_per_million", "kicks_per_request", "calls_per_request", "peak_memory")
#: what ratios are made of: more is better for the first, less for the others
COMPARED = ("per_second", "p50", "p99", "cpu_per_million")


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of the first back end to another, over the rounds. nan where nothing was measured."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True)
class CaseResult:
    """``runs``: by back end, the measures of every round. ``ratios``: by the other back end and measure."""

    case: Case
    runs: Mapping[str, Sequence[Mapping[str, float]]]
    ratios: Mapping[str, Mapping[str, Ratio]]

    def median(self, backend: str, measure: str) -> float:
        return statistics.median(run[measure] for run in self.runs[backend])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Of paired values."""
    pairs = [a / b if b else math.nan for a, b in zip(ours, theirs, strict=True)]
    if any(math.isnan(pair) for pair in pairs):
        return Ratio(math.nan, math.nan, math.nan)
    return Ratio(statistics.median(pairs), min(pairs), max(pairs))


class Bench:
    """Starts back ends when a case wants them first; they end with the context."""

    def __init__(self, directory: Path, image: backends.Image, *, say: Callable[[str], None]) -> None:
        self.directory = directory
        self.image = image
        self.front, self.back = backends.on_processors()
        self._say = say
        self._stack = contextlib.ExitStack()
        self._direct_image: backends.Image | None = None
        self._running: dict[str, backends.Running] = {}
        self._second: SecondFrontend | None = None

    def __enter__(self) -> Bench:
        self._stack.enter_context(backends.pin(self.front))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()

    def run(self, case: Case, *, rounds: int, seconds: float) -> CaseResult:
        """All rounds of one case."""
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in case.backends}
        for number in range(rounds):
            for name in case.backends:
                runs[name].append(self._once(case, name, seconds))
            done = ", ".join(f"{name} {runs[name][-1]['per_second']:,.0f}/s" for name in case.backends)
            self._say(f"{case.name} round {number + 1}: {done}")
        return CaseResult(case, runs, self._ratios(case, runs))

    def _ratios(self, case: Case, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, Ratio]]:
        first, *others = case.backends
        return {
            other: {
                measure: ratio([run[measure] for run in runs[first]], [run[measure] for run in runs[other]])
                for measure in COMPARED
            }
            for other in others
        }

    def _once(self, case: Case, name: str, seconds: float) -> dict[str, float]:
        backend = self._backend(name)
        if case.second:
            return self._by_second(case, backend, seconds)
        result = blk.run(
            blk.BlkCase(
                str(backend.socket),
                depth=case.depth,
                queues=case.queues,
                size=case.size,
                rw=case.rw,
                seconds=seconds,
                packed=name.endswith("packed"),
            )
        )
        if result.errors:
            raise RuntimeError(f"{case.name}: {name} failed {result.errors} requests")
        return {measure: getattr(result, measure) for measure in MEASURES}

    def _by_second(self, case: Case, backend: backends.Running, seconds: float) -> dict[str, float]:
        if self._second is None:
            self._second = SecondFrontend(self.directory)
        before = cpu_seconds(backend.pid)
        result = self._second.run(backend.socket, rw=case.rw, depth=case.depth, size=case.size, seconds=seconds)
        spent = cpu_seconds(backend.pid) - before
        # its warm-up is in there too: scale by the time
        spent *= seconds / (seconds + blk.WARM_UP)
        found: dict[str, float] = dict.fromkeys(MEASURES, math.nan)
        found.update({name: getattr(result, name) for name in MEASURES if hasattr(result, name)})
        return found | {"cpu_per_million": spent / result.requests * 1e6 if result.requests else math.nan}

    def _backend(self, name: str) -> backends.Running:
        """The one called ``name``, started if it is not; packed rings are a matter of the front end."""
        name = name.removesuffix(" packed")
        if name not in self._running:
            self._running[name] = self._stack.enter_context(self._start(name))
        return self._running[name]

    def _start(self, name: str) -> contextlib.AbstractContextManager[backends.Running]:
        program, *words = name.split()
        direct = "direct" in words
        file = name.replace(" ", "-")
        image = self._image(direct)
        if program == "hcd":
            return backends.hcd_blk(self.directory, file, image, self.back, direct=direct)
        return backends.qsd(self.directory, file, image, self.back, aio=words[0], direct=direct)

    def _image(self, direct: bool) -> backends.Image:
        """hcd locks its file against a second hcd, so O_DIRECT has one of its own, of the same size."""
        if not direct:
            return self.image
        if self._direct_image is None:
            self._direct_image = backends.make_image(self.directory, self.image.size, "direct")
        return self._direct_image
