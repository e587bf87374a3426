"""Guests talk to each other through hcd's hub: two Linux guests, a big-endian one, DPDK's testpmd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tables import table

from hcd.demo import jobs, qemu, testpmd
from hcd.demo.console import Guest
from hcd.demo.hcd_process import HcdProcess, Resources

pytestmark = pytest.mark.guest

PORT = table("netN", "net", "WHERE", backend="hub")


def two_ports(where: str) -> str:
    """Two network devices on one hub; ``where`` is how each one's path is known."""
    return "".join(PORT.replace("WHERE", where).replace("N", number) for number in ("0", "1"))


@pytest.mark.parametrize("buses", [("legacy", "modern")], ids=["legacy-and-modern"])
def test_two_guests_ping_and_transfer_a_file(
    buses: tuple[str, str],
    short_dir: Path,
    start_hcd: Callable[..., HcdProcess],
    boot: Callable[..., Guest],
    expect_rings: Callable[..., None],
    expect_settled: Callable[[HcdProcess, Resources], None],
) -> None:
    """One rings by port writes, one by memory writes; headers of 10 and of 12 bytes meet on the hub."""
    hcd = start_hcd(two_ports('qmp = "{dir}/qmpN.sock"'))
    before = hcd.resources()
    server_job = """
    up eth0 10.0.0.1/24
    serve_file 4
    nc -l -p 9 </dev/null
    """
    client_job = """
    up eth0 10.0.0.2/24
    ping_peer 10.0.0.1 5
    get_file 10.0.0.1
    until_true 30 nc 10.0.0.1 9 </dev/null
    """
    guests = []
    for index, job in enumerate((server_job, client_job)):
        card = qemu.net(short_dir / f"net{index}.sock", buses[index], mac=f"52:54:00:00:00:0{index + 1}")
        vm = qemu.Vm("q35", devices=card, qmp=[short_dir / f"qmp{index}.sock"])
        guests.append(boot(vm, job, jobs.NET))
    client = guests[1].wait()
    server = guests[0].wait()
    assert client["ping"] == "5/5"
    assert client["file-got"] == server["file-served"]
    for index, bus in enumerate(buses):
        expect_rings(hcd, f"net{index}", qemu.BUS_PATHS[bus], "qmp")
    expect_settled(hcd, before)


def test_big_endian_guest_rings_by_hypercall(
    short_dir: Path,
    start_hcd: Callable[..., HcdProcess],
    boot: Callable[..., Guest],
    expect_rings: Callable[..., None],
) -> None:
    """s390x notifies virtio-ccw by diagnose 0x500. Two cards in one guest, each in its network namespace."""
    hcd = start_hcd(two_ports('qmp = "{dir}/qmpN.sock"'))
    cards = [
        word
        for index in (0, 1)
        for word in qemu.net(
            short_dir / f"net{index}.sock", "ccw", ident=f"net{index}", mac=f"52:54:00:00:00:0{index + 1}"
        )
    ]
    vm = qemu.Vm("s390x", devices=cards, qmp=[short_dir / "qmp0.sock", short_dir / "qmp1.sock"])
    job = """
    until_true 10 test -e /sys/class/net/eth1
    split_network eth1
    up eth0 10.0.0.1/24
    $INSIDE ip addr add 10.0.0.2/24 dev eth1
    $INSIDE ip link set eth1 up
    ping_peer 10.0.0.2 5
    serve_file 1
    $INSIDE wget -q -O /tmp/got http://10.0.0.1/file
    say "file-got=$(hash_of /tmp/got)"
    """
    said = boot(vm, job, jobs.NET).wait()
    assert said["ping"] == "5/5"
    assert said["file-got"] == said["file-served"]
    for index in (0, 1):
        expect_rings(hcd, f"net{index}", "hypercall", "qmp")


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_testpmd_forwards_through_the_hub(
    packed: bool,
    short_dir: Path,
    need: Callable[..., None],
    start_hcd: Callable[..., HcdProcess],
    expect_rings: Callable[..., None],
    expect_settled: Callable[[HcdProcess, Resources], None],
) -> None:
    """A polling driver: it writes the kick eventfd itself when it rings at all."""
    need("dpdk-testpmd")
    hcd = start_hcd(two_ports('path = "direct"'))
    before = hcd.resources()
    sockets = [short_dir / "net0.sock", short_dir / "net1.sock"]
    ports = testpmd.run(sockets, short_dir / "testpmd.log", packed=packed)
    assert set(ports) == {0, 1}
    for index in (0, 1):
        expect_rings(hcd, f"net{index}", "direct", "declared")
    expect_settled(hcd, before)
