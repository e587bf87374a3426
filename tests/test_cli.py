"""The command line: what it understands, what it refuses, and QEMU's conventions for back-end programs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hcd import cli
from hcd.config import Address, DaemonConfig
from hcd.doorbell import Path as BellPath
from hcd.errors import ConfigError
from hcd.version import VERSION

Make = Callable[..., Path]

SOURCE = """
from hcd.device import ConfigError, Device, Option

class Lamp(Device):
    description = "a lamp"
    vhost_user_type = "input"
    vhost_user_features = ("dimmer", "no-grab")
    options = (
        Option("bulb-file", "path", "where the bulb is (100% bright)"),
        Option("watts", "int", "how bright", default=40, minimum=1, maximum=100),
        Option("colour", "str", "its colour", default="white", choices=("white", "red")),
        Option("read-only", "bool", "cannot be switched", default=False),
        Option("store", "size", "how much light"),
    )
    def __init__(self, name, options):
        super().__init__(name, options)
        if options["watts"] == 13:
            raise ConfigError("13 watts bring bad luck")
    def process(self, queue): pass
"""


@pytest.fixture(autouse=True)
def site(make_distribution: Make) -> Path:
    """Every test has the type "lamp"."""
    return make_distribution("lampworks", "3.1", {"lamp": "lamp_cli:Lamp"}, {"lamp_cli": SOURCE})


class Served(list[tuple[DaemonConfig, socket.socket | None, bool]]):
    """What the daemon would have been started with."""

    @property
    def spec(self) -> Any:
        ((config, _, _),) = self
        (spec,) = config.devices
        return spec


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    calls = Served()

    def run(
        config: DaemonConfig,
        *,
        inherited: socket.socket | None = None,
        exit_on_disconnect: bool = False,
        load: Callable[[], DaemonConfig] | None = None,
    ) -> None:
        assert load is None or load() == config
        calls.append((config, inherited, exit_on_disconnect))

    monkeypatch.setattr("hcd.daemon.run", run)
    return calls


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run_command(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_command


Run = Callable[..., tuple[int, str, str]]


def write(tmp_path: Path, extra: str = "") -> str:
    file = tmp_path / "hcd.toml"
    file.write_text(f'[[device]]\nname = "desk"\ntype = "lamp"\nsocket = "/run/desk.sock"\n{extra}')
    return str(file)


# -- the simple commands


def test_version_is_told(run: Run) -> None:
    assert run("--version") == (0, f"hcd {VERSION}\n", "")


@pytest.mark.parametrize("arguments", ["devices", "--help", "device rng --help", "device rng --print-capabilities",
                                       "qemu-args CONFIG --accel kvm --qemu-version 8.2"])
def test_output_that_cannot_be_written_is_said_by_every_command(arguments: str, tmp_path: Path) -> None:
    (tmp_path / "hcd.toml").write_text('[[device]]\nname = "rng0"\ntype = "rng"\nsocket = "/run/rng.sock"\n')
    words = arguments.replace("CONFIG", f"{tmp_path}/hcd.toml").split()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hcd", *words], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
            env=environment,
        )
    assert (done.returncode, done.stderr) == (1, "hcd: cannot write: No space left on device\n")


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_output_that_was_closed_is_not_missed(closed: str) -> None:
    """As some starters of daemons do. Nothing that hcd opens takes its place."""
    command = f'exec "{sys.executable}" -m hcd devices {closed}'
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_devices_lists_types_with_their_options(run: Run) -> None:
    status, out, _ = run("devices")
    assert status == 0
    assert "lamp: a lamp\n" in out
    assert "--watts=INT" in out
    assert "--colour=white|red" in out
    assert "--read-only" in out
    assert "how bright (default 40)" in out


def test_devices_lists_the_others_when_one_is_broken(run: Run, make_distribution: Make) -> None:
    make_distribution("darkworks", "0.2", {"dark": "nowhere_at_all:X"})
    status, out, err = run("devices")
    assert status == 1
    assert "lamp: a lamp" in out
    assert "darkworks 0.2" in err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("fly",),
        ("run", "a", "b"),
        ("run", "--log-level=loud"),
        ("check",),
        ("devices", "x"),
        ("device",),
        ("device", "--fd=3"),
        ("device", "--print-capabilities"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(run: Run, arguments: tuple[str, ...]) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("hcd: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("device", "--help")])
def test_help_is_there(run: Run, arguments: tuple[str, ...]) -> None:
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    assert out.startswith("usage: hcd")


def test_help_of_a_type_has_its_options(run: Run) -> None:
    status, out, _ = run("device", "lamp", "--help")
    assert status == 0
    assert "--socket-path" in out
    assert "--bulb-file" in out
    assert "100% bright" in out


# -- check and run


def test_check_accepts_a_good_configuration(run: Run, tmp_path: Path) -> None:
    file = write(tmp_path)
    assert run("check", file) == (0, f"{file}: ok, 1 device\n", "")


def test_check_prints_each_problem_on_a_line_and_ends_with_78(run: Run, tmp_path: Path) -> None:
    file = write(tmp_path, 'path = "isa"\n[device.options]\nwatts = 0\n')
    status, out, err = run("check", file)
    assert (status, out) == (78, "")
    lines = err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f'hcd: {file}: [[device]] "desk" ') for line in lines)


def test_check_tells_what_only_the_type_knows(run: Run, tmp_path: Path) -> None:
    file = write(tmp_path, "[device.options]\nwatts = 13\n")
    status, _, err = run("check", file)
    assert status == 78
    assert err == f'hcd: {file}: [[device]] "desk" options: 13 watts bring bad luck\n'


def test_run_serves_a_configuration(run: Run, tmp_path: Path, served: Served) -> None:
    assert run("run", write(tmp_path))[0] == 0
    assert served.spec.name == "desk"
    assert served[0][1:] == (None, False)


def test_run_looks_in_etc_by_default(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "DEFAULT_CONFIG", str(tmp_path / "absent.toml"))
    status, _, err = run("run")
    assert status == 78
    assert "absent.toml: cannot be read" in err


def test_run_ends_with_78_when_something_cannot_be_opened(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConfigError("cannot listen on /run/desk.sock: another process does")

    monkeypatch.setattr("hcd.daemon.run", refuse)
    status, _, err = run("run", write(tmp_path))
    assert (status, err) == (78, "hcd: cannot listen on /run/desk.sock: another process does\n")


# -- one device


def test_a_device_takes_its_options_from_the_command_line(run: Run, served: Served) -> None:
    arguments = "--socket-path=/run/l.sock --bulb-file=/b --watts 60 --colour=red --read-only --store=2K"
    more = "--name=desk --path=pio --bus=pci --qmp=unix:/run/qmp --metrics=[::1]:0 --poll-us=0"
    last = ("--drain-timeout=1.5", "--exit-on-disconnect")
    status, _, err = run("device", "lamp", *arguments.split(), *more.split(), *last)
    assert (status, err) == (0, "")
    ((config, inherited, exit_on_disconnect),) = served
    assert (inherited, exit_on_disconnect) == (None, True)
    assert (config.metrics, config.poll_us, config.drain_timeout) == (Address("::1", 0), 0, 1.5)
    spec = served.spec
    assert (spec.name, spec.type, spec.socket) == ("desk", "lamp", "/run/l.sock")
    assert (spec.path, spec.bus, spec.qmp) == (BellPath.PIO, "pci", "/run/qmp")
    assert spec.options == {
        "bulb_file": "/b",
        "watts": 60,
        "colour": "red",
        "read_only": True,
        "store": 2048,
    }


def test_a_device_has_defaults(run: Run, served: Served) -> None:
    assert run("device", "lamp", "--socket-path=/run/l.sock", "--path=auto")[0] == 0
    spec = served.spec
    assert (spec.name, spec.path, spec.bus, spec.qmp) == ("lamp", None, None, None)
    assert spec.options == {
        "bulb_file": None,
        "watts": 40,
        "colour": "white",
        "read_only": False,
        "store": None,
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "one of the arguments --socket-path --fd is required"),
        (("--socket-path=/x", "--fd=3"), "not allowed with"),
        (("--socket-path=",), "expected the path of a unix socket"),
        (("--socket-path=/" + "x" * 108,), "at most 107 bytes"),
        (("--fd=stdin",), "expected the number of an inherited file descriptor"),
        (("--fd=-1",), "expected the number of an inherited file descriptor"),
        (("--socket-path=/x", "--watts=0"), "argument --watts: expected an integer from 1 to 100"),
        (("--socket-path=/x", "--watts"), "expected one argument"),
        (("--socket-path=/x", "--colour=blue"), "expected one of white, red"),
        (("--socket-path=/x", "--read-only=maybe"), "expected true or false"),
        (("--socket-path=/x", "--store=many"), "expected a size"),
        (("--socket-path=/x", "--wats=1"), "unrecognized arguments: --wats=1"),
        (("--socket-path=/x", "--wat=1"), "unrecognized arguments"),
        (("--socket-path=/x", "extra"), "unrecognized arguments: extra"),
        (("--socket-path=/x", "--path=isa"), "argument --path: expected"),
        (("--socket-path=/x", "--bus=isa"), "argument --bus: expected one of pci, mmio, ccw"),
        (("--socket-path=/x", "--name=a b"), "argument --name: expected"),
        (("--socket-path=/x", "--metrics=9847"), "argument --metrics: expected"),
        (("--socket-path=/x", "--poll-us=-1"), "argument --poll-us: expected"),
        (("--socket-path=/x", "--drain-timeout=soon"), "argument --drain-timeout: expected"),
    ],
)
def test_a_wrong_option_is_one_line_and_status_2(
    run: Run, served: Served, arguments: tuple[str, ...], expected: str
) -> None:
    status, out, err = run("device", "lamp", *arguments)
    assert (status, out, len(served)) == (2, "", 0)
    assert expected in err
    assert err.count("\n") == 1


def test_an_unknown_type_is_one_line_and_status_1(run: Run) -> None:
    status, _, err = run("device", "lam", "--socket-path=/x")
    assert status == 1
    assert err.count("\n") == 1
    assert 'no device type "lam"' in err


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "inherited.sock"))
        sock.listen()
        yield sock


def give(sock: socket.socket) -> int:
    """A duplicate, as an inherited descriptor that hcd owns."""
    return os.dup(sock.fileno())


def test_fd_may_be_a_listening_socket(run: Run, served: Served, listening: socket.socket) -> None:
    fd = give(listening)
    assert run("device", "lamp", f"--fd={fd}")[0] == 0
    inherited = served[0][1]
    assert inherited is not None
    with inherited:
        assert inherited.fileno() == fd
        assert not inherited.get_inheritable()
        assert served.spec.socket == listening.getsockname()


def test_fd_may_be_a_connected_socket(run: Run, served: Served) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert run("device", "lamp", f"--fd={give(ours)}")[0] == 0
    inherited = served[0][1]
    assert inherited is not None
    inherited.close()
    assert served.spec.socket == ""


def wrong_descriptors(tmp_path: Path) -> Iterator[tuple[str, int, str]]:
    closed = os.open("/dev/null", os.O_RDONLY)
    os.close(closed)
    yield "closed", closed, "is not open"
    yield "beyond an int", 1 << 40, "is not open"
    yield "file", os.open("/dev/null", os.O_RDONLY), "is not a socket"
    yield "datagram", socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach(), "is not a stream socket"
    yield "tcp", socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach(), "is not a unix socket"
    fresh = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    yield "fresh", fresh.detach(), "is neither listening nor connected"
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound.bind(str(tmp_path / "bound"))
    yield "bound", bound.detach(), "is neither listening nor connected"


def test_fd_may_be_nothing_else(run: Run, served: Served, tmp_path: Path) -> None:
    for what, fd, expected in wrong_descriptors(tmp_path):
        status, _, err = run("device", "lamp", f"--fd={fd}")
        assert (status, err) == (1, f"hcd: file descriptor {fd} {expected}\n"), what
        if what not in ("closed", "beyond an int"):
            os.close(fd)  # a refused descriptor is left as it was
    assert not served


# -- --print-capabilities


@pytest.mark.parametrize(
    "arguments",
    [
        ("lamp", "--print-capabilities"),
        ("lamp", "--print-capabilities", "--fd=99", "--socket-path=/x", "--junk", "more"),
        ("lamp", "--watts=none", "--help", "--print-capabilities"),
        ("--print-capabilities", "lamp"),
    ],
)
def test_capabilities_are_printed_whatever_else_is_asked(run: Run, arguments: tuple[str, ...]) -> None:
    status, out, err = run("device", *arguments)
    assert (status, err) == (0, "")
    assert json.loads(out) == {"type": "input", "features": ["dimmer", "no-grab"]}


def test_a_type_that_qemu_has_no_name_for_prints_none(run: Run, make_distribution: Make) -> None:
    source = SOURCE.replace('"input"', '""')
    make_distribution("oddworks", "1", {"odd": "odd_cli:Lamp"}, {"odd_cli": source})
    assert json.loads(run("device", "odd", "--print-capabilities")[1]) == {"features": ["dimmer", "no-grab"]}


def test_capabilities_of_an_unknown_type_are_an_error(run: Run) -> None:
    status, out, err = run("device", "lam", "--print-capabilities")
    assert (status, out) == (1, "")
    assert 'no device type "lam"' in err


PROBE = """
import sys
from hcd.cli import main
status = main(["device", "lamp", "--print-capabilities"])
heavy = {"trio", "prometheus_client", "construct"} & set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""


