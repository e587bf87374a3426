"""The daemon under a service manager: readiness, inherited sockets, reload, watchdog."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from lamps import SOURCE, Process, hung_up, served, write

from hcd import watch
from hcd.config import DeviceSpec
from hcd.frontend.blk import BlockDriver
from hcd.frontend.client import Frontend
from hcd.supervisor import make_plan

pytestmark = pytest.mark.long


#: starts a program with the sockets whose numbers are its first argument as descriptors 3, 4, ... of its own
LAUNCHER = """
next=3
for fd in $1; do eval "exec $next<&$fd"; next=$((next + 1)); done
export LISTEN_PID=$$ LISTEN_FDS=$((next - 3))
shift
exec "$@"
"""


class Service:
    """One hcd and the manager's end of its NOTIFY_SOCKET."""

    def __init__(self, process: Process, notify: socket.socket) -> None:
        self.process = process
        self.notify = notify
        self.said: list[str] = []

    def hear(self) -> str:
        try:
            message = self.notify.recv(4096).decode()
        except TimeoutError:
            pytest.fail(f"nothing more was said: {self.said}; {self.process.end(signal.SIGKILL)[1]}")
        self.said.append(message)
        return message

    def until(self, start: str) -> str:
        """The next message that begins with ``start``."""
        while not (message := self.hear()).startswith(start):
            pass
        return message

    def hangup(self) -> str:
        """Reload; what it says at the end of that."""
        self.process.popen.send_signal(signal.SIGHUP)
        self.until("RELOADING=1\nMONOTONIC_USEC=")
        return self.until("READY=1")


Start = Callable[..., Service]
Connect = Callable[[Path], socket.socket]


@pytest.fixture
def start(make_distribution: Callable[..., Path], short_dir: Path) -> Iterator[Start]:
    """Starts hcd as a service with sockets that are its own from the start, by the names that they get."""
    site = make_distribution("lampworks", "3.1", {"lamp": "lamp_service:Lamp"}, {"lamp_service": SOURCE})
    with contextlib.ExitStack() as stack:
        notify = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        notify.settimeout(30)
        notify.bind(str(short_dir / "notify"))

        def started(
            *arguments: str, given: Mapping[str, socket.socket] | None = None, extra: Mapping[str, str] | None = None
        ) -> Service:
            # FDSTORE: this manager keeps no descriptors
            environment = {"NOTIFY_SOCKET": str(short_dir / "notify"), "FDSTORE": "0", **(extra or {})}
            fds: tuple[int, ...] = ()
            launcher: tuple[str, ...] = ()
            if given is not None:
                environment["LISTEN_FDNAMES"] = ":".join(given)
                fds = tuple(sock.fileno() for sock in given.values())
                launcher = ("bash", "-c", LAUNCHER, "launcher", " ".join(map(str, fds)))
            process = Process(site, arguments, fds, environment, launcher)
            stack.enter_context(process.popen)
            stack.callback(process.stop)
            return Service(process, notify)

        yield started


@pytest.fixture
def connect() -> Iterator[Connect]:
    with contextlib.ExitStack() as stack:

        def connected(path: Path) -> socket.socket:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(30)
            client.connect(str(path))
            return client

        yield connected


