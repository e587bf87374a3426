"""The control socket of a real daemon: what is asked of it, by whom, and what nobody can do to it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lamps import Process, write
from tables import table

from hcd.control import settings
from hcd.control.client import Client, NoDaemonError, connect
from hcd.control.protocol import CallError
from hcd.control.server import MAX_CONNECTIONS_OF_USER
from hcd.control.snapshot import from_json
from hcd.demo.hcd_process import HcdProcess, Resources
from hcd.frontend.blk import BlockDriver, BlockRequest, read_config
from hcd.frontend.client import Frontend

pytestmark = pytest.mark.long

Start = Callable[..., HcdProcess]

DISK = table("disk0", "blk", 'path = "direct"', blk_file="{dir}/image")
RNG = table("rng0", "rng")
MIB = 1 << 20


def hcd(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, as an operator types it."""
    words = [sys.executable, "-m", "hcd", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


def hcd_as_stranger(*arguments: object) -> tuple[int, str]:
    """Exit status and output of the command for a user who owns nothing.

    In a fork of this process: the interpreter may stand where that user cannot read it.
    """
    from hcd import cli
    from hcd.control import live  # noqa: F401 - what the command imports when it needs it

    with contextlib.redirect_stderr(io.StringIO()):
        cli.main(["status", "--control", "/nowhere/at/all"])
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.dup2(write, 1)
            sys.stdout = sys.stderr = os.fdopen(write, "w")
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            status = cli.main([str(word) for word in arguments])
            sys.stdout.flush()
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as output:
        said = output.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


@pytest.fixture
def control(short_dir: Path) -> Path:
    return short_dir / "control.sock"


@pytest.fixture
def daemon(start_hcd: Start, short_dir: Path, control: Path) -> HcdProcess:
    (short_dir / "image").write_bytes(bytes(MIB))
    made = start_hcd(DISK + RNG, daemon=f'[control]\npath = "{control}"')
    wait_for(control)
    return made


def wait_for(path: Path) -> None:
    """Until somebody answers there; for daemons whose other sockets listen already."""
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(NoDaemonError), Client(str(path)):
            return
        assert time.monotonic() < deadline, "no control socket"
        time.sleep(0.01)


@pytest.fixture
def disk(daemon: HcdProcess, short_dir: Path) -> Iterator[tuple[Frontend, BlockDriver]]:
    with Frontend.open(short_dir / "disk0.sock") as frontend:
        frontend.open_back_channel()
        yield frontend, BlockDriver(frontend.memory, frontend.queues[0])


@pytest.fixture
def load(disk: tuple[Frontend, BlockDriver]) -> Iterator[Callable[[], int]]:
    """Reads and writes at depth 16 meanwhile; ``load()`` is how many were done. None may fail."""
    done, stop, failures = 0, threading.Event(), []

    def requests() -> Iterator[BlockRequest]:
        number = 0
        while not stop.is_set():
            number += 1
            sector = number * 8 % 2048
            yield BlockRequest(1, sector, bytes(4096)) if number % 2 else BlockRequest(0, sector, length=4096)

    def run() -> None:
        nonlocal done
        try:
            for request in disk[1].pipeline(requests(), 16):
                request.check()
                done += 1
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield lambda: done
    stop.set()
    thread.join(30)
    assert failures == []
    assert done > 100


def goes_on(load: Callable[[], int]) -> None:
    """The disk still serves."""
    before, deadline = load(), time.monotonic() + 20
    while load() < before + 50:
        assert time.monotonic() < deadline, "the load stands still"
        time.sleep(0.005)


def ask(path: Path, *lines: bytes) -> list[Any]:
    """What a client of anybody's making is answered, the greeting first."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(str(path))
        sock.sendall(b"".join(lines))
        sock.shutdown(socket.SHUT_WR)
        return [json.loads(line) for line in sock.makefile("rb")]


# -- the views, as a new user sees them


def test_status_of_a_busy_daemon(control: Path, load: Callable[[], int]) -> None:
    goes_on(load)
    done = hcd("status", "--control", control)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert re.match(r"hcd \S+, pid \d+, up \d+ s, /\S+/hcd\.toml: 2 devices, 1 connected$", lines[0])
    assert lines[1] == "all is well"
    row = next(line.split() for line in lines if line.startswith("disk0 "))
    assert row[:6] == ["disk0", "blk", *row[2:4], "direct", "declared"]
    assert row[3] == f"({os.getpid()})"
    assert row[9] == "1.0M"
    assert any(re.match(r"disk0 +0 +running +split +128 +\d+ ", line) for line in lines)
    assert "VERSION_1" in done.stdout


def test_status_for_programs_is_the_whole_snapshot(control: Path, load: Callable[[], int]) -> None:
    goes_on(load)
    done = hcd("status", "--json", "disk0", "--control", control)
    data = json.loads(done.stdout)
    shown = from_json(data)
    assert data["wrong"] == []
    (device,) = shown.devices
    assert device.peer is not None
    assert (device.name, device.peer.pid, device.capacity) == ("disk0", os.getpid(), MIB)
    (queue,) = device.queues
    assert queue.done > 50
    assert queue.failed == 0
    assert queue.latency.count == queue.done
    assert queue.latency.buckets[-1] == queue.done
    assert queue.bytes_from_guest > 4096 * 20


def test_doorbells_of_a_busy_daemon(control: Path, load: Callable[[], int]) -> None:
    goes_on(load)
    header, row, *_ = hcd("doorbells", "--control", control).stdout.splitlines()
    assert header.split() == ["DEVICE", "QUEUE", "PATH", "SOURCE", "KIND", "ADDRESS", "RINGS", "WAKEUPS", "P50", "P99"]
    assert row.split()[:4] == ["disk0", "0", "direct", "declared"]
    assert int(row.split()[6]) > 0
    assert re.search(r"\d (us|ms|s) +[\d.]+ (us|ms|s)$", row), "it has quantiles"
    listed = json.loads(hcd("doorbells", "--json", "--control", control).stdout)
    assert [(bell["device"], bell["name"]) for bell in listed] == [("disk0", "0"), ("rng0", "0")]
    assert listed[0]["rings"] > 0


def test_top_shows_the_busy_one_first(control: Path, load: Callable[[], int]) -> None:
    goes_on(load)
    lines = hcd("top", "--once", "--interval", "0.2", "--control", control).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2].split() == ["DEVICE", "PATH", "REQ/S", "RINGS/S", "READ/S", "WRITE/S", "INFL", "LOAD", "P99", "ERR"]
    assert lines[3].split()[:2] == ["disk0", "direct"]
    assert re.match(r"[\d.]+k?$", lines[3].split()[2])
    assert lines[4].split()[:3] == ["rng0", "unknown", "-"]


def test_top_into_a_pipe_goes_on_through_a_restart(
    daemon: HcdProcess, control: Path, start_hcd: Start
) -> None:
    """Plain frames, no escape sequences."""
    words = [sys.executable, "-m", "hcd", "top", "--interval", "0.1", "--control", str(control)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as top:
        assert top.stdout is not None

        def until(wanted: str) -> None:
            assert any(wanted in line for line in iter(top.stdout.readline, ""))  # type: ignore[union-attr]

        until("since the start")
        until("; last 0.")
        daemon.stop()
        until("no daemon answers")
        start_hcd(DISK + RNG, daemon=f'[control]\npath = "{control}"')
        until("disk0")
        top.send_signal(signal.SIGINT)
        rest = top.stdout.read()
        assert top.wait(30) == 0
    assert "\x1b" not in rest


def top_on_a_terminal(control: Path, keys: bytes, size: tuple[int, int] = (0, 0)) -> bytes:
    """Start it, see the devices, press ``keys``: it ends and leaves the terminal as it was. What it wrote."""
    import pty
    import termios

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, size)
    before = termios.tcgetattr(theirs)
    words = [sys.executable, "-m", "hcd", "top", "--interval", "60", "--control", str(control)]
    with subprocess.Popen(words, stdin=theirs, stdout=theirs) as top:
        seen = b""
        while b"rng0" not in seen:
            seen += os.read(ours, 4096)
        os.write(ours, keys)
        while b"\x1b[?1049l" not in seen:
            seen += os.read(ours, 4096)
        assert top.wait(30) == 0
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)
    return seen


def test_top_on_a_terminal_ends_with_q_and_leaves_it_as_it_was(daemon: HcdProcess, control: Path) -> None:
    assert b"\x1b[?1049h" in top_on_a_terminal(control, b"xq")


def test_top_has_no_line_that_goes_on_in_the_next_one(daemon: HcdProcess, control: Path) -> None:
    seen = top_on_a_terminal(control, b"q", size=(24, 30))
    lines = re.sub(rb"\x1b\[[?0-9]*[A-Za-z]", b"", seen).split(b"\r\n")
    assert max(len(line.rstrip(b"\r")) for line in lines) == 30


@pytest.mark.parametrize("words", [("status",), ("doorbells", "--json")], ids=" ".join)
def test_output_that_cannot_be_written_is_said(
    daemon: HcdProcess, control: Path, words: tuple[str, ...]
) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "hcd", *words, "--control", str(control)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "hcd: cannot write: No space left on device\n")


# -- nobody there, or not for us


def test_no_daemon_says_which_path_was_tried_and_what_to_do(short_dir: Path) -> None:
    done = hcd("status", "--control", short_dir / "nobody.sock")
    assert done.returncode == 3
    assert done.stdout == ""
    assert f"hcd: no daemon answers at {short_dir}/nobody.sock: there is no such socket" in done.stderr
    assert "[control] path" in done.stderr


def test_without_a_path_the_usual_places_are_tried(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instances are looked for, too."""
    monkeypatch.setattr(settings, "SYSTEM_DIRECTORY", str(short_dir))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_dir / "user"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NoDaemonError) as caught:
        connect(None)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"no daemon answers at {short_dir}/control.sock: there is no such socket"
    assert lines[1] == f"no daemon answers at {short_dir}/user/hcd/control.sock: there is no such socket"
    assert "systemctl start hcd" in lines[2]
    (short_dir / "disk7").mkdir()
    (short_dir / "disk7" / "control.sock").touch()
    with pytest.raises(NoDaemonError, match=r"instances of hcd@.service are here: --control=disk7"):
        connect(None)
    with pytest.raises(NoDaemonError, match=rf"{short_dir}/disk7/control.sock: nobody listens"):
        connect("disk7")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HCD_CONTROL": "/x"}, "/x"),
        ({"HCD_CONTROL": "", "RUNTIME_DIRECTORY": "/run/hcd/disk0"}, ""),
        ({"RUNTIME_DIRECTORY": "/run/hcd/disk0:/run/more"}, "/run/hcd/disk0/control.sock"),
        ({"XDG_RUNTIME_DIR": "/run/user/7"}, "/run/user/7/hcd/control.sock"),
        ({}, "/tmp/hcd-1000/control.sock"),
    ],
)
def test_the_default_place_fits_who_runs_it(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(settings, "SYSTEM_DIRECTORY", "/nowhere/at/all")
    assert settings.default_path(environment) == expected


def test_the_socket_of_a_killed_daemon_is_named_and_taken_over(
    daemon: HcdProcess, control: Path, start_hcd: Start
) -> None:
    daemon.kill()
    done = hcd("status", "--control", control)
    assert done.returncode == 3
    assert "nobody listens there" in done.stderr
    start_hcd(DISK + RNG, daemon=f'[control]\npath = "{control}"')
    assert hcd("status", "--control", control).returncode == 0


def test_the_socket_of_a_living_daemon_is_not_taken(daemon: HcdProcess, control: Path, short_dir: Path) -> None:
    """One that was configured is an error that names who has it; the default place is not worth one."""
    other = short_dir / "other"
    other.mkdir()
    (other / "hcd.toml").write_text(f'[control]\npath = "{control}"\n' + RNG.replace("{dir}", str(other)))
    done = hcd("run", other / "hcd.toml")
    assert done.returncode == 78
    assert f"[control] path: cannot listen on {control}: another process does (pid {daemon.process.pid})" in done.stderr
    (other / "hcd.toml").write_text(RNG.replace("{dir}", str(other)))
    words = [sys.executable, "-m", "hcd", "run", str(other / "hcd.toml")]
    environment = {**os.environ, "HCD_CONTROL": str(control)}
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log = []
        for line in process.stderr:
            log.append(line)
            if "ready" in line:
                break
        process.terminate()
        assert process.wait(30) == 0
    assert "no control socket: " in "".join(log)
    assert hcd("status", "--control", control).returncode == 0, "it is still that of the first one"


def test_who_answers_may_be_somebody_else(short_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_dir / "web"))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            connection.sendall(b"220 welcome\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        done = hcd("status", "--control", short_dir / "web")
        thread.join()
    assert done.returncode == 3
    assert "who answers is not hcd" in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_strangers_may_look_if_the_mode_lets_them_and_change_nothing(
    start_hcd: Start, short_dir: Path, control: Path
) -> None:
    short_dir.chmod(0o755)
    (short_dir / "image").write_bytes(bytes(MIB))
    running = start_hcd(DISK, daemon=f'[control]\npath = "{control}"\nmode = "0666"')
    wait_for(control)
    assert control.stat().st_mode & 0o777 == 0o666
    status, said = hcd_as_stranger("status", "--control", control)
    assert (status, said.splitlines()[1]) == (0, "all is well")
    for words in (["reload"], ["resize", "disk0", "2M"], ["trace", "disk0"]):
        status, said = hcd_as_stranger(*words, "--control", control)
        assert status == 4, said
        assert f"{words[0]} is for root, the account of hcd and the owner of its socket" in said
    assert (short_dir / "image").stat().st_size == MIB
    assert "reload was refused to user id 65534" in running.log_text
    control.chmod(0o600)
    status, said = hcd_as_stranger("status", "--control", control)
    assert status == 4
    assert "permission denied" in said


def test_the_socket_is_for_the_daemons_own_group_by_default(daemon: HcdProcess, control: Path) -> None:
    made = control.stat()
    assert (made.st_mode & 0o777, made.st_uid, made.st_gid) == (0o660, os.geteuid(), os.getegid())


# -- reload


def test_reload_says_what_changed_or_why_not(daemon: HcdProcess, control: Path, short_dir: Path) -> None:
    file = short_dir / "hcd.toml"
    good = file.read_text()
    file.write_text(good.replace('name = "rng0"', 'name = "rng1"').replace("rng0.sock", "rng1.sock"))
    done = hcd("reload", "--control", control)
    assert (done.returncode, done.stdout) == (0, "reloaded: 1 unchanged; added rng1; removed rng0\n")
    file.write_text(good.replace('type = "rng"', 'type = "rgn"'))
    done = hcd("reload", "--control", control)
    assert done.returncode == 1
    assert 'no device type "rgn"' in done.stderr
    status = hcd("status", "--control", control)
    assert status.returncode == 1, "a refused configuration is something that is wrong"
    assert "the last reload, " in status.stdout
    assert "rng1" in status.stdout
    file.write_text(good.replace('mode = "', "").replace("[control]", '[control]\nmode = "0600"'))
    done = hcd("reload", "--control", control)
    assert done.returncode == 0
    assert "[control] has changed; that takes effect at the next restart" in done.stdout
    assert hcd("status", "--control", control).returncode == 0


def test_a_daemon_without_configuration_has_nothing_to_reload(short_dir: Path, control: Path) -> None:
    words = ["device", "rng", f"--socket-path={short_dir}/rng.sock", f"--control={control}"]
    with HcdProcess(words, short_dir / "log", sockets=[short_dir / "rng.sock"]):
        wait_for(control)
        done = hcd("reload", "--control", control)
        assert done.returncode == 1
        assert "no configuration file" in done.stderr
        assert hcd("status", "--control", control).returncode == 0
    assert not control.exists()


# -- resize


@pytest.mark.parametrize("returned", ["None", "'large'", "-1"])
def test_a_size_that_is_none_is_the_devices_error(
    make_distribution: Callable[..., Path], start_hcd: Start, control: Path, monkeypatch: pytest.MonkeyPatch,
    returned: str,
) -> None:
    source = f"""
from hcd.device import Device
class Odd(Device):
    virtio_id = 63
    def process(self, queue): pass
    def storage_size(self): return 512
    def resize(self, size): return {returned}
"""
    site = make_distribution("oddworks", "1.0", {"odd": "odd_device:Odd"}, {"odd_device": source})
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")])))
    daemon = start_hcd(table("odd", "odd"), daemon=f'[control]\npath = "{control}"')
    done = hcd("resize", "odd", "1M", "--control", control)
    said = f"odd: TypeError: resize() returned {returned}; expected the new size in bytes"
    assert (done.returncode, done.stderr) == (1, f"hcd: {said}\n")
    assert daemon.metrics().total("hcd_handler_errors_total", device="odd") == 1
    daemon.kill()  # there is a traceback in its log


def test_a_disk_grows_while_it_is_used(
    control: Path, short_dir: Path, disk: tuple[Frontend, BlockDriver], load: Callable[[], int]
) -> None:
    goes_on(load)
    done = hcd("resize", "disk0", "3M", "--control", control)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"disk0: {3 * MIB} bytes, {MIB} before; the front end is told\n"
    assert (short_dir / "image").stat().st_size == 3 * MIB
    os.truncate(short_dir / "image", 4 * MIB)
    assert "the front end is told" in hcd("resize", "disk0", "--control", control).stdout
    goes_on(load)


def test_the_front_end_sees_the_new_size_and_can_use_it(control: Path, disk: tuple[Frontend, BlockDriver]) -> None:
    frontend, driver = disk
    with Client(str(control)) as client:
        assert client.call("resize", device="disk0", size=2 * MIB)["told"]
    assert frontend.wait_back_message().name == "CONFIG_CHANGE_MSG"
    assert read_config(frontend).capacity == 2 * MIB // 512
    driver.write(2 * MIB // 512 - 8, b"end." * 1024)
    assert driver.read(2 * MIB // 512 - 8, 4096) == b"end." * 1024


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["disk0", "4096"], "a disk does not shrink while it is served"),
        (["disk0", "1048577"], "no multiple of its blocks of 512"),
        (["rng0"], "no storage that can grow"),
        (["disk9"], 'there is no device "disk9"; expected one of disk0, rng0'),
    ],
)
def test_what_cannot_grow_says_why(
    daemon: HcdProcess, control: Path, short_dir: Path, words: list[str], reason: str
) -> None:
    done = hcd("resize", *words, "--control", control)
    assert done.returncode == 1
    assert reason in done.stderr
    assert (short_dir / "image").stat().st_size == MIB


