"""Asking QEMU for the path: the rules, a fake QEMU that misbehaves in every way, and the real one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from hcd import qmp
from hcd.doorbell import Path as BellPath
from hcd.qmp import DeviceFacts, PathAnswer

VERSION_1 = 1 << 32
SOCKET = "/run/hcd/disk0.sock"


# -- the rules


def facts(bus: str = "PCIE", arch: str = "x86_64", pio: bool | None = False) -> DeviceFacts:
    return DeviceFacts("/machine/peripheral/d0", "some-device", bus, arch, pio)


@pytest.mark.parametrize(
    ("found", "features", "path", "kind"),
    [
        (facts(), 0, BellPath.PIO, "legacy"),
        (facts(), VERSION_1, BellPath.MMIO, "modern"),
        (facts(pio=True), VERSION_1, BellPath.PIO, "modern-pio"),
        (facts(pio=True), 0, BellPath.PIO, "legacy"),
        (facts("virtual-css-bus", "s390x", None), VERSION_1, BellPath.HYPERCALL, "ccw"),
        (facts("virtual-css-bus", "s390x", None), 0, BellPath.HYPERCALL, "ccw"),
        (facts("virtio-mmio-bus", pio=None), 0, BellPath.MMIO, "virtio-mmio"),
        (facts("virtio-mmio-bus", "aarch64", None), VERSION_1, BellPath.MMIO, "virtio-mmio"),
        (facts(arch="aarch64"), 0, BellPath.MMIO, "legacy"),
        (facts(arch="aarch64", pio=True), VERSION_1, BellPath.MMIO, "modern-pio"),
        (facts(arch="i386"), 0, BellPath.PIO, "legacy"),
    ],
)
def test_path_follows_from_bus_features_and_architecture(
    found: DeviceFacts, features: int, path: BellPath, kind: str
) -> None:
    answer = qmp.path_of(found, features)
    assert answer is not None
    assert (answer.path, answer.kind) == (path, kind)


def test_a_transport_that_is_not_known_gives_no_path() -> None:
    assert qmp.path_of(facts("newfangled-bus", pio=None), VERSION_1) is None


def test_a_conflict_names_both_paths_and_the_device() -> None:
    answer = PathAnswer(BellPath.MMIO, "modern", "vhost-user-blk-pci (/machine/peripheral/d0)")
    assert answer.conflict(None) == ""
    assert answer.conflict(BellPath.MMIO) == ""
    text = answer.conflict(BellPath.PIO)
    assert '"pio"' in text
    assert "vhost-user-blk-pci" in text
    assert "mmio" in text


def test_netdevs_are_found_in_the_monitors_text() -> None:
    text = (
        "virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n"
        " \\ n0: index=0,type=vhost-user,vhost-user0 to cn\r\n"
        "virtio-net-pci.1: index=1,type=nic,\r\n"
        " \\ n0: index=1,type=vhost-user,vhost-user1 to cn\r\n"
        "n7: index=0,type=vhost-user,vhost-user0 to a b\r\n"
        "u0: index=0,type=user,net=10.0.2.0,restrict=off\r\n"
    )
    assert qmp.netdev_chardevs(text) == {"n0": "cn", "n7": "a b"}
    assert qmp.netdev_chardevs("") == {}


# -- a fake QEMU


class FakeQemu:
    """A QOM tree behind a QMP socket. ``tree`` maps an object's path to its properties."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.arch = "x86_64"
        self.network = ""
        self.pci: Any = []
        self.tree: dict[str, dict[str, Any]] = {"/chardevs": {}, "/machine/peripheral": {}}
        self.tree["/machine/peripheral-anon"] = {}
        self.noise: list[dict[str, Any]] = []
        self.clients = 0

    def add(self, path: str, type_: str, **properties: Any) -> None:
        self.tree[path] = {"type": type_, **{key.replace("_", "-"): v for key, v in properties.items()}}
        parent, _, name = path.rpartition("/")
        self.tree.setdefault(parent, {})[name] = f"child<{type_}>"

    def chardev(self, label: str, path: str, **extra: Any) -> None:
        self.add(f"/chardevs/{label}", "chardev-socket", addr={"type": "unix", "path": path, **extra})

    def pci_device(self, name: str, chardev: str, **properties: Any) -> None:
        properties = {"modern-pio-notify": False, **properties}
        self.add(f"/machine/peripheral/{name}", "vhost-user-blk-pci", chardev=chardev, **properties)
        self.tree[f"/machine/peripheral/{name}"]["parent_bus"] = "/machine/q35/pcie.0"
        self.tree["/machine/q35/pcie.0"] = {"type": "PCIE"}

    def answer(self, command: str, arguments: dict[str, str]) -> dict[str, Any]:
        if command == "qmp_capabilities":
            return {"return": {}}
        if command == "query-target":
            return {"return": {"arch": self.arch}}
        if command == "human-monitor-command":
            return {"return": self.network}
        if command == "query-pci":
            return {"return": self.pci}
        found = self.tree.get(arguments["path"])
        if found is None:
            return {"error": {"class": "DeviceNotFound", "desc": "no such object"}}
        if command == "qom-list":
            listed = [{"name": k, "type": v if str(v).startswith("child<") else "str"} for k, v in found.items()]
            return {"return": listed}
        if arguments["property"] not in found:
            return {"error": {"class": "GenericError", "desc": "no such property"}}
        return {"return": found[arguments["property"]]}

    async def converse(self, stream: trio.SocketStream) -> None:
        self.clients += 1
        await send(stream, {"QMP": {"version": {}, "capabilities": []}})
        buffer = b""
        while data := await stream.receive_some():
            buffer += data
            while b"\n" in buffer:
                line, buffer = buffer.split(b"\n", 1)
                request = json.loads(line)
                for event in self.noise:
                    await send(stream, event)
                await send(stream, self.answer(request["execute"], request.get("arguments", {})))


