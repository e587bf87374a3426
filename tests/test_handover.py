"""Sessions outlive the process: a stand-in for systemd's manager restarts hcd, the front end sees no disconnect."""

from __future__ import annotations

import os
import signal
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hcd_protocols.vhost_user import BackendRequest
from hcd_protocols.virtio.blk import RequestType
from manager import Manager
from tables import table

from hcd.demo.hcd_process import Metrics, fetch
from hcd.frontend.blk import BlockDriver, BlockRequest
from hcd.frontend.client import Frontend
from hcd.frontend.memory import MemorySlot, SharedMemory
from hcd.frontend.net import NET_FEATURES, NetDriver
from hcd.frontend.rng import EntropyDriver

pytestmark = pytest.mark.long

DISK = """
[daemon]
metrics = "unix:{dir}/metrics.sock"

[control]
path = "{dir}/control.sock"

""" + table("disk:0", "blk", socket="{dir}/disk.sock", blk_file="{dir}/disk.img")
OTHERS = table("net0", "net", mac="52:54:00:00:00:01") + table("net1", "net") + table("rng", "rng")

NOTHING_DROPPED: dict[str, list[str]] = {"duplicate": [], "full": [], "hung up": []}
SIGNALS = [signal.SIGTERM, signal.SIGKILL]
BLOCK = 512

#: its requests are never answered, and whoever stops a ring waits for them
STUCK = DISK.replace("[daemon]", "[daemon]\ndrain_timeout = 60").replace(
    "[device.options]", 'wrap = [{ error = { pattern = "d", delay-ms = 3600000 } }]\n[device.options]'
)
GET_VRING_BASE, VERSION = 11, 1
#: where the state file says that a message is being handled
BUSY_AT = 12

#: says its configuration once a process, if it is told so
SHY = """
import os
from hcd.device import Device

class Shy(Device):
    virtio_id = 63
    asks = 0
    def config(self):
        self.asks += 1
        if self.asks > 1 and os.environ.get("SHY"):
            raise LookupError("not now")
        return b"four"
    def process(self, queue):
        for request in queue:
            request.complete()
"""

Start = Callable[..., Manager]


@pytest.fixture
def manage(short_dir: Path) -> Iterator[Start]:
    """``manage(devices)``: hcd with these tables under a manager, ready."""
    managers: list[Manager] = []

    def start(devices: str, **how: Any) -> Manager:
        configure(short_dir, devices)
        (short_dir / "disk.img").write_bytes(bytes(1 << 20))
        manager = Manager(short_dir, [sys.executable, "-m", "hcd", "run", str(short_dir / "hcd.toml")], **how)
        managers.append(manager)
        manager.start()
        return manager

    yield start
    for manager in managers:
        print(manager.log_tail())
        assert "Traceback" not in manager.log.read_text()
        manager.close()


def configure(directory: Path, devices: str) -> None:
    (directory / "hcd.toml").write_text(devices.replace("{dir}", str(directory)))


def handovers(directory: Path) -> dict[str, float]:
    """By outcome, of the process that runs now."""
    metrics = Metrics(fetch(directory / "metrics.sock", "/metrics"))
    return {outcome: metrics.total("hcd_handovers_total", outcome=outcome) for outcome in ("resumed", "failed")}


def in_flight(directory: Path) -> float:
    return Metrics(fetch(directory / "metrics.sock", "/metrics")).total("hcd_requests_inflight")


def many_files(count: int) -> SharedMemory:
    """Guest memory in that many files."""
    return SharedMemory([MemorySlot(gpa=number << 24, size=1 << 20) for number in range(count)])


def disk_of(front: Frontend) -> BlockDriver:
    return BlockDriver(front.memory, front.queues[0], timeout=30)


def block(number: int) -> bytes:
    return bytes([number % 251]) * BLOCK


# -- nothing is noticed

@pytest.mark.parametrize(
    ("packed", "slots", "number"),
    [(False, True, signal.SIGTERM), (True, False, signal.SIGTERM), (False, False, signal.SIGKILL)],
    ids=["split-slots-SIGTERM", "packed-table-SIGTERM", "split-table-SIGKILL"],
)
def test_a_front_end_goes_on_over_restarts(
    manage: Start, short_dir: Path, packed: bool, slots: bool, number: signal.Signals
) -> None:
    """Requests, messages, the configuration space and memory that comes later; several regions of one file."""
    manager = manage(DISK)
    protocol = ~0 if slots else ~(1 << 15)
    with Frontend.open(short_dir / "disk.sock", packed=packed, timeout=30, protocol=protocol) as front:
        disk = disk_of(front)
        for turn in range(2):
            disk.write(turn, block(turn + 1))
            manager.restart(number)
            assert disk.read(turn, BLOCK) == block(turn + 1)
            front.sync()
            assert front.config(0, 8) == (2048).to_bytes(8, "little")
        assert handovers(short_dir) == {"resumed": 1, "failed": 0}
        assert manager.dropped == NOTHING_DROPPED
    manager.until(lambda: manager.names() == [], "empty store")
    assert manager.kill(signal.SIGTERM) == 0


