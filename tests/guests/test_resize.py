"""A disk grows under a running guest: Linux sees the new size without a reboot, and can use it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tables import table

from hcd.demo import jobs, qemu
from hcd.demo.console import Guest
from hcd.demo.hcd_process import HcdProcess

pytestmark = pytest.mark.guest

DISK = table("disk", "blk", 'bus = "pci"', blk_file="{dir}/image")
#: sectors: 16 MiB, then 40 MiB
BEFORE, AFTER = 32768, 81920

JOB = f"""
until_true 10 test -b /dev/vda
verify_block /dev/vda 1
say "before=$(cat /sys/block/vda/size)"
grown() {{ [ "$(cat /sys/block/vda/size)" = {AFTER} ]; }}
until_true 60 grown
say "after=$(cat /sys/block/vda/size)"
verify_block /dev/vda 2 38
"""


def test_a_running_guest_sees_that_its_disk_has_grown(
    short_dir: Path, start_hcd: Callable[..., HcdProcess], boot: Callable[..., Guest]
) -> None:
    image, control = short_dir / "image", short_dir / "control.sock"
    image.touch()
    os.truncate(image, BEFORE * 512)
    hcd = start_hcd(DISK, daemon=f'[control]\npath = "{control}"')
    vm = qemu.Vm(devices=qemu.block(short_dir / "disk.sock", "modern"))
    guest = boot(vm, JOB, jobs.BLOCK)
    assert guest.wait_for("before") == str(BEFORE)
    command = [sys.executable, "-m", "hcd", "resize", "disk", "40M", "--control", str(control)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"disk: {AFTER * 512} bytes, {BEFORE * 512} before; the front end is told\n", done.stderr
    said = guest.wait()
    assert said["after"] == str(AFTER)
    assert said["block-written"] == said["block-read"]
    assert image.stat().st_size == AFTER * 512
    assert hcd.metrics().total("hcd_requests_total", device="disk", status="error") == 0
