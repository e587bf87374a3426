"""What a session leaves behind when nobody collects garbage.

A daemon that is idle makes no objects, so no collection ever runs: what an ended session left in a cycle of references
stays mapped, open and alive, perhaps for days. Here hcd runs without a collector at all, under
a manager that keeps sessions over restarts. All kinds of sessions come and end in all kinds of ways, twice; after the
second time there must be nothing more than after the first.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from hcd_protocols.vhost_user.messages import FRONTEND_REQUESTS, VERSION, RequestSpec, build_message
from hcd_protocols.virtio.blk import RequestType
from manager import Manager
from tables import table

from hcd.demo.hcd_process import Resources, fetch
from hcd.frontend.blk import BLOCK_FEATURES, BlockDriver, BlockRequest
from hcd.frontend.client import Frontend
from hcd.frontend.errors import FrontendError
from hcd.frontend.memory import MemorySlot, SharedMemory
from hcd.frontend.net import NET_FEATURES, NetDriver
from hcd.frontend.rng import EntropyDriver
from hcd.testing.vmm import Vmm

pytestmark = pytest.mark.long

TIMEOUT = 60.0
#: what the log remembers of lines that repeat
OWN = "hcd.log._Window"
SECTOR = 512
QUEUES = 2

ALWAYS = "".join([
    '[daemon]\ndrain_timeout = 0.1\nmetrics = "unix:{dir}/metrics.sock"\n\n',
    table("disk", "blk", blk_file="{dir}/disk.img", num_queues=2),
    table("ram", "blk", 'wrap = [{ error = { pattern = ".x" } }]', ram="1M"),
    table("net0", "net"),
    table("net1", "net"),
    table("rng", "rng"),
    table("slow", "rng", max_bytes=1, period=3_600_000),
    table("bells", "echo", ports="0x510,0x514", stamps=True),
])

#: the second generation of each takes the place of the first at a reload
CHANGING = {
    "blk": ('ram = "1M"', 'ram = "2M"'),
    "scsi": ('disk = ["ram:1M"]', 'disk = ["ram:2M"]'),
    "net": ('hub = "one"', 'hub = "two"'),
    "rng": ("period = 1000", "period = 2000"),
    "console": ('port = ["listen:{dir}/one.sock"]', 'port = ["listen:{dir}/two.sock"]'),
    "vsock": ('uds-path = "{dir}/one.vsock"', 'uds-path = "{dir}/two.vsock"'),
    "echo": ('ports = "0x520"', 'ports = "0x524"'),
}


def changing(generation: int) -> str:
    return "".join(
        f'[[device]]\nname = "changing-{kind}"\ntype = "{kind}"\nsocket = "{{dir}}/changing-{kind}.sock"\n'
        f"[device.options]\n{options[generation]}\n"
        for kind, options in CHANGING.items()
    )


class Daemon:
    """hcd under a manager, and what it holds."""

    def __init__(self, directory: Path, manager: Manager) -> None:
        self.directory = directory
        self.manager = manager

    def socket(self, name: str) -> Path:
        return self.directory / f"{name}.sock"

    def open(self, name: str = "disk", **how: object) -> Frontend:
        return Frontend.open(self.socket(name), timeout=TIMEOUT, **how)  # type: ignore[arg-type]

    def configure(self, generation: int) -> None:
        text = ALWAYS + changing(generation)
        (self.directory / "hcd.toml").write_text(text.replace("{dir}", str(self.directory)))

    def reload(self, generation: int) -> None:
        """Returns when the devices are those of ``generation``."""
        manager = self.manager
        assert manager.process is not None
        heard = len(manager.heard)
        self.configure(generation)
        manager.process.send_signal(signal.SIGHUP)
        manager.until(lambda: any(one.startswith("READY=1") for one in manager.heard[heard:]), "end of the reload")

    def objects(self) -> dict[str, int]:
        with socket.socket(socket.AF_UNIX) as asks:
            asks.settimeout(TIMEOUT)
            asks.connect(str(self.directory / "objects.sock"))
            told: dict[str, int] = json.loads(asks.makefile().read())
            return told

    def holds(self) -> Held:
        """Without the connection over which we asked for the metrics, once that is closed there too."""
        assert self.manager.process is not None
        while (objects := self.objects()).get("hcd.metrics.server._Connection"):
            time.sleep(0.01)
        return Held(Resources(self.manager.process.pid), objects)

    def holds_at_rest(self) -> Held:
        """The connection over which something was asked takes a moment to end."""
        held = self.holds()
        while held.growth_since(later := self.holds()):
            held = later
        return held

    def wait_until_idle(self) -> None:
        """The last session of every device is over."""
        connected = 'hcd_connected{device="([^"]+)"} 1'
        while re.search(connected, fetch(self.directory / "metrics.sock", "/metrics")):
            time.sleep(0.01)

    def growth_since(self, before: Held) -> str:
        """What is there and was not there ``before``. The last task of a session takes a moment to end."""
        deadline = time.monotonic() + 10
        while (growth := self.holds().growth_since(before)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return growth


class Held:
    """Descriptors, threads, mappings; objects."""

    def __init__(self, resources: Resources, objects: dict[str, int]) -> None:
        # A file's threads come with its load, and stay.
        resources.threads = [name for name in resources.threads if name != "hcd-block"]
        self.resources = resources
        self.objects = objects

    def growth_since(self, earlier: Held) -> str:
        more = {
            name: f"{earlier.objects.get(name, 0)} -> {number}"
            for name, number in self.objects.items()
            if number > earlier.objects.get(name, 0) and name != OWN
        }
        return "; ".join(filter(None, [self.resources.growth_since(earlier.resources), str(more) if more else ""]))


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="hcd-", dir="/tmp") as name:
        directory = Path(name)
        (directory / "disk.img").write_bytes(bytes(1 << 20))
        program = [sys.executable, str(Path(__file__).with_name("without_gc.py")), str(directory / "objects.sock")]
        with Manager(directory, [*program, "run", str(directory / "hcd.toml")]) as manager:
            made = Daemon(directory, manager)
            made.configure(0)
            manager.start()
            yield made
            assert manager.kill(signal.SIGTERM) == 0, manager.log_tail()
            assert "Traceback" not in manager.log.read_text(), manager.log_tail()


# -- sessions

def disk_of(front: Frontend, index: int = 0) -> BlockDriver:
    return BlockDriver(front.memory, front.queues[index], timeout=TIMEOUT)


@contextmanager
def memory_file(size: int = 1 << 20) -> Iterator[int]:
    fd = os.memfd_create("garbage")
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def well_behaved(daemon: Daemon) -> None:
    """Both kinds of rings; rings that are stopped first; memory slots and tables; requests in the record."""
    for packed in (False, True):
        for protocol in (~0, ~(1 << 15), 0):
            with daemon.open(queues=QUEUES, packed=packed, protocol=protocol) as front:
                for index in range(QUEUES):
                    disk_of(front, index).write(index, bytes(SECTOR))
                if protocol:
                    front.open_back_channel()
                    front.config(0, 8)
                    front.write_config(32, b"\0")
                    front.stop_queue(0)
    with daemon.open(inflight=True) as front:
        disk_of(front).write(1, bytes(SECTOR))


def all_devices(daemon: Daemon) -> None:
    cards = []
    with ExitStack() as stack:
        for name in ("net0", "net1"):
            front = stack.enter_context(daemon.open(name, queues=2, device=int(NET_FEATURES)))
            cards.append(NetDriver(front.memory, *front.queues.values(), features=front.features, timeout=TIMEOUT))
        frame = b"\xff" * 6 + b"\x52\x54\0\0\0\x01" + b"\x88\xb5" + bytes(50)
        cards[0].send(frame)
        assert cards[1].receive() == frame
    with daemon.open("rng") as front:
        assert len(EntropyDriver(front.memory, front.queues[0], timeout=TIMEOUT).read(64)) == 64
    with daemon.open("ram", device=BLOCK_FEATURES) as front:  # every second request fails
        for _ in range(4):
            with suppress(FrontendError):
                disk_of(front).write(0, bytes(SECTOR))


def doorbells(daemon: Daemon) -> None:
    for refuses in (False, True):
        vmm = Vmm(str(daemon.socket("bells")), register=lambda item, error=17 * refuses: error)  # type: ignore[misc]
        vmm.close()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as nonsense, memory_file() as fd:
        nonsense.connect(str(daemon.socket("bells")))
        socket.send_fds(nonsense, [b"what?"], [fd])
        nonsense.recv(4096)


def broken_messages(daemon: Daemon) -> None:
    """Each request in turn: too short, with descriptors that it does not take, and with any content."""
    chance = random.Random(1)
    for spec in FRONTEND_REQUESTS.values():
        for data, count in _variants(spec, chance):
            with daemon.open(memory_size=1 << 20) as front, memory_file() as memory, suppress(FrontendError):
                files = [memory, front.queues[0].kick_fd]
                front.send_raw(data, [files[n % 2] for n in range(count)])
                front.sync()
                front.sync()


def _variants(spec: RequestSpec, chance: random.Random) -> Iterator[tuple[bytes, int]]:
    size, most = max(spec.min_size, 8 if spec.max_size else 0), spec.max_fds
    request = spec.request
    yield build_message(request, bytes(spec.min_size - 1 if spec.min_size else 1)), most
    yield build_message(request, bytes(size)), most + 1
    yield build_message(request, bytes(size)), spec.min_fds
    yield build_message(request, chance.randbytes(size), VERSION | 8), most


def bad_guests(daemon: Daemon) -> None:
    """The ring breaks, or the memory goes away under it."""
    for packed in (False, True):
        with daemon.open(packed=packed, memory_size=1 << 20) as front:
            queue = front.queues[0]
            queue.submit([(1 << 60, 16)], [(front.memory.alloc(1), 1)])
            front.sync()
        with (
            SharedMemory.of_size(1 << 20, seal=False) as memory,
            suppress(FrontendError),
            daemon.open(packed=packed, memory=memory) as front,
        ):
            disk_of(front).write(0, bytes(SECTOR))
            os.ftruncate(memory.regions[0].fd, 0)
            while True:
                front.queues[0].kick()
                front.sync()


def in_the_middle(daemon: Daemon) -> None:
    """The front end dies in a message, with requests in flight, or with memory that requests still need."""
    with Frontend(daemon.socket("disk"), timeout=TIMEOUT) as front, memory_file() as memory:
        front.send_raw(build_message(FRONTEND_REQUESTS[5].request, bytes(100))[:20], [memory])
    with daemon.open(queues=QUEUES) as front:
        for index in range(QUEUES):
            disk = disk_of(front, index)
            for sector in range(16):
                disk.add(BlockRequest(RequestType.OUT, sector, bytes(SECTOR)))
            front.queues[index].publish()
            front.queues[index].kick()
    for stops in (False, True):
        slots = [MemorySlot(gpa=number << 24, size=1 << 20) for number in range(2)]
        with SharedMemory(slots) as memory, Frontend(daemon.socket("slow"), memory=memory, timeout=TIMEOUT) as front:
            front.negotiate()
            front.share_memory()
            queue = front.start_queue(0, region=0)
            buffer = memory.regions[1].gpa + 4096
            for _ in range(4):
                queue.submit([], [(buffer, 64)])
            front.sync()
            if stops:
                front.stop_queue(0)
                front.hand_over(queue, queue.ring.rewind())
            memory.regions[:] = memory.regions[:1]
            front.share_memory()


def two_at_once(daemon: Daemon) -> None:
    with daemon.open(), Frontend(daemon.socket("disk"), timeout=TIMEOUT) as second:
        second.wait_hangup()


def reload(daemon: Daemon) -> None:
    """Devices, with a session or without, are exchanged for others, and back."""
    for generation in (1, 0):
        with daemon.open("changing-blk") as front, daemon.open("changing-net", queues=2) as card:
            disk_of(front).write(0, bytes(SECTOR))
            daemon.reload(generation)
            front.wait_hangup()
            card.wait_hangup()


Session = Callable[[Daemon], None]
SESSIONS: tuple[Session, ...] = (
    well_behaved, all_devices, doorbells, broken_messages, bad_guests, in_the_middle, two_at_once, reload,
)


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.__name__)
def test_a_session_leaves_nothing_to_be_collected(daemon: Daemon, session: Session) -> None:
    session(daemon)
    daemon.wait_until_idle()
    before = daemon.holds()
    session(daemon)
    daemon.wait_until_idle()
    growth = daemon.growth_since(before)
    assert not growth, growth


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nor_does_a_session_that_another_process_began(daemon: Daemon, number: signal.Signals) -> None:
    """One is gone on with, one breaks the protocol after that. The last session of a device is all that is kept."""
    with daemon.open(queues=QUEUES) as disk, daemon.open("changing-blk") as other:
        disk_of(disk).write(0, bytes(SECTOR))
        daemon.manager.restart(number)
        disk_of(disk, 1).write(1, bytes(SECTOR))
        other.send_raw(bytes(12))
        other.wait_hangup()
    daemon.wait_until_idle()
    after = daemon.holds_at_rest()
    for _ in range(2):
        daemon.open(queues=QUEUES).close()
        daemon.open("changing-blk").close()
    daemon.wait_until_idle()
    fresh = daemon.holds()
    assert not (growth := after.growth_since(fresh)), growth
    assert not (growth := daemon.growth_since(after)), growth
