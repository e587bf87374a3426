"""Linux's own socket driver on hcd: programs of guest and host talk both ways, and every byte is checked."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from manager import Manager
from tables import table

from hcd.demo import jobs, qemu, uml
from hcd.demo.console import Guest
from hcd.demo.hcd_process import HcdProcess, Resources

pytestmark = pytest.mark.guest

#: ports: the guest listens, the host listens
GUEST, HOST = 1234, 5000
#: bytes of the large stream, of each of many, and how many
LARGE, SMALL, MANY = 3_000_000, 20_000, 24
COMPLEMENT = bytes(255 - byte for byte in range(256))

DEVICE = table(
    "sock", "vsock", socket="{dir}/vu.sock", uds_path="{dir}/x.vsock", seqpacket_path="{dir}/x.messages", guest_cid=42
)
#: as in vsock_peer.c
MESSAGES = (1, 100, 4052, 4053, 60000, 65536)

JOB = f"""
until_true 10 test -c /dev/vsock
vsock_peer talk {HOST} {LARGE} 1
say talked=one
vsock_peer talk {HOST} {SMALL} {MANY}
say talked=many
vsock_peer echo {GUEST} {1 + MANY}
say echoed=all
if vsock_peer talk {HOST + 1} 1 1 2>/tmp/refused; then false; fi
say "refused=$(cat /tmp/refused)"
vsock_peer messages {HOST + 2}
vsock_peer mirror {GUEST + 1}
"""


def stream(size: int, salt: int) -> bytes:
    """As byte_at() of vsock_peer.c."""
    return bytes((at % 251 + at // 251 + salt) & 0xFF for at in range(size))


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


class HostEcho:
    """A program of the host that answers whatever the guest connects with, like ``vsock_peer echo``."""

    def __init__(self, path: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> None:
        self.bytes = 0
        self._listener = socket.socket(socket.AF_UNIX, kind)
        self._listener.bind(path)
        self._listener.listen(128)
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._answer, args=(sock,)))
            self._threads[-1].start()

    def _answer(self, sock: socket.socket) -> None:
        with sock:
            while data := sock.recv(1 << 17):
                self.bytes += len(data)
                sock.sendall(data.translate(COMPLEMENT))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        for thread in self._threads:
            thread.join(30)


@pytest.fixture
def host_echo(short_dir: Path) -> Iterator[HostEcho]:
    with (
        closing(HostEcho(f"{short_dir}/x.vsock_{HOST}")) as echo,
        closing(HostEcho(f"{short_dir}/x.vsock_{HOST + 2}", socket.SOCK_SEQPACKET)),
    ):
        yield echo


def reach_guest(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    sock.connect(str(path))
    sock.sendall(b"CONNECT %d\n" % GUEST)
    answer = b""
    while not answer.endswith(b"\n"):
        answer += sock.recv(1)
    assert answer.startswith(b"OK ")
    return sock


def exchange_messages(path: Path) -> None:
    """With ``vsock_peer mirror``: as many on their way as there is room for, before the first comes back."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(60)
        sock.connect(str(path))
        sock.send(b"CONNECT %d\n" % (GUEST + 1))
        assert sock.recv(100).startswith(b"OK ")
        sent = [stream(size, salt) for salt, size in enumerate(MESSAGES)]
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(lambda: [sock.send(message) for message in sent])
            assert [sock.recv(1 << 17) for _ in sent] == sent
            assert sending.result(60) == list(MESSAGES)


def talk(sock: socket.socket, size: int, salt: int) -> None:
    """As ``vsock_peer talk``: send, say no more, and everything comes back."""
    data = stream(size, salt)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(read_all, sock)
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert answer.result(120) == data.translate(COMPLEMENT)


def check_both_ways(guest: Guest, hcd: HcdProcess, short_dir: Path, echo: HostEcho) -> None:
    """The whole of JOB, from the host's side."""
    guest.wait_for("talked", 120)
    guest.wait_for("listening", 180)
    assert echo.bytes == LARGE + MANY * SMALL
    with ExitStack() as stack, ThreadPoolExecutor(MANY) as pool:
        with reach_guest(short_dir / "x.vsock") as sock:
            talk(sock, LARGE, 7)
        socks = [stack.enter_context(reach_guest(short_dir / "x.vsock")) for _ in range(MANY)]
        for done in [pool.submit(talk, sock, SMALL, salt) for salt, sock in enumerate(socks)]:
            done.result(120)
    guest.wait_until("listening", lambda port: port == str(GUEST + 1), 180)
    exchange_messages(short_dir / "x.messages")
    said = guest.wait(300)
    assert said["echoed"] == "all"
    assert "Connection reset" in said["refused"]
    metrics = hcd.metrics()
    for name, labels in (("accepted_total", {"by": "guest"}), ("accepted_total", {"by": "host"})):
        assert metrics.total(f"hcd_device_vsock_{name}", **labels) == 2 + MANY
    for side in ("guest", "host"):
        total = metrics.total("hcd_device_vsock_payload_bytes_total", to=side)
        assert total == 2 * (LARGE + MANY * SMALL + sum(MESSAGES))
    assert metrics.total("hcd_device_vsock_refused_total", by="guest") == 1
    assert metrics.total("hcd_device_vsock_connections") == 0
    assert metrics.total("hcd_guest_errors_total") == metrics.total("hcd_handler_errors_total") == 0


