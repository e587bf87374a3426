"""The daemon as a process: how it starts, whom it serves, and how it ends."""

from __future__ import annotations

import contextlib
import signal
import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from lamps import SOURCE, Process, hung_up, served, write
from prometheus_client.parser import text_string_to_metric_families

from hcd import supervisor

Start = Callable[..., Process]


@pytest.fixture
def start(make_distribution: Callable[..., Path]) -> Iterator[Start]:
    """Starts hcd with the type "lamp"; what still runs at the end of the test is killed."""
    site = make_distribution("lampworks", "3.1", {"lamp": "lamp_daemon:Lamp"}, {"lamp_daemon": SOURCE})
    with contextlib.ExitStack() as stack:

        def started(*arguments: str, fds: tuple[int, ...] = ()) -> Process:
            process = Process(site, arguments, fds)
            stack.enter_context(process.popen)
            stack.callback(process.stop)
            return process

        yield started


@pytest.fixture
def connect() -> Iterator[Callable[[Path], socket.socket]]:
    with contextlib.ExitStack() as stack:

        def connected(path: Path) -> socket.socket:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(30)
            client.connect(str(path))
            return client

        yield connected


Connect = Callable[[Path], socket.socket]


# -- start and end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(start: Start, tmp_path: Path, number: int) -> None:
    hcd = start("run", write(tmp_path, names=("desk", "floor")))
    assert hcd.until("ready: .*") == "ready: desk, floor"
    assert (tmp_path / "desk.sock").is_socket()
    status, log = hcd.end(number)
    assert status == 0, log
    assert "Traceback" not in log
    assert log.count(": off") == 2
    assert not list(tmp_path.glob("*.sock"))


def test_a_signal_ends_it_while_front_ends_are_connected(start: Start, connect: Connect, tmp_path: Path) -> None:
    hcd = start("run", write(tmp_path))
    hcd.until("ready")
    client = connect(tmp_path / "desk.sock")
    assert served(client)
    status, log = hcd.end(signal.SIGTERM)
    assert status == 0, log
    assert "Traceback" not in log
    assert hung_up(client)


def test_it_starts_again_after_it_was_killed(start: Start, connect: Connect, tmp_path: Path) -> None:
    first = start("run", write(tmp_path))
    first.until("ready")
    assert first.end(signal.SIGKILL)[0] == -signal.SIGKILL
    assert (tmp_path / "desk.sock").is_socket()
    second = start("run", write(tmp_path))
    second.until("ready")
    assert served(connect(tmp_path / "desk.sock"))
    assert second.end(signal.SIGTERM)[0] == 0


def test_a_socket_in_use_is_left_to_its_owner(start: Start, connect: Connect, tmp_path: Path) -> None:
    first = start("run", write(tmp_path))
    first.until("ready")
    status, log = start("run", write(tmp_path)).end()
    assert status == 78
    assert f"hcd: cannot listen on {tmp_path}/desk.sock: another process does" in log
    assert served(connect(tmp_path / "desk.sock"))
    assert first.end(signal.SIGTERM)[0] == 0


@pytest.mark.parametrize(
    ("fault", "status", "expected"),
    [
        ("operator", 78, 'hcd: device "desk" (lamp): no bulb\n'),
        ("system", 78, 'hcd: device "desk" (lamp): [Errno 2] No such file or directory'),
        ("defect", 1, "hcd: device \"desk\" (lamp), of lampworks 3.1: open() raised KeyError: 'bulb'\n"),
    ],
)
def test_a_device_that_does_not_open_ends_the_start(
    start: Start, tmp_path: Path, fault: str, status: int, expected: str
) -> None:
    ended, log = start("run", write(tmp_path, options=f'fault = "{fault}"')).end()
    assert ended == status
    assert expected in log
    assert "ExceptionGroup" not in log
    assert not list(tmp_path.glob("*.sock"))


def test_what_was_opened_before_the_failure_is_closed(start: Start, tmp_path: Path) -> None:
    file = write(tmp_path, names=("desk", "floor"))
    (tmp_path / "floor.sock").write_text("in the way")
    status, log = start("run", file).end()
    assert status == 78
    assert "it exists and is not a socket" in log
    assert log.count(": off") == 2
    assert not (tmp_path / "desk.sock").exists()


# -- front ends


def test_front_ends_come_one_after_the_other(start: Start, connect: Connect, tmp_path: Path) -> None:
    hcd = start("device", "lamp", f"--socket-path={tmp_path}/desk.sock")
    hcd.until("ready")
    inode = (tmp_path / "desk.sock").stat().st_ino
    for _ in range(3):
        with connect(tmp_path / "desk.sock") as client:
            assert served(client)
    assert (tmp_path / "desk.sock").stat().st_ino == inode
    assert hcd.end(signal.SIGTERM)[0] == 0


