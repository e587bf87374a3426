"""The notify protocol and inherited sockets, against real sockets."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hcd.errors import ConfigError
from hcd.systemd import Inherited, Notifier, take_listen_fds, take_watchdog


class Manager:
    """The manager's end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(30)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def heard(self) -> list[str]:
        return self.socket.recv(4096).decode().split("\n")


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, short_dir: Path) -> Iterator[Manager]:
    abstract = f"@hcd-test/{os.getpid()}/{secrets.token_hex(4)}"
    made = Manager(abstract if request.param == "abstract" else str(short_dir / "notify"))
    with made.socket:
        yield made


@pytest.fixture
def notifier(manager: Manager, no_leaks: None) -> Iterator[Notifier]:
    made = Notifier(manager.address)
    yield made
    made.close()


def test_readiness_comes_with_a_status_of_one_line(manager: Manager, notifier: Notifier) -> None:
    notifier.ready("two devices\nREADY=0")
    assert manager.heard() == ["READY=1", "STATUS=two devices READY=0"]


def test_each_message_is_one_datagram(manager: Manager, notifier: Notifier) -> None:
    notifier.status("busy")
    notifier.watchdog()
    notifier.extend_timeout(1.5)
    notifier.stopping()
    heard = [manager.heard() for _ in range(4)]
    assert heard == [["STATUS=busy"], ["WATCHDOG=1"], ["EXTEND_TIMEOUT_USEC=1500000"], ["STOPPING=1"]]


def test_a_reload_tells_when_it_began(manager: Manager, notifier: Notifier) -> None:
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    first, second = manager.heard()
    assert first == "RELOADING=1"
    key, _, when = second.partition("=")
    assert key == "MONOTONIC_USEC"
    assert before <= int(when) <= time.monotonic_ns() // 1000


def test_the_address_is_taken_out_of_the_environment(manager: Manager) -> None:
    environment = {"NOTIFY_SOCKET": manager.address, "HOME": "/"}
    notifier = Notifier.take(environment)
    assert environment == {"HOME": "/"}
    assert notifier
    notifier.close()
    assert not notifier


def test_without_a_manager_nothing_is_sent() -> None:
    notifier = Notifier.take({})
    assert not notifier
    notifier.ready("nobody hears it")
    notifier.close()


def test_a_manager_that_is_gone_is_mentioned_once(short_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier(str(short_dir / "none"))
    with caplog.at_level(logging.WARNING):
        notifier.watchdog()
        notifier.watchdog()
    assert [record.getMessage() for record in caplog.records] == [
        "the service manager cannot be told WATCHDOG=1: No such file or directory"
    ]
    notifier.close()


def test_a_manager_whose_queue_is_full_holds_nobody_up(short_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager = Manager(str(short_dir / "notify"))
    notifier = Notifier(manager.address)
    with manager.socket, caplog.at_level(logging.WARNING):
        for _ in range(5000):  # more than any queue holds; nobody reads
            notifier.watchdog()
        assert "cannot be told" in caplog.text
    notifier.close()


def test_an_address_of_another_kind_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    assert not Notifier("vsock:2:1234")
    assert '"vsock:2:1234"' in caplog.text


# -- watchdog


def test_the_watchdog_period_is_in_seconds_and_is_taken_out() -> None:
    environment = {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}
    assert take_watchdog(environment) == 30.0
    assert environment == {}


@pytest.mark.parametrize("environment", [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "x"}])
def test_no_watchdog_is_wanted(environment: dict[str, str]) -> None:
    assert take_watchdog(environment) is None


def test_the_watchdog_of_another_process_is_not_ours() -> None:
    assert take_watchdog({"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}) is None


# -- inherited sockets

READ = """
import os, sys
os.environ["LISTEN_PID"] = os.environ["LISTEN_PID"] or str(os.getpid())
from hcd.systemd import take_listen_fds
print([(one.fd, one.name) for one in take_listen_fds()])
print([os.get_inheritable(fd) for fd in (3, 4)], [key for key in os.environ if key.startswith("LISTEN")])
"""


def read_in_child(pid: str, count: str, names: str | None) -> list[str]:
    """What a process finds that was started with two sockets at 3 and 4."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LISTEN_PID": pid, "LISTEN_FDS": count}
    if names is not None:
        environment["LISTEN_FDNAMES"] = names
    ours, theirs = socket.socketpair()
    with ours, theirs:
        shell = f'exec 3<&{ours.fileno()} 4<&{theirs.fileno()}; exec "$@"'
        done = subprocess.run(
            ["bash", "-c", shell, "sh", sys.executable, "-c", READ],
            env=environment, pass_fds=(ours.fileno(), theirs.fileno()), capture_output=True, text=True, timeout=60,
        )
    assert done.returncode == 0 or "ConfigError" in done.stderr, done.stderr
    return (done.stdout + done.stderr).splitlines()


def test_sockets_are_taken_with_their_names_and_not_passed_on() -> None:
    assert read_in_child("", "2", "disk0:metrics") == ["[(3, 'disk0'), (4, 'metrics')]", "[False, False] []"]


@pytest.mark.parametrize("names", [None, "hcd@disk0.socket:unknown"])
def test_a_name_that_the_unit_did_not_give_is_none(names: str | None) -> None:
    assert read_in_child("", "2", names)[0] == "[(3, ''), (4, '')]"


def test_sockets_that_are_for_another_process_are_left_alone() -> None:
    assert read_in_child("1", "2", "a:b") == ["[]", "[True, True] []"]


@pytest.mark.parametrize(
    ("count", "names", "expected"),
    [
        ("many", None, 'LISTEN_FDS: expected a number of descriptors, found "many"'),
        ("2", "a", "LISTEN_FDNAMES has 1 names for 2 descriptors"),
        ("40", None, "is not open"),
    ],
)
def test_nonsense_is_the_operators_to_fix(count: str, names: str | None, expected: str) -> None:
    assert expected in read_in_child("", count, names)[-1]


def test_no_sockets_without_a_manager() -> None:
    environment: dict[str, str] = {}
    assert take_listen_fds(environment) == []
    with pytest.raises(ConfigError):
        take_listen_fds({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "-1"})


def test_a_socket_is_called_by_number_and_name() -> None:
    assert str(Inherited(3, "disk0")) == 'file descriptor 3 ("disk0")'
    assert str(Inherited(3, "")) == "file descriptor 3"
