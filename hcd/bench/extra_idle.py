"""What hcd costs when it does nothing, and how fast it is there."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hcd.bench.extra import Context, Measured, judged, median_of
from hcd.bench.peer import status
from hcd.demo.hcd_process import is_listening
from hcd.frontend.blk import BLOCK_FEATURES
from hcd.frontend.client import Frontend

__all__ = ["capabilities", "connected", "disks", "idle", "start"]

DEVICES, QUEUES = 64, 4
SWITCHES, RSS_ANON, START, CAPABILITIES = 5.0, 60 << 20, 0.6, 0.15
SETTLE = 3.0
#: where the data of these disks are
IN_MEMORY = 'ram = "16M"'


def disks(directory: Path, count: int = DEVICES, queues: int = QUEUES) -> str:
    """The configuration of so many disks in memory, d0, d1 ..."""
    return "".join(
        f'[[device]]\nname = "d{i}"\ntype = "blk"\nsocket = "{directory}/d{i}.sock"\n'
        f"options = {{ {IN_MEMORY}, num-queues = {queues} }}\n"
        for i in range(count)
    )


def connected(directory: Path, numbers: Sequence[int], queues: int = QUEUES) -> contextlib.ExitStack:
    """Front ends that are connected, have running queues, and are idle."""
    stack = contextlib.ExitStack()
    with stack:
        for i in numbers:
            front = Frontend.open(
                f"{directory}/d{i}.sock", queues=queues, memory_size=256 << 10, device=int(BLOCK_FEATURES)
            )
            stack.enter_context(front)
        return stack.pop_all()


def idle(context: Context) -> Sequence[Measured]:
    """64 connected devices, no scrape, no watchdog."""
    with context.daemon(disks) as hcd, connected(hcd.directory, range(DEVICES)):
        time.sleep(SETTLE)  # trio's idle threads end, polling has stopped
        seconds = max(5.0, context.seconds)
        before = _switches(hcd.pid)
        time.sleep(seconds)
        rate = (_switches(hcd.pid) - before) / seconds
        rss = status(hcd.pid, "RssAnon") * 1024
    return [
        judged("idle, 64 devices connected: context switches", f"{rate:.1f}/s", "< 5/s", rate < SWITCHES, rate=rate),
        judged("idle, 64 devices connected: RssAnon", f"{rss / (1 << 20):.1f} MiB", "< 60 MiB", rss < RSS_ANON, b=rss),
    ]


def _switches(pid: int) -> int:
    """Voluntary ones, of all threads."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        text = (task / "status").read_text(encoding="ascii", errors="replace")
        total += int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return total


def start(context: Context) -> Sequence[Measured]:
    """From fork to listening, one device and 64."""
    one = median_of([_start_once(context.directory / f"s{i}.sock") for i in range(max(3, context.rounds))])
    began = time.monotonic()
    with context.daemon(disks):
        many = time.monotonic() - began
    return [
        judged("start to listening, one device", f"{one:.3f} s", "< 0.6 s", one < START, seconds=one),
        Measured("start to listening, 64 devices and metrics", f"{many:.3f} s", numbers={"seconds": many}),
    ]


def _start_once(socket: Path) -> float:
    began = time.monotonic()
    command = [sys.executable, "-m", "hcd", "device", "blk", "--ram=16M", f"--socket-path={socket}"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not is_listening(socket):
            if process.poll() is not None or time.monotonic() - began > 20:
                raise TimeoutError("hcd does not start")
            time.sleep(0.002)
        return time.monotonic() - began
    finally:
        process.terminate()
        process.wait()


def capabilities(context: Context) -> Sequence[Measured]:
    """What a management layer waits for when it probes."""
    command = [sys.executable, "-m", "hcd", "device", "blk", "--print-capabilities"]
    times, spent = [], []
    for _ in range(max(5, context.rounds)):
        began, before = time.monotonic(), _children()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.monotonic() - began)
        spent.append(_children() - before)
    took, cpu = median_of(times), median_of(spent)
    value = f"{took:.3f} s (processor time {cpu:.3f} s)"
    return [judged("--print-capabilities", value, "< 0.15 s", took < CAPABILITIES, seconds=took, cpu=cpu)]


def _children() -> float:
    """Processor seconds of the processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