async def send(stream: trio.SocketStream, message: object) -> None:
    with contextlib.suppress(trio.BrokenResourceError):
        await stream.send_all(json.dumps(message).encode() + b"\r\n")


@contextlib.asynccontextmanager
async def serving(path: str, converse: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[None]:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with socket.socket(socket.AF_UNIX) as raw:
        raw.bind(path)
        raw.listen()
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(raw))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, converse, [listener])
            yield
            nursery.cancel_scope.cancel()


@pytest.fixture
def qemu(tmp_path: Path) -> FakeQemu:
    return FakeQemu(str(tmp_path / "qmp"))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.WARNING, "hcd.qmp")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


async def find(qemu: FakeQemu, path: str = SOCKET, features: int = VERSION_1) -> PathAnswer | None:
    async with serving(qemu.path, qemu.converse):
        return await qmp.find_path(qemu.path, path, features=features)


async def test_the_device_on_the_chardev_of_our_socket_is_found(qemu: FakeQemu) -> None:
    qemu.chardev("other", "/run/hcd/other.sock")
    qemu.chardev("c0", SOCKET)
    qemu.pci_device("d1", "other", modern_pio_notify=True)
    qemu.pci_device("d0", "c0")
    answer = await find(qemu)
    assert answer == PathAnswer(BellPath.MMIO, "modern", "vhost-user-blk-pci (/machine/peripheral/d0)")


async def test_events_between_answers_are_skipped(qemu: FakeQemu) -> None:
    qemu.noise = [{"event": "NIC_RX_FILTER_CHANGED", "data": {}}, {"event": "RTC_CHANGE"}]
    qemu.chardev("c0", SOCKET)
    qemu.pci_device("d0", "c0", modern_pio_notify=True)
    answer = await find(qemu)
    assert answer is not None
    assert answer.path is BellPath.PIO


async def test_a_network_device_is_found_through_its_netdev(qemu: FakeQemu) -> None:
    qemu.chardev("cn", SOCKET)
    qemu.network = " \\ n0: index=0,type=vhost-user,vhost-user0 to cn\r\n"
    path = "/machine/peripheral-anon/device[0]"
    qemu.add(path, "virtio-net-ccw", netdev="n0")
    qemu.tree[path]["parent_bus"] = "/machine/css"
    qemu.tree["/machine/css"] = {"type": "virtual-css-bus"}
    answer = await find(qemu)
    assert answer is not None
    assert (answer.path, answer.kind) == (BellPath.HYPERCALL, "ccw")