@pytest.fixture
def bound() -> Iterator[Callable[..., socket.socket]]:
    """Listening sockets, as a manager makes them."""
    with contextlib.ExitStack() as stack:

        def make(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
            made = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
            made.bind(str(path))
            if kind != socket.SOCK_DGRAM:
                made.listen()
            # above those that the launcher fills
            copy = socket.socket(fileno=os.dup2(made.fileno(), made.fileno() + 100))
            return stack.enter_context(copy)

        yield make


Bound = Callable[..., socket.socket]


# -- what it says


def test_it_is_ready_when_every_socket_listens(start: Start, connect: Connect, short_dir: Path) -> None:
    hcd = start("run", write(short_dir, f'metrics = "unix:{short_dir}/m.sock"', names=("desk", "floor")))
    message = hcd.until("READY=1")
    assert message == "READY=1\nSTATUS=2 devices, 0 connected"
    for name in ("desk.sock", "floor.sock", "m.sock"):
        connect(short_dir / name)


def test_the_status_follows_the_connections(start: Start, connect: Connect, short_dir: Path) -> None:
    hcd = start("run", write(short_dir, names=("desk", "floor")))
    hcd.until("READY=1")
    client = connect(short_dir / "floor.sock")
    assert hcd.until("STATUS=") == "STATUS=2 devices, 1 connected: floor"
    client.close()
    assert hcd.until("STATUS=") == "STATUS=2 devices, 0 connected"


def test_it_says_that_it_stops_and_how_long_that_may_take(start: Start, short_dir: Path) -> None:
    hcd = start("run", write(short_dir, "drain_timeout = 3", names=("desk", "floor")))
    hcd.until("READY=1")
    status, log = hcd.process.end(signal.SIGTERM)
    assert status == 0, log
    hcd.until("STOPPING=1")
    assert int(hcd.until("EXTEND_TIMEOUT_USEC=").partition("=")[2]) >= 9_000_000  # a drain, then two more


def test_how_long_stopping_may_take_is_what_the_last_reload_says(start: Start, short_dir: Path) -> None:
    """That long the process has before it ends itself by force."""
    hcd = start("run", write(short_dir, "drain_timeout = 3", names=("desk",)))
    hcd.until("READY=1")
    write(short_dir, "drain_timeout = 20", names=("desk", "floor"))
    hcd.hangup()
    status, log = hcd.process.end(signal.SIGTERM)
    assert status == 0, log
    assert int(hcd.until("EXTEND_TIMEOUT_USEC=").partition("=")[2]) >= 60_000_000


def test_a_start_that_fails_is_never_ready(start: Start, short_dir: Path) -> None:
    hcd = start("run", write(short_dir, options='fault = "operator"'))
    assert hcd.process.end()[0] == 78
    assert hcd.until("STATUS=") == 'STATUS=cannot start: device "desk" (lamp): no bulb'
    assert not any(message.startswith("READY") for message in hcd.said)


def test_a_single_device_is_a_service_too(start: Start, short_dir: Path) -> None:
    hcd = start("device", "lamp", f"--socket-path={short_dir}/desk.sock")
    assert hcd.until("READY=1") == "READY=1\nSTATUS=1 device, 0 connected"
    assert hcd.process.end(signal.SIGTERM)[0] == 0


def test_a_status_has_room_for_a_few_names() -> None:
    hosts: list[Any] = [SimpleNamespace(connected=True, spec=SimpleNamespace(name=f"d{i}")) for i in range(10)]
    assert watch.describe(hosts) == "10 devices, 10 connected: d0, d1, d2, d3, d4, d5, d6, d7, and 2 more"


# -- inherited sockets


@pytest.mark.parametrize("name", ["desk", "hcd@desk.socket", "unknown"])
def test_a_device_is_served_on_the_socket_that_the_manager_bound(
    start: Start, connect: Connect, bound: Bound, short_dir: Path, name: str
) -> None:
    path = short_dir / "desk.sock"
    listening = bound(path)
    early = connect(path)  # before anybody accepts
    hcd = start("run", write(short_dir), given={name: listening})
    hcd.until("READY=1")
    assert served(early)
    early.close()
    assert served(connect(path))
    status, log = hcd.process.end(signal.SIGTERM)
    assert status == 0, log
    assert path.is_socket(), "it belongs to the manager"


def test_some_devices_have_sockets_of_the_manager_and_others_their_own(
    start: Start, connect: Connect, bound: Bound, short_dir: Path
) -> None:
    hcd = start("run", write(short_dir, names=("desk", "floor")), given={"floor": bound(short_dir / "floor.sock")})
    hcd.until("READY=1")
    assert served(connect(short_dir / "desk.sock"))
    assert served(connect(short_dir / "floor.sock"))


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_metrics_are_served_on_the_managers_socket(start: Start, bound: Bound, short_dir: Path, family: str) -> None:
    with contextlib.ExitStack() as stack:
        if family == "tcp":
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            target: Any = listening.getsockname()
        else:
            listening = bound(short_dir / "m.sock")
            target = str(short_dir / "m.sock")
        moved = stack.enter_context(socket.socket(fileno=os.dup2(listening.fileno(), listening.fileno() + 200)))
        hcd = start("run", write(short_dir), given={"metrics": moved})
        hcd.until("READY=1")
        client = stack.enter_context(socket.socket(listening.family))
        client.settimeout(30)
        client.connect(target)
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        with client.makefile("rb") as stream:
            assert b"hcd_build_info" in stream.read()


def test_a_socket_bound_elsewhere_contradicts_the_configuration(start: Start, bound: Bound, short_dir: Path) -> None:
    hcd = start("run", write(short_dir), given={"desk": bound(short_dir / "other.sock")})
    status, log = hcd.process.end()
    assert status == 78
    assert f'device "desk": its socket is configured as {short_dir}/desk.sock' in log
    assert f"the one that was handed over is {short_dir}/other.sock" in log


def test_a_symbolic_link_is_no_contradiction(start: Start, bound: Bound, short_dir: Path) -> None:
    (short_dir / "real").mkdir()
    (short_dir / "link").symlink_to("real")
    file = write(short_dir)
    Path(file).write_text(Path(file).read_text().replace("/desk.sock", "/link/desk.sock"))
    start("run", file, given={"desk": bound(short_dir / "real" / "desk.sock")}).until("READY=1")


def test_a_socket_that_nobody_wants_is_refused(start: Start, bound: Bound, short_dir: Path) -> None:
    status, log = start("run", write(short_dir), given={"dusk": bound(short_dir / "dusk.sock")}).process.end()
    assert status == 78
    assert 'a socket named "dusk" was handed over' in log
    assert 'expected the name of a device (desk) or "metrics"' in log


def test_an_unnamed_socket_is_not_given_to_one_of_several_devices(start: Start, bound: Bound, short_dir: Path) -> None:
    hcd = start("run", write(short_dir, names=("desk", "floor")), given={"unknown": bound(short_dir / "desk.sock")})
    status, log = hcd.process.end()
    assert status == 78
    assert "2 devices and one unnamed socket" in log


def test_a_socket_of_another_kind_is_refused(start: Start, bound: Bound, short_dir: Path) -> None:
    given = {"desk": bound(short_dir / "desk.sock", socket.SOCK_SEQPACKET)}
    status, log = start("run", write(short_dir), given=given).process.end()
    assert (status, "file descriptor 3 is not a stream socket" in log) == (78, True), log


def test_a_metrics_address_that_the_configuration_puts_elsewhere_is_refused(
    start: Start, bound: Bound, short_dir: Path
) -> None:
    given = {"metrics": bound(short_dir / "m.sock")}
    file = write(short_dir, f'metrics = "unix:{short_dir}/n.sock"')
    status, log = start("run", file, given=given).process.end()
    assert status == 78
    assert f"[daemon] metrics: configured as unix:{short_dir}/n.sock" in log


# -- reload


def test_a_reload_adds_removes_and_changes_devices_beside_one_that_notices_nothing(
    start: Start, connect: Connect, short_dir: Path
) -> None:
    table = '[[device]]\nname = "{0}"\ntype = "lamp"\nsocket = "{1}/{0}.sock"\noptions.level = {2}\n'
    file = short_dir / "hcd.toml"
    file.write_text("".join(table.format(name, short_dir, 1) for name in ("kept", "gone", "other")))
    hcd = start("run", str(file))
    hcd.until("READY=1")
    kept, gone, other = (connect(short_dir / f"{name}.sock") for name in ("kept", "gone", "other"))
    assert served(kept)
    assert served(gone)
    assert served(other)
    inode = (short_dir / "other.sock").stat().st_ino
    levels = {"new": 1, "other": 7, "kept": 1}
    file.write_text("".join(table.format(name, short_dir, level) for name, level in levels.items()))
    assert hcd.hangup() == "READY=1\nSTATUS=3 devices, 1 connected: kept"
    hcd.process.until("reloaded: 1 unchanged; added new; changed other; removed gone")
    assert served(kept), "the same connection, and it is not even in the middle of anything"
    assert hung_up(gone)
    assert hung_up(other)
    assert not (short_dir / "gone.sock").exists()
    assert served(connect(short_dir / "new.sock"))
    assert served(connect(short_dir / "other.sock"))
    assert (short_dir / "other.sock").stat().st_ino == inode
    status, log = hcd.process.end(signal.SIGTERM)
    assert status == 0, log
    assert "Traceback" not in log
    assert log.count("kept: on") == 1
    assert log.count("kept: off") == 1
    assert "other: on at 7" in log
    assert not list(short_dir.glob("*.sock"))


BAD = {
    "is not valid TOML": "nonsense",
    '[[device]] "new" bus: expected one of pci, mmio, ccw': '{old}{new}bus = "isa"\n',
    'device "new" (lamp): no bulb': "{old}{new}options.fault = 'operator'\n",
    "open() raised KeyError: 'bulb'": "{old}{new}options.fault = 'defect'\n",
    "in-the-way.sock: it exists and is not a socket": "{old}{way}",
}


@pytest.mark.parametrize("expected", list(BAD))
def test_a_bad_configuration_changes_nothing_and_says_why(
    start: Start, connect: Connect, short_dir: Path, expected: str
) -> None:
    file = Path(write(short_dir))
    hcd = start("run", str(file))
    hcd.until("READY=1")
    client = connect(short_dir / "desk.sock")
    assert served(client)
    way = short_dir / "in-the-way.sock"
    way.write_text("")
    table = '[[device]]\nname = "new"\ntype = "lamp"\nsocket = "{}"\n'
    file.write_text(
        BAD[expected].format(old=file.read_text(), new=table.format(short_dir / "new.sock"), way=table.format(way))
    )
    assert hcd.hangup() == "READY=1\nSTATUS=1 device, 1 connected: desk"
    hcd.process.until("not reloaded, all is as before: .*")
    assert expected in hcd.process.lines[-1]
    assert served(client)
    assert not (short_dir / "new.sock").exists()
    assert way.read_text() == ""
    status, log = hcd.process.end(signal.SIGTERM)
    assert status == 0, log
    assert log.count("desk: on") == 1


def test_a_changed_device_that_does_not_open_is_as_it_was(start: Start, connect: Connect, short_dir: Path) -> None:
    file = write(short_dir, names=("desk", "floor"))
    hcd = start("run", file)
    hcd.until("READY=1")
    before = Path(file).read_text()
    levelled = before.replace("[device.options]", "[device.options]\nlevel = 5", 1)
    Path(file).write_text(levelled + 'fault = "operator"\n')  # the first would do, the second does not
    assert hcd.hangup() == "READY=1\nSTATUS=2 devices, 0 connected"
    hcd.process.until("desk: is served as before; a front end has had to connect again")
    for name in ("desk", "floor"):
        assert served(connect(short_dir / f"{name}.sock"))
    Path(file).write_text(levelled)
    hcd.hangup()
    hcd.process.until("reloaded: 1 unchanged; changed desk")
    log = hcd.process.end(signal.SIGTERM)[1]
    assert [line.split("desk: ")[1] for line in log.splitlines() if "desk: o" in line] == [
        "on at 1", "off", "on at 5", "off", "on at 1", "off", "on at 5", "off",
    ]


def test_a_device_can_be_renamed_on_its_socket(start: Start, connect: Connect, short_dir: Path) -> None:
    file = write(short_dir)
    hcd = start("run", file)
    hcd.until("READY=1")
    inode = (short_dir / "desk.sock").stat().st_ino
    Path(file).write_text(Path(file).read_text().replace('name = "desk"', 'name = "table"'))
    hcd.hangup()
    hcd.process.until("reloaded: 0 unchanged; changed table")
    assert served(connect(short_dir / "desk.sock"))
    assert (short_dir / "desk.sock").stat().st_ino == inode


def test_two_devices_can_exchange_their_sockets(start: Start, connect: Connect, short_dir: Path) -> None:
    file = write(short_dir, names=("desk", "floor"))
    hcd = start("run", file)
    hcd.until("READY=1")
    text = Path(file).read_text()
    for old, new in (("desk.sock", "x"), ("floor.sock", "desk.sock"), ("/x", "/floor.sock")):
        text = text.replace(old, new)
    Path(file).write_text(text)
    hcd.hangup()
    connect(short_dir / "floor.sock")
    assert hcd.until("STATUS=") == "STATUS=2 devices, 1 connected: desk"


def test_an_inherited_socket_outlives_the_removal_of_its_device(
    start: Start, connect: Connect, bound: Bound, short_dir: Path
) -> None:
    file = write(short_dir, names=("desk", "floor"))
    text = Path(file).read_text()
    hcd = start("run", file, given={"desk": bound(short_dir / "desk.sock")})
    hcd.until("READY=1")
    Path(file).write_text(text[text.index("[[device]]", text.index("desk.sock")) :])
    assert hcd.hangup() == "READY=1\nSTATUS=1 device, 0 connected"
    assert (short_dir / "desk.sock").is_socket()
    Path(file).write_text(text)
    assert hcd.hangup() == "READY=1\nSTATUS=2 devices, 0 connected"
    assert served(connect(short_dir / "desk.sock"))


def test_what_only_a_restart_changes_is_said(start: Start, short_dir: Path) -> None:
    file = write(short_dir)
    hcd = start("run", file)
    hcd.until("READY=1")
    write(short_dir, f'metrics = "unix:{short_dir}/metrics.sock"\npoll_us = 5\ndrain_timeout = 2\nstuck_after = 3')
    hcd.hangup()
    hcd.process.until(r"\[daemon\] metrics has changed; that takes effect at the next restart")
    hcd.process.until("reloaded: 0 unchanged; adjusted desk")
    hcd.hangup()
    hcd.process.until(r"\[daemon\] metrics has changed; that takes effect at the next restart")
    hcd.process.until("reloaded: 1 unchanged")
    write(short_dir)
    hcd.hangup()
    hcd.process.until("reloaded: 0 unchanged; adjusted desk")
    _, log = hcd.process.end(signal.SIGTERM)
    assert "poll_us" not in log
    assert log.count("metrics has changed") == 2, "it is again what it was when hcd started"


def spec(name: str, path: str = "", **options: int) -> DeviceSpec:
    return DeviceSpec(name, "lamp", path or f"/run/{name}", options=options)


def test_a_plan_tells_devices_apart_by_name_then_by_socket() -> None:
    plan = make_plan(
        [spec("a"), spec("b"), spec("c"), spec("d")],
        [spec("a"), spec("b", level=2), spec("e", "/run/../run/c"), spec("f")],
    )
    assert [one.name for one in plan.kept] == ["a"]
    assert [one.name for one in plan.added] == ["f"]
    assert [one.name for one in plan.removed] == ["d"]
    assert [(old.name, new.name) for old, new in plan.changed] == [("b", "b"), ("c", "e")]


# -- watchdog


async def test_the_watchdog_is_told_only_when_both_loops_went_round(autojump_clock: trio.testing.MockClock) -> None:
    pings: list[float] = []
    posted: list[Callable[[], object]] = []
    reactor = SimpleNamespace(beats=1)
    lane: Any = SimpleNamespace(reactor=reactor, post=posted.append)
    notifier: Any = SimpleNamespace(watchdog=lambda: pings.append(trio.current_time()))

    async def reactor_runs(turn: bool) -> None:
        reactor.beats += turn
        posted.pop()()
        await trio.testing.wait_all_tasks_blocked()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.keep_watchdog, notifier, lane, 10.0)
        await trio.sleep(1000)
        assert (len(pings), len(posted)) == (0, 1), "the reactor is stuck, and is not asked again and again"
        await reactor_runs(False)
        assert (len(pings), len(posted)) == (0, 1), "it ran what was posted, but its loop did not go round"
        await reactor_runs(True)
        assert (len(pings), len(posted)) == (1, 0)
        await trio.sleep(5.5)
        await reactor_runs(True)
        assert pings[1] - pings[0] <= 5.6
        nursery.cancel_scope.cancel()


