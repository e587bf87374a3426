"""Whether the cost of a request grows with what has nothing to do with it: scrapes, devices, ring size, regions."""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hcd.bench import blk
from hcd.bench.backends import make_image
from hcd.bench.extra import Context, Daemon, Measured, judged, median_of
from hcd.bench.extra_idle import DEVICES, IN_MEMORY, QUEUES, connected, disks
from hcd.bench.scraper import PERIOD
from hcd.frontend.errors import BackendError
from hcd.frontend.memory import MemorySlot, SharedMemory

__all__ = ["devices", "memory_of", "regions", "ring_sizes", "scraper", "scraper_of_file"]

PAGE = 4096
#: measurements with each kind of scraper, by the rounds of others, and how long each takes at least (seconds)
SCRAPED = 4
SLICE = 1.0
#: bytes: more than the processor's cache, as a disk has
FILE = 256 << 20


# -- metrics


@dataclass(slots=True)
class _Scraped:
    """What one kind of scraper did to the load, slice by slice: beside the slice without, requests/s lost and p99."""

    lost: list[float] = field(default_factory=list)
    tail: list[float] = field(default_factory=list)
    found: list[dict[str, Any]] = field(default_factory=list)

    @property
    def cost(self) -> tuple[float, float]:
        """Of requests/s, and the standard error of that."""
        return statistics.mean(self.lost), statistics.stdev(self.lost) / len(self.lost) ** 0.5


def scraper(context: Context) -> Sequence[Measured]:
    """Load on a disk in memory, with and without somebody who reads /metrics ten times a second."""
    return _scraped_load(context, disks, "memory")


def scraper_of_file(context: Context) -> Sequence[Measured]:
    """The same with the loaded disk in the page cache: it serves fewer requests, which a scrape holds up for longer."""
    image = make_image(context.directory, FILE, "scraped").path
    return _scraped_load(
        context, lambda directory: disks(directory).replace(IN_MEMORY, f'blk-file = "{image}"', 1), "file"
    )


def _scraped_load(context: Context, devices: Callable[[Path], str], where: str) -> Sequence[Measured]:
    """In one session, in turn: what is looked for is less than what a shared machine changes in a minute, and than
    what one session differs from the next."""
    kinds = {"kept": _Scraped(), "new": _Scraped(), "none": _Scraped()}
    port = _free_port()
    with context.daemon(devices, metrics_port=port) as hcd:
        _touch_all(hcd)
        case = blk.BlkCase(f"{hcd.directory}/d0.sock", seconds=max(SLICE, context.seconds))
        others = [i for i in range(DEVICES) if i]
        with connected(hcd.directory, others), _scraper(port) as process, blk.loading(case) as load:
            for i in range(SCRAPED * context.rounds):
                for kind, scraped in kinds.items():
                    _slice(load, process, kind, scraped, quiet_first=bool(i % 2))
    return _judge(where, kinds["kept"], kinds["new"], kinds["none"])


def _slice(
    load: Callable[[], blk.BlkResult], process: subprocess.Popen[bytes], kind: str, scraped: _Scraped, quiet_first: bool
) -> None:
    quiet = load() if quiet_first else None
    with _scraping(process, kind, scraped.found):
        busy = load()
    quiet = quiet or load()
    scraped.lost.append(1 - busy.per_second / quiet.per_second)
    scraped.tail.append(busy.p99 / quiet.p99)


