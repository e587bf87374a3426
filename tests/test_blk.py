"""The block device on a real reactor, driven through split and packed rings in this process."""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hcd_protocols.virtio.blk import REQUEST_HEADER, SEGMENT, BlkConfig, RequestType
from hcd_protocols.virtio.features import BlkFeature, RingFeature

from hcd.device import ConfigError, DeviceError, GuestError, Virtqueue
from hcd.devices import image
from hcd.devices.blk import OPERATIONS, Block
from hcd.frontend.blk import BlockDriver, BlockRequest
from hcd.frontend.errors import RequestFailed
from hcd.frontend.local import LocalDevice, LocalLane, LocalQueue, map_memory
from hcd.frontend.memory import SharedMemory

V1 = int(RingFeature.VERSION_1)
EVENT = int(RingFeature.EVENT_IDX)
PACKED = V1 | int(RingFeature.RING_PACKED)
INDIRECT = int(RingFeature.INDIRECT_DESC)
IN_ORDER = int(RingFeature.IN_ORDER)
RINGS = {
    "legacy": 0,
    "split-event": V1 | EVENT | INDIRECT,
    "split-in-order": V1 | IN_ORDER,
    "packed": PACKED | INDIRECT,
    "packed-event-in-order": PACKED | EVENT | IN_ORDER,
}
IN, OUT, FLUSH, GET_ID = RequestType.IN, RequestType.OUT, RequestType.FLUSH, RequestType.GET_ID
DISCARD, WRITE_ZEROES = RequestType.DISCARD, RequestType.WRITE_ZEROES
SECTOR = 512
OK, IOERR, UNSUPP = 0, 1, 2
SIZE = 1 << 20

pytestmark = pytest.mark.usefixtures("no_leaks")


class Rig:
    """A block device at work, and a driver for each of its queues."""

    def __init__(self, lane: LocalLane, options: dict[str, Any], features: int) -> None:
        self.block = Block("disk0", options)
        self.local = LocalDevice(self.block, lane, features=features | int(BlkFeature.FLUSH))
        self.local.__enter__()
        self.raised: list[Exception] = []
        for queue in self.local.queues:
            queue.device.on_error = self._handler_raised
        self.memory = self.local.memory
        self.drivers = [BlockDriver(self.memory, queue.driver) for queue in self.local.queues]
        self.driver = self.drivers[0]

    def _handler_raised(self, queue: Virtqueue, error: Exception) -> None:
        """What a session does then."""
        self.raised.append(error)
        request = queue.unfinished()
        assert request is not None
        self.block.fail_request(request, 1)

    def run(self, *requests: BlockRequest) -> None:
        for request in requests:
            self.driver.add(request)
        self.driver.queue.publish()
        while self.driver.inflight:
            self.driver.wait()

    def status(self, kind: int, sector: int = 0, data: bytes = b"", **more: Any) -> int:
        request = BlockRequest(kind, sector, data, **more)
        self.run(request)
        return request.status

    def raw(self, readable: list[int], writable: list[int], content: bytes) -> tuple[int, bytes]:
        """A chain of descriptors of these sizes, with ``content`` in the readable ones; what was written, where."""
        at = self.memory.alloc(sum(readable) + 1)
        self.memory.write(at, content)
        answer = self.memory.alloc(sum(writable) + 1)
        self.memory.write(answer, b"\xaa" * sum(writable))

        def cut(start: int, sizes: list[int]) -> list[tuple[int, int]]:
            return [(start + sum(sizes[:i]), size) for i, size in enumerate(sizes)]

        token = self.driver.queue.submit(cut(at, readable), cut(answer, writable))
        return self.driver.queue.wait_for(token), self.memory.read(answer, sum(writable))

    @property
    def stats(self) -> Any:
        return self.local.queues[0].stats

    def close(self) -> None:
        self.local.close()
        self.__dict__.clear()


@pytest.fixture
def lane() -> Iterator[LocalLane]:
    lane = LocalLane()
    yield lane
    lane.close()
    assert lane.errors == []


Start = Callable[..., Rig]


