"""The example plug-in of docs/examples, with Linux's balloon driver, on front ends that know nothing of the device."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tables import table

from hcd.demo import qemu
from hcd.demo.console import Guest
from hcd.demo.hcd_process import HcdProcess

pytestmark = pytest.mark.guest

BALLOON_ID, QUEUES, CONFIG_SIZE = 5, 3, 8
DRIVER = ("virtio_balloon",)
SOURCE = Path(__file__).parents[2] / "docs/examples/hcd-guestmem/src/hcd_guestmem/__init__.py"
DEVICE = table("mem", "guestmem", interval=0.05)
JOB = """
bytes() { awk "/^$1:/ {print \\$2 * 1024}" /proc/meminfo; }
say "total=$(bytes MemTotal)"
say "free=$(bytes MemFree)"
dd if=/dev/zero of=/tmp/fill bs=1M count=40 2>/dev/null
say filled=yes
sleep 5
"""


@pytest.fixture
def hcd(
    make_distribution: Callable[..., Path], start_hcd: Callable[..., HcdProcess], monkeypatch: pytest.MonkeyPatch
) -> HcdProcess:
    """A daemon with the plug-in, installed."""
    modules = {"hcd_guestmem": SOURCE.read_text(encoding="utf-8")}
    site = make_distribution("hcd-guestmem", "1.0.0", {"guestmem": "hcd_guestmem:GuestMemory"}, modules)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")])))
    return start_hcd(DEVICE)


def bytes_of(hcd: HcdProcess, kind: str) -> float:
    return hcd.metrics().total("hcd_device_guestmem_bytes", device="mem", kind=kind)


def check_reports(hcd: HcdProcess, guest: Guest) -> None:
    """What the metrics say is what the guest's own /proc/meminfo says, and it follows what the guest does."""
    total, free = float(guest.wait_for("total")), float(guest.wait_for("free"))
    guest.wait_for("filled")
    while bytes_of(hcd, "free") > free - (35 << 20):
        assert "status" not in guest.values, "the guest ended before its metrics showed that its memory was filled"
    metrics = hcd.metrics()
    assert bytes_of(hcd, "total") == total
    assert bytes_of(hcd, "free") > 0
    assert metrics.total("hcd_device_guestmem_reports_total", device="mem") >= 2
    assert metrics.total("hcd_device_guestmem_faults_total", kind="minor") > 0
    assert metrics.total("hcd_guest_errors_total") == metrics.total("hcd_handler_errors_total") == 0
    guest.wait()


def test_user_mode_linux_reports_its_memory(
    hcd: HcdProcess, short_dir: Path, boot_uml: Callable[..., Guest]
) -> None:
    """It has a front end for any virtio id."""
    check_reports(hcd, boot_uml(JOB, [(short_dir / "mem.sock", BALLOON_ID)], DRIVER))


@pytest.mark.usefixtures("newer_qemu")
def test_a_guest_of_qemu_reports_its_memory(
    hcd: HcdProcess, short_dir: Path, boot: Callable[..., Guest]
) -> None:
    """Through vhost-user-test-device, which is told what the device is."""
    told = qemu.any_device(short_dir / "mem.sock", "modern", BALLOON_ID, queues=QUEUES, config_size=CONFIG_SIZE)
    check_reports(hcd, boot(qemu.Vm("q35", devices=told), JOB, DRIVER))
