"""``hcd doctor``: each usual mistake is found, named with its evidence, and told how to mend."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tables import table

from hcd import cli
from hcd.config import Address, DeviceSpec
from hcd.demo.hcd_process import HcdProcess
from hcd.devices.blk import Block
from hcd.doctor import access, command_line, daemon, device_socket, host, labels, machine
from hcd.doctor.access import Account
from hcd.doctor.command_line import front_of, parse
from hcd.doctor.findings import Finding, Severity

DEVICES = table("rng0", "rng", 'qmp = "{dir}/qmp.sock"') + table("disk0", "blk", ram="16M")
SHARED = ["-m", "64M", "-object", "memory-backend-memfd,id=ram,size=64M,share=on", "-machine", "memory-backend=ram"]
NOBODY = Account("guest", 54321, frozenset({54321}))
Ask = Callable[..., tuple[int, dict[str, Finding]]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """``ask(*arguments)``: the exit status, and the findings by check."""

    def run(*arguments: object) -> tuple[int, dict[str, Finding]]:
        status = cli.main(["doctor", "--json", *map(str, arguments)])
        said = json.loads(capsys.readouterr().out)
        found = [Finding(**{**item, "severity": Severity(item["severity"])}) for item in said["findings"]]
        assert status == any(item.severity is Severity.ERROR for item in found)
        return status, {item.check: item for item in found}

    return run


def write_config(directory: Path, devices: str = DEVICES, head: str = "") -> Path:
    file = directory / "hcd.toml"
    file.write_text(head + devices.replace("{dir}", str(directory)))
    return file


@contextlib.contextmanager
def qemu(directory: Path, *arguments: str) -> Iterator[None]:
    """A paused QEMU with a QMP socket in ``directory``."""
    pidfile = directory / "pid"
    command = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-S", "-accel", "tcg", *arguments]
    qmp = ["-qmp", f"unix:{directory}/qmp.sock,server=on,wait=off"]
    subprocess.run([*command, *qmp, "-daemonize", "-pidfile", str(pidfile)], check=True, timeout=60, cwd=directory)
    pid = os.pidfd_open(int(pidfile.read_text()))
    try:
        yield
    finally:
        signal.pidfd_send_signal(pid, signal.SIGKILL)
        select.select([pid], [], [], 10)
        os.close(pid)


def rng_on(path: object) -> list[str]:
    return ["-chardev", f"socket,id=c0,path={path}", "-device", "vhost-user-rng-pci,chardev=c0"]


# -- the report


def test_people_see_the_worst_first_and_what_to_do(short_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--config", str(write_config(short_dir))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("error: ")
    assert any(line.startswith("    -> start hcd") for line in lines)
    assert lines[-1].startswith("looked at: ")


def test_without_a_configuration_one_has_to_say_where_to_look(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("hcd.doctor.cli.DEFAULT_CONFIG", str(tmp_path / "none.toml"))
    assert cli.main(["doctor"]) == 1
    assert "say --config FILE, or which socket" in capsys.readouterr().err


# -- configuration and files


def test_problems_of_the_configuration_are_findings(ask: Ask, short_dir: Path) -> None:
    status, found = ask("--config", write_config(short_dir, DEVICES.replace("ram = ", "rom = ")))
    assert status == 1
    assert "rom: is not an option" in found["config"].what
    _, found = ask("--config", write_config(short_dir, DEVICES.replace('ram = "16M"', "")))
    assert "expected exactly one of blk-file and ram" in found["config"].what


def test_an_image_that_is_not_there_or_not_for_the_daemon_is_found(ask: Ask, short_dir: Path) -> None:
    image = short_dir / "disk.img"
    file = write_config(short_dir, DEVICES.replace('ram = "16M"', f'blk-file = "{image}"'))
    assert f"{image} does not exist" in ask("--config", file)[1]["file-missing"].what
    image.write_bytes(bytes(4096))
    image.chmod(0o600)
    assert "file-missing" not in ask("--config", file)[1]
    short_dir.chmod(0o755)
    assert "(-rw------- " in access.denial(image, NOBODY, access.READ)
    assert access.denial(image, Account("root", 0, frozenset()), access.WRITE) == ""


def test_a_directory_on_the_way_that_may_not_be_searched_is_named(short_dir: Path) -> None:
    short_dir.chmod(0o755)
    inner = short_dir / "inner"
    inner.mkdir(mode=0o700)
    (inner / "file").touch(mode=0o666)
    assert f"guest may not search {inner} (drwx------ " in access.denial(inner / "file", NOBODY, access.READ)
    mine = Account("me", os.getuid(), frozenset())
    assert access.denial(inner / "file", mine, access.READ) == ""


# -- the socket


def test_a_daemon_that_works_has_nothing_that_keeps_it_from_working(
    ask: Ask, short_dir: Path, start_hcd: Callable[..., HcdProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    hcd = start_hcd(DEVICES.replace('qmp = "{dir}/qmp.sock"\n', ""))
    file = short_dir / "hcd.toml"
    status, found = ask("--config", file)
    assert status == 0
    assert not {check for check in found if check.startswith(("config", "file", "limit"))}
    assert {check for check in found if check.startswith("socket")} <= {"socket-access"}
    assert "the one that is installed" in found["version"].what
    assert cli.main(["doctor", "--config", str(file), str(short_dir / "rng0.sock")]) == 0
    assert "nothing was found" in capsys.readouterr().out
    assert "broke the protocol" not in hcd.log.read_text()


def test_nobody_listens(ask: Ask, short_dir: Path) -> None:
    """No file, no directory, a stale socket, something that is no socket."""
    file = write_config(short_dir)
    (short_dir / "other.sock").touch()
    found = ask("--config", file, short_dir / "rng0.sock")[1]
    assert "does not exist" in found["socket-missing"].what
    elsewhere = write_config(short_dir, DEVICES.replace("{dir}/rng0", "{dir}/no/rng0"))
    assert "no does not exist" in ask("--config", elsewhere, short_dir / "no/rng0.sock")[1]["socket-directory"].what
    file = write_config(short_dir)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(short_dir / "rng0.sock"))
    status, found = ask("--config", file, short_dir / "rng0.sock")
    assert status == 1
    assert "left behind by a process that is gone" in found["socket-stale"].what
    (short_dir / "disk0.sock").write_text("")
    assert "is not a socket" in ask("--config", file, short_dir / "disk0.sock")[1]["socket-type"].what


@contextlib.contextmanager
def listening(path: Path, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=lambda: serve(listener))
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def answer(text: bytes) -> Callable[[socket.socket], None]:
    """Serve one client: take its question, say ``text``, hang up."""

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as client:
            client.recv(100)
            client.sendall(text)

    return serve


@pytest.mark.parametrize(
    ("text", "check"), [(b"220 mail\r\n", "socket-foreign"), (b"", "socket-busy"), (b"x" * 20, "socket-foreign")]
)
def test_who_listens_is_asked_what_it_is(ask: Ask, short_dir: Path, text: bytes, check: str) -> None:
    file = write_config(short_dir)
    with listening(short_dir / "rng0.sock", answer(text)):
        found = ask("--config", file, short_dir / "rng0.sock")[1]
    assert f"pid {os.getpid()}" in found[check].evidence


def test_a_listener_that_does_not_answer_is_told_apart(short_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_dir / "s"))
        listener.listen()
        found = device_socket.probe(str(short_dir / "s"), timeout=0.05)
        assert found is not None
        assert (found.state, found.pid) == ("silent", os.getpid())


def test_a_socket_that_is_not_configured_is_a_mismatch(ask: Ask, short_dir: Path) -> None:
    file = write_config(short_dir)
    finding = ask("--config", file, short_dir / "rng.sock")[1]["path-mismatch"]
    assert f"rng0 at {short_dir}/rng0.sock" in finding.evidence
    assert "the nearest is" in finding.evidence


def test_who_may_not_connect_is_said_with_the_group_that_may(short_dir: Path) -> None:
    """Connecting takes write permission for the socket, whatever the directory says."""
    short_dir.chmod(0o755)
    path = short_dir / "rng0.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o660)
        (finding,) = device_socket.check("rng0", str(path), [NOBODY], None)
        assert finding.check == "socket-permission"
        assert "srw-rw----" in finding.evidence
        assert f"usermod -aG {path.group()} guest" in finding.todo
        (finding,) = device_socket.check("rng0", str(path), [], None)
        assert (finding.check, finding.severity) == ("socket-access", Severity.NOTE)
        member = Account("guest", 54321, frozenset({path.stat().st_gid}))
        assert list(device_socket.check("rng0", str(path), [member], None)) == []


# -- QEMU, asked over QMP


@pytest.mark.guest
def test_memory_that_is_not_shared_is_found_in_a_running_qemu(
    ask: Ask, short_dir: Path, start_hcd: Callable[..., HcdProcess], need: Callable[..., None]
) -> None:
    """QEMU starts with it, connects, and the guest gets nothing: the device would see other memory."""
    need("qemu-system-x86_64")
    start_hcd(DEVICES)
    disk = ["-chardev", f"socket,id=c1,path={short_dir}/disk0.sock", "-device", "vhost-user-blk-pci,chardev=c1"]
    private = [word.replace("share=on", "share=off") for word in SHARED]
    with qemu(short_dir, *private, *rng_on(short_dir / "rng0.sock"), *disk):
        status, found = ask("--config", short_dir / "hcd.toml")
        assert status == 1
        assert set(found) - {"kvm-limited", "kvm-missing", "kvm-denied", "version", "socket-access"} == {
            "memory-not-shared", "socket-busy", "reconnect-missing",
        }  # fmt: skip
        assert "memory-backend-memfd ram: share=off" in found["memory-not-shared"].evidence
    anonymous = ["-m", "64M", "-object", "memory-backend-ram,id=ram,size=64M,share=on", "-M", "pc,memory-backend=ram"]
    with qemu(short_dir, *anonymous, *rng_on(short_dir / "rng0.sock")):
        assert "no descriptor" in ask(short_dir / "qmp.sock")[1]["memory-not-shared"].what
    with qemu(short_dir, *SHARED, *rng_on("rng0.sock")):
        assert "memory-not-shared" not in ask("--config", short_dir / "hcd.toml", short_dir / "qmp.sock")[1]


@pytest.mark.guest
def test_a_qemu_without_qmp_is_found_by_its_socket(
    ask: Ask, short_dir: Path, start_hcd: Callable[..., HcdProcess], need: Callable[..., None]
) -> None:
    """What it was started with says that its memory is not shared."""
    need("qemu-system-x86_64")
    start_hcd(DEVICES)
    private = [word.replace("share=on", "share=off") for word in SHARED]
    with qemu(short_dir, *private, *rng_on("rng0.sock")):
        (short_dir / "qmp.sock").unlink()
        found = ask("--config", short_dir / "hcd.toml", short_dir / "rng0.sock")[1]
        assert "has no share=on" in found["memory-not-shared"].evidence
        assert "memory-not-shared" not in ask("--config", short_dir / "hcd.toml", short_dir / "disk0.sock")[1]


@pytest.mark.guest
def test_a_chardev_that_leads_elsewhere_is_found(
    ask: Ask, short_dir: Path, start_hcd: Callable[..., HcdProcess], need: Callable[..., None]
) -> None:
    """Another socket, another kind of device, no device on it, QEMU as the listener, a connection that was lost."""
    need("qemu-system-x86_64")
    hcd = start_hcd(DEVICES.replace("rng0.sock", "rng1.sock"))
    other = write_config(short_dir / ".", DEVICES)
    qmp = short_dir / "qmp.sock"
    with qemu(short_dir, *SHARED, *rng_on(short_dir / "rng1.sock")):
        finding = ask("--config", other, qmp)[1]["path-mismatch"]
        assert f"chardev c0: no configured device has the socket {short_dir}/rng1.sock" in finding.what
        assert f"the nearest is {short_dir}/rng0.sock" in finding.evidence
    right = write_config(short_dir, DEVICES.replace("rng0.sock", "rng1.sock"))
    with qemu(short_dir, *SHARED, *rng_on(short_dir / "disk0.sock")):
        found = ask("--config", right, qmp)[1]
        assert "disk0 is another kind of device than vhost-user-rng-pci" in found["device-mismatch"].what
    with qemu(short_dir, *SHARED, "-chardev", f"socket,id=c0,path={short_dir}/rng1.sock"):
        assert "no device of QEMU uses it" in ask("--config", right, qmp)[1]["qemu-no-device"].what
    with qemu(short_dir, *SHARED):
        assert "has no chardev that is connected" in ask("--config", right, qmp)[1]["qemu-no-device"].what
    with qemu(short_dir, *SHARED, *rng_on(short_dir / "rng1.sock")):
        hcd.stop()
        assert "is not connected to rng0" in ask("--config", right, qmp)[1]["not-connected"].what


def test_a_qmp_socket_that_does_not_answer_is_explained(
    ask: Ask, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken by another client, left behind, not there."""
    file = write_config(short_dir)
    qmp = short_dir / "qmp.sock"
    assert "No such file" in ask("--config", file, qmp)[1]["qmp-unreachable"].what
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(qmp))
        assert "left behind" in ask("--config", file, f"unix:{qmp}")[1]["qmp-unreachable"].evidence
        taken.listen()
        look = machine.look
        monkeypatch.setattr(machine, "look", lambda path: look(path, timeout=0.05))
        assert "another client" in ask("--config", file, qmp)[1]["qmp-busy"].todo