async def test_a_relative_path_of_qemu_starts_in_its_own_directory(
    qemu: FakeQemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the fake runs in this process
    qemu.chardev("c0", "sub/../disk0.sock")
    qemu.pci_device("d0", "c0")
    assert await find(qemu, str(tmp_path / "disk0.sock")) is not None


async def test_a_relative_path_whose_directory_qemu_has_left_is_known_by_its_end(
    qemu: FakeQemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")  # as "-daemonize" does
    qemu.chardev("c0", "vm/disk0.sock")
    qemu.pci_device("d0", "c0")
    assert await find(qemu, str(tmp_path / "vm" / "disk0.sock")) is not None
    assert await find(qemu, str(tmp_path / "xvm" / "disk0.sock")) is None


async def test_a_path_through_a_symbolic_link_is_the_same_socket(qemu: FakeQemu, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    qemu.chardev("c0", str(tmp_path / "link" / "disk0.sock"))
    qemu.pci_device("d0", "c0")
    assert await find(qemu, str(tmp_path / "real" / "disk0.sock")) is not None


async def test_an_abstract_socket_is_known_by_its_name(qemu: FakeQemu) -> None:
    qemu.chardev("c0", "hcd-disk0", abstract=True)
    qemu.pci_device("d0", "c0")
    assert await find(qemu, "@hcd-disk0") is not None


async def test_two_devices_of_one_kind_on_one_socket_agree(qemu: FakeQemu) -> None:
    for name in ("d0", "d1"):
        qemu.chardev(f"c-{name}", SOCKET)
        qemu.pci_device(name, f"c-{name}")
    assert await find(qemu) is not None


async def test_two_devices_of_different_kinds_on_one_socket_are_no_answer(
    qemu: FakeQemu, warnings: Callable[[], str]
) -> None:
    for name, notify in (("d0", True), ("d1", False)):
        qemu.chardev(f"c-{name}", SOCKET)
        qemu.pci_device(name, f"c-{name}", modern_pio_notify=notify)
    assert await find(qemu) is None
    assert "d0" in warnings()
    assert "d1" in warnings()


async def test_no_chardev_of_ours_is_said(qemu: FakeQemu, warnings: Callable[[], str]) -> None:
    qemu.chardev("c0", "/run/else.sock")
    qemu.chardev("c1", "")
    qemu.chardev("c2", "\0\ud800")
    qemu.add("/chardevs/c3", "chardev-socket", addr={"type": "inet", "host": "h", "port": "1"})
    qemu.add("/chardevs/c4", "chardev-socket", addr=7)
    qemu.add("/chardevs/c5", "chardev-pty")
    assert await find(qemu) is None
    assert f"no chardev that is connected to {SOCKET}" in warnings()


async def test_a_chardev_without_a_device_is_said(qemu: FakeQemu, warnings: Callable[[], str]) -> None:
    qemu.chardev("c0", SOCKET)
    qemu.pci_device("d0", "else")
    assert await find(qemu) is None
    assert "no device of QEMU uses chardev c0" in warnings()


async def test_a_bus_that_is_not_known_is_said(qemu: FakeQemu, warnings: Callable[[], str]) -> None:
    qemu.chardev("c0", SOCKET)
    qemu.add("/machine/peripheral/d0", "vhost-user-blk", chardev="c0")
    assert await find(qemu) is None
    assert "vhost-user-blk on a bus of type unknown" in warnings()


async def test_the_conversation_ends_with_the_answer(qemu: FakeQemu) -> None:
    """QEMU takes one client at a time: whoever stays blocks the operator's own."""
    left = trio.Event()

    async def converse(stream: trio.SocketStream) -> None:
        await qemu.converse(stream)
        left.set()

    qemu.chardev("c0", SOCKET)
    qemu.pci_device("d0", "c0")
    async with serving(qemu.path, converse):
        assert await qmp.find_path(qemu.path, SOCKET, features=VERSION_1) is not None
        await left.wait()
    assert qemu.clients == 1


# -- a QEMU that misbehaves


@pytest.mark.parametrize(
    ("greeting", "expected"),
    [
        (b"", "hung up"),
        (b'{"QMP": {', "hung up"),
        (b"220 mail.example ESMTP\r\n", "does not speak QMP"),
        (b"\xff\xfe\r\n", "does not speak QMP"),
        (b"[1, 2]\r\n", "does not speak QMP"),
        (b"3\r\n", "does not speak QMP"),
        (b"[" * 100_000 + b"\r\n", "does not speak QMP"),
        (b'{"return": {}}\r\n', "does not speak QMP"),
        (b'{"QMP": {}}\r\n', "hung up"),
        (b'{"QMP": {}}\r\n{"x": 1}\r\n', "neither an answer nor an event"),
        (b'{"QMP": {}}\r\n{"error": "no"}\r\n', "qmp_capabilities: no"),
        (b'{"QMP": {}}\r\n{"error": {"desc": "locked"}}\r\n', "qmp_capabilities: locked"),
        (b'{"QMP": {}}\r\n{"return": {}}\r\n{"return": 7}\r\n', "no chardev"),
        (b'{"QMP": {}}\r\n{"return": {}}\r\n{"return": [7, {"name": 1, "type": 2}]}\r\n', "no chardev"),
    ],
)
async def test_a_peer_that_is_not_qemu_or_hangs_up_is_said(
    tmp_path: Path, warnings: Callable[[], str], greeting: bytes, expected: str
) -> None:
    async def converse(stream: trio.SocketStream) -> None:
        await stream.send_all(greeting)
        await stream.send_eof()
        with contextlib.suppress(trio.BrokenResourceError):
            while await stream.receive_some():
                pass

    path = str(tmp_path / "qmp")
    async with serving(path, converse):
        assert await qmp.find_path(path, SOCKET, features=0) is None
    assert expected in warnings()


async def test_an_answer_without_end_is_cut_off(tmp_path: Path, warnings: Callable[[], str]) -> None:
    async def converse(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                await stream.send_all(b"x" * 65536)

    path = str(tmp_path / "qmp")
    async with serving(path, converse):
        assert await qmp.find_path(path, SOCKET, features=0) is None
    assert "longer than" in warnings()


async def test_a_qemu_that_does_not_answer_costs_the_timeout_and_no_more(
    tmp_path: Path, warnings: Callable[[], str], autojump_clock: trio.testing.MockClock
) -> None:
    async def converse(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    path = str(tmp_path / "qmp")
    async with serving(path, converse):
        started = trio.current_time()
        assert await qmp.find_path(path, SOCKET, features=0, timeout=30) is None
        assert trio.current_time() - started == pytest.approx(30)
    assert "no answer within 30 s" in warnings()


async def test_nobody_at_the_socket_is_said(tmp_path: Path, warnings: Callable[[], str]) -> None:
    path = str(tmp_path / "qmp")
    assert await qmp.find_path(path, SOCKET, features=0) is None
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    assert await qmp.find_path(path, SOCKET, features=0) is None
    assert "No such file" in warnings()
    assert "refused" in warnings()


# -- the real QEMU

REAL_BLK = [
    ("q35", "vhost-user-blk-pci,disable-modern=on", 0, BellPath.PIO, "legacy"),
    ("q35", "vhost-user-blk-pci", VERSION_1, BellPath.MMIO, "modern"),
    ("pc", "vhost-user-blk-pci,modern-pio-notify=on", VERSION_1, BellPath.PIO, "modern-pio"),
    ("pc", "vhost-user-blk-pci-transitional,id=d0", 0, BellPath.PIO, "legacy"),
    ("microvm", "vhost-user-blk", 0, BellPath.MMIO, "virtio-mmio"),
]
REAL_NET = [
    ("x86_64", "q35", "virtio-net-pci,mq=on,vectors=6", VERSION_1, BellPath.MMIO, "modern"),
    ("s390x", "s390-ccw-virtio", "virtio-net-ccw", VERSION_1, BellPath.HYPERCALL, "ccw"),
]


def need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        if os.environ.get("HCD_REQUIRE") == "1":
            pytest.fail(f"{program} is not installed")
        pytest.skip(f"{program} is not installed")
    return found


@contextlib.contextmanager
def daemonized(directory: Path, program: str, *arguments: str) -> Iterator[None]:
    """A program of QEMU's that is ready when it goes to the background."""
    pidfile = directory / f"{program}.pid"
    command = [need(program), *arguments, "--daemonize", "--pidfile", str(pidfile)]
    subprocess.run(command, cwd=directory, check=True, timeout=60)
    pid = os.pidfd_open(int(pidfile.read_text()))
    try:
        yield
    finally:
        signal.pidfd_send_signal(pid, signal.SIGKILL)
        select.select([pid], [], [], 10)
        os.close(pid)


@contextlib.contextmanager
def virtual_machine(directory: Path, arch: str, machine: str, *arguments: str) -> Iterator[str]:
    """A paused machine; gives the path of its QMP socket."""
    shared = ["-m", "64", "-object", "memory-backend-memfd,id=mem,size=64M,share=on", "-nodefaults", "-S"]
    qmp_option = ["-display", "none", "-qmp", "unix:qmp,server=on,wait=off"]
    board = ["-accel", "tcg", "-M", f"{machine},memory-backend=mem"]
    with daemonized(directory, f"qemu-system-{arch}", *board, *shared, *qmp_option, *arguments):
        yield str(directory / "qmp")


@pytest.fixture
def block_back_end(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    node = ["--blockdev", "file,node-name=n,filename=image"]
    export = ["--export", "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=blk.sock"]
    with daemonized(tmp_path, "qemu-storage-daemon", *node, *export):
        yield tmp_path


@pytest.fixture
def network_back_end(tmp_path: Path) -> Iterator[Path]:
    """DPDK's vhost back end with two queue pairs."""
    command = [
        *(need("dpdk-testpmd"), "--no-huge", "-m", "256", "--no-pci", "--no-shconf", "-l", "0,1"),
        *(f"--file-prefix=hcd{os.getpid()}", f"--vdev=net_vhost0,iface={tmp_path}/net.sock,queues=2"),
        *("--", "--total-num-mbufs=4096", "-i"),
    ]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as testpmd:
        try:
            said: list[str] = []
            for line in testpmd.stdout or ():
                said.append(line)
                if "Checking link statuses" in line:
                    break
            else:
                pytest.fail("testpmd ended:\n" + "".join(said))
            yield tmp_path
        finally:
            testpmd.kill()


@pytest.mark.guest
@pytest.mark.parametrize(("machine", "device", "features", "path", "kind"), REAL_BLK)
async def test_qemu_is_asked_about_a_disk(
    block_back_end: Path, machine: str, device: str, features: int, path: BellPath, kind: str
) -> None:
    options = ["-chardev", "socket,id=c0,path=blk.sock", "-device", f"{device},chardev=c0"]
    with virtual_machine(block_back_end, "x86_64", machine, *options) as socket_path:
        for _ in range(2):  # the first conversation left the socket free
            answer = await qmp.find_path(socket_path, str(block_back_end / "blk.sock"), features=features)
            assert answer is not None
            assert (answer.path, answer.kind) == (path, kind)
            assert answer.device.startswith("vhost-user-blk")
        assert await qmp.find_path(socket_path, str(block_back_end / "other.sock"), features=0) is None


@pytest.mark.guest
@pytest.mark.parametrize(("arch", "machine", "device", "features", "path", "kind"), REAL_NET)
async def test_qemu_is_asked_about_a_network_device(
    network_back_end: Path, arch: str, machine: str, device: str, features: int, path: BellPath, kind: str
) -> None:
    queues = ",queues=2" if "mq=on" in device else ""
    options = [
        *("-chardev", f"socket,id=c0,path={network_back_end}/net.sock"),
        *("-netdev", f"vhost-user,id=n0,chardev=c0{queues}", "-device", f"{device},netdev=n0"),
    ]
    with virtual_machine(network_back_end, arch, machine, *options) as socket_path:
        answer = await qmp.find_path(socket_path, str(network_back_end / "net.sock"), features=features)
    assert answer is not None
    assert (answer.path, answer.kind) == (path, kind)
    assert answer.device.startswith("virtio-net")
    if kind == "ccw":
        assert answer.place is not None
        assert answer.place.of(1) == "fe.0.0000=1"