def test_a_probe_imports_neither_trio_nor_prometheus_client(site: Path) -> None:
    path = os.pathsep.join([str(site), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["type"] == "input"


def test_output_into_a_closed_pipe_is_no_traceback(site: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    path = os.pathsep.join([str(site), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "hcd", "devices"],
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


# -- wrappers


def test_device_is_run_under_wrappers(run: Run, served: Served) -> None:
    """In the order in which they are given."""
    wraps = ("--wrap=log", "--wrap", "error:pattern=.x,delay-ms=5")
    status, _, err = run("device", "lamp", "--socket-path=/run/x", *wraps)
    assert (status, err) == (0, "")
    assert [spec.options.get("pattern") for spec in served.spec.wrap] == [None, ".x"]


@pytest.mark.parametrize(
    ("type_", "wrap", "expected"),
    [
        ("lamp", "lgo", 'did you mean "log"'),
        ("lamp", "error:x", '"x" is not an option'),
        ("echo", "error:pattern=x,queue=1", '"queue" is not an option of wrapper "error" of a doorbell device'),
    ],
)
def test_wrong_wrappers_are_refused(run: Run, type_: str, wrap: str, expected: str) -> None:
    status, _, err = run("device", type_, "--socket-path=/run/x", f"--wrap={wrap}")
    assert status != 0
    assert expected in err


@pytest.mark.parametrize(
    ("words", "ports"), [((), ("pty",)), (("--port=listen:/a", "--port=x=pty"), ("listen:/a", "x=pty"))]
)
def test_a_list_is_given_once_for_each_item(run: Run, served: Served, words: Any, ports: Any) -> None:
    """What is given takes the place of the default."""
    assert run("device", "console", "--socket-path=/run/con.sock", *words)[0] == 0
    assert served.spec.options["port"] == ports