# -- QEMU's command line


def checks(words: str, version: tuple[int, int] = (7, 2), sockets: dict[str, str] | None = None) -> set[str]:
    return {finding.check for finding in command_line.check(parse(words.split()), version, sockets or {})}


BLK = " -chardev socket,id=c,path=/run/d.sock{} -device vhost-user-blk-pci,chardev=c"
SHARING = " ".join(SHARED)


@pytest.mark.parametrize(
    ("words", "version", "found"),
    [
        (SHARING + BLK.format(",reconnect=1"), (7, 2), set()),
        (SHARING + BLK.format(",reconnect-ms=1000"), (9, 2), set()),
        (SHARING + BLK.format(",reconnect-ms=1000"), (9, 1), {"reconnect-spelling"}),
        (SHARING + BLK.format(",reconnect=1"), (9, 2), {"reconnect-spelling"}),
        (SHARING + BLK.format(""), (7, 2), {"reconnect-missing"}),
        (SHARING + BLK.format(",reconnect=1").replace("blk", "rng"), (7, 2), {"reconnect-unsupported"}),
        (SHARING + BLK.format("").replace("blk", "rng"), (7, 2), set()),
        (SHARING + BLK.format(",reconnect=1").replace("-pci", "-pci-non-transitional"), (7, 2), set()),
        (SHARING + BLK.format(",reconnect=1,server=on"), (7, 2), {"chardev-server"}),
        (SHARING + BLK.format(",reconnect=1").replace("chardev=c", "chardev=d"), (7, 2), {"qemu-chardev"}),
        (BLK.format(",reconnect=1"), (7, 2), {"memory-not-shared"}),
        (SHARING.replace("share=on", "share=off") + BLK.format(",reconnect=1"), (7, 2), {"memory-not-shared"}),
        ("-m 1G -object memory-backend-file,id=m,share=on,mem-path=/dev/shm,size=1G -numa node,memdev=m"
         + BLK.format(",reconnect=1"), (7, 2), set()),
        (SHARING + " -chardev socket,id=c,path=/n,reconnect=1 -netdev vhost-user,id=n,chardev=c"
         " -device virtio-net-pci,netdev=n", (7, 2), set()),
        (SHARING + " -netdev user,id=n -device virtio-net-pci,netdev=n", (7, 2), {"qemu-no-device"}),
    ],
)  # fmt: skip
def test_mistakes_in_a_command_line(words: str, version: tuple[int, int], found: set[str]) -> None:
    assert checks(words, version) == found


