"""DPDK's testpmd as a front end: a poll-mode virtio driver that shares no code with Linux or QEMU.

Two virtio-user ports forward to each other ("io" mode). With both ports on one hub every packet goes round
for ever: out of one port, through the hub, into the other. So a few bursts are enough for as much traffic as
wanted. testpmd prints its statistics once a second and, asked to end, once more.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hcd.demo.packages import MissingToolError

__all__ = ["PortStats", "TestpmdFailedError", "parse", "run"]

_PORT = re.compile(r"Forward statistics for port (\d+)")
_RECEIVED = re.compile(r"RX-packets:\s*(\d+)")
_SENT = re.compile(r"TX-packets:\s*(\d+)")
_LIVE_PORT = re.compile(r"NIC statistics for port (\d+)")


class TestpmdFailedError(Exception):
    """testpmd did not start or moved too little; the message ends with what it printed last."""

    __test__ = False


@dataclass(frozen=True, slots=True)
class PortStats:
    """Packets of one port over the whole run."""

    received: int
    sent: int


def command(sockets: Sequence[Path | str], prefix: str, *, packed: bool = False, extra: str = "") -> list[str]:
    """The command line for one virtio-user port per socket. ``extra`` goes behind each device's arguments."""
    program = shutil.which("dpdk-testpmd")
    if program is None:
        raise MissingToolError("dpdk-testpmd is missing (Debian package dpdk-dev)")
    processors = sorted(os.sched_getaffinity(0))
    arguments = [program, "--lcores", f"0@{processors[0]},1@{processors[-1]}", "--no-huge", "-m", "64"]
    arguments += ["--no-pci", "--no-telemetry", f"--file-prefix={prefix}"]
    for index, socket in enumerate(sockets):
        words = f"--vdev=net_virtio_user{index},path={socket},queues=1"
        arguments.append(words + (",packed_vq=1" if packed else "") + extra)
    options = [
        "--total-num-mbufs=2048",
        "--forward-mode=io",
        "--auto-start",
        "--tx-first",
        "--stats-period=1",
    ]
    return [*arguments, "--", *options]


def run(
    sockets: Sequence[Path | str],
    log: Path,
    *,
    packed: bool = False,
    packets: int = 10_000,
    timeout: float = 60,
    extra: str = "",
) -> dict[int, PortStats]:
    """Forward until every port has received ``packets``, then stop; the final statistics by port number."""
    # Its runtime files go beside the log, so that nothing is needed of /run and nothing stays there.
    environment = {**os.environ, "RUNTIME_DIRECTORY": str(log.parent)}
    output: list[str] = []
    enough = threading.Event()
    process = subprocess.Popen(
        command(sockets, log.stem, packed=packed, extra=extra),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )
    reader = threading.Thread(target=_read, args=(process, len(sockets), packets, output, enough), daemon=True)
    reader.start()
    try:
        enough.wait(timeout)
    finally:
        _stop(process)
        reader.join()
        log.write_text("".join(output))
    stats = parse("".join(output))
    if len(stats) < len(sockets) or any(port.received < packets for port in stats.values()):
        tail = "".join(output[-30:])
        raise TestpmdFailedError(f"testpmd moved {stats}, not {packets} packets a port (log: {log})\n{tail}")
    return stats


def parse(text: str) -> dict[int, PortStats]:
    """The statistics that testpmd prints when it stops forwarding."""
    stats = {}
    for match in _PORT.finditer(text):
        rest = text[match.end() :]
        received, sent = _RECEIVED.search(rest), _SENT.search(rest)
        if received and sent:
            stats[int(match.group(1))] = PortStats(int(received.group(1)), int(sent.group(1)))
    return stats


def _read(process: subprocess.Popen[str], ports: int, packets: int, output: list[str], enough: threading.Event) -> None:
    """Collect the output; set ``enough`` when each port has received ``packets``, or at the end of it."""
    assert process.stdout is not None
    port, received = 0, dict.fromkeys(range(ports), 0)
    with process.stdout as lines:
        for line in lines:
            output.append(line)
            if found := _LIVE_PORT.search(line):
                port = int(found.group(1))
            elif found := _RECEIVED.search(line):
                received[port] = int(found.group(1))
                if min(received.values()) >= packets:
                    enough.set()
    enough.set()


def _stop(process: subprocess.Popen[str]) -> None:
    """SIGTERM makes testpmd print its statistics and end; one that does not listen is killed."""
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
