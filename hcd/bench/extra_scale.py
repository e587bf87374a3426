"""Whether the cost of a request grows with what has nothing to do with it: scrapes, devices, ring size, regions."""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hcd.bench import blk
from hcd.bench.extra import Context, Daemon, Measured, judged, median_of
from hcd.bench.extra_idle import DEVICES, QUEUES, connected, disks
from hcd.bench.scraper import PERIOD
from hcd.frontend.memory import MemorySlot, SharedMemory

__all__ = ["devices", "memory_of", "regions", "ring_sizes", "scraper"]

PAGE = 4096
#: runs with a scraper, by the rounds of other measurements
SCRAPED = 3


# -- metrics


def scraper(context: Context) -> Sequence[Measured]:
    """Load with and without somebody who reads /metrics ten times a second, in turn."""
    quiet: list[blk.BlkResult] = []
    scraped: list[blk.BlkResult] = []
    found: list[dict[str, Any]] = []
    port = _free_port()
    with context.daemon(disks, metrics_port=port) as hcd:
        _touch_all(hcd)
        others = [i for i in range(DEVICES) if i]
        with connected(hcd.directory, others):
            case = blk.BlkCase(f"{hcd.directory}/d0.sock", seconds=max(1.0, context.seconds))
            quiet.append(blk.run(case))
            for _ in range(SCRAPED * context.rounds):
                with _scraping(port, found):
                    scraped.append(blk.run(case))
                quiet.append(blk.run(case))
    # Each beside its two neighbours: what is looked for is less than what a shared machine changes in a minute.
    triples = list(zip(quiet, scraped, quiet[1:], strict=False))
    cost = 1 - statistics.median(2 * b.per_second / (a.per_second + c.per_second) for a, b, c in triples)
    tail = statistics.median(2 * b.p99 / (a.p99 + c.p99) for a, b, c in triples)
    own, size = median_of([one["cpu"] for one in found]), found[-1]["bytes"]
    times = [took for one in found for took in one["times"]]
    name = f"a scrape of {DEVICES} devices x {QUEUES} queues under load"
    value = f"median {median_of(times) * 1e3:.1f} ms, longest {max(times) * 1e3:.1f} ms, {size >> 10} KiB"
    lost = f"{cost:.1%} (the scraper's own processor time: {own / PERIOD:.1%})"
    return [
        judged("ten scrapes a second: requests/s lost", lost, "<= 3 %", cost <= 0.03, cost=cost, own=own / PERIOD),
        judged("ten scrapes a second: p99, times", f"{tail:.2f}", "<= 1.5", tail <= 1.5, ratio=tail),
        judged(name, value, "< 50 ms", max(times) < 0.05, longest=max(times), bytes=size),
    ]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _touch_all(hcd: Daemon) -> None:
    """Every queue of every device has served requests, so that no histogram is empty."""
    for i in range(DEVICES):
        blk.run(blk.BlkCase(f"{hcd.directory}/d{i}.sock", depth=2, queues=QUEUES, rw="mix", seconds=0.02))


@contextlib.contextmanager
def _scraping(port: int, found: list[dict[str, Any]]) -> Iterator[None]:
    """A process of its own on this process' processor; what it found goes to ``found``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hcd.bench.scraper", str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()  # the first scrape is done
        yield
    finally:
        output, _ = process.communicate(timeout=30)
    found.append(json.loads(output))


# -- what else there is


def devices(context: Context) -> Sequence[Measured]:
    """One loaded device among 1, 16 and 64 that are connected."""
    counts = (1, 16, DEVICES)
    with context.daemon(disks) as hcd:

        def run(count: int) -> blk.BlkResult:
            with connected(hcd.directory, range(1, count)):
                return blk.run(blk.BlkCase(f"{hcd.directory}/d0.sock", seconds=context.seconds))

        return _growth(context, "devices connected", counts, run, 0.05)


def ring_sizes(context: Context) -> Sequence[Measured]:
    """The same load on rings of 64 to 1024 entries."""
    with context.daemon(lambda directory: disks(directory, 1)) as hcd:

        def run(size: int) -> blk.BlkResult:
            case = blk.BlkCase(f"{hcd.directory}/d0.sock", depth=16, ring_size=size, seconds=context.seconds)
            return blk.run(case)

        return _growth(context, "entries in the ring", (64, 256, 1024), run, 0.05)


def regions(context: Context) -> Sequence[Measured]:
    """The same load with its buffers in 1 to 64 regions of guest memory."""
    with context.daemon(lambda directory: disks(directory, 1)) as hcd:

        def run(count: int) -> blk.BlkResult:
            with memory_of(count, 64, 4096) as memory:
                case = blk.BlkCase(f"{hcd.directory}/d0.sock", depth=64, seconds=context.seconds)
                return blk.run(case, memory)

        return _growth(context, "regions of memory", (1, 8, 64), run, 0.1)


def memory_of(count: int, buffers: int, size: int) -> SharedMemory:
    """``count`` regions with gaps between them, and so little room that ``buffers`` of ``size`` bytes use them all."""
    room = PAGE + -(-buffers // count) * size
    slots, at = [], 0x4000_0000
    for i in range(count):
        # The ring takes a page and a half of the first one; the headers that don't fit beside it go to the next.
        extra = (2 if count == 1 else 1) * PAGE if i == 0 else 0
        slots.append(MemorySlot(at, room + extra))
        at += room + extra + (1 << 20)
    return SharedMemory(slots)


def _growth(
    context: Context, what: str, values: Sequence[int], run: Callable[[int], blk.BlkResult], most: float
) -> list[Measured]:
    """By how much a request costs more than with the first value, the median of paired ratios: time at full load, and
    (in words) processor time of the back end."""
    results: dict[int, list[blk.BlkResult]] = {value: [] for value in values}
    for _ in range(context.rounds):
        for value in values:
            results[value].append(run(value))
    rows = []
    for value in values[1:]:
        pairs = list(zip(results[values[0]], results[value], strict=True))
        growth = statistics.median(a.per_second / b.per_second for a, b in pairs) - 1
        cpu = statistics.median(b.cpu_per_million / a.cpu_per_million for a, b in pairs) - 1
        name = f"cost of a request with {value} {what}, to {values[0]}"
        text = f"{growth:+.1%} (processor time {cpu:+.1%})"
        rows.append(judged(name, text, f"<= {most:+.0%}", growth <= most, growth=growth, cpu=cpu))
    return rows