def test_a_command_line_is_read_as_qemu_reads_it() -> None:
    """Doubled commas, one or two dashes, a relative path, a driver with its key."""
    line = parse(["--chardev", "socket,id=c,path=a,,b", "-S", "-device", "driver=vhost-user-rng-pci,chardev=c"], "/vm")
    (chardev,) = line.named("chardev")
    assert line.path_of(chardev) == "/vm/a,b"
    found = list(command_line.check(line, None, {"/vm/c": "disk0"}))
    assert [finding.check for finding in found] == ["memory-not-shared", "path-mismatch"]
    assert all(front_of(name) for name in ("virtio-net-pci", "vhost-user-rng", "vhost-user-vsock-pci"))
    assert front_of("virtio-gpu-pci") is None
    assert front_of("") is None


def test_a_command_that_does_not_start_is_read_not_run(ask: Ask, need: Callable[..., None], short_dir: Path) -> None:
    need("qemu-system-x86_64")
    words = ["qemu-system-x86_64", *SHARED, *rng_on("/nowhere.sock,reconnect-ms=1000")]
    status, found = ask("--config", write_config(short_dir), "--", *words)
    assert status == 1
    assert {"reconnect-spelling", "path-mismatch", "reconnect-unsupported"} <= set(found)
    assert "write reconnect=1" in found["reconnect-spelling"].todo


