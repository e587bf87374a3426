"""A guest with disk, network card and entropy device does not notice that hcd is restarted, and neither does QEMU.

No device of it connects again by itself: a connection that breaks once stays broken. All of its devices share one
memory file. HCD_RESTARTS says how many restarts of each kind there are (default 3; 20 are a few minutes).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import guest_writer as writer
import pytest
from manager import Manager
from tables import table

from hcd.demo import jobs, qemu
from hcd.demo.console import Guest
from hcd.demo.hcd_process import Metrics, fetch

pytestmark = pytest.mark.guest

RESTARTS = int(os.environ.get("HCD_RESTARTS", "3"))
DEPTH = 32
#: acknowledged and verified writes between two restarts
WRITES = 1000

DEVICES = "".join([
    '[daemon]\nmetrics = "unix:{dir}/metrics.sock"\n\n',
    table("disk", "blk", blk_file="{dir}/disk.img"),
    table("net0", "net"),
    table("net1", "net"),
    table("entropy", "rng", socket="{dir}/rng.sock"),
])

#: two cards on one hub, each in a namespace of its own; frames and random bytes go on all the time
JOB = """
up eth0 10.0.0.1/24
split_network eth1
$INSIDE ip addr add 10.0.0.2/24 dev eth1
$INSIDE ip link set eth1 up
ping_peer 10.0.0.2 1
ping -i 0.05 -W 60 10.0.0.2 >/tmp/pings &
pinging=$!
until_true 10 grep -q virtio_rng /sys/class/misc/hw_random/rng_available
( while true; do
    dd if=/dev/hwrng of=/dev/null bs=64 count=16 iflag=fullblock 2>/dev/null || say "error=hwrng"
    echo >>/tmp/draws
done ) &
drawing=$!
{writer}
draws=$(wc -l </tmp/draws)
until_true 60 more_draws
kill $drawing
say "draws=$(wc -l </tmp/draws)"
ping_peer 10.0.0.2 5
kill -INT $pinging
wait $pinging || true
say "pinged=$(awk '/packets transmitted/ {print $1 "/" $4}' /tmp/pings)"
"""

FUNCTIONS = """
more_draws() { [ $(wc -l </tmp/draws) -gt $draws ]; }
"""

NAMES = ("disk", "net0", "net1", "entropy")


@pytest.fixture
def manager(short_dir: Path) -> Iterator[Manager]:
    config = short_dir / "hcd.toml"
    config.write_text(DEVICES.replace("{dir}", str(short_dir)))
    with (short_dir / "disk.img").open("wb") as image:
        image.truncate(writer.image_size(DEPTH))
    with Manager(short_dir, [sys.executable, "-m", "hcd", "run", str(config)]) as manager:
        yield manager


def test_guest_and_qemu_notice_no_restart(
    manager: Manager,
    short_dir: Path,
    need: Callable[..., None],
    boot: Callable[..., Guest],
    open_qmp: Callable[[Path], Any],
) -> None:
    """SIGTERM at any time, then kill -9 while no control message is on its way; 32 verified writes in flight."""
    need("cc")
    manager.start()
    devices = [*qemu.block(short_dir / "disk.sock", "modern"), *qemu.rng(short_dir / "rng.sock", "modern")]
    for name in ("net0", "net1"):
        mac = f"52:54:00:00:00:0{name[-1]}"
        devices += qemu.net(short_dir / f"{name}.sock", "modern", ident=name, mac=mac)
    vm = qemu.Vm("q35", cpus=1, devices=devices, qmp=[short_dir / "qmp.sock"])
    job = FUNCTIONS + JOB.replace("{writer}", writer.job(depth=DEPTH))
    program = writer.build(short_dir)
    guest = boot(vm, job, (*jobs.BLOCK, *jobs.NET, *jobs.RNG), programs={"writer": program})
    manager.until(lambda: manager.roles().count("connection") == len(NAMES), "four connections")
    for _ in range(RESTARTS):  # firmware and kernel set the devices up meanwhile
        manager.restart()
    writes = writer.wait_for_writes(guest, WRITES)
    pauses = []
    for number in [signal.SIGTERM] * RESTARTS + [signal.SIGKILL] * RESTARTS:
        begin = time.monotonic()
        manager.restart(number)
        manager.until(lambda: resumed(short_dir) == len(NAMES), "four sessions that go on")
        pauses.append(time.monotonic() - begin)
        writes = writer.wait_for_writes(guest, writes + WRITES)
    sockets = {one["label"]: one["filename"] for one in open_qmp(short_dir / "qmp.sock").execute("query-chardev")}
    writer.stop(short_dir / "disk.img")
    said = guest.wait(480)
    print(f"{len(pauses)} restarts, {said['writes']} writes, pings {said['pinged']}, {said['draws']} KiB drawn; "
          f"pauses {min(pauses):.2f} to {max(pauses):.2f} s")
    assert "error" not in said
    assert int(said["verified"]) == DEPTH * writer.SLOTS
    for name in ("disk0", "net0", "net1", "rng0"):
        assert not sockets[f"{name}-socket"].startswith("disconnected"), sockets
    assert qemu_lines(guest) == [], "QEMU has nothing to say of restarts"
    assert "I/O error" not in guest.log.read_text(errors="replace")
    assert manager.dropped["duplicate"] == manager.dropped["full"] == []
    assert "Traceback" not in manager.log.read_text()
    manager.until(lambda: manager.names() == [], "empty store")


def qemu_lines(guest: Guest) -> list[str]:
    """What QEMU itself said, on the guest's console; not what it says of every network card of hcd."""
    lines = guest.log.read_text(errors="replace").splitlines()
    return [line for line in lines if "qemu-system" in line and "VHOST_USER_PROTOCOL_F_CONFIG but QEMU" not in line]


def resumed(directory: Path) -> float:
    """How many sessions this process has taken over."""
    metrics = Metrics(fetch(directory / "metrics.sock", "/metrics"))
    assert metrics.total("hcd_handovers_total", outcome="failed") == 0
    return metrics.total("hcd_handovers_total", outcome="resumed")
