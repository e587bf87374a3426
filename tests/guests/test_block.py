"""A Linux guest does I/O on hcd's block device over every bus that QEMU has; user-mode Linux too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tables import table

from hcd.demo import jobs, qemu, uml
from hcd.demo.console import Guest
from hcd.demo.hcd_process import HcdProcess, Resources

pytestmark = pytest.mark.guest

Boot = Callable[..., Guest]
Start = Callable[..., HcdProcess]
Settled = Callable[[HcdProcess, Resources], None]

RAM_DISK = table("disk", "blk", 'qmp = "{dir}/qmp.sock"', ram="64M")
FOUR_QUEUES = table("disk", "blk", 'qmp = "{dir}/qmp.sock"', ram="64M", num_queues=4)

UML_DISK = table("disk", "blk", 'path = "direct"', ram="64M")


def vm_with_disk(directory: Path, machine: str, bus: str, *, cpus: int = 1, packed: bool = False) -> qemu.Vm:
    disk = qemu.block(directory / "disk.sock", bus, queues=cpus, packed=packed)
    return qemu.Vm(machine, cpus=cpus, devices=disk, qmp=[directory / "qmp.sock"])


@pytest.mark.parametrize(
    ("machine", "bus", "packed"),
    [
        pytest.param("q35", "legacy", False, id="legacy-pci"),
        pytest.param("q35", "modern", False, id="modern-pci"),
        pytest.param("q35", "pio", False, id="modern-pio-notify"),
        pytest.param("microvm", "mmio", False, id="virtio-mmio"),
        pytest.param("q35", "modern", True, id="packed-ring"),
    ],
)
def test_guest_reads_back_what_it_wrote(
    machine: str,
    bus: str,
    packed: bool,
    short_dir: Path,
    start_hcd: Start,
    boot: Boot,
    expect_rings: Callable[..., None],
    expect_settled: Settled,
) -> None:
    """The rings are counted under the path of the bus, which QEMU told hcd."""
    hcd = start_hcd(RAM_DISK)
    before = hcd.resources()
    vm = vm_with_disk(short_dir, machine, bus, packed=packed)
    said = boot(vm, "verify_block /dev/vda 4", jobs.BLOCK).wait()
    assert said["block-written"] == said["block-read"]
    expect_rings(hcd, "disk", qemu.BUS_PATHS[bus], "qmp")
    expect_settled(hcd, before)


def test_four_queues_each_serve_their_processor(
    short_dir: Path, start_hcd: Start, boot: Boot, expect_rings: Callable[..., None]
) -> None:
    """Linux maps one queue to one processor: I/O from each of four processors rings each of four queues."""
    hcd = start_hcd(FOUR_QUEUES)
    job = """
    until_true 10 test -b /dev/vda
    say "queues=$(ls /sys/block/vda/mq | wc -l)"
    for cpu in 0 1 2 3; do
        dd if=/dev/urandom of=/tmp/out bs=64k count=8 2>/dev/null
        at=$(( cpu * 8 ))
        taskset -c $cpu dd if=/tmp/out of=/dev/vda bs=64k seek=$at oflag=direct conv=notrunc 2>/dev/null
        taskset -c $cpu dd if=/dev/vda of=/tmp/in bs=64k skip=$at count=8 iflag=direct 2>/dev/null
        cmp /tmp/out /tmp/in
    done
    """
    said = boot(vm_with_disk(short_dir, "q35", "modern", cpus=4), job, jobs.BLOCK).wait()
    assert said["queues"] == "4"
    expect_rings(hcd, "disk", "mmio", "qmp")
    metrics = hcd.metrics()
    for queue in ("0", "1", "2", "3"):
        assert metrics.total("hcd_requests_total", device="disk", queue=queue) > 0, f"queue {queue}"
        assert metrics.total("hcd_doorbell_rings_total", device="disk", queue=queue) > 0, f"queue {queue}"


def test_user_mode_linux_rings_directly(
    short_dir: Path,
    start_hcd: Start,
    boot_uml: Boot,
    expect_rings: Callable[..., None],
    expect_settled: Settled,
) -> None:
    """A front end that is not QEMU; its path is declared in the configuration."""
    hcd = start_hcd(UML_DISK)
    before = hcd.resources()
    said = boot_uml("verify_block /dev/vda 4", [(short_dir / "disk.sock", uml.BLOCK_ID)]).wait()
    assert said["block-written"] == said["block-read"]
    expect_rings(hcd, "disk", "direct", "declared")
    expect_settled(hcd, before)