def test_a_second_front_end_is_refused_while_the_first_is_there(start: Start, connect: Connect, tmp_path: Path) -> None:
    hcd = start("device", "lamp", f"--socket-path={tmp_path}/desk.sock")
    hcd.until("ready")
    first = connect(tmp_path / "desk.sock")
    assert served(first)
    assert not served(connect(tmp_path / "desk.sock"))
    assert served(first)
    first.close()
    assert served(connect(tmp_path / "desk.sock"))
    assert hcd.end(signal.SIGTERM)[0] == 0


def test_devices_of_one_process_are_served_beside_each_other(start: Start, connect: Connect, tmp_path: Path) -> None:
    hcd = start("run", write(tmp_path, names=("desk", "floor")))
    hcd.until("ready")
    desk, floor = connect(tmp_path / "desk.sock"), connect(tmp_path / "floor.sock")
    desk.sendall(b"\xff" * 12)
    assert hung_up(desk)
    assert served(floor)
    assert served(connect(tmp_path / "desk.sock"))
    assert hcd.end(signal.SIGTERM)[0] == 0


def test_it_ends_with_its_front_end_when_told_so(start: Start, connect: Connect, tmp_path: Path) -> None:
    hcd = start("device", "lamp", f"--socket-path={tmp_path}/desk.sock", "--exit-on-disconnect")
    hcd.until("ready")
    with connect(tmp_path / "desk.sock") as client:
        assert served(client)
    status, log = hcd.end()
    assert status == 0, log
    assert not (tmp_path / "desk.sock").exists()


# -- inherited sockets


def test_an_inherited_listening_socket_serves_on_and_is_not_unlinked(
    start: Start, connect: Connect, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "desk.sock"))
        listening.listen()
        hcd = start("device", "lamp", f"--fd={listening.fileno()}", fds=(listening.fileno(),))
        hcd.until("ready")
        for _ in range(2):
            with connect(tmp_path / "desk.sock") as client:
                assert served(client)
        assert hcd.end(signal.SIGTERM)[0] == 0
        assert (tmp_path / "desk.sock").is_socket()
        connect(tmp_path / "desk.sock")  # it still listens, for the next process that shares it


def test_an_inherited_connection_is_served_once(start: Start) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            hcd = start("device", "lamp", f"--fd={theirs.fileno()}", fds=(theirs.fileno(),))
        ours.settimeout(30)
        assert served(ours)
    status, log = hcd.end()
    assert status == 0, log
    assert "Traceback" not in log


def test_a_descriptor_that_was_not_inherited_is_refused(start: Start) -> None:
    status, log = start("device", "lamp", "--fd=77").end()
    assert (status, log) == (1, "hcd: file descriptor 77 is not open\n")


# -- defects


async def test_what_fails_unexpectedly_is_logged_and_tried_again(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    outcomes = iter([RuntimeError("a defect"), ExceptionGroup("two", [OSError(), KeyError()]), None])

    async def serve() -> None:
        outcome = next(outcomes)
        if outcome is not None:
            raise outcome

    await supervisor.keep_up("desk", serve)
    assert next(outcomes, "none left") == "none left"
    assert caplog.text.count("desk: serving failed; trying again") == 2


# -- metrics


def families(text: str) -> set[str]:
    return {family.name for family in text_string_to_metric_families(text)}


def test_metrics_are_served_on_tcp(start: Start, tmp_path: Path) -> None:
    hcd = start("run", write(tmp_path, 'metrics = "127.0.0.1:0"'))
    url = hcd.until(r"http://127\.0\.0\.1:[0-9]+/metrics")
    hcd.until("ready")
    with urllib.request.urlopen(url, timeout=30) as response:
        text = response.read().decode()
    assert {"hcd_doorbell_info", "hcd_doorbell_rings", "process_cpu_seconds"} <= families(text)
    assert 'hcd_connected{device="desk"} 0\n' in text
    assert hcd.end(signal.SIGTERM)[0] == 0


def test_metrics_are_served_on_a_unix_socket(start: Start, connect: Connect, tmp_path: Path) -> None:
    hcd = start("run", write(tmp_path, f'metrics = "unix:{tmp_path}/metrics.sock"'))
    hcd.until("ready")
    client = connect(tmp_path / "metrics.sock")
    client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    with client.makefile("rb") as stream:
        head, _, body = stream.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert "hcd_build_info" in families(body.decode())
    assert hcd.end(signal.SIGTERM)[0] == 0
    assert not (tmp_path / "metrics.sock").exists()


def test_an_address_in_use_ends_the_start(start: Start, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, log = start("run", write(tmp_path, f'metrics = "127.0.0.1:{port}"')).end()
    assert status == 78
    assert f"cannot serve metrics on 127.0.0.1:{port}: " in log
    assert "ready:" not in log


def test_a_host_that_is_none_ends_the_start(start: Start, tmp_path: Path) -> None:
    host = "x" * 70  # longer than a label may be: refused without asking anybody
    status, log = start("run", write(tmp_path, f'metrics = "{host}:9847"')).end()
    assert status == 78
    assert f"cannot serve metrics on {host}:9847: " in log
    assert "Traceback" not in log
