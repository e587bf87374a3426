"""``hcd device blk --fd=N`` in the place of QEMU's own block back end: an inherited listening socket."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hcd.demo import jobs, qemu
from hcd.demo.console import Guest
from hcd.demo.hcd_process import HcdProcess

pytestmark = pytest.mark.guest


@pytest.fixture
def start_device(short_dir: Path) -> Iterator[Callable[..., HcdProcess]]:
    """``start_device(name, image, queues)``: hcd on a socket that this process listens on (``name``.sock)."""
    started: list[HcdProcess] = []
    listeners: list[socket.socket] = []

    def start(name: str, image: Path, queues: int = 1) -> HcdProcess:
        listener = socket.socket(socket.AF_UNIX)
        listeners.append(listener)
        listener.bind(str(short_dir / f"{name}.sock"))
        listener.listen(1)
        metrics = short_dir / f"{name}-metrics.sock"
        arguments = ["device", "blk", f"--fd={listener.fileno()}", f"--name={name}"]
        arguments += [f"--blk-file={image}", f"--num-queues={queues}", f"--metrics=unix:{metrics}"]
        arguments += [f"--qmp={short_dir / f'{name}-qmp.sock'}"]
        hcd = HcdProcess(arguments, short_dir / f"{name}.log", metrics=metrics, pass_fds=[listener.fileno()])
        started.append(hcd)
        return hcd

    try:
        yield start
        for hcd in started:
            hcd.stop()
        for listener in listeners:
            assert Path(listener.getsockname()).exists(), "an inherited socket is not hcd's to unlink"
    finally:
        for hcd in started:
            hcd.kill()
        for listener in listeners:
            listener.close()


@pytest.mark.parametrize("queues", [1, 8])
def test_guest_uses_a_disk_behind_an_inherited_socket(
    queues: int,
    short_dir: Path,
    disk_image: Callable[[int], Path],
    start_device: Callable[..., HcdProcess],
    boot: Callable[..., Guest],
    expect_rings: Callable[..., None],
) -> None:
    hcd = start_device("disk0", disk_image(32), queues)
    disk = qemu.block(short_dir / "disk0.sock", "modern", queues=queues)
    vm = qemu.Vm("q35", cpus=min(queues, 4), devices=disk, qmp=[short_dir / "disk0-qmp.sock"])
    said = boot(vm, "verify_block /dev/vda 4", jobs.BLOCK).wait()
    assert said["block-written"] == said["block-read"]
    expect_rings(hcd, "disk0", "mmio", "qmp")


def test_second_disk_is_plugged_into_a_running_guest(
    short_dir: Path,
    disk_image: Callable[[int], Path],
    start_device: Callable[..., HcdProcess],
    boot: Callable[..., Guest],
    open_qmp: Callable[[Path], object],
    expect_rings: Callable[..., None],
) -> None:
    """Two daemons, one QEMU: chardev-add and device_add while the guest runs, then device_del."""
    first, second = start_device("disk0", disk_image(32)), start_device("disk1", disk_image(48))
    names = ("disk0-qmp", "disk1-qmp", "qmp")
    vm = qemu.Vm(
        "pc",
        devices=qemu.block(short_dir / "disk0.sock", "modern"),
        qmp=[short_dir / f"{name}.sock" for name in names],
    )
    guest = boot(
        vm,
        """
        verify_block /dev/vda 2
        say plug=now
        until_true 30 test -b /dev/vdb
        verify_block /dev/vdb 2
        say unplug=now
        until_true 30 test ! -e /sys/block/vdb
        verify_block /dev/vda 2 4
        """,
        jobs.BLOCK,
    )
    guest.wait_for("plug")
    qmp = open_qmp(short_dir / "qmp.sock")
    address = {"type": "unix", "data": {"path": str(short_dir / "disk1.sock")}}
    qmp.execute(
        "chardev-add", id="plugged", backend={"type": "socket", "data": {"addr": address, "server": False}}
    )
    qmp.execute("device_add", driver="vhost-user-blk-pci", id="disk1", chardev="plugged", bus="pci.0")
    guest.wait_for("unplug")
    expect_rings(second, "disk1", "mmio", "qmp")
    qmp.execute("device_del", id="disk1")
    said = guest.wait()
    assert said["block-written"] == said["block-read"]
    expect_rings(first, "disk0", "mmio", "qmp")