@pytest.mark.parametrize("bus", ["modern", "legacy"])
def test_guest_and_host_talk_both_ways(
    bus: str,
    short_dir: Path,
    start_hcd: Callable[..., HcdProcess],
    boot: Callable[..., Guest],
    compile_static: Callable[[str], bytes],
    host_echo: HostEcho,
    expect_settled: Callable[[HcdProcess, Resources], None],
) -> None:
    """Streams of megabytes, many at once, half-closed on both sides, asked for by either."""
    hcd = start_hcd(DEVICE)
    before = hcd.resources()
    vm = qemu.Vm("q35", devices=qemu.vsock(short_dir / "vu.sock", bus))
    guest = boot(vm, JOB, jobs.VSOCK, programs={"vsock_peer": compile_static("vsock_peer.c")})
    check_both_ways(guest, hcd, short_dir, host_echo)
    expect_settled(hcd, before)


def test_user_mode_linux_talks_both_ways(
    short_dir: Path,
    start_hcd: Callable[..., HcdProcess],
    boot_uml: Callable[..., Guest],
    compile_static: Callable[[str], bytes],
    host_echo: HostEcho,
) -> None:
    """The same driver on another front end, which hands over the event queue too."""
    hcd = start_hcd(DEVICE)
    devices = [(short_dir / "vu.sock", uml.VSOCK_ID)]
    guest = boot_uml(JOB, devices, jobs.VSOCK, programs={"vsock_peer": compile_static("vsock_peer.c")})
    check_both_ways(guest, hcd, short_dir, host_echo)


def test_a_paused_guest_keeps_its_connections(
    short_dir: Path,
    start_hcd: Callable[..., HcdProcess],
    boot: Callable[..., Guest],
    open_qmp: Callable[..., Any],
    compile_static: Callable[[str], bytes],
) -> None:
    """QEMU stops its queues and starts them again; what came meanwhile is there."""
    start_hcd(DEVICE)
    vm = qemu.Vm("q35", devices=qemu.vsock(short_dir / "vu.sock", "modern"), qmp=[short_dir / "qmp.sock"])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{short_dir}/x.vsock_{HOST}")
        listener.listen()
        guest = boot(vm, f"vsock_peer idle {HOST}", jobs.VSOCK, programs={"vsock_peer": compile_static("vsock_peer.c")})
        guest.wait_for("idle")
        sock, _ = listener.accept()
        qmp = open_qmp(short_dir / "qmp.sock")
        qmp.execute("stop")
        sock.sendall(b"x")
        qmp.execute("cont")
        assert guest.wait()["idle-ended"] == "data"
        sock.settimeout(30)
        assert sock.recv(1) == b""
        sock.close()


@pytest.fixture
def manager(short_dir: Path) -> Iterator[Manager]:
    """hcd under a service manager that keeps its sessions over restarts."""
    config = short_dir / "hcd.toml"
    config.write_text(DEVICE.replace("{dir}", str(short_dir)))
    with Manager(short_dir, [sys.executable, "-m", "hcd", "run", str(config)]) as manager:
        manager.start()
        yield manager


RESTARTED = f"""
vsock_peer idle {HOST}
vsock_peer talk {HOST} {SMALL} 2
say talked=again
vsock_peer echo {GUEST} 1
"""


def test_a_guest_learns_of_a_restart_and_connects_again(
    manager: Manager,
    short_dir: Path,
    boot_uml: Callable[..., Guest],
    compile_static: Callable[[str], bytes],
    host_echo: HostEcho,
) -> None:
    """The front end notices nothing; the guest's connections are reset by an event, and new ones work."""
    programs = {"vsock_peer": compile_static("vsock_peer.c")}
    guest = boot_uml(RESTARTED, [(short_dir / "vu.sock", uml.VSOCK_ID)], jobs.VSOCK, programs=programs)
    guest.wait_for("idle")
    manager.restart()
    assert guest.wait_for("idle-ended") == "Connection reset by peer"
    assert guest.wait_for("talked") == "again"
    guest.wait_for("listening")
    with reach_guest(short_dir / "x.vsock") as sock:
        talk(sock, SMALL, 3)
    guest.wait()


def test_a_guest_of_qemu_goes_on_after_a_restart(
    manager: Manager,
    short_dir: Path,
    boot: Callable[..., Guest],
    compile_static: Callable[[str], bytes],
    host_echo: HostEcho,
) -> None:
    """QEMU keeps the event queue, so the guest is told nothing; new connections work in both directions."""
    job = f"""
    vsock_peer idle {HOST} &
    vsock_peer echo {GUEST} 1
    vsock_peer talk {HOST} {SMALL} 2
    say talked=again
    """
    programs = {"vsock_peer": compile_static("vsock_peer.c")}
    vm = qemu.Vm("q35", devices=qemu.vsock(short_dir / "vu.sock", "modern"))
    guest = boot(vm, job, jobs.VSOCK, programs=programs)
    guest.wait_for("idle")
    guest.wait_for("listening")
    manager.restart()
    manager.until(lambda: "went on with the front end" in manager.log.read_text(), "a session that goes on")
    with reach_guest(short_dir / "x.vsock") as sock:
        talk(sock, SMALL, 3)
    assert guest.wait()["talked"] == "again"
