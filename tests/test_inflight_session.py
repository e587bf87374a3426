"""A daemon is killed with requests in flight; the front end comes back to the next one and nothing is missing."""

from __future__ import annotations

import os
import random
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hcd_protocols.virtio.blk import SECTOR_SIZE, RequestType
from tables import table

from hcd.demo.hcd_process import HcdProcess
from hcd.frontend.blk import BlockDriver, BlockRequest
from hcd.frontend.client import Frontend
from hcd.frontend.errors import BackendError
from hcd.frontend.net import NET_FEATURES, NetDriver

pytestmark = pytest.mark.long

Start = Callable[..., HcdProcess]

DISK = table("disk", "blk", blk_file="{dir}/disk.img")

#: every fourth request takes a moment, whatever the image lies on
SLOW = 'wrap = [{ error = { pattern = "...d", delay-ms = 1 } }]'
SLOW_DISK = table("disk", "blk", SLOW, blk_file="{dir}/disk.img")

HUB = table("left", "net") + table("right", "net")

BLOCK = 4096
BLOCKS = 256
DEPTH = 32


def stamp(place: int, sequence: int) -> bytes:
    """A block that says everywhere what it is, so that half of one is found."""
    return struct.pack("<QQ", place, sequence) * (BLOCK // 16)


class Writer:
    """Writes stamped blocks at ``depth``, never two at one place at once, and remembers what it was told."""

    def __init__(self, frontend: Frontend, seed: int, depth: int = DEPTH) -> None:
        self.frontend = frontend
        self.driver = BlockDriver(frontend.memory, frontend.queues[0], timeout=20)
        self.random = random.Random(seed)
        self.sequence = 0
        self.depth = depth
        #: place -> sequence: acknowledged, and on its way
        self.acknowledged: dict[int, int] = {}
        self.underway: dict[int, int] = {}

    def fill(self) -> None:
        while len(self.underway) < self.depth:
            place = self.random.randrange(BLOCKS)
            if place not in self.underway:
                self.sequence += 1
                self.underway[place] = self.sequence
                request = BlockRequest(RequestType.OUT, place * BLOCK // SECTOR_SIZE, stamp(place, self.sequence))
                request.pieces = (512, 1024) if self.sequence % 3 == 0 else ()
                self.driver.add(request)
        self.driver.queue.publish()

    def take(self, done: list[BlockRequest]) -> int:
        for request in done:
            place = request.check().sector * SECTOR_SIZE // BLOCK
            self.acknowledged[place] = self.underway.pop(place)
        return len(done)

    def write(self, count: int) -> None:
        """Until ``count`` more are acknowledged; ``depth`` others are in flight then."""
        self.fill()
        while count > 0:
            count -= self.take(self.driver.wait())
            self.fill()

    def write_until_hangup(self, count: int, then: Callable[[], object]) -> None:
        """At full depth to the end; ``then`` is called in another thread after ``count`` writes, and is to kill."""
        killer = threading.Thread(target=then)
        with pytest.raises(BackendError, match="hung up"):
            self._write_on(count, killer)
        killer.join()

    def _write_on(self, count: int, then: threading.Thread) -> None:
        while True:
            self.fill()
            count -= self.take(self.driver.wait())
            if count <= 0 and then.ident is None:
                then.start()

    def finish(self) -> None:
        while self.underway:
            self.take(self.driver.wait())

    def check_image(self, image: bytes) -> None:
        """Every acknowledged block is there whole; one that is on its way may be there, or the one before it."""
        for place, sequence in self.acknowledged.items():
            block = image[place * BLOCK : (place + 1) * BLOCK]
            assert block in (stamp(place, sequence), stamp(place, self.underway.get(place, sequence))), place


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_killed_with_a_full_queue(packed: bool, short_dir: Path, start_hcd: Start) -> None:
    """Ten times, in the middle of 32 writes that are in flight: all complete, once, without an error."""
    image = short_dir / "disk.img"
    image.write_bytes(bytes(BLOCK * BLOCKS))
    hcd = start_hcd(SLOW_DISK)
    # A driver that knows no flush has each write synchronised, so they take their time, and a moment more in any case.
    with Frontend.open(short_dir / "disk.sock", packed=packed, inflight=True, device=0, timeout=20) as frontend:
        writer = Writer(frontend, seed=packed)
        recovered = 0
        for _ in range(10):
            writer.write_until_hangup(200, hcd.kill)
            writer.check_image(image.read_bytes())
            hcd = start_hcd(SLOW_DISK)
            frontend.reconnect()
            writer.finish()
            writer.check_image(image.read_bytes())
            recovered += "in flight when the last back end ended" in hcd.log_text
        assert recovered, "requests were hardly ever in flight when the daemon was killed"
        assert frontend.queues[0].ring.outstanding == 0


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_every_receive_buffer_is_offered_again(packed: bool, short_dir: Path, start_hcd: Start) -> None:
    """A network card is killed in the middle of frames that take several buffers each: none of 32 buffers is lost, as
    a burst that needs them all shows. Frames that were under way may be lost; nothing is torn or comes back."""
    hcd = start_hcd(HUB)
    options: dict[str, Any] = {"queues": 2, "size": 64, "packed": packed, "device": NET_FEATURES, "inflight": True}
    with (
        Frontend.open(short_dir / "left.sock", **options) as left,
        Frontend.open(short_dir / "right.sock", **options) as right,
    ):
        sender, receiver = (
            NetDriver(end.memory, end.queues[0], end.queues[1], features=end.features, buffers=32, buffer_size=128)
            for end in (left, right)
        )
        last = -1
        for life in range(5):
            killer = threading.Thread(target=hcd.kill)
            with suppress(BackendError):
                for number in range(life * 1000, life * 1000 + 1000):
                    sender.send(frame(number, 400))
                    last = newest(receiver.pending(), last)
                    if number % 1000 == 50:
                        killer.start()
            killer.join()
            hcd = start_hcd(HUB)
            left.reconnect()
            right.reconnect()
            sender.send()  # what the last daemon had taken and not answered goes out now
            last = newest(receiver.pending(), last)
            for number in range(8):  # of four buffers each
                sender.start([frame((life + 1) * 1000 - 8 + number, 400)])
            sender.send()
            burst = [receiver.receive() for _ in range(8)]
            assert newest(burst, last) == (life + 1) * 1000 - 1
            last = (life + 1) * 1000 - 1


def frame(number: int, size: int) -> bytes:
    """A broadcast whose rest says its number again and again."""
    return b"\xff" * 6 + b"\x02\0\0\0\0\1" + b"\x88\xb5" + struct.pack("<I", number) * ((size - 14) // 4)


def newest(frames: list[bytes], last: int) -> int:
    """The number of the last of ``frames``, which are whole and come after ``last``."""
    for one in frames:
        number = struct.unpack_from("<I", one, 14)[0]
        assert one == frame(number, 400)
        assert number >= last
        last = number
    return last


def test_without_a_record_the_front_end_may_still_come_back(short_dir: Path, start_hcd: Start) -> None:
    """The control: INFLIGHT_SHMFD negotiated, no region handed over, as QEMU does for devices that know none."""
    (short_dir / "disk.img").write_bytes(bytes(BLOCK * BLOCKS))
    hcd = start_hcd(DISK)
    with Frontend.open(short_dir / "disk.sock", timeout=20) as frontend:
        writer = Writer(frontend, seed=3)
        writer.write(100)
        writer.finish()
        hcd.kill()
        start_hcd(DISK)
        frontend.reconnect()
        writer.write(100)
        writer.finish()
        writer.check_image((short_dir / "disk.img").read_bytes())


def open_without_rings(path: Path, **options: bool) -> Frontend:
    frontend = Frontend(path)
    frontend.negotiate(**options)
    frontend.share_memory()
    return frontend


def test_the_region_may_come_after_the_rings(short_dir: Path, start_hcd: Start) -> None:
    """As long as they are not enabled. One that comes later is refused."""
    (short_dir / "disk.img").write_bytes(bytes(BLOCK * BLOCKS))
    start_hcd(DISK)
    with open_without_rings(short_dir / "disk.sock") as frontend:
        queue = frontend.start_queue(0, 64)
        frontend.enable_queue(0, False)
        frontend.request_inflight(1, 64)
        frontend.enable_queue(0)
        driver = BlockDriver(frontend.memory, queue)
        driver.write(0, stamp(0, 1))
        assert frontend.inflight is not None
        record = os.pread(frontend.inflight.fd, 16, 0)
        assert struct.unpack("<QHHHH", record)[1:3] == (1, 64)
        assert struct.unpack("<QHHHH", record)[4] == 1, "the used index after one request"
        with pytest.raises(BackendError):
            frontend.hand_over_inflight()
        frontend.wait_hangup()


def test_the_front_end_truncates_the_region(short_dir: Path, start_hcd: Start) -> None:
    """Each store of the daemon past the new end is a SIGBUS. The session ends, the process serves the next one."""
    (short_dir / "disk.img").write_bytes(bytes(BLOCK * BLOCKS))
    hcd = start_hcd(DISK)
    with open_without_rings(short_dir / "disk.sock") as frontend:
        frontend.request_inflight(1, 128)
        assert frontend.inflight is not None
        fd = os.memfd_create("unsealed", os.MFD_CLOEXEC)
        os.ftruncate(fd, frontend.inflight.mmap_size)
        os.close(frontend.inflight.fd)
        frontend.inflight = frontend.inflight._replace(fd=fd)
        frontend.hand_over_inflight()
        queue = frontend.start_queue(0, 128)
        driver = BlockDriver(frontend.memory, queue)
        driver.write(0, stamp(0, 1))
        os.ftruncate(fd, 0)
        driver.submit(BlockRequest(RequestType.OUT, 0, stamp(0, 2)))
        frontend.wait_hangup()
    assert "truncated the memory" in hcd.log_text
    with Frontend.open(short_dir / "disk.sock", inflight=True) as frontend:
        BlockDriver(frontend.memory, frontend.queues[0]).write(0, bytes(512))


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_ring_that_was_stopped_may_go_on_or_begin_anew(packed: bool, short_dir: Path, start_hcd: Start) -> None:
    """After GET_VRING_BASE the front end says where a ring stands, also with the region of before."""
    (short_dir / "disk.img").write_bytes(bytes(BLOCK * BLOCKS))
    hcd = start_hcd(DISK)
    with Frontend.open(short_dir / "disk.sock", packed=packed, inflight=True, size=16) as frontend:
        writer = Writer(frontend, seed=1, depth=4)
        writer.write(30)
        writer.finish()
        queue = frontend.queues[0]
        frontend.hand_over(queue, frontend.stop_queue(0))
        writer.write(10)
        writer.finish()
        frontend.stop_queue(0)
        queue.close()
        frontend.start_queue(0, 16)
        fresh = Writer(frontend, seed=2, depth=4)
        fresh.write_until_hangup(30, hcd.kill)
        start_hcd(DISK)
        frontend.reconnect()
        fresh.finish()
        fresh.check_image((short_dir / "disk.img").read_bytes())


@pytest.mark.parametrize(
    ("size", "offset", "queues", "entries", "why"),
    [
        (64, 0, 1, 128, "take 2112"),
        (1 << 20, 0, 1, 128, "the file has"),
        (2112, 8, 1, 128, "multiple of 64"),
        (2112, 1 << 20, 1, 128, "the file has"),
        (4224, 0, 1, 512, "take"),
        ((1 << 62), (1 << 62), 1, 128, "larger than any file"),
        (2112, 0, 0, 128, "queues"),
        (2112, 0, 2, 128, "queues"),
        (2112, 0, 1, 0, "queues"),
        (2112, 0, 1, 65535, "queues"),
    ],
)
def test_a_region_that_cannot_be_is_refused(
    size: int, offset: int, queues: int, entries: int, why: str, short_dir: Path, start_hcd: Start
) -> None:
    """The connection ends, the log says why; the next front end is served and no descriptor stays behind."""
    (short_dir / "disk.img").write_bytes(bytes(BLOCK * BLOCKS))
    hcd = start_hcd(DISK)
    with open_without_rings(short_dir / "disk.sock") as frontend:
        frontend.request_inflight(1, 128)
        assert frontend.inflight is not None
        frontend.inflight = frontend.inflight._replace(
            mmap_size=size, mmap_offset=offset, num_queues=queues, queue_size=entries
        )
        with pytest.raises(BackendError):
            frontend.hand_over_inflight()
        frontend.wait_hangup()
    assert why in hcd.log_text
    with Frontend.open(short_dir / "disk.sock", inflight=True) as frontend:
        BlockDriver(frontend.memory, frontend.queues[0]).write(0, bytes(512))


def test_a_ring_larger_than_the_region_is_served_without_a_record(short_dir: Path, start_hcd: Start) -> None:
    """QEMU's virtio-mmio: the driver takes 1024 entries where the region was made for 128. The log says it."""
    (short_dir / "disk.img").write_bytes(bytes(BLOCK * BLOCKS))
    hcd = start_hcd(DISK)
    with open_without_rings(short_dir / "disk.sock") as frontend:
        frontend.request_inflight(1, 128)
        frontend.hand_over_inflight()
        frontend.start_queue(0, 1024)
        frontend.driver_ok()
        disk = BlockDriver(frontend.memory, frontend.queues[0])
        disk.write(0, bytes(range(256)) * 2)
        assert disk.read(0, 512) == bytes(range(256)) * 2
    assert "disk: queue 0: a ring of 1024 entries and an in-flight region for 128: its requests are not" in hcd.log_text
