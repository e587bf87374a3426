"""The experiment: attach the tiny guest to hcd, ring every path in turns, count on both sides, make rows.

Order of things. Every target is probed once: a path that does not return, or that hcd or the kernel does not have,
becomes a row that says so. Then the rounds: in each, every target gets its share of the rings, in an order that moves
on by one, so that what disturbs the machine for a while disturbs all paths alike. The first round is the warm-up and
is counted, not measured. At the end hcd is asked how many rings it saw.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from hcd.errors import HcdError
from hcd.lab.child import VmmFailed, VmmProcess
from hcd.lab.metrics import Scrape, histogram_rows
from hcd.lab.results import EXIT, QUANTILES, RING, TRIP, Count, Measure, Row, quantile

__all__ = ["Experiment", "Target"]

ROUNDS = 10
_PROBE_SECONDS = 1.0
_ATTACH_SECONDS = 10.0
#: a run may take this long for each ring before it is given up (seconds)
_SLOWEST_RING = 1e-3
_PATHS = {"PIO": "pio", "MMIO": "mmio", "HYPERV": "hypercall", "XEN": "hypercall"}


@dataclass(slots=True)
class Target:
    """Something to ring and how to measure it. ``why`` is set when it turns out not to work."""

    measure: Measure
    path: str
    kind: str
    ring: dict[str, str]
    why: str = ""
    stamped: bool = False
    sent: int = 0
    ticks: array[int] = field(default_factory=lambda: array("I"))
    medians: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.measure} {self.path} {self.kind}"

    @property
    def doorbell(self) -> str:
        return f"{self.ring['device']}/{self.ring['doorbell']}" if "doorbell" in self.ring else ""


class Experiment:
    """One run. ``start`` starts a VMM: the first one, and another one where a guest took its VMM along.

    ``scrape`` reads hcd's metrics, None where they cannot be had; ``constant_tsc``: whether ticks are time, without
    which hcd times no rings. ``say`` gets a line now and then. Use it as a context manager.
    """

    def __init__(
        self,
        start: Callable[[], VmmProcess],
        scrape: Callable[[], Scrape] | None,
        *,
        constant_tsc: bool = True,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.targets: list[Target] = []
        self._start = start
        self._vmm = start()
        self.host: dict[str, Any] = self._vmm.ask("host")
        self._sockets: list[str] = []
        self._constant_tsc = constant_tsc
        self._scrape = scrape
        self._say = say
        self._empty = Target(EXIT, "", "empty", {"bare": "empty"})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._vmm.__exit__(kind, error, trace)

    # -- what to measure

    def attach(self, socket: str) -> None:
        """Attach to the device behind ``socket``; its doorbells become targets. HcdError when that fails."""
        found = self._vmm.ask("attach", socket=socket, timeout=_ATTACH_SECONDS)
        self._sockets.append(socket)
        usable = [one for one in found["interrupts"] if not one["error"]]
        unusable = next((one["reason"] for one in found["interrupts"] if one["error"]), "")
        for bell in found["doorbells"]:
            path, kind = _PATHS[bell["place"]], _kind(bell)
            ring = {"device": found["device"], "doorbell": bell["name"]}
            measure = TRIP if found["interrupts"] else EXIT
            target = Target(measure, path, kind, ring, why=bell["reason"], stamped=bell["stamp"])
            if measure is TRIP and not usable:
                target.why = target.why or unusable
            self.targets.append(target)

    def add_comparisons(self) -> None:
        """What rings no device: exits that this process's VMM answers, and the bare hypercall."""
        self.targets += [
            Target(EXIT, "pio", "vmm", {"bare": "pio"}),
            Target(EXIT, "mmio", "vmm", {"bare": "mmio"}),
            Target(EXIT, "hypercall", "null", {"bare": "hypercall"}),
        ]

    def keep_only(self, wanted: Sequence[str]) -> None:
        """Forget targets that are not of these paths ("pio") or kinds ("mmio/any-length"). HcdError for any that
        there is none of."""
        names = {name for one in self.targets for name in (one.path, f"{one.path}/{one.kind}")}
        if missing := [name for name in wanted if name not in names]:
            raise HcdError(f"nothing to ring over {', '.join(missing)}; there is {', '.join(sorted(names))}")
        self.targets = [one for one in self.targets if {one.path, f"{one.path}/{one.kind}"} & set(wanted)]

    # -- doing it

    def run(self, rings: int, trips: int) -> tuple[list[Row], list[Count]]:
        """Ring ``rings`` times for every exit and ``trips`` times for every round trip; rows and counts."""
        before = self._scrape() if self._scrape else None
        for target in (self._empty, *self.targets):
            self._probe(target)
        for number in range(ROUNDS + 1):
            self._round(number, rings, trips)
        counts, after = self._count(before)
        rows = [self._row(target) for target in self.targets]
        rows += self._ring_rows(before, after)
        _compare_with_pio(rows)
        return rows, counts

    def _probe(self, target: Target) -> None:
        if target.why:
            return
        self._say(f"probing {target.name}")
        self._ring(target, 1, _PROBE_SECONDS)
        target.ticks = array("I")

    def _round(self, number: int, rings: int, trips: int) -> None:
        self._say(f"round {number} of {ROUNDS}" if number else "warm-up")
        turn = number % max(1, len(self.targets))
        for target in (self._empty, *self.targets[turn:], *self.targets[:turn]):
            if target.why:
                continue
            share = _due(trips if target.measure == TRIP else rings, number) - target.sent
            if share > 0:
                ticks = self._ring(target, share, 2 + share * _SLOWEST_RING)
                if number and not target.why:
                    target.ticks.extend(ticks)
                    target.medians.append(quantile(sorted(ticks), 0.5))

    def _ring(self, target: Target, count: int, timeout: float) -> list[int]:
        """Ring ``count`` times; sets ``target.why`` when they did not all come back."""
        do = "trips" if target.measure == TRIP else "exits"
        try:
            result = self._vmm.ask(do, ring=target.ring, count=count, timeout=timeout)
        except VmmFailed as exc:
            target.why = str(exc)
            if not self._vmm.alive:
                target.sent = 0  # nobody knows how often it rang
                self._revive()
            return []
        ticks: list[int] = result["ticks"]
        target.sent += len(ticks)
        if result["why"]:
            target.why = result["why"]
            if target.measure == TRIP:
                target.sent += 1  # it rang, and no interrupt came
                target.why = f"no interrupt came back: {target.why}"
        elif result["status"]:
            target.why = f"the hypercall returned {result['status']:#x}"
        return ticks

    def _revive(self) -> None:
        """Go on with another VMM. HcdError when that is not to be had."""
        self._vmm.close()
        self._vmm = self._start()
        for socket in self._sockets:
            self._vmm.ask("attach", socket=socket, timeout=_ATTACH_SECONDS)

    # -- what hcd saw

    def _count(self, before: Scrape | None) -> tuple[list[Count], Scrape | None]:
        """Rings of every doorbell on both sides; waits a moment for hcd to take the last ones."""
        if self._scrape is None or before is None:
            return [], None
        deadline = time.monotonic() + 5
        while True:
            after = self._scrape()
            counts = [
                Count(
                    target.ring["device"],
                    target.ring["doorbell"],
                    target.path,
                    target.sent,
                    after.rings(target.ring) - before.rings(target.ring),
                )
                for target in self.targets
                if target.doorbell and target.sent
            ]
            if all(one.equal for one in counts) or time.monotonic() > deadline:
                return counts, after
            time.sleep(0.01)

    # -- rows

    def _row(self, target: Target) -> Row:
        row = Row(target.measure, target.path, target.kind, target.doorbell, why=target.why)
        khz = self.host["tsc_khz"]
        if not row.why and not khz:
            row.why = "KVM does not tell the frequency of the TSC"
        if row.why or not target.ticks:
            row.why = row.why or "no ring is left to measure: the first one is the probe"
            return row
        ordered = sorted(target.ticks)
        base = self._baseline if target.measure == EXIT else 0
        second = khz * 1e3
        row.rings = len(ordered)
        if base:
            row.note = f"{base / second * 1e6:.2f} us for taking the time are subtracted"
        row.mean = max(sum(ordered) / len(ordered) - base, 1) / second
        row.per_second = 1 / row.mean
        row.quantiles = {f"{q:g}": max(quantile(ordered, q) - base, 0) / second for q in QUANTILES}
        medians = [max(median - base, 1) for median in target.medians]
        row.spread = max(medians) / min(medians)
        return row

    @property
    def _baseline(self) -> int:
        """Ticks that taking the time costs."""
        return quantile(sorted(self._empty.ticks), 0.5) if self._empty.ticks else 0

    def _ring_rows(self, before: Scrape | None, after: Scrape | None) -> Iterable[Row]:
        """From the guest's stamp to the handler, as hcd measured them: its histograms of this run."""
        for target in self.targets:
            if target.measure != TRIP:
                continue
            row = Row(RING, target.path, target.kind, target.doorbell, why=target.why)
            if not row.why:
                row.why = self._why_no_ring(target, before is None)
            if not row.why and before is not None and after is not None:
                histogram_rows(row, target.ring, before, after)
            yield row

    def _why_no_ring(self, target: Target, blind: bool) -> str:
        if not target.stamped:
            return "the device has no stamp for this doorbell"
        if not self._constant_tsc:
            return "the TSC is not said to be constant and non-stop: hcd times no rings by it"
        if self.host["tsc_offset"] is None:
            return "this kernel does not tell the guest's TSC offset (KVM_VCPU_TSC_OFFSET, Linux 5.16)"
        return "hcd's metrics are not known (--metrics)" if blind else ""


def _kind(bell: dict[str, Any]) -> str:
    """How the doorbell is registered, as a label."""
    if bell["place"] in ("HYPERV", "XEN"):
        return str(bell["place"]).lower()
    if bell["datamatch"] is not None:
        return "datamatch"
    return "fixed" if bell["width"] else "any-length"


def _due(total: int, number: int) -> int:
    """How many of ``total`` rings have been sent after round ``number``, with the probe and the warm-up, round 0."""
    return total * (number + 1) // (ROUNDS + 1)


def _compare_with_pio(rows: Sequence[Row]) -> None:
    """Fill in the ratios: to the port doorbell that hcd serves, of the same measure."""
    for row in rows:
        pio = next((one for one in rows if one.measure == row.measure and one.path == "pio" and one.p50), None)
        if pio is not None and row.p50:
            row.ratio = row.p50 / pio.p50
