"""Doorbell devices in a daemon that is a process of its own: configuration, command line, its end and its death."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hcd_protocols.doorbell import TableComplete
from tables import table

from hcd.demo.hcd_process import HcdProcess, Resources
from hcd.testing.vmm import Gone, Vmm

Start = Callable[..., HcdProcess]
Settled = Callable[[HcdProcess, Resources], None]

NULLIO = table(
    "count", "nullio", ports="0x510/2=7", gpas="0xfee00000", any_gpas="0xfee01000", connections="32"
)


def rings(hcd: HcdProcess, queue: str) -> float:
    return hcd.metrics().total("hcd_doorbell_rings_total", device="count", queue=queue)


def test_a_vmm_that_comes_and_goes_leaves_nothing_behind(
    start_hcd: Start, expect_settled: Settled, short_dir: Path
) -> None:
    """Rings are exact over many VMMs, and hcd holds afterwards what it held before."""
    hcd = start_hcd(NULLIO)
    path = str(short_dir / "count.sock")
    Vmm(path).close()
    before = hcd.resources()
    for _ in range(20):
        with Vmm(path) as vmm:
            for name in ("pio0", "mmio0", "any0", "hyperv0"):
                vmm.ring(name, 50)
    expect_settled(hcd, before)
    Vmm(path).close()  # the last session is over when the next one is served
    for name in ("pio0", "mmio0", "any0", "hyperv0"):
        assert rings(hcd, name) == 1000
    assert hcd.metrics().total("hcd_doorbell_rings_total", path="hypercall") == 1000
    expect_settled(hcd, before)


def test_a_vmm_outlives_hcd(start_hcd: Start, short_dir: Path) -> None:
    """hcd is killed; the VMM notices, keeps its eventfds, and the next hcd counts what was rung in between."""
    hcd = start_hcd(NULLIO)
    path = str(short_dir / "count.sock")
    vmm = Vmm(path)
    hcd.kill()
    with pytest.raises(Gone):
        vmm.until(TableComplete)
    vmm.ring("pio0", 12)
    held = vmm.keep()
    hcd = start_hcd(NULLIO)
    with Vmm(path, held=held) as vmm:
        assert len(vmm.adopted) == 4
        vmm.ring("pio0", 30)
    Vmm(path).close()
    assert rings(hcd, "pio0") == 42


def test_hcd_device_serves_a_doorbell_device(short_dir: Path) -> None:
    """The command line takes the same options, and ends when its VMM has gone."""
    path = short_dir / "s"
    with HcdProcess(
        ["device", "nullio", f"--socket-path={path}", "--ports=0x510,0x514", "--exit-on-disconnect"],
        short_dir / "log",
        sockets=[path],
    ) as hcd:
        Vmm(str(path)).close()
        hcd.wait()
        assert "2 of 2 doorbells" in hcd.log_text
    assert not path.exists()


def test_an_inherited_socket_must_be_of_the_right_type(short_dir: Path) -> None:
    command = [sys.executable, "-m", "hcd", "device", "nullio", "--ports=1"]
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(short_dir / "s"))
        sock.listen()
        done = subprocess.run([*command, f"--fd={sock.fileno()}"], pass_fds=[sock.fileno()], capture_output=True,
                              text=True, timeout=30)
    assert done.returncode == 1
    assert "is not a SOCK_SEQPACKET socket" in done.stderr


def test_an_inherited_listening_socket(short_dir: Path) -> None:
    path = short_dir / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(path))
        sock.listen()
        arguments = ["device", "nullio", "--ports=1", f"--fd={sock.fileno()}", "--exit-on-disconnect"]
        with HcdProcess(arguments, short_dir / "log", pass_fds=[sock.fileno()]) as hcd:
            Vmm(str(path)).close()
            hcd.wait()
    os.unlink(path)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ('path = "pio"', '"path" has no meaning here'),
        ('qmp = "/tmp/qmp"', '"qmp" has no meaning here'),
    ],
)
def test_keys_of_virtio_devices_are_refused(extra: str, expected: str, short_dir: Path) -> None:
    config = short_dir / "hcd.toml"
    config.write_text(NULLIO.replace("{dir}", str(short_dir)).replace("[device.options]", f"{extra}\n[device.options]"))
    command = [sys.executable, "-m", "hcd", "run", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 78
    assert expected in done.stderr