def _judge(where: str, kept: _Scraped, new: _Scraped, none: _Scraped) -> list[Measured]:
    own, size = median_of([one["cpu"] for one in kept.found]), kept.found[-1]["bytes"]
    times = [took for one in kept.found + new.found for took in one["times"]]
    tail = max(statistics.median(kept.tail), statistics.median(new.tail))
    own_time = f"; the scraper's own processor time {own / PERIOD:.1%}"
    socket_alone, error = none.cost
    beside = f"; {socket_alone:.1%} +-{error:.1%} with a socket alone, hcd not asked"
    name = f"a scrape of {DEVICES} devices x {QUEUES} queues under load"
    value = f"median {median_of(times) * 1e3:.1f} ms, longest {max(times) * 1e3:.1f} ms, {size >> 10} KiB"
    return [
        _judge_cost(f"{where}: ten scrapes a second, requests/s lost", kept, own_time),
        _judge_cost(f"{where}: the same, a new connection each", new, beside),
        judged(f"{where}: ten scrapes a second, p99, times", f"{tail:.2f}", "<= 1.5", tail <= 1.5, ratio=tail),
        judged(f"{where}: {name}", value, "< 50 ms", max(times) < 0.05, longest=max(times), bytes=size),
    ]


def _judge_cost(name: str, scraped: _Scraped, remark: str) -> Measured:
    cost, error = scraped.cost
    return judged(name, f"{cost:.1%} +-{error:.1%}{remark}", "<= 3 %", cost <= 0.03, cost=cost, error=error)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _touch_all(hcd: Daemon) -> None:
    """Every queue of every device has served requests, so that no histogram is empty."""
    for i in range(DEVICES):
        blk.run(blk.BlkCase(f"{hcd.directory}/d{i}.sock", depth=2, queues=QUEUES, rw="mix", seconds=0.02))


@contextlib.contextmanager
def _scraper(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own on this process' processor: see :mod:`hcd.bench.scraper`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hcd.bench.scraper", str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()  # the first scrape is done
        yield process
    finally:
        process.communicate(timeout=30)


@contextlib.contextmanager
def _scraping(process: subprocess.Popen[bytes], kind: str, found: list[dict[str, Any]]) -> Iterator[None]:
    """It scrapes; what it found goes to ``found``. BackendError when it could not."""
    assert process.stdout is not None
    _tell(process, kind)
    yield
    _tell(process, "end")
    if not (line := process.stdout.readline()):
        raise BackendError("the scraper ended early; what it said is above")
    found.append(json.loads(line))


def _tell(process: subprocess.Popen[bytes], word: str) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it ended, and has nothing to say then
        process.stdin.write(f"{word}\n".encode("ascii"))
        process.stdin.flush()


# -- what else there is


def devices(context: Context) -> Sequence[Measured]:
    """One loaded device among 1, 16 and 64 that are connected."""
    counts = (1, 16, DEVICES)
    with context.daemon(disks) as hcd:

        def run(count: int) -> blk.BlkResult:
            with connected(hcd.directory, range(1, count)):
                return blk.run(_load(context, hcd))

        return _growth(context, "devices connected", counts, run, 0.05)


def ring_sizes(context: Context) -> Sequence[Measured]:
    """The same load on rings of 64 to 1024 entries."""
    with context.daemon(lambda directory: disks(directory, 1)) as hcd:

        def run(size: int) -> blk.BlkResult:
            return blk.run(_load(context, hcd, depth=16, ring_size=size))

        return _growth(context, "entries in the ring", (64, 256, 1024), run, 0.05)


def regions(context: Context) -> Sequence[Measured]:
    """The same load with its buffers in 1 to 64 regions of guest memory."""
    with context.daemon(lambda directory: disks(directory, 1)) as hcd:

        def run(count: int) -> blk.BlkResult:
            with memory_of(count, 64, 4096) as memory:
                return blk.run(_load(context, hcd, depth=64), memory)

        return _growth(context, "regions of memory", (1, 8, 64), run, 0.1)


def _load(context: Context, hcd: Daemon, depth: int = 32, ring_size: int = 0) -> blk.BlkCase:
    """By a front end that polls. One that sleeps costs three times as much a request, and what a wake-up costs differs
    from one to the next by more than what is looked for."""
    socket_path = f"{hcd.directory}/d0.sock"
    return blk.BlkCase(socket_path, depth=depth, ring_size=ring_size, seconds=context.seconds, poll=True)


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
