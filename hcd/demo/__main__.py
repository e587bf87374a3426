"""``make demo``: one hcd, a guest that uses all its devices, once over PIO and once over MMIO, and a table.

Exit status 0 only if everything that the guest read back compared equal and every ring came over the path of
its pass, with QEMU as the source of that knowledge. Without QEMU the same I/O goes through hcd's own front
end.
"""

from __future__ import annotations

import platform
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

from hcd.demo import own_frontend, passes, report
from hcd.demo.console import GuestFailedError
from hcd.demo.hcd_process import HcdFailedError, HcdProcess, Metrics
from hcd.demo.packages import MissingToolError

DEFAULT_PORT = 9847

DEVICE = """
[[device]]
name = "{name}"
type = "{type}"
socket = "{{dir}}/{name}.sock"
{path}
[device.options]
{options}
"""

OPTIONS = {
    "disk": ("blk", 'ram = "128M"'),
    "rng": ("rng", ""),
    "net0": ("net", 'backend = "hub"'),
    "net1": ("net", 'backend = "hub"'),
}

_started = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - _started:6.1f} s] {text}", flush=True)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="hcd-demo-", dir="/tmp") as path:
        directory = Path(path)
        why_not = _no_guest()
        try:
            if why_not:
                say(f"{why_not}: using hcd's own front end instead of a guest")
                return _with_own_frontend(directory)
            return _with_guests(directory)
        except (GuestFailedError, HcdFailedError, MissingToolError, RuntimeError) as exc:
            say(f"FAILED: {exc}")
            return 1


def _no_guest() -> str:
    """Why no guest can be booted here; empty when one can."""
    if shutil.which("qemu-system-x86_64") is None:
        return "QEMU is not installed (Debian package qemu-system-x86)"
    if platform.machine() != "x86_64":
        return f"the guest uses tools of an x86-64 host, this is {platform.machine()}"
    return ""


def configuration(path: str) -> str:
    """The ``[[device]]`` tables; ``path`` is the line that says how paths are known."""
    return "".join(
        DEVICE.format(name=name, type=type_, path=path, options=options) for name, (type_, options) in OPTIONS.items()
    )


def start(directory: Path, path: str) -> HcdProcess:
    port = free_port()
    hcd = HcdProcess.from_config(directory, configuration(path), metrics_port=port)
    say(f"hcd runs with {', '.join(OPTIONS)}; scrape http://127.0.0.1:{port}/metrics while it does")
    return hcd


def free_port() -> int:
    """hcd's usual port where nobody else has it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", DEFAULT_PORT))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _with_guests(directory: Path) -> int:
    rows: list[report.Row] = []
    wrong: list[str] = []
    with start(directory, 'qmp = "{dir}/qmp.sock"') as hcd:
        for one in passes.PASSES:
            before = hcd.metrics()
            wrong += [f"{one.path}: {problem}" for problem in passes.boot(one, directory, say)]
            after = hcd.metrics()
            done = report.rows_since(before, after, passes.DEVICES, one.path)
            wrong += misrung(done, before, after, "qmp")
            rows += done
        return finish(hcd, rows, wrong)


def _with_own_frontend(directory: Path) -> int:
    with start(directory, 'path = "direct"') as hcd:
        before = hcd.metrics()
        wrong = [] if own_frontend.run(directory, say) else ["what came back differs from what was sent"]
        after = hcd.metrics()
        rows = report.rows_since(before, after, passes.DEVICES, "direct")
        return finish(hcd, rows, wrong + misrung(rows, before, after, "declared"))


def misrung(rows: list[report.Row], before: Metrics, after: Metrics, source: str) -> list[str]:
    """Devices that were not rung, or over another path too, or whose path is known from elsewhere."""
    wrong = []
    for row in rows:
        name = "hcd_doorbell_rings_total"
        rings = after.total(name, device=row.device) - before.total(name, device=row.device)
        if not row.rings or rings != row.rings:
            wrong.append(f"{row.device}: {row.rings} of {rings:g} rings over {row.path}")
        if row.source != source:
            wrong.append(f"{row.device}: the path is known from {row.source!r}, not from {source!r}")
    return wrong


def finish(hcd: HcdProcess, rows: list[report.Row], wrong: list[str]) -> int:
    print()
    print(report.table(rows))
    print("\nTimes are upper bounds of histogram buckets: dispatch from the wake-up to the device's handler,")
    print("response from the wake-up to the interrupt. Rings are fewer than requests: polling suppresses them.")
    print(f"Scraped from http://127.0.0.1:{hcd.metrics_at}/metrics\n", flush=True)
    for problem in wrong:
        say(f"WRONG: {problem}")
    if not wrong:
        say("everything compared equal")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
