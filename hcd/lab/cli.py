"""``hcd lab``: arguments, the hcd to measure, and what is done with the result."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from hcd.config import Address, parse_address
from hcd.demo.hcd_process import HcdFailedError, HcdProcess, fetch
from hcd.errors import ConfigError, HcdError
from hcd.lab import facts, plot, report, results
from hcd.lab.child import VmmProcess
from hcd.lab.devices import configuration
from hcd.lab.experiment import ROUNDS, Experiment
from hcd.lab.machine import MAX_SAMPLES
from hcd.lab.metrics import Scrape
from hcd.lab.results import Report

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = "Measure what each path out of a guest costs on this machine: a tiny guest rings hcd over every one."
DEFAULT_RINGS = 100_000
#: a round trip is that much slower that it gets fewer rings
_TRIPS_SHARE = 10
#: what the tiny guest has room to note in one round, in all of them
MAX_RINGS = ROUNDS * MAX_SAMPLES
_PATHS = ("pio", "mmio", "hypercall")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``hcd lab``."""
    parser.add_argument(
        "--paths", type=_paths, default=_PATHS, metavar="LIST", help="of pio, mmio, hypercall, or like mmio/any-length"
    )
    parser.add_argument("--rings", type=_count, default=DEFAULT_RINGS, metavar="N", help=f"default {DEFAULT_RINGS}")
    parser.add_argument("--trips", type=_count, metavar="N", help="round trips; default a tenth of --rings")
    parser.add_argument("--json", metavar="FILE", help="write everything there; - is standard output")
    parser.add_argument("--plot", metavar="FILE", help="draw the distributions (PNG, SVG, PDF; needs matplotlib)")
    parser.add_argument("--pin", type=_cpus, metavar="CPUS", help="the guest on the first, hcd on the others: 2,3")
    parser.add_argument(
        "--socket", action="append", metavar="PATH", help="doorbell socket of a device of a running hcd (repeatable)"
    )
    parser.add_argument("--metrics", type=_address, metavar="ADDR", help="where that hcd serves its metrics")
    parser.add_argument("--no-save", action="store_true", help="do not keep the result for hcd_path_cost_seconds")


def run(arguments: argparse.Namespace) -> int:
    """Run the experiment; 0 when every ring that was sent was counted."""
    if arguments.plot:
        plot.need_matplotlib()
    try:
        found = _experiment(arguments)
    except HcdFailedError as exc:
        raise HcdError(str(exc)) from exc
    _publish(found, arguments)
    return 0 if all(one.equal for one in found.counts) else 1


def _experiment(arguments: argparse.Namespace) -> Report:
    machine = facts.look()
    trips = arguments.trips or max(1, arguments.rings // _TRIPS_SHARE)
    guest, others = _split(arguments.pin)
    with contextlib.ExitStack() as stack:
        with _pinned(others):
            sockets, scrape = stack.enter_context(_hcd(arguments))

        def start() -> VmmProcess:
            with _pinned(guest):
                return VmmProcess()

        constant = len(machine.tsc_flags) == 2
        experiment = stack.enter_context(Experiment(start, scrape, constant_tsc=constant, say=_say))
        for socket in sockets:
            experiment.attach(str(socket))
        experiment.add_comparisons()
        experiment.keep_only(arguments.paths)
        rows, counts = experiment.run(arguments.rings, trips)
    spreads = {f"{row.measure} {row.path} {row.kind}": row.spread for row in rows if not row.why}
    return Report(
        taken=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine.table,
        warnings=facts.warnings(machine, spreads),
        rows=rows,
        counts=counts,
        options={"rings": arguments.rings, "trips": trips, "paths": list(arguments.paths), "pin": arguments.pin},
    )


@contextlib.contextmanager
def _hcd(arguments: argparse.Namespace) -> Iterator[tuple[Sequence[str | Path], Callable[[], Scrape] | None]]:
    """The sockets to attach to, and how to read the metrics: of a running hcd, or of one that is started for this."""
    if arguments.socket:
        where = _metrics_place(arguments.metrics)
        yield arguments.socket, None if where is None else lambda: Scrape(fetch(where, "/metrics"))
        return
    with tempfile.TemporaryDirectory(prefix="hcd-lab-", dir="/tmp") as name:
        directory = Path(name)
        text, sockets = configuration(directory)
        with HcdProcess.from_config(directory, text) as hcd:
            yield sockets, lambda: Scrape(hcd.metrics().text)


def _metrics_place(address: Address | None) -> Path | int | None:
    if address is None:
        return None
    if address.path:
        return Path(address.path)
    if address.host not in ("127.0.0.1", "localhost"):
        raise ConfigError(f"--metrics {address}: the experiment runs beside its hcd, at 127.0.0.1 or a unix socket")
    return address.port


def _publish(found: Report, arguments: argparse.Namespace) -> None:
    if not arguments.no_save:
        try:
            path = results.save(found)
            _say(f"kept in {path}: a running hcd exports it as hcd_path_cost_seconds")
        except OSError as exc:
            _say(f"not kept for hcd_path_cost_seconds: {exc}")
    if arguments.json and arguments.json != "-":
        try:
            Path(arguments.json).write_text(found.to_json())
        except OSError as exc:
            raise ConfigError(f"cannot write {arguments.json}: {exc.strerror}") from exc
    if arguments.plot:
        plot.draw(found.rows, arguments.plot, "\n".join([found.machine["cpu"], *found.warnings]))
    print(found.to_json() if arguments.json == "-" else report.render(found), end="")


def _say(text: str) -> None:
    """Progress goes to a terminal only."""
    if sys.stderr.isatty():
        print(f"hcd lab: {text}", file=sys.stderr)


# -- processors


def _split(cpus: Sequence[int] | None) -> tuple[set[int], set[int]]:
    """The guest's, and those of everything else; with one processor both share it."""
    if not cpus:
        return set(), set()
    return {cpus[0]}, set(cpus[1:] or cpus)


@contextlib.contextmanager
def _pinned(cpus: set[int]) -> Iterator[None]:
    """Processes that are started in the block run on ``cpus`` alone; they inherit it."""
    if not cpus:
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as exc:
        raise ConfigError(f"--pin: cannot run on {','.join(map(str, sorted(cpus)))}: {exc.strerror}") from exc
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# -- arguments


def _paths(text: str) -> tuple[str, ...]:
    found = tuple(word for word in text.split(",") if word)
    wrong = [word for word in found if word.partition("/")[0] not in _PATHS]
    if wrong or not found:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(_PATHS)}, found {text!r}")
    return found


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() and len(text) < 20 else 0
    if not 1 <= number <= MAX_RINGS:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {MAX_RINGS}, found {text!r}")
    return number


def _cpus(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"expected processors like 2,3, found {text!r}")
    return [int(word) for word in words]


def _address(text: str) -> Address:
    try:
        return parse_address(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
