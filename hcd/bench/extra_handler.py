"""Handlers written in Python: how many requests a second, how fairly they share a reactor, what a slow one does."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from hcd.bench import blk
from hcd.bench.extra import Context, Measured, judged, median_of

__all__ = ["fairness", "null_handler", "slow_handler"]

#: an installed distribution with device types, as anybody can make one
ENTRY_POINTS = """[hcd.devices]
bench-null = "hcd_bench_types:Null"
bench-status = "hcd_bench_types:WithStatus"
bench-slow = "hcd_bench_types:Slow"
""".replace('"', "")
TYPES = '''
import time
from hcd_protocols.virtio.blk import BlkConfig
from hcd.device import Device


class Null(Device):
    virtio_id = 2
    description = "reads headers and completes"

    def config(self):
        return BlkConfig(capacity=1 << 20).to_bytes()

    def process(self, queue):
        for request in queue:
            request.u32(0)
            request.complete(1)


class WithStatus(Null):
    def process(self, queue):
        for request in queue:
            request.u32(0)
            request.write_at(request.writable_size - 1, b"\\0")
            request.complete(1)


class Slow(Null):
    def process(self, queue):
        for request in queue:
            time.sleep(0.1)
            request.complete(1)
'''
GOAL = 1_000_000
SLEEP = 0.1


def _types(directory: Path) -> Path:
    site = directory / "site"
    info = site / "hcd_bench_types-1.0.dist-info"
    if not info.exists():
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hcd-bench-types\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(ENTRY_POINTS)
        (site / "hcd_bench_types.py").write_text(TYPES)
    return site


def _table(directory: Path, name: str, kind: str, options: str = "") -> str:
    options = f"options = {{ {options} }}\n" if options else ""
    return f'[[device]]\nname = "{name}"\ntype = "{kind}"\nsocket = "{directory}/{name}.sock"\n{options}'


def null_handler(context: Context) -> Sequence[Measured]:
    """Requests a second through a handler of Python, polling front end, depth 64."""

    def devices(directory: Path) -> str:
        return _table(directory, "null", "bench-null") + _table(directory, "status", "bench-status")

    rows = []
    with context.daemon(devices, plugins=_types(context.directory)) as hcd:
        for name, what in (("null", "reads the header, completes"), ("status", "and writes a status byte")):
            for packed in (False, True):
                case = blk.BlkCase(
                    f"{hcd.directory}/{name}.sock", depth=64, seconds=context.seconds, poll=True, packed=packed
                )
                results = [blk.run(case) for _ in range(context.rounds)]
                rate, cpu = median_of([r.per_second for r in results]), median_of([r.cpu_per_million for r in results])
                ring = "packed" if packed else "split"
                title, value = f"handler in Python, {what}, {ring}", f"{rate:,.0f}/s, {cpu:.2f} CPU s per million"
                limited = name == "null"
                if limited:
                    rows.append(judged(title, value, ">= 1 M/s", rate >= GOAL, per_second=rate, cpu_per_million=cpu))
                else:
                    rows.append(Measured(title, value, numbers={"per_second": rate, "cpu_per_million": cpu}))
    return rows


def fairness(context: Context) -> Sequence[Measured]:
    """Two devices of one process, the same load on both at the same time."""

    def devices(directory: Path) -> str:
        return "".join(_table(directory, name, "blk", 'ram = "64M"') for name in "ab")

    shares = []
    with context.daemon(devices) as hcd:
        for _ in range(context.rounds):
            results = together([blk.BlkCase(f"{hcd.directory}/{name}.sock", seconds=context.seconds) for name in "ab"])
            total = sum(result.per_second for result in results)
            shares.append(min(result.per_second for result in results) / total)
    worst = min(shares)
    return [judged("two busy devices: the smaller share", f"{worst:.0%}", ">= 40 %", worst >= 0.4, share=worst)]


def together(cases: Sequence[blk.BlkCase]) -> list[blk.BlkResult]:
    """Run loads at the same time, a thread each."""
    results: dict[int, blk.BlkResult] = {}
    errors: list[Exception] = []

    def load(index: int, case: blk.BlkCase) -> None:
        try:
            results[index] = blk.run(case)
        except Exception as exc:
            errors.append(exc)

    threads = [threading.Thread(target=load, args=pair) for pair in enumerate(cases)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors.pop()
    return [results[index] for index in range(len(cases))]


def slow_handler(context: Context) -> Sequence[Measured]:
    """A handler that sleeps 100 ms beside a busy device: what the other one sees, and how often the log tells."""

    def devices(directory: Path) -> str:
        return _table(directory, "slow", "bench-slow") + _table(directory, "busy", "blk", 'ram = "64M"')

    seconds = max(context.seconds, 1.0)
    with context.daemon(devices, plugins=_types(context.directory)) as hcd:
        alone = blk.run(blk.BlkCase(f"{hcd.directory}/busy.sock", seconds=seconds))
        slow = blk.BlkCase(f"{hcd.directory}/slow.sock", depth=1, seconds=seconds)
        beside, slept = together([blk.BlkCase(f"{hcd.directory}/busy.sock", seconds=seconds), slow])
        lines = [line for line in hcd.process.log_text.splitlines() if "slow" in line and "warning" in line]
    value = (
        f"other device {beside.per_second:,.0f}/s, p99.9 {beside.p999 * 1e3:.0f} ms "
        f"(alone {alone.per_second:,.0f}/s); {slept.requests} slow requests, {len(lines)} log lines"
    )
    return [judged("a handler that sleeps 100 ms", value, "one log line", len(lines) == 1, lines=len(lines))]
