"""QEMU started with what ``hcd qemu-args`` prints, unchanged: a Linux guest uses the devices."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tables import table

from hcd.demo import jobs, qemu
from hcd.demo.console import Guest
from hcd.demo.hcd_process import HcdProcess
from hcd.demo.packages import GuestFiles

pytestmark = pytest.mark.guest

DEVICES = "".join([
    table("disk0", "blk", "BUS", ram="64M", num_queues=2),
    table("rng0", "rng", "BUS"),
    table("net0", "net", "BUS", mac="52:54:00:12:34:57"),
    table("host0", "scsi", "BUS", disk="{dir}/scsi.img"),
    table("vsock0", "vsock", "BUS", uds_path="{dir}/vsock"),
])
JOB = """
verify_block /dev/vda 2
draw_random 1024
until_true 10 test -e /sys/class/net/eth0
say "mac=$(cat /sys/class/net/eth0/address)"
ip link set eth0 up
"""
SCSI_JOB = """
until_true 20 test -b /dev/sda
say "sectors=$(cat /sys/block/sda/size)"
"""
#: SeaBIOS of Debian 12 waits for ever for a SCSI host that is to be rung by port: none of its rings arrives
NO_SCSI = ["disk0", "rng0", "net0", "vsock0"]
MODULES = (*jobs.BLOCK, *jobs.RNG, *jobs.NET, "virtio_scsi", "sd_mod", "vmw_vsock_virtio_transport")


@dataclass
class Printed:
    """A machine whose devices, memory and machine type are those of the printed words, nothing else."""

    words: Sequence[str]
    machine: str

    @property
    def kind(self) -> qemu.Machine:
        return qemu.MACHINES[self.machine]

    def command(self, files: GuestFiles, initrd: Path) -> list[str]:
        console = ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
        clock = " ".join(qemu._clock_words()) if self.machine == "microvm" else ""
        append = f"console=ttyS0 rdinit=/init quiet panic=-1 reboot=t no_timer_check tsc=reliable {clock}"
        return [
            *("qemu-system-x86_64", "-nodefaults", "-display", "none", "-no-reboot", "-accel", qemu.accelerator()),
            *("-kernel", str(files.kernel), "-initrd", str(initrd), "-append", append),
            *console,
            *self.words,
        ]


@pytest.mark.parametrize(
    ("bus", "machine", "more", "path"),
    [
        pytest.param('qmp = "{dir}/qmp.sock"', "pc", [], "mmio", id="pci"),
        pytest.param('bus = "pci"\npath = "pio"', "q35", [*NO_SCSI, "--machine", "q35", "--packed"], "pio",
                     id="pci-by-port"),
        pytest.param('bus = "mmio"', "microvm", [], "mmio", id="mmio"),
    ],
)
def test_qemu_takes_what_is_printed(
    bus: str,
    machine: str,
    more: list[str],
    path: str,
    short_dir: Path,
    start_hcd: Callable[..., HcdProcess],
    boot: Callable[..., Guest],
) -> None:
    """Every device is negotiated with and used; its doorbells ring over the path of the configuration."""
    (short_dir / "scsi.img").write_bytes(bytes(4 << 20))
    hcd = start_hcd(DEVICES.replace("BUS", bus))
    command = [sys.executable, "-m", "hcd", "qemu-args", str(short_dir / "hcd.toml"), "--memory", "256M", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = ["disk0", "rng0", "net0", "vsock0", *([] if "disk0" in more else ["host0"])]
    job = JOB + (SCSI_JOB if "host0" in names else "")
    said = boot(Printed(shlex.split(done.stdout), machine), job, MODULES).wait()
    assert said["block-written"] == said["block-read"]
    assert said["rng"].startswith("virtio_rng")
    assert said["mac"] == "52:54:00:12:34:57"
    metrics = hcd.metrics()
    if "host0" in names:
        assert said["sectors"] == str((4 << 20) // 512)
    for name in {"disk0", "rng0", "host0"} & set(names):
        assert metrics.total("hcd_requests_total", device=name, status="ok") > 0
        assert metrics.total("hcd_doorbell_rings_total", device=name, path=path) > 0
    for name in names:
        assert f"{name}: front end connected" in hcd.log_text
        assert metrics.total("hcd_protocol_errors_total", device=name) == 0