def test_an_image_that_was_cut_short_is_not_made_official(daemon: HcdProcess, control: Path, short_dir: Path) -> None:
    os.truncate(short_dir / "image", 512)
    done = hcd("resize", "disk0", "--control", control)
    assert done.returncode == 1
    assert "512 bytes are fewer than the 1048576 that the guest sees" in done.stderr


def test_memory_grows_too(start_hcd: Start, short_dir: Path, control: Path) -> None:
    start_hcd(table("disk0", "blk", 'path = "direct"', ram=MIB), daemon=f'[control]\npath = "{control}"')
    with Frontend.open(short_dir / "disk0.sock") as frontend:
        driver = BlockDriver(frontend.memory, frontend.queues[0])
        driver.write(8, b"kept" * 128)
        done = hcd("resize", "disk0", "64M", "--control", control)
        assert "the front end cannot be told" in done.stdout, "it opened no back channel"
        assert driver.read(8, 512) == b"kept" * 128
        driver.write((64 * MIB - 512) // 512, b"last" * 128)
        assert driver.read((64 * MIB - 512) // 512, 512) == b"last" * 128


# -- trace


class Tracer:
    """``hcd trace --json`` of a device, read line by line."""

    def __init__(self, control: Path, device: str, *words: str) -> None:
        command = [sys.executable, "-m", "hcd", "trace", device, "--json", "--control", str(control), *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.lines = self.process.stdout
        assert self.read()["what"] == "tracing"

    def read(self) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(self.lines.readline())
        return event

    def until(self, what: str, **fields: Any) -> dict[str, Any]:
        while True:
            event = self.read()
            if event["what"] == what and fields.items() <= event.items():
                return event

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.lines.close()
        self.process.wait(30)


@pytest.fixture
def trace(control: Path) -> Iterator[Callable[..., Tracer]]:
    made: list[Tracer] = []

    def start(*words: str) -> Tracer:
        made.append(Tracer(control, *words))
        return made[-1]

    yield start
    for tracer in made:
        tracer.close()


def test_trace_shows_a_front_end_from_its_first_message_to_its_last(
    daemon: HcdProcess, short_dir: Path, trace: Callable[..., Tracer]
) -> None:
    """What is in a request is never shown."""
    tracer = trace("disk0")
    with Frontend.open(short_dir / "disk0.sock") as frontend:
        frontend.open_back_channel()
        driver = BlockDriver(frontend.memory, frontend.queues[0])
        driver.write(16, b"secret!!" * 64)
        driver.read(16, 512)
        frontend.config(0, 8)
    seen = []
    while not seen or seen[-1]["what"] != "disconnected":
        seen.append(tracer.read())
    assert seen[0]["what"] == "connected"
    assert seen[0]["pid"] == os.getpid()
    texts = [event["text"] for event in seen if event["what"] == "message"]
    assert texts[0] == "GET_FEATURES"
    assert re.match(r"GET_FEATURES 0x[0-9a-f]+ \(.*EVENT_IDX.*VERSION_1.*\)$", texts[1])
    assert any(re.match(r"ADD_MEM_REG region=\{guest_addr=0x\S+ size=\d+ .* fds=1 need_reply$", text) for text in texts)
    assert "SET_VRING_NUM index=0 num=128 need_reply" in texts
    assert "SET_VRING_NUM ok" in texts
    assert any(re.match(r"SET_VRING_KICK index=0 fds=1", text) for text in texts)
    assert "SET_BACKEND_REQ_FD fds=1 need_reply" in texts
    assert any(re.match(r"GET_CONFIG offset=0 size=8 flags=0 data=<8 bytes>$", text) for text in texts)
    requests = [event["text"] for event in seen if event["what"] == "request"]
    assert requests == ["write sector 16, 512 bytes", "read sector 16, 512 bytes"]
    ends = [(event["op"], event["status"], event["written"]) for event in seen if event["what"] == "done"]
    assert ends == [("write", "ok", 1), ("read", "ok", 513)]
    assert "secret" not in json.dumps(seen)


def test_trace_begins_and_ends_while_requests_are_in_flight(
    load: Callable[[], int], trace: Callable[..., Tracer], control: Path
) -> None:
    for _ in range(5):
        tracer = trace("disk0")
        tracer.until("request")
        tracer.until("done", op="write", status="ok")
        tracer.close()
        goes_on(load)


def test_trace_shows_a_limited_number_of_requests_and_counts_the_others(
    load: Callable[[], int], trace: Callable[..., Tracer]
) -> None:
    tracer = trace("disk0", "--rate", "10")
    first = tracer.until("request")["number"]
    assert tracer.until("lost")["lines"] > 0
    later = tracer.until("request")["number"]
    assert later > first, "numbers go on while lines are dropped"


def test_a_reader_that_reads_nothing_holds_up_nobody(
    load: Callable[[], int], control: Path, daemon: HcdProcess
) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(str(control))
        sock.sendall(b'{"call": "trace", "device": "disk0", "rate": 100000}\n')
        for _ in range(20):
            goes_on(load)
        sock.settimeout(30)
        lines = sock.makefile("rb")
        lost = next(event for line in lines if (event := json.loads(line).get("event", {})).get("what") == "lost")
    assert lost["lines"] > 0
    goes_on(load)


def test_a_trace_ends_with_the_reader_of_its_output(daemon: HcdProcess, control: Path) -> None:
    """``hcd trace disk0 | head -1``, and nothing more happens."""
    words = [sys.executable, "-m", "hcd", "trace", "disk0", "--control", str(control)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "tracing disk0" in process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 0
        assert process.stderr.read() == ""


def test_resizing_is_seen_on_the_back_channel(
    control: Path, disk: tuple[Frontend, BlockDriver], trace: Callable[..., Tracer]
) -> None:
    tracer = trace("disk0")
    assert hcd("resize", "disk0", "2M", "--control", control).returncode == 0
    assert tracer.until("message", direction="back")["text"] == "CONFIG_CHANGE_MSG"


# -- clients that mean no good


def test_any_client_is_answered_line_by_line_even_if_it_closed_its_half(daemon: HcdProcess, control: Path) -> None:
    greeting, *answers = ask(control, b'\n{"call": "snapshot", "id": 7}\nnonsense\n{"call": "explode"}\n')
    assert greeting["protocol"] == 1
    assert [next(iter(answer)) for answer in answers] == ["result", "error", "error"]
    assert answers[0]["id"] == 7
    assert [answer["error"]["kind"] for answer in answers[1:]] == ["request", "unknown"]
    assert from_json(answers[0]["result"]).pid == daemon.process.pid


def test_a_line_without_end_is_refused_and_the_connection_ends(daemon: HcdProcess, control: Path) -> None:
    _, answer = ask(control, b"x" * (1 << 20))
    assert "a line of more than 4096 bytes" in answer["error"]["text"]


def test_nothing_that_clients_do_hurts(daemon: HcdProcess, control: Path, load: Callable[[], int]) -> None:
    goes_on(load)
    before = connections(daemon)
    pieces = [b"", b"\0" * 100, b'{"call"', b'{"call": "snapshot"}\n' * 50, b"\xff" * 5000, b"[" * 4000 + b"\n"]
    for turn in range(60):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(control))
            with contextlib.suppress(BrokenPipeError):
                sock.sendall(pieces[turn % len(pieces)])
            if turn % 3 == 0:
                sock.shutdown(socket.SHUT_WR)
            if turn % 4 == 0:
                sock.recv(10)
        if turn % 20 == 0:
            goes_on(load)
    assert hcd("status", "--control", control).returncode == 0
    deadline = time.monotonic() + 20
    while connections(daemon) > before:
        assert time.monotonic() < deadline, daemon.resources().fds
        time.sleep(0.01)


def connections(daemon: HcdProcess) -> int:
    """Open sockets; the disk starts threads as it likes."""
    return sum(target.startswith("socket:") for target in daemon.resources().fds.values())


def test_one_user_has_so_many_connections_and_no_more(daemon: HcdProcess, control: Path) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS_OF_USER):
            stack.enter_context(Client(str(control)))
        with pytest.raises(NoDaemonError, match="too many connections"):
            Client(str(control))
        with pytest.raises(NoDaemonError, match=rf"\A{control}: too many connections to the control socket\Z"):
            connect(str(control))
    wait_for(control)
    assert "too many connections: pid" in daemon.log_text


def test_descriptors_that_a_client_sends_are_not_kept(
    daemon: HcdProcess, control: Path, expect_settled: Callable[[HcdProcess, Resources], None]
) -> None:
    before = daemon.resources()
    with socket.socket(socket.AF_UNIX) as sock, open("/dev/null", "rb") as file:
        sock.settimeout(30)
        sock.connect(str(control))
        socket.send_fds(sock, [b'{"call": "snapshot"}\n'], [file.fileno()] * 50)
        with sock.makefile("rb") as lines:    # the socket is closed when both are
            assert b"protocol" in lines.readline()
            assert b"result" in lines.readline()
            while_open = daemon.resources()
        assert not [target for target in while_open.fds.values() if target == "/dev/null"][1:]
    expect_settled(daemon, before)


# -- a daemon in trouble


def test_a_stuck_handler_is_what_status_says_first(
    make_distribution: Callable[..., Path], short_dir: Path, control: Path
) -> None:
    from lamps import SOURCE

    site = make_distribution("lampworks", "3.1", {"lamp": "lamp_service:Lamp"}, {"lamp_service": SOURCE})
    fifo = short_dir / "fifo"
    os.mkfifo(fifo)
    file = Path(write(short_dir, options=f'block = "{fifo}"'))
    file.write_text(f'[control]\npath = "{control}"\n' + file.read_text())
    process = Process(site, ("run", str(file)))
    try:
        process.until("ready")
        done = hcd("status", "--control", control)
        assert done.returncode == 1
        assert done.stdout.splitlines()[2].strip().startswith("the thread that serves the rings does not answer")
        with Client(str(control)) as client, pytest.raises(CallError, match="does not answer"):
            client.call("resize", device="desk")
        fifo.write_text("go on")
        while (done := hcd("status", "--control", control)).returncode:
            assert "does not answer" in done.stdout
        assert process.end(signal.SIGTERM)[0] == 0
    finally:
        process.stop()
        process.popen.communicate()