@pytest.mark.parametrize("packed", [False, True])
def test_requests_in_flight_when_it_is_killed_are_served_by_the_next_process(
    manage: Start, short_dir: Path, packed: bool
) -> None:
    manager = manage(DISK)
    with Frontend.open(short_dir / "disk.sock", packed=packed, timeout=30) as front:
        disk = disk_of(front)
        for turn in range(3):
            sectors = range(turn * 64, turn * 64 + 32)
            for sector in sectors:
                disk.submit(BlockRequest(RequestType.OUT, sector, block(turn + sector)))
            manager.restart(signal.SIGKILL)
            while disk.inflight:
                for done in disk.wait():
                    done.check()
            for sector in sectors:
                assert disk.read(sector, BLOCK) == block(turn + sector)
        assert manager.dropped == NOTHING_DROPPED


def test_a_kick_while_nobody_is_there_is_not_lost(manage: Start, short_dir: Path) -> None:
    manager = manage(DISK)
    with Frontend.open(short_dir / "disk.sock", timeout=30) as front:
        disk = disk_of(front)
        for number in SIGNALS:
            manager.kill(number)
            disk.submit(BlockRequest(RequestType.OUT, 5, block(int(number))))
            front.queues[0].kick()
            manager.start()
            while disk.inflight:
                for done in disk.wait():
                    done.check()
            assert disk.read(5, BLOCK) == block(int(number))


def test_messages_under_way_at_a_stop_are_answered_by_one_process_or_the_other(manage: Start, short_dir: Path) -> None:
    """SIGTERM at any time: every kind of message goes on without a pause in between."""
    manager = manage(DISK)
    with Frontend.open(short_dir / "disk.sock", timeout=30) as front:
        failures: list[Exception] = []
        over = threading.Event()

        def talk() -> None:
            try:
                while not over.is_set():
                    base = front.stop_queue(0)
                    front.hand_over(front.queues[0], base)
                    front.share_memory()
                    front.set_status(front.status())
                    front.config(0, 57)
                    front.sync()
            except Exception as error:
                failures.append(error)

        talker = threading.Thread(target=talk)
        talker.start()
        for _ in range(5):
            manager.restart()
        over.set()
        talker.join()
        assert failures == []
        disk_of(front).write(0, block(1))
        assert manager.dropped == NOTHING_DROPPED


def test_a_kill_behind_an_answer_is_no_kill_in_the_middle(manage: Start, short_dir: Path) -> None:
    """The front end has its answer, so the message is over, however little time the process had after it."""
    manager = manage(DISK)
    with Frontend.open(short_dir / "disk.sock", timeout=30) as front:
        for _ in range(6):
            front.sync()
            manager.restart(signal.SIGKILL)
        assert handovers(short_dir) == {"resumed": 1, "failed": 0}


@pytest.mark.parametrize("number", SIGNALS)
def test_one_guest_with_several_devices(manage: Start, short_dir: Path, number: signal.Signals) -> None:
    """They share one memory file, which the manager keeps once. Cards and entropy go on as well."""
    manager = manage(DISK + OTHERS)
    memory = SharedMemory.of_size(16 << 20)
    names = ("disk", "net0", "net1", "rng")
    try:
        fronts = {
            name: Frontend.open(
                short_dir / f"{name}.sock", memory=memory, queues=2 if "net" in name else 1, timeout=30,
                device=int(NET_FEATURES) if "net" in name else ~0,
            )
            for name in names
        }
        disk = disk_of(fronts["disk"])
        cards = [
            NetDriver(memory, front.queues[0], front.queues[1], features=front.features, timeout=30)
            for front in (fronts["net0"], fronts["net1"])
        ]
        entropy = EntropyDriver(memory, fronts["rng"].queues[0], timeout=30)
        assert manager.roles().count("memory") == 1
        for turn in range(2):
            manager.restart(number)
            assert handovers(short_dir) == {"resumed": 4, "failed": 0}
            disk.write(turn, block(turn))
            for one, other in (cards, cards[::-1]):
                frame = b"\xff" * 6 + b"\x52\x54\0\0\0\x01" + b"\x88\xb5" + bytes([turn]) * 50
                one.send(frame)
                assert other.receive() == frame
            assert len(entropy.read(64)) == 64
        assert manager.roles().count("memory") == 1
        assert manager.dropped == NOTHING_DROPPED
        for front in fronts.values():
            front.close()
        manager.until(lambda: manager.names() == [], "empty store")
    finally:
        memory.close()


