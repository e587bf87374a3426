"""A guest's file system on a file of the host: the bytes arrive in the file, discarded ones leave it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tables import table

from hcd.demo import jobs, qemu
from hcd.demo.console import Guest
from hcd.demo.hcd_process import HcdProcess

pytestmark = pytest.mark.guest

MIB = 1 << 20

DEVICE = table("disk", "blk", 'qmp = "{dir}/qmp.sock"', blk_file="IMAGE")


def vm_with_disk(directory: Path) -> qemu.Vm:
    disk = qemu.block(directory / "disk.sock", "modern")
    return qemu.Vm("q35", memory_mib=384, devices=disk, qmp=[directory / "qmp.sock"])


def test_host_finds_what_the_guest_wrote_to_its_file_system(
    short_dir: Path,
    tmp_path: Path,
    disk_image: Callable[[int], Path],
    start_hcd: Callable[..., HcdProcess],
    boot: Callable[..., Guest],
    run_tool: Callable[..., str],
    expect_rings: Callable[..., None],
) -> None:
    """mkfs.ext4, mount, write 64 MiB, unmount, fsck in the guest; the host reads the file system itself."""
    image = disk_image(256)
    hcd = start_hcd(DEVICE.replace("IMAGE", str(image)))
    job = "verify_filesystem /dev/vda 64\numount /mnt"
    said = boot(vm_with_disk(short_dir), job, jobs.BLOCK, tools=True).wait()
    assert said["fsck"] == "clean"
    assert said["file-written"] == said["file-read"]
    expect_rings(hcd, "disk", "mmio", "qmp")
    hcd.stop()
    copy = tmp_path / "data"
    run_tool("debugfs", "-R", f"dump /data {copy}", str(image))
    assert copy.stat().st_size == 64 * MIB
    assert hashlib.sha256(copy.read_bytes()).hexdigest() == said["file-written"]


def test_discarded_blocks_become_a_hole_in_the_file(
    short_dir: Path,
    disk_image: Callable[[int], Path],
    start_hcd: Callable[..., HcdProcess],
    boot: Callable[..., Guest],
) -> None:
    """The guest writes 8 MiB and discards the first 4: the host sees a hole there and data behind it."""
    image = disk_image(64)
    hcd = start_hcd(DEVICE.replace("IMAGE", str(image)))
    job = f"""
    verify_block /dev/vda 8
    blkdiscard -o 0 -l {4 * MIB} /dev/vda
    dd if=/dev/vda of=/tmp/rest bs=1M skip=4 count=4 iflag=direct 2>/dev/null
    say "rest=$(hash_of /tmp/rest)"
    """
    said = boot(vm_with_disk(short_dir), job, jobs.BLOCK).wait()
    assert hcd.metrics().total("hcd_requests_total", device="disk", op="discard") > 0
    hcd.stop()
    with image.open("rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 4 * MIB
        file.seek(4 * MIB)
        assert hashlib.sha256(file.read(4 * MIB)).hexdigest() == said["rest"]
