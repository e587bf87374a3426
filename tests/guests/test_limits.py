"""Linux guests under limits: they get what is allowed, late, and nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tables import table

from hcd.demo import jobs, qemu
from hcd.demo.console import Guest
from hcd.demo.hcd_process import HcdProcess

pytestmark = pytest.mark.guest

DISK_LIMITS = 'limits = { bytes_per_second = "8M", bytes_burst = "256K" }'
NET_LIMITS = "limits = { requests_per_second = 1000, requests_burst = 64 }"
DEVICES = "".join([
    table("disk", "blk", DISK_LIMITS, ram="64M", num_queues=2),
    table("net0", "net", NET_LIMITS),
    table("net1", "net"),
])
JOB = """
verify_block /dev/vda 4
until_true 10 test -e /sys/class/net/eth1
split_network eth1
up eth0 10.0.0.1/24
$INSIDE ip addr add 10.0.0.2/24 dev eth1
$INSIDE ip link set eth1 up
$INSIDE ip link set lo up
serve_file 1
$INSIDE wget -q -O /tmp/got http://10.0.0.1/file
say "file-got=$(hash_of /tmp/got)"
"""


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_guest_is_served_by_its_limits(
    packed: bool, short_dir: Path, start_hcd: Callable[..., HcdProcess], boot: Callable[..., Guest]
) -> None:
    """What it wrote it reads back, a file comes whole through a card that is held back, and no limit is exceeded."""
    began = time.monotonic()
    hcd = start_hcd(DEVICES)
    disk = qemu.block(short_dir / "disk.sock", "modern", queues=2, packed=packed)
    cards = [
        word
        for index in (0, 1)
        for word in qemu.net(
            short_dir / f"net{index}.sock", "modern", ident=f"net{index}", mac=f"52:54:00:00:00:0{index + 1}",
            packed=packed,
        )
    ]
    vm = qemu.Vm("q35", cpus=2, devices=disk + cards)
    said = boot(vm, JOB, (*jobs.BLOCK, *jobs.NET)).wait()
    seconds = time.monotonic() - began
    assert said["block-written"] == said["block-read"]
    assert said["file-got"] == said["file-served"]
    metrics = hcd.metrics()
    largest = 1 << 20
    assert metrics.total("hcd_request_bytes_total", device="disk") <= (8 << 20) * seconds + (256 << 10) + largest
    assert metrics.total("hcd_requests_total", device="net0") <= 1000 * seconds + 64
    for device in ("disk", "net0"):
        assert metrics.total("hcd_throttled_seconds_total", device=device) > 0
        assert metrics.total("hcd_guest_errors_total", device=device) == 0
    assert metrics.total("hcd_throttled_seconds_total", device="net1") == 0
