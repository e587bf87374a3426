"""The demo's guest: boots once per pass, uses every device of one hcd, says what it compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hcd.demo import jobs, packages, qemu
from hcd.demo.console import Guest

__all__ = ["DEVICES", "PASSES", "Pass", "boot"]

Say = Callable[[str], None]

#: names of the devices in hcd's configuration, and of their sockets
DEVICES = ("disk", "rng", "net0", "net1")
FILE_MIB = 32
PINGS = 20

JOB = f"""
verify_filesystem /dev/vda {FILE_MIB}
umount /mnt
draw_random 4096
until_true 10 test -e /sys/class/net/eth1
split_network eth1
up eth0 10.0.0.1/24
$INSIDE ip addr add 10.0.0.2/24 dev eth1
$INSIDE ip link set eth1 up
ping_peer 10.0.0.2 {PINGS}
"""


@dataclass(frozen=True, slots=True)
class Pass:
    """One boot: the path that every doorbell must take, and the bus of each device type that takes it."""

    title: str
    path: str
    bus: str
    rng_bus: str


PASSES = (
    # QEMU has no legacy variant of its vhost-user entropy device; its 1.x one can ring by port writes too.
    Pass("legacy virtio, port writes", "pio", "legacy", "pio"),
    Pass("virtio 1.x, memory writes", "mmio", "modern", "modern"),
)


def boot(one: Pass, directory: Path, say: Say) -> list[str]:
    """Run the guest of one pass against the sockets in ``directory``. Returns what did not compare equal.

    Raises MissingToolError, GuestFailedError.
    """
    files = packages.guest_files("amd64", progress=say)
    tools = [("mkfs.ext4", "e2fsprogs"), ("fsck.ext4", "e2fsprogs")]
    modules = ("virtio_pci", *jobs.BLOCK, *jobs.NET, *jobs.RNG)
    initrd = directory / "initrd.cpio"
    initrd.write_bytes(jobs.base_tree(files, modules, tools=tools).cpio() + jobs.job_tree(JOB).cpio())
    qmp = directory / "qmp.sock"
    vm = qemu.Vm("q35", memory_mib=384, devices=_devices(one, directory), qmp=[qmp])
    say(f"{one.title}: booting Linux {files.release} in QEMU ({qemu.accelerator()})")
    command = vm.command(files, initrd)
    with Guest(one.path, command, directory / f"{one.path}.log", on_value=Progress(say)) as guest:
        return unequal(guest.wait())


def _devices(one: Pass, directory: Path) -> list[str]:
    arguments = qemu.block(directory / "disk.sock", one.bus, ident="disk")
    arguments += qemu.rng(directory / "rng.sock", one.rng_bus, ident="rng")
    for number in ("0", "1"):
        name = f"net{number}"
        arguments += qemu.net(directory / f"{name}.sock", one.bus, ident=name, mac=f"52:54:00:00:00:0{number}")
    return arguments


class Progress:
    """Says what the guest's values mean, as they come."""

    TEXTS: ClassVar = {
        "kernel": "guest is up",
        "fsck": f"disk: file system made, {FILE_MIB} MiB written, checked clean",
        "file-read": "disk: file read back",
        "random-bytes": "rng: {} random bytes drawn",
        "ping": "net0, net1: {} pings answered through the hub",
        "gave-up": "guest gave up waiting for: {}",
    }

    def __init__(self, say: Say) -> None:
        self._say = say

    def __call__(self, key: str, value: str) -> None:
        if key in self.TEXTS:
            self._say("  " + self.TEXTS[key].format(value))


def unequal(said: dict[str, str]) -> list[str]:
    """What of a guest's report is not as it must be; empty when everything compared equal."""
    wrong = []
    if not said.get("file-written") or said.get("file-written") != said.get("file-read"):
        wrong.append("disk: the file read back differs from the one written")
    if said.get("fsck") != "clean":
        wrong.append("disk: the file system is not clean")
    # Random bytes do not compress; a buffer that nobody filled would.
    if said.get("random-bytes") != "4096" or int(said.get("random-gzipped", "0")) < 4096:
        wrong.append("rng: not 4096 random bytes")
    if said.get("ping") != f"{PINGS}/{PINGS}":
        wrong.append(f"net: {said.get('ping', 'no')} pings answered")
    return wrong