def test_what_was_told_once_holds_on(manage: Start, short_dir: Path) -> None:
    """The write-cache mode, the MTU, the back channel: the next process knows them."""
    manager = manage(DISK + OTHERS)
    with Frontend.open(short_dir / "disk.sock", timeout=30) as front:
        front.open_back_channel()
        front.write_config(32, b"\0")
        size = len(front.config(0, 57))
        manager.restart(signal.SIGKILL)
        assert front.config(32, 1) == b"\0"
        manager.kill(signal.SIGTERM)
        os.truncate(short_dir / "disk.img", 2 << 20)
        manager.start()
        assert front.wait_back_message() is BackendRequest.CONFIG_CHANGE_MSG
        assert front.config(0, 8) == (4096).to_bytes(8, "little")
        assert size == 57


def test_a_device_that_cannot_say_its_configuration_is_gone_on_with(
    make_distribution: Callable[..., Path], short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked whether that changed in between. As at any other time that is an error of the device, and counted."""
    site = make_distribution("shy", "1", {"shy": "lamp_shy:Shy"}, {"lamp_shy": SHY})
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")])))
    configure(short_dir, DISK.partition("[[device]]")[0] + table("shy", "shy"))
    with closing(Manager(short_dir, [sys.executable, "-m", "hcd", "run", str(short_dir / "hcd.toml")])) as manager:
        manager.start()
        with Frontend.open(short_dir / "shy.sock", timeout=30) as front:
            assert front.config(0, 4) == b"four"
            monkeypatch.setenv("SHY", "yes")
            manager.restart(signal.SIGTERM)
            assert handovers(short_dir) == {"resumed": 1, "failed": 0}
            front.sync()
        log = manager.log.read_text()
    assert "Shy: config() raised LookupError: not now" in log
    assert log.count("Traceback") == 1


def test_a_second_restart_while_the_first_is_under_way(manage: Start, short_dir: Path) -> None:
    """Asked to end, or killed, as soon as it is there: sessions that nobody took up yet stay where they are."""
    manager = manage(DISK)
    with Frontend.open(short_dir / "disk.sock", timeout=30) as front:
        for number in SIGNALS * 3:
            manager.restart(number)
        disk_of(front).write(3, block(3))
        assert handovers(short_dir) == {"resumed": 1, "failed": 0}


def test_masked_interrupts_cost_the_manager_nothing(manage: Start, short_dir: Path) -> None:
    """QEMU goes to and fro between two call eventfds: both are stored once; a third takes the place of the older."""
    manager = manage(DISK)
    with Frontend.open(short_dir / "disk.sock", timeout=30) as front:
        tell, connection = front.link.tell, front.link.connection
        guest, masked, third = front.queues[0].call_fd, os.eventfd(0), os.eventfd(0)
        tell(connection.set_vring_call, 0, masked)
        heard = len(manager.heard)
        for _ in range(5):
            tell(connection.set_vring_call, 0, guest)
            tell(connection.set_vring_call, 0, masked)
        assert len(manager.heard) == heard
        tell(connection.set_vring_call, 0, third)
        tell(connection.set_vring_call, 0, guest)
        front.sync()
        assert manager.roles().count("call0") == 2
        manager.restart(signal.SIGKILL)
        disk_of(front).write(0, block(1))
        assert manager.roles().count("call0") == 1
        os.close(masked)
        os.close(third)


# -- a clean end, where it cannot go on

def gone(front: Frontend) -> None:
    """The front end sees that the connection was closed, and not only after a while."""
    front.wait_hangup(30)


def reconnects(manager: Manager, directory: Path, name: str = "disk") -> None:
    """The store holds nothing of the last session, and the next one is served."""
    manager.until(lambda: manager.names() == [], "empty store")
    with Frontend.open(directory / f"{name}.sock", timeout=30) as front:
        disk_of(front).write(0, block(9))


def test_a_process_that_dies_in_the_middle_of_a_message_ends_the_session(manage: Start, short_dir: Path) -> None:
    """A message that stops a ring waits for a request which never ends: nobody knows what was done of it."""
    manager = manage(STUCK)
    with Frontend.open(short_dir / "disk.sock", timeout=30) as front:
        disk_of(front).submit(BlockRequest(RequestType.IN, 0, length=BLOCK))
        manager.until(lambda: in_flight(short_dir) == 1, "request in flight")  # a stopped ring takes no more
        front.send_raw(struct.pack("=IIIII", GET_VRING_BASE, VERSION, 8, 0, 0))
        state = manager.fd_of("state")
        manager.until(lambda: os.pread(state, 1, BUSY_AT) == b"\1", "message that is being handled")
        manager.restart(signal.SIGKILL)
        gone(front)
        assert "while it handled a message" in manager.log_tail()
        assert handovers(short_dir)["failed"] == 1
    manager.until(lambda: manager.names() == [], "empty store")


def test_a_front_end_that_goes_while_nobody_is_there(manage: Start, short_dir: Path) -> None:
    manager = manage(DISK)
    front = Frontend.open(short_dir / "disk.sock", timeout=30)
    manager.kill(signal.SIGKILL)
    front.close()
    manager.until_hung_up("connection")
    manager.start()
    reconnects(manager, short_dir)


@pytest.mark.parametrize("change", ["removed", "another file", "another type"])
def test_another_configuration_ends_the_session(manage: Start, short_dir: Path, change: str) -> None:
    manager = manage(DISK + OTHERS)
    (short_dir / "other.img").write_bytes(bytes(1 << 20))
    with Frontend.open(short_dir / "disk.sock", timeout=30) as front:
        changed = {
            "removed": DISK.partition("[[device]]")[0] + OTHERS,
            "another file": DISK.replace("disk.img", "other.img") + OTHERS,
            "another type": DISK.replace('"blk"', '"rng"').partition("[device.options]")[0] + OTHERS,
        }[change]
        configure(short_dir, changed)
        manager.restart()
        gone(front)
        said = "not configured any more" if change == "removed" else "configured otherwise now"
        assert f"disk:0: the session of an earlier process ends: the device is {said}" in manager.log_tail()
    manager.until(lambda: manager.names() == [], "empty store")


@pytest.mark.parametrize("lost", ["memory", "kick0", "connection", "inflight"])
def test_a_descriptor_that_was_not_kept_ends_the_session(manage: Start, short_dir: Path, lost: str) -> None:
    manager = manage(DISK)
    with Frontend.open(short_dir / "disk.sock", timeout=30) as front:
        manager.forget(lost)
        manager.restart()
        gone(front)
    reconnects(manager, short_dir)


def test_a_state_of_another_version_ends_the_session(manage: Start, short_dir: Path) -> None:
    manager = manage(DISK)
    with Frontend.open(short_dir / "disk.sock", timeout=30) as front:
        manager.kill(signal.SIGTERM)
        os.pwrite(manager.fd_of("state"), struct.pack("=I", 99), 8)
        manager.start()
        gone(front)
        assert "version is 99" in manager.log_tail()
    reconnects(manager, short_dir)


def test_a_damaged_state_ends_the_session(manage: Start, short_dir: Path) -> None:
    manager = manage(DISK)
    with Frontend.open(short_dir / "disk.sock", timeout=30) as front:
        manager.kill(signal.SIGTERM)
        state = manager.fd_of("state")
        os.pwrite(state, b"\xff" * (os.fstat(state).st_size - 64), 64)
        manager.start()
        gone(front)
    reconnects(manager, short_dir)


def test_a_full_store_costs_the_handover_and_nothing_else(manage: Start, short_dir: Path) -> None:
    """Two front ends fill it; the third is served all the same, and its session ends with the process."""
    manager = manage(DISK + OTHERS, limit=14, environment={"FDSTORE": "14"})
    with Frontend.open(short_dir / "rng.sock", timeout=30) as kept:
        with Frontend.open(short_dir / "disk.sock", timeout=30) as also_kept:
            with Frontend.open(short_dir / "net0.sock", queues=2, timeout=30, device=int(NET_FEATURES)) as front:
                front.sync()
                assert "net0: a restart of hcd will end this connection" in manager.log_tail()
                manager.restart()
                gone(front)
            disk_of(also_kept).write(0, block(1))
        assert len(EntropyDriver(kept.memory, kept.queues[0], timeout=30).read(16)) == 16
    assert manager.dropped["full"] == manager.dropped["duplicate"] == []  # what hangs up may be dropped first


def test_one_front_end_cannot_use_the_store_up(manage: Start, short_dir: Path) -> None:
    """With many memory files its own session is not kept any more; the next one is."""
    manager = manage(DISK + OTHERS, limit=20, environment={"FDSTORE": "20"})
    with (
        closing(many_files(6)) as files,
        Frontend.open(short_dir / "disk.sock", timeout=30, memory=files) as greedy,
        Frontend.open(short_dir / "rng.sock", timeout=30) as modest,
    ):
        assert "disk:0: a restart of hcd will end this connection" in manager.log_tail()
        manager.restart()
        gone(greedy)
        assert len(EntropyDriver(modest.memory, modest.queues[0], timeout=30).read(16)) == 16


def test_a_store_that_is_smaller_than_the_service_knows(manage: Start, short_dir: Path) -> None:
    manager = manage(DISK, limit=4)
    with Frontend.open(short_dir / "disk.sock", timeout=30) as front:
        disk_of(front).write(0, block(1))
        assert manager.dropped["full"]
        manager.restart()
        gone(front)
        assert "did not keep" in manager.log_tail()
    manager.until(lambda: manager.names() == [], "empty store")
