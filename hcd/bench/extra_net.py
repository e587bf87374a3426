"""Frames through the hub: with the compiled load, and with DPDK's testpmd, whose drivers are somebody else's."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from hcd.bench import net
from hcd.bench.extra import Context, Measured, judged, median_of
from hcd.demo.testpmd import TestpmdFailedError, command

__all__ = ["hub", "testpmd"]

GOAL = 1_000_000
#: packets that each port starts with, and that go round from then on
BURST = 64
START_SECONDS = 30
_PPS = re.compile(r"Rx-pps:\s*(\d+)")


def _cards(directory: Path) -> str:
    return "".join(f'[[device]]\nname = "{n}"\ntype = "net"\nsocket = "{directory}/{n}.sock"\n' for n in "ab")


def hub(context: Context) -> Sequence[Measured]:
    """The compiled load between two ports, one front-end thread for both."""
    rows = []
    with context.daemon(_cards) as hcd:
        near, far = (f"{hcd.directory}/{name}.sock" for name in "ab")
        for packed in (False, True):
            case = net.NetCase(near, far, seconds=context.seconds, poll=True, packed=packed)
            results = [net.run(case) for _ in range(context.rounds)]
            rate = median_of([result.received_per_second for result in results])
            cpu = median_of([result.cpu_per_million for result in results])
            dropped = sum(result.dropped for result in results)
            name = f"64-byte frames through the hub, hcd bench, {'packed' if packed else 'split'}"
            value = f"{rate:,.0f}/s, {cpu:.2f} CPU s per million, {dropped} dropped"
            rows.append(Measured(name, value, numbers={"per_second": rate, "cpu_per_million": cpu}))
    return rows


def testpmd(context: Context) -> Sequence[Measured]:
    """Two virtio-user ports of one testpmd, each forwarding what the other sent: frames a second through the hub."""
    rows = []
    with context.daemon(_cards) as hcd:
        sockets = [hcd.directory / f"{name}.sock" for name in "ab"]
        for packed in (False, True):
            rate = _forward(sockets, hcd.directory, packed, samples=max(3, int(context.seconds * context.rounds)))
            name = f"64-byte frames through the hub, testpmd, {'packed' if packed else 'split'}"
            rows.append(judged(name, f"{rate:,.0f}/s", ">= 1 M/s", rate >= GOAL, per_second=rate))
    return rows


def _forward(sockets: Sequence[Path], directory: Path, packed: bool, samples: int) -> float:
    """The median of what both ports received together, a second each; the first two seconds are left out."""
    words = [*command(sockets, "bench", packed=packed), f"--burst={BURST}"]
    environment = {**os.environ, "RUNTIME_DIRECTORY": str(directory)}
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", env=environment,
    )
    watchdog = threading.Timer(START_SECONDS + samples, process.kill)
    watchdog.start()
    output, rates = [], []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            rates += [int(found) for found in _PPS.findall(line)]
            if len(rates) >= len(sockets) * (samples + 2):
                break
    finally:
        watchdog.cancel()
        process.terminate()
        process.communicate()
    if len(rates) < len(sockets) * 3:
        raise TestpmdFailedError(f"testpmd moved nothing\n{''.join(output[-20:])}")
    each = len(sockets)
    return median_of([sum(rates[i : i + each]) for i in range(2 * each, len(rates) - each + 1, each)])
