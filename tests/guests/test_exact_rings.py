"""Through a real QEMU, each ring of the guest is counted: no more, no fewer, under the right path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from qtest import PCI_SLOT, QtestVm, wait_until
from tables import table

from hcd.demo.hcd_process import HcdProcess

pytestmark = pytest.mark.guest

DISK = table("disk", "blk", 'qmp = "{dir}/qmp.sock"', ram="16M")

PCI = f"chardev=disk,addr={PCI_SLOT}"
CASES = {
    "legacy PCI": ("pc", f"vhost-user-blk-pci,disable-modern=on,disable-legacy=off,{PCI}", "pio", "legacy"),
    "modern PCI": ("pc", f"vhost-user-blk-pci,disable-legacy=on,{PCI}", "mmio", "modern"),
    "modern PCI by port": (
        "pc", f"vhost-user-blk-pci,disable-legacy=on,modern-pio-notify=on,{PCI}", "pio", "modern-pio"),
    "virtio-mmio": ("microvm", "vhost-user-blk,chardev=disk", "mmio", "virtio-mmio"),
}


def start(vm: QtestVm, case: str) -> str:
    if case == "legacy PCI":
        return vm.start_legacy_pci()
    if case == "virtio-mmio":
        return vm.start_legacy_mmio()
    return vm.start_modern_pci(by_port=case.endswith("port"))


def rings(hcd: HcdProcess) -> float:
    return hcd.metrics().total("hcd_doorbell_rings_total", device="disk")


@pytest.mark.parametrize("case", CASES)
def test_every_ring_is_counted_once(
    case: str, short_dir: Path, start_hcd: Callable[..., HcdProcess], need: Callable[..., None]
) -> None:
    """QEMU's eventfd counts one ring that nobody rang; what the guest rings is counted exactly."""
    need("qemu-system-x86_64")
    machine, device, path, kind = CASES[case]
    hcd = start_hcd(DISK)
    devices = ["-chardev", f"socket,id=disk,path={short_dir / 'disk.sock'}", "-device", device]
    with QtestVm(short_dir, machine, devices) as vm:
        ring = start(vm, case)
        wait_until(lambda: hcd.metrics().series("hcd_doorbell_info", source="qmp"))
        for more in (1, 999):
            before = rings(hcd)
            for _ in range(more):
                vm.say(ring)
            wait_until(lambda: rings(hcd) >= before + more)  # noqa: B023
        metrics = hcd.metrics()
        assert metrics.series("hcd_doorbell_rings_total", device="disk") == [
            ({"device": "disk", "queue": "0", "path": path}, 1000)
        ]
        ((info, _),) = metrics.series("hcd_doorbell_info", device="disk")
        assert (info["path"], info["source"], info["kind"]) == (path, "qmp", kind)
        rung = ring.split()  # "outw 0xc010 0"
        width = {"w": 2, "l": 4}[rung[0][-1]]
        value = "" if kind == "modern" else "=0"
        assert info["address"] == f"{int(rung[1], 0):#x}/{width}{value}"


def test_a_bad_chain_through_qemu_breaks_the_ring_alone(
    short_dir: Path, start_hcd: Callable[..., HcdProcess], need: Callable[..., None]
) -> None:
    """A driver that offers a loop: the ring stops and the log says why; QEMU and hcd go on, a reset heals it."""
    need("qemu-system-x86_64")
    hcd = start_hcd(DISK)
    devices = ["-chardev", f"socket,id=disk,path={short_dir / 'disk.sock'}", "-device", CASES["legacy PCI"][1]]
    with QtestVm(short_dir, "pc", devices) as vm:
        ring = vm.start_legacy_pci()
        vm.offer((0x200000, 16, 1, 1), (0x201000, 16, 1, 0))
        vm.say(ring)
        wait_until(lambda: hcd.metrics().total("hcd_guest_errors_total", device="disk") == 1)
        assert "longer than the ring" in hcd.log_text
        vm.offer((0x200000, 16, 0, 0))
        vm.start_legacy_pci()
        vm.say(ring)
        wait_until(lambda: hcd.metrics().total("hcd_guest_errors_total", device="disk") == 2)
        assert hcd.metrics().total("hcd_connected", device="disk") == 1