@pytest.fixture
def start(lane: LocalLane) -> Iterator[Start]:
    """``start(features=V1, ram=SIZE, ...)``: a device with these options, running."""
    rigs: list[Rig] = []

    def start(features: int = V1, **options: Any) -> Rig:
        rigs.append(Rig(lane, options, features))
        return rigs[-1]

    yield start
    for rig in rigs:
        if rig.__dict__:
            rig.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture(params=list(RINGS.values()), ids=list(RINGS))
def ring(request: pytest.FixtureRequest) -> int:
    features: int = request.param
    return features


@pytest.fixture(params=["file", "ram"])
def disk(request: pytest.FixtureRequest, ring: int, start: Start, path: Path) -> Rig:
    return start(ring, ram=SIZE) if request.param == "ram" else start(ring, blk_file=str(path))


@pytest.fixture
def ram(start: Start) -> Rig:
    return start(ram=SIZE, serial="a serial number")


def pattern(n: int, seed: int = 1) -> bytes:
    return bytes((i * 7 + i // 251 + seed) & 0xFF for i in range(n))


def header(kind: int, sector: int = 0) -> bytes:
    return REQUEST_HEADER.pack(kind, 0, sector)


# -- requests


def test_every_operation(disk: Rig) -> None:
    driver, data = disk.driver, pattern(32 << 10)
    driver.write(8, data)
    driver.flush()
    assert driver.read(8, len(data)) == data
    driver.write_zeroes(8, 2)
    driver.write_zeroes(20, 1, unmap=True)
    expected = bytes(1024) + data[1024 : 12 * SECTOR] + bytes(SECTOR) + data[13 * SECTOR :]
    assert driver.read(8, len(data)) == expected
    driver.discard(8, 64)
    assert driver.get_id() == ""
    stats = disk.stats
    counts = {name: stats.requests(i, OK) for i, name in enumerate(OPERATIONS)}
    assert counts == dict(zip(OPERATIONS, (2, 1, 1, 1, 2, 1, 0), strict=True))
    assert (stats.inflight, stats.guest_errors) == (0, 0)


def test_a_mixed_load_at_depth(disk: Rig) -> None:
    rounds = [BlockRequest(OUT, 8 * i, pattern(4096, i), pieces=(100, 1000)) for i in range(64)]
    rounds += [BlockRequest(FLUSH)]
    assert [r.status for r in disk.driver.pipeline(rounds, 32)] == [OK] * 65
    reads = [BlockRequest(IN, 8 * i, length=4096, pieces=(3000,)) for i in range(64)]
    assert [r.status for r in disk.driver.pipeline(reads, 32)] == [OK] * 64
    assert [r.result for r in reads] == [pattern(4096, i) for i in range(64)]


@pytest.mark.parametrize("features", [V1 | INDIRECT, PACKED | INDIRECT], ids=["split", "packed"])
def test_indirect_chains(start: Start, features: int) -> None:
    rig = start(features, ram=SIZE)
    data = pattern(20 * SECTOR)
    assert rig.status(OUT, 4, data, indirect=True, pieces=(100,) * 30) == OK
    read = BlockRequest(IN, 4, length=len(data), indirect=True, pieces=(512,) * 10)
    rig.run(read)
    assert read.result == data


def test_queues_work_on_the_same_disk(start: Start, path: Path) -> None:
    rig = start(blk_file=str(path), num_queues=4)
    for index, driver in enumerate(rig.drivers):
        driver.write(index, bytes([index + 1]) * SECTOR)
    expected = b"".join(bytes([index + 1]) * SECTOR for index in range(4))
    assert [driver.read(0, 4 * SECTOR) for driver in rig.drivers] == [expected] * 4


def test_discard_leaves_a_hole_and_the_file_holds_the_rest(start: Start, path: Path) -> None:
    rig = start(blk_file=str(path))
    rig.driver.write(0, b"\xee" * SIZE)
    rig.driver.flush()
    full = path.stat().st_blocks
    rig.driver.discard(8, 1024)
    assert path.stat().st_blocks <= full - 1000
    content = path.read_bytes()
    assert content == b"\xee" * 4096 + bytes(512 << 10) + b"\xee" * (SIZE - 4096 - (512 << 10))


def test_get_id_fills_what_the_driver_has_room_for(ram: Rig) -> None:
    assert ram.raw([16], [20, 1], header(GET_ID)) == (21, b"a serial number".ljust(20, b"\0") + b"\0")
    assert ram.raw([16], [4, 1], header(GET_ID)) == (5, b"a se\0")
    assert ram.raw([16], [30, 1], header(GET_ID)) == (21, b"a serial number".ljust(20, b"\0") + b"\xaa" * 10 + b"\0")
    assert ram.raw([16], [1], header(GET_ID)) == (1, b"\0")


@pytest.mark.parametrize("sizes", [[1] * 16, [3, 13], [4, 4, 8], [12, 4], [15, 1]])
def test_a_header_split_over_descriptors_works(ram: Rig, sizes: list[int]) -> None:
    data = pattern(SECTOR)
    assert ram.raw([*sizes, 100, 412], [1], header(OUT, 2**8 + 3) + data) == (1, b"\0")
    assert ram.driver.read(2**8 + 3, SECTOR) == data


def test_header_data_and_status_in_one_descriptor_each_way(ram: Rig) -> None:
    data = pattern(SECTOR)
    assert ram.raw([16 + SECTOR], [1], header(OUT, 5) + data) == (1, b"\0")
    assert ram.raw([16], [SECTOR + 1], header(IN, 5)) == (SECTOR + 1, data + b"\0")


@pytest.mark.parametrize("size", [1, 3, 4, 8, 15])
def test_a_header_cut_short_fails_with_a_status(ram: Rig, size: int) -> None:
    for kind in (IN, OUT):
        assert ram.raw([size], [SECTOR, 1], header(kind)[:size]) == (1, b"\xaa" * SECTOR + b"\1")
    assert [type(error) for error in ram.raised] == [GuestError, GuestError]
    assert ram.stats.requests(0, 1) + ram.stats.requests(1, 1) == 2
    assert ram.status(IN, 0, length=SECTOR) == OK


def test_a_header_cut_short_without_a_status_byte_is_given_back(ram: Rig) -> None:
    assert ram.raw([15], [], header(OUT)[:15]) == (0, b"")
    assert [type(error) for error in ram.raised] == [GuestError]


def test_a_request_without_a_status_byte_is_given_back(ram: Rig) -> None:
    for kind in (IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 99):
        assert ram.raw([16 + SECTOR], [], header(kind) + bytes(SECTOR)) == (0, b"")
    assert ram.stats.guest_errors == 7
    assert ram.status(IN, 0, length=SECTOR) == OK


BAD = {
    "past the end": (BlockRequest(IN, SIZE // SECTOR, length=SECTOR), IOERR),
    "across the end": (BlockRequest(OUT, SIZE // SECTOR - 1, bytes(1024)), IOERR),
    "far away": (BlockRequest(IN, 2**64 - 1, length=SECTOR), IOERR),
    "odd size": (BlockRequest(OUT, 0, bytes(SECTOR - 1)), IOERR),
    "unknown type": (BlockRequest(14, 0), UNSUPP),
    "SCSI": (BlockRequest(2, 0), UNSUPP),
    "huge type": (BlockRequest(2**32 - 1, 0), UNSUPP),
    "no segment": (BlockRequest(DISCARD, 0), IOERR),
    "part of a segment": (BlockRequest(WRITE_ZEROES, 0, bytes(17)), IOERR),
    "too many segments": (BlockRequest(WRITE_ZEROES, 0, SEGMENT.pack(0, 1, 0) * 17), IOERR),
    "segment too long": (BlockRequest(DISCARD, 0, SEGMENT.pack(0, (1 << 21) + 1, 0)), IOERR),
    "segment past the end": (BlockRequest(WRITE_ZEROES, 0, SEGMENT.pack(SIZE // SECTOR, 1, 0)), IOERR),
    "segment that wraps": (BlockRequest(DISCARD, 0, SEGMENT.pack(2**64 - 1, 2, 0)), IOERR),
    "unknown flag": (BlockRequest(WRITE_ZEROES, 0, SEGMENT.pack(0, 1, 2)), UNSUPP),
    "unmap of a discard": (BlockRequest(DISCARD, 0, SEGMENT.pack(0, 1, 1)), UNSUPP),
}


@pytest.mark.parametrize("features", [V1, PACKED], ids=["split", "packed"])
def test_a_bad_request_fails_alone_and_is_logged_once(
    start: Start, path: Path, features: int, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(b"\xee" * SIZE)
    rig = start(features, blk_file=str(path))
    with caplog.at_level(logging.WARNING, "hcd.device"):
        for name, (request, status) in BAD.items():
            assert rig.status(request.kind, request.sector, request.data, length=request.length) == status, name
            assert rig.status(IN, 0, length=SECTOR) == OK
    assert path.read_bytes() == b"\xee" * SIZE
    assert rig.stats.guest_errors == len(BAD)
    assert sum(rig.stats.requests(op, 1) + rig.stats.requests(op, 2) for op in range(len(OPERATIONS))) == len(BAD)
    assert caplog.messages == [
        f"queue 0: bad read request of the driver: 512 bytes at sector 2048 are past the end, {SIZE // SECTOR}"
    ]


def test_headers_of_a_big_endian_legacy_driver(lane: LocalLane) -> None:
    memory = SharedMemory.of_size(1 << 20)
    queue = LocalQueue(memory, map_memory(memory), features=0, operations=OPERATIONS, big_endian=True)
    block = Block("disk0", {"ram": SIZE})
    block.open(lane)
    block.connect(0)
    driver = BlockDriver(memory, queue.driver, big_endian=True)
    write = BlockRequest(OUT, 0x123, pattern(SECTOR))
    zeroes = BlockRequest(WRITE_ZEROES, 0, struct.pack(">QII", 0x124, 1, 1))
    read = BlockRequest(IN, 0x123, length=SECTOR)
    for request in (write, zeroes, read):
        driver.add(request)
        queue.driver.publish()
        queue.turn(block.process)
        driver.poll()
    assert (write.status, zeroes.status, read.status, read.result) == (OK, OK, OK, pattern(SECTOR))
    block.close()
    queue.close()
    memory.close()


# -- failures of the file


def test_a_file_error_is_an_error_status_and_logged_once_a_minute(
    start: Start, path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("hcd.devices.blk.time.monotonic", lambda: now[0])
    rig = start(blk_file=str(path))
    os.truncate(path, 0)
    with caplog.at_level(logging.WARNING, "hcd.device"):
        for _ in range(3):
            assert rig.status(IN, 8, length=SECTOR) == IOERR
        now[0] += 61
        assert rig.status(IN, 8, length=SECTOR) == IOERR
    assert caplog.messages == [
        "queue 0: read failed: [Errno 5] Input/output error",
        "queue 0: read failed: [Errno 5] Input/output error (2 more since the last such message)",
    ]
    assert rig.stats.requests(0, 1) == 4
    assert rig.stats.guest_errors == 0


def test_closing_with_requests_in_flight(start: Start, path: Path) -> None:
    rig = start(blk_file=str(path))
    for i in range(60):
        rig.driver.add(BlockRequest(OUT, 8 * i, pattern(4096, i)))
    rig.driver.queue.publish()
    rig.close()    # no_leaks looks at threads, descriptors and memory


# -- what the driver is told


def test_configuration_space_of_a_file(start: Start, path: Path) -> None:
    rig = start(blk_file=str(path), num_queues=2)
    assert BlkConfig.from_bytes(rig.block.config()) == BlkConfig(
        capacity=2048, seg_max=126, blk_size=512, physical_block_exp=3, min_io_size=8, writeback=1, num_queues=2,
        max_discard_sectors=1 << 21, max_discard_seg=16, discard_sector_alignment=8,
        max_write_zeroes_sectors=1 << 21, max_write_zeroes_seg=16, write_zeroes_may_unmap=1,
    )
    assert len(rig.block.config()) == 60


@pytest.mark.parametrize(("size", "exponent"), [(512, 3), (1024, 2), (4096, 0), (8192, 0)])
def test_logical_block_size(start: Start, size: int, exponent: int) -> None:
    config = BlkConfig.from_bytes(start(ram=SIZE, block_size=size).block.config())
    assert (config.capacity, config.blk_size, config.physical_block_exp) == (2048, size, exponent)
    assert config.discard_sector_alignment == max(4096, size) // 512


def test_features() -> None:
    always = {"SEG_MAX", "BLK_SIZE", "FLUSH", "TOPOLOGY", "CONFIG_WCE"}

    def names(**options: Any) -> set[str]:
        return {str(bit.name) for bit in BlkFeature(Block("d", options).features)}

    assert names(ram=SIZE) == always | {"DISCARD", "WRITE_ZEROES", "SIZE_MAX"}
    assert names(ram=SIZE, num_queues=2) == always | {"DISCARD", "WRITE_ZEROES", "SIZE_MAX", "MQ"}
    assert names(blk_file="x", read_only=True) == always | {"RO"}


@pytest.fixture
def direct_path(path: Path) -> Path:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError:
        pytest.skip(f"no O_DIRECT in {path.parent}")
    return path


@pytest.mark.parametrize("offset", [0, 512, 16, 1])
@pytest.mark.parametrize("length", [512, 4096, 300 << 10])
def test_direct_takes_memory_of_any_alignment(start: Start, direct_path: Path, offset: int, length: int) -> None:
    rig = start(blk_file=str(direct_path), direct=True)
    at, small = rig.memory.alloc(length + 1024, 4096) + offset, rig.memory.alloc(64)
    data = pattern(length, seed=length % 251)
    rig.memory.write(at, data)
    rig.memory.write(small, header(OUT, 8))
    halves = [(at, length // 3), (at + length // 3, length - length // 3)]
    queue = rig.driver.queue
    assert queue.wait_for(queue.submit([(small, 16), *halves], [(small + 32, 1)])) == 1
    assert direct_path.read_bytes()[4096 : 4096 + length] == data
    rig.memory.write(at, bytes(length))
    rig.memory.write(small, header(IN, 8))
    assert queue.wait_for(queue.submit([(small, 16)], [*halves, (small + 32, 1)])) == length + 1
    assert rig.memory.read(at, length) == data
    assert (rig.memory.read(small + 32, 1), rig.stats.guest_errors) == (b"\0", 0)


def test_direct_goes_past_the_page_cache(start: Start, direct_path: Path) -> None:
    rig = start(blk_file=str(direct_path), direct=True)
    flags = [os.readlink(f"/proc/self/fd/{fd}") == str(direct_path) and _is_direct(fd) for fd in _own_fds()]
    assert any(flags)
    assert rig.status(IN, 0, length=4096) == OK


def _own_fds() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]


def _is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def test_read_only(start: Start, path: Path) -> None:
    path.chmod(0o444)
    rig = start(blk_file=str(path), read_only=True)
    for kind, data in ((OUT, bytes(SECTOR)), (DISCARD, SEGMENT.pack(0, 1, 0)), (WRITE_ZEROES, SEGMENT.pack(0, 1, 0))):
        assert rig.status(kind, 0, data) == IOERR
    assert rig.status(IN, 0, length=SECTOR) == OK
    assert rig.status(FLUSH) == OK
    config = BlkConfig.from_bytes(rig.block.config())
    assert (config.max_discard_sectors, config.max_write_zeroes_sectors) == (0, 0)


def test_the_driver_chooses_the_write_cache_mode(start: Start, path: Path) -> None:
    block = start(blk_file=str(path)).block
    assert not block._disk.writethrough
    block.write_config(32, b"\0")
    assert block._disk.writethrough
    assert BlkConfig.from_bytes(block.config()).writeback == 0
    block.connect(int(BlkFeature.FLUSH | BlkFeature.CONFIG_WCE))
    assert block._disk.writethrough, "the mode survives a reconnect"
    block.write_config(32, b"\1")
    assert not block._disk.writethrough


def test_a_driver_that_cannot_flush_gets_writethrough(start: Start, path: Path) -> None:
    rig = start(blk_file=str(path))
    rig.block.connect(V1)
    assert rig.block._disk.writethrough
    rig.driver.write(0, pattern(SECTOR))
    assert path.read_bytes()[:SECTOR] == pattern(SECTOR)
    rig.block.connect(V1 | int(BlkFeature.CONFIG_WCE))
    assert not rig.block._disk.writethrough


@pytest.mark.parametrize(("offset", "data"), [(0, b"\1"), (32, b"\2"), (32, b"\0\0"), (33, b"\0"), (32, b"")])
def test_nothing_else_can_be_written(start: Start, offset: int, data: bytes) -> None:
    block = start(ram=SIZE).block
    before = block.config()
    with pytest.raises(DeviceError, match="write-cache mode at 32"):
        block.write_config(offset, data)
    assert block.config() == before


# -- options and images


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of blk-file and ram"),
        ({"blk_file": "x", "ram": 1 << 20}, "exactly one of blk-file and ram"),
        ({"ram": SIZE, "read_only": True}, "read-only"),
        ({"ram": SIZE, "direct": True}, "direct"),
        ({"ram": SIZE, "block_size": 3000}, "power of two"),
        ({"ram": SIZE, "serial": "x" * 21}, "expected up to 20"),
        ({"ram": SIZE, "serial": "ü" * 11}, "22 bytes"),
    ],
)
def test_options_that_contradict(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Block("d", options)


def refused(lane: LocalLane, **options: Any) -> str:
    block = Block("d", options)
    with pytest.raises(ConfigError) as caught:
        block.open(lane)
    block.close()    # harmless after a failed open
    return str(caught.value)


def test_paths_that_cannot_be_served(lane: LocalLane, tmp_path: Path) -> None:
    assert "No such file" in refused(lane, blk_file=str(tmp_path / "absent"))
    assert "Is a directory" in refused(lane, blk_file=str(tmp_path))
    assert "expected a file or a block device" in refused(lane, blk_file="/dev/null")
    os.mkfifo(tmp_path / "fifo")
    assert "expected a file or a block device" in refused(lane, blk_file=str(tmp_path / "fifo"))
    (tmp_path / "empty").touch()
    assert "less than one block" in refused(lane, blk_file=str(tmp_path / "empty"))
    assert "less than one block" in refused(lane, ram=100)


HEADS = {
    "qcow2": b"QFI\xfb\0\0\0\3",
    "qed": b"QED\0",
    "vmdk": b"KDMV",
    "vhdx": b"vhdxfile",
    "vhd": b"conectix",
    "luks": b"LUKS\xba\xbe\0\2",
    "vdi": b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe",
}


@pytest.mark.parametrize("name", HEADS)
def test_a_container_is_refused_unless_the_operator_insists(
    lane: LocalLane, start: Start, path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(HEADS[name].ljust(SIZE, b"\0"))
    message = refused(lane, blk_file=str(path))
    assert f"a {name} image" in message
    assert "force-raw" in message
    rig = start(blk_file=str(path), force_raw=True)
    assert rig.driver.read(0, SECTOR) == HEADS[name].ljust(SECTOR, b"\0")
    assert f"looks like a {name} image" in caplog.text


def test_the_last_part_of_a_block_is_not_served(start: Start, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(bytes(3 * 4096 + 700))
    rig = start(blk_file=str(path), block_size=4096)
    assert BlkConfig.from_bytes(rig.block.config()).capacity == 24
    assert "the last 700 are not served" in caplog.text
    with pytest.raises(RequestFailed):
        rig.driver.read(24, SECTOR)


def test_an_image_has_one_writer_or_many_readers(
    lane: LocalLane, start: Start, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "LOCK_TIMEOUT", 0.0)
    writer = start(blk_file=str(path))
    assert "in use by another process" in refused(lane, blk_file=str(path))
    assert "in use by another process" in refused(lane, blk_file=str(path), read_only=True)
    writer.close()
    start(blk_file=str(path), read_only=True)
    start(blk_file=str(path), read_only=True)
    assert "in use by another process" in refused(lane, blk_file=str(path))


def test_a_busy_lock_is_waited_for(start: Start, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = threading.Event()
    monkeypatch.setattr("hcd.devices.image.time.sleep", lambda _: said.wait(10))
    fd = os.open(path, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            os.close(fd)    # the predecessor ends
            said.set()

    logger, handler = logging.getLogger("hcd.device"), Lines()
    logger.addHandler(handler)
    try:
        assert start(blk_file=str(path)).status(OUT, 0, bytes(SECTOR)) == OK
    finally:
        logger.removeHandler(handler)
    assert lines == [f"blk-file {path} is in use by another process or device; waiting up to 10 s for it"]