# -- the host


def fake(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_selinux_is_judged_by_the_daemons_label(tmp_path: Path) -> None:
    label = "system_u:system_r:unconfined_service_t:s0\0"
    root = fake(tmp_path, {"sys/fs/selinux/enforce": "1", "proc/7/attr/current": label})
    (finding,) = labels.check_selinux(7, root)
    assert finding.severity is Severity.WARNING
    assert "connect to type unconfined_service_t" in finding.what
    fake(tmp_path, {"sys/fs/selinux/enforce": "0"})
    assert [f.severity for f in labels.check_selinux(7, root)] == [Severity.NOTE]
    assert list(labels.check_selinux(7, tmp_path / "none")) == []


def test_apparmor_is_judged_by_the_guests_profile(tmp_path: Path) -> None:
    files = {
        "sys/module/apparmor/parameters/enabled": "Y\n",
        "proc/7/attr/current": "libvirt-1234 (enforce)\n",
        "etc/apparmor.d/libvirt/libvirt-1234.files": '  "/var/lib/x" rwk,\n  "/run/hcd/rng0.sock" r,\n',
    }
    root = fake(tmp_path, files)
    (finding,) = labels.check_apparmor(7, "/run/hcd/rng0.sock", root)
    assert "/run/hcd/*.sock rw," in finding.todo
    fake(tmp_path, {"etc/apparmor.d/local/abstractions/libvirt-qemu": "/run/hcd/*.sock rw,\n"})
    assert list(labels.check_apparmor(7, "/run/hcd/rng0.sock", root)) == []
    fake(tmp_path, {"proc/8/attr/current": "unconfined\n"})
    assert list(labels.check_apparmor(8, "/run/else.sock", root)) == []


def test_limits_are_those_of_the_daemon(tmp_path: Path) -> None:
    spec = DeviceSpec("d", "blk", "/run/d.sock")
    device = Block("d", {"ram": 1 << 20, "num_queues": 64})
    table = "Limit                     Soft Limit           Hard Limit           Units\n"
    table += "Max open files            {}                  {}                files\n"
    table += "Max address space         {}                  unlimited            bytes\n"
    proc = fake(tmp_path, {"7/limits": table.format(200, 4096, 1 << 30)})
    found = {finding.check: finding for finding in host.check_limits([(spec, device)], 7, proc)}
    assert set(found) == {"limit-files", "limit-memory"}
    assert "RLIMIT_NOFILE is 200, about 240 are needed" in found["limit-files"].evidence
    fake(tmp_path, {"7/limits": table.format(1024, 4096, "unlimited")})
    assert list(host.check_limits([(spec, device)], 7, proc)) == []


def test_kvm(tmp_path: Path) -> None:
    cpu = fake(tmp_path, {"cpu": "model name: x\nflags : fpu vmx sse\n", "plain": "flags : fpu\n", "kvm": ""})
    assert [f.check for f in host.check_kvm(tmp_path / "none", cpu / "cpu")] == ["kvm-missing"]
    assert [f.check for f in host.check_kvm(tmp_path / "kvm", cpu / "cpu")] == []
    assert [f.check for f in host.check_kvm(tmp_path / "kvm", cpu / "plain")] == ["kvm-limited"]


def test_a_daemon_of_another_version_is_found(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = b'hcd_build_info{python="3.11",version="0.0.9"} 1.0\n'
    path = short_dir / "metrics.sock"
    with listening(path, answer(b"HTTP/1.0 200 OK\r\n\r\n" + body)):
        (finding,) = daemon.check_version(Address(path=str(path)))
    assert "the daemon is hcd 0.0.9" in finding.what
    path.unlink()
    assert [f.check for f in daemon.check_version(Address(path=str(path)))] == ["metrics-unreachable"]
    with listening(path, answer(b"220 mail\r\n")):
        assert [f.check for f in daemon.check_version(Address(path=str(path)))] == ["metrics-unreachable"]