def test_a_stuck_reactor_is_not_pinged_for(start: Start, short_dir: Path) -> None:
    fifo = short_dir / "fifo"
    os.mkfifo(fifo)
    hcd = start("run", write(short_dir, options=f'block = "{fifo}"'), extra={"WATCHDOG_USEC": "100000"})
    hcd.until("READY=1")
    for _ in range(3):
        hcd.hangup()  # trio is well
    assert "WATCHDOG=1" not in hcd.said
    release = threading.Thread(target=fifo.write_text, args=("go on",))
    release.start()
    hcd.until("WATCHDOG=1")
    release.join()
    hcd.until("WATCHDOG=1")
    assert hcd.process.end(signal.SIGTERM)[0] == 0


# -- reload under load


def test_requests_go_on_while_ten_devices_come_and_go_and_a_disk_changes(start: Start, short_dir: Path) -> None:
    table = '[[device]]\nname = "{0}"\ntype = "{1}"\nsocket = "{2}/{0}.sock"\noptions = {{ {3} }}\n'

    def configure(others: range, serial: str) -> None:
        text = table.format("busy", "blk", short_dir, "ram = 1048576")
        text += table.format("image", "blk", short_dir, f'blk-file = "{short_dir}/image", serial = "{serial}"')
        text += "".join(table.format(f"extra{i}", "lamp", short_dir, "") for i in others)
        (short_dir / "hcd.toml").write_text(text)

    (short_dir / "image").write_bytes(bytes(1 << 20))
    configure(range(10), "first")
    hcd = start("run", str(short_dir / "hcd.toml"))
    hcd.until("READY=1")
    with Frontend.open(short_dir / "busy.sock") as frontend:
        disk = BlockDriver(frontend.memory, frontend.queues[0])
        done = 0
        hcd.notify.setblocking(False)
        for turn in range(4):
            configure(range(turn * 5, turn * 5 + 10), f"turn{turn}")
            hcd.process.popen.send_signal(signal.SIGHUP)
            said = b""
            while not said.startswith(b"READY=1"):
                data = done.to_bytes(8, "little") * 512
                disk.write(done % 256 * 8, data)
                assert disk.read(done % 256 * 8, len(data)) == data
                done += 1
                with contextlib.suppress(BlockingIOError):
                    said = hcd.notify.recv(4096)
        hcd.notify.settimeout(30)
    with Frontend.open(short_dir / "image.sock") as frontend:  # the image was locked, let go and locked again
        assert BlockDriver(frontend.memory, frontend.queues[0]).get_id() == "turn3"
    status, log = hcd.process.end(signal.SIGTERM)
    assert status == 0, log
    assert done > 20, "it was under load"
    assert log.count("reloaded: ") == 4
    assert log.count("busy: front end connected") == 1
