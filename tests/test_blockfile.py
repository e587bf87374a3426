"""Block storage behind requests: rings in this process, turns given by hand, real files and a real worker."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import resource
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hcd_protocols.virtio.blk import REQUEST_HEADER, SEGMENT, RequestType
from hcd_protocols.virtio.features import RingFeature

from hcd.dataplane.blockfile import BlockFile, BlockRam, BlockStore
from hcd.dataplane.virtqueue import Request, Virtqueue
from hcd.errors import GuestError
from hcd.frontend.blk import BlockDriver, BlockRequest
from hcd.frontend.local import LocalQueue, Scheduler, map_memory
from hcd.frontend.memory import SharedMemory

V1 = int(RingFeature.VERSION_1)
PACKED = V1 | int(RingFeature.RING_PACKED)
EVENT = int(RingFeature.EVENT_IDX)
RINGS = {"split": V1, "split-event": V1 | EVENT, "packed": PACKED, "packed-event": PACKED | EVENT}
SECTOR = 512
OK, IOERR = 0, 1
IN, OUT, FLUSH = RequestType.IN, RequestType.OUT, RequestType.FLUSH
DISCARD, WRITE_ZEROES = RequestType.DISCARD, RequestType.WRITE_ZEROES
COMPARE = 1000  # virtio-blk has none

pytestmark = pytest.mark.usefixtures("no_leaks")


class Disk:
    """A store behind one ring. The handler is the least that a block device needs."""

    def __init__(self, store: BlockStore, features: int = V1, scheduler: Scheduler | None = None) -> None:
        self.store = store
        self.errors: list[Exception] = []
        self.submits = True
        store.on_error = lambda _, error: self.errors.append(error)
        self.memory = SharedMemory.of_size(8 << 20)
        self.table = map_memory(self.memory)
        self.queue = LocalQueue(self.memory, self.table, features=features, scheduler=scheduler)
        self.driver = BlockDriver(self.memory, self.queue.driver)

    def close(self) -> None:
        assert self.store.close()
        self.queue.close()
        self.memory.close()
        self.__dict__.clear()    # pytest keeps fixtures for longer than no_leaks likes

    def handle(self, queue: Virtqueue) -> None:
        for request in queue:
            kind, _, sector = REQUEST_HEADER.unpack(request.read(REQUEST_HEADER.size))
            if kind == IN:
                self.store.read(request, sector)
            elif kind == OUT:
                self.store.write(request, sector)
            elif kind == FLUSH:
                self.store.flush(request)
            elif kind == COMPARE:
                self.store.compare(request, sector)
            else:
                act = self.store.discard if kind == DISCARD else self.store.write_zeroes
                act(request, [(first, n, bool(flags)) for first, n, flags in SEGMENT.iter_unpack(request.read())])
        if self.submits:
            self.store.submit()

    def issue(self, *requests: BlockRequest) -> None:
        """Put ``requests`` into the ring and give the device one turn."""
        for request in requests:
            self.driver.add(request)
        self.driver.queue.publish()
        self.queue.turn(self.handle)

    def reap(self) -> None:
        """Wait until the worker has finished something, and complete it."""
        assert select.select([self.store.fileno()], [], [], 10)[0], "the worker finished nothing"
        self.store.reap()
        self.queue.scheduler.flush()

    def finish(self) -> list[BlockRequest]:
        """Everything that is in flight, in the order in which the device finished it."""
        done = self.driver.poll()
        while self.driver.inflight:
            self.reap()
            done += self.driver.poll()
        return done

    def do(self, *requests: BlockRequest) -> list[BlockRequest]:
        self.issue(*requests)
        return self.finish()

    def one(self, kind: int, sector: int = 0, data: bytes = b"", **more: Any) -> BlockRequest:
        return self.do(BlockRequest(kind, sector, data, **more))[0]


def segments(*ranges: tuple[int, int, int]) -> bytes:
    return b"".join(SEGMENT.pack(*one) for one in ranges)


def pattern(n: int, seed: int = 1) -> bytes:
    return bytes((i * 7 + i // 251 + seed) & 0xFF for i in range(n))


class Images:
    """Makes files and disks on them, and closes what is left."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.disks: list[Disk] = []

    def file(self, content: bytes = bytes(1 << 20), directory: Path | None = None) -> Path:
        path = (directory or self.directory) / f"image{len(self.disks)}"
        path.write_bytes(content)
        return path

    def disk(self, path: Path, features: int = V1, *, flags: int = os.O_RDWR, size: int = -1, workers: int = 4) -> Disk:
        read_only = flags == os.O_RDONLY and size < 0
        store = BlockFile(os.open(path, flags), size, read_only=read_only, workers=workers)
        return self.keep(Disk(store, features))

    def direct(self, path: Path, features: int = V1, *, uring: bool = True, workers: int = 4) -> Disk:
        try:
            fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        except OSError:
            pytest.skip(f"no O_DIRECT in {path.parent}")
        return self.keep(Disk(BlockFile(fd, workers=workers, ring=uring), features))

    def keep(self, disk: Disk) -> Disk:
        self.disks.append(disk)
        return disk


@pytest.fixture
def images(tmp_path: Path) -> Iterator[Images]:
    images = Images(tmp_path)
    yield images
    for disk in images.disks:
        disk.close()


@pytest.fixture(params=list(RINGS.values()), ids=list(RINGS))
def ring(request: pytest.FixtureRequest) -> int:
    features: int = request.param
    return features


@pytest.fixture(params=["file", "ram", "direct", "direct, threads"])
def disk(request: pytest.FixtureRequest, ring: int, images: Images) -> Disk:
    if request.param == "ram":
        return images.keep(Disk(BlockRam(1 << 20), ring))
    if request.param == "file":
        return images.disk(images.file(), ring)
    return images.direct(images.file(), ring, uring=request.param == "direct")


def cached(path: Path) -> list[int]:
    """Numbers of the pages that are in the page cache. Reading to find out would bring them there."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    pages = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapping:
        first = ctypes.c_char.from_buffer(mapping)
        assert libc.mincore(ctypes.byref(first), ctypes.c_size_t(size), pages) == 0
        del first
    return [number for number, state in enumerate(pages) if state & 1]


def drop_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(path: Path, size: int) -> None:
    """The first ``size`` bytes into the page cache, and no more."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), size, 0)


@pytest.fixture
def cold(images: Images) -> Callable[[Disk, Path], None]:
    """``cold(disk, path)``: nothing of the file is in the page cache, or the test is skipped."""

    def check(disk: Disk, path: Path) -> None:
        assert isinstance(disk.store, BlockFile)
        if not disk.store.nowait:
            pytest.skip("this file system has no RWF_NOWAIT")
        drop_cache(path)
        if cached(path):
            pytest.skip("this file system keeps its page cache")

    return check


# -- what the requests do


def test_what_was_written_is_read_back(disk: Disk) -> None:
    data = pattern(64 << 10)
    assert disk.one(OUT, 8, data).status == OK
    assert disk.one(FLUSH).status == OK
    answer = disk.one(IN, 8, length=len(data))
    assert (answer.status, answer.result, answer.written) == (OK, data, len(data) + 1)


def test_the_file_holds_what_was_written(images: Images) -> None:
    path = images.file()
    disk = images.disk(path)
    data = pattern(5 * SECTOR)
    written = disk.one(OUT, 3, data)
    assert (written.status, written.written) == (OK, 1)
    assert path.read_bytes() == bytes(3 * SECTOR) + data + bytes((1 << 20) - 8 * SECTOR)


def test_pieces_of_any_size_carry_the_data(disk: Disk) -> None:
    data = pattern(8 * SECTOR)
    pieces = (1, 511, 3, 1000, 512, 7)
    assert disk.one(OUT, 1, data, pieces=pieces).status == OK
    assert disk.one(IN, 1, length=len(data), pieces=pieces[::-1]).result == data


def test_more_pieces_than_one_system_call_takes(disk: Disk) -> None:
    data = pattern(40 * SECTOR)
    pieces = (100,) * 200
    assert disk.one(OUT, 0, data, pieces=pieces).status == OK
    assert disk.one(IN, 0, length=len(data), pieces=pieces).result == data


def test_the_status_may_share_a_descriptor_with_the_data(disk: Disk) -> None:
    data = pattern(SECTOR)
    disk.one(OUT, 9, data)
    header, answer = disk.memory.alloc(16), disk.memory.alloc(SECTOR + 1)
    disk.memory.write(header, REQUEST_HEADER.pack(IN, 0, 9))
    disk.driver.queue.submit([(header, 16)], [(answer, SECTOR + 1)])
    disk.queue.turn(disk.handle)
    while not (used := disk.driver.queue.used()):
        disk.reap()
    assert used[0].written == SECTOR + 1
    assert disk.memory.read(answer, SECTOR + 1) == data + bytes([OK])


def test_many_requests_at_once(disk: Disk) -> None:
    writes = [BlockRequest(OUT, 8 * i, pattern(4096, i)) for i in range(50)]
    assert [r.status for r in disk.do(*writes)] == [OK] * 50
    reads = [BlockRequest(IN, 8 * i, length=4096) for i in range(50)]
    disk.do(*reads)
    assert [r.result for r in reads] == [pattern(4096, i) for i in range(50)]


@pytest.mark.parametrize("unmap", [0, 1])
def test_zeroes_are_zeroes(disk: Disk, unmap: int) -> None:
    disk.one(OUT, 0, b"\xff" * (64 << 10))
    assert disk.one(WRITE_ZEROES, 0, segments((3, 30, unmap), (50, 0, unmap), (100, 1, unmap))).status == OK
    whole = bytearray(b"\xff" * (64 << 10))
    whole[3 * SECTOR : 33 * SECTOR] = bytes(30 * SECTOR)
    whole[100 * SECTOR : 101 * SECTOR] = bytes(SECTOR)
    assert disk.one(IN, 0, length=64 << 10).result == whole


def test_discard_frees_the_blocks_of_a_file(images: Images) -> None:
    path = images.file(b"\xff" * (1 << 20))
    disk = images.disk(path)
    before = path.stat().st_blocks
    assert disk.one(DISCARD, 0, segments((0, 1024, 0))).status == OK
    assert path.stat().st_blocks <= before - 1024 + 16
    assert path.stat().st_size == 1 << 20
    assert path.read_bytes() == bytes(512 << 10) + b"\xff" * (512 << 10)


def test_writethrough_writes_are_on_the_disk_when_they_complete(disk: Disk) -> None:
    disk.store.writethrough = True
    assert disk.one(OUT, 0, pattern(4096)).status == OK
    assert disk.one(WRITE_ZEROES, 0, segments((0, 1, 1))).status == OK
    assert disk.one(IN, 0, length=4096).result == bytes(SECTOR) + pattern(4096)[SECTOR:]


# -- the page cache and the worker


def test_cached_reads_don_t_see_the_worker(images: Images) -> None:
    path = images.file(pattern(1 << 20))
    disk = images.disk(path)
    store = disk.store
    assert isinstance(store, BlockFile)
    if not store.nowait:
        pytest.skip("this file system has no RWF_NOWAIT")
    path.read_bytes()
    disk.do(*(BlockRequest(IN, 8 * i, length=4096) for i in range(20)))
    assert (store.inline_reads, store.jobs) == (20, 0)


def test_a_large_read_is_left_to_the_worker(images: Images) -> None:
    """Copying takes time, and the lane has other devices to serve."""
    data = pattern(2 << 20)
    path = images.file(data)
    disk = images.disk(path)
    store = disk.store
    assert isinstance(store, BlockFile)
    if not store.nowait:
        pytest.skip("this file system has no RWF_NOWAIT")
    path.read_bytes()
    assert disk.one(IN, 0, length=1 << 20).result == data[: 1 << 20]
    assert (store.inline_reads, store.jobs) == (1, 0)
    assert disk.one(IN, 0, length=2 << 20).result == data
    assert (store.inline_reads, store.jobs) == (1, 1)


@pytest.mark.parametrize("kind", [IN, OUT])
def test_a_disk_in_memory_copies_only_so_much_at_once(images: Images, kind: int) -> None:
    """Descriptors may all name the same memory: 32 MiB are served, more are refused."""
    disk = images.keep(Disk(BlockRam(64 << 20)))
    header, status = disk.memory.alloc(16), disk.memory.alloc(1)
    buffer = disk.memory.alloc(4 << 20)
    disk.memory.write(header, REQUEST_HEADER.pack(kind, 0, 0))
    for pieces, expected in ((8, OK), (9, IOERR)):
        data = [(buffer, 4 << 20)] * pieces
        readable, writable = ([(header, 16)], data) if kind == IN else ([(header, 16), *data], [])
        disk.driver.queue.submit(readable, [*writable, (status, 1)])
        disk.queue.turn(disk.handle)
        (used,) = disk.driver.queue.used()
        assert disk.memory.read(status, 1) == bytes([expected])
        assert used.written == (1 + (kind == IN and expected == OK) * (pieces << 22))


def test_a_cold_read_completes_after_a_cached_one(images: Images, cold: Callable[[Disk, Path], None]) -> None:
    content = pattern(1 << 20)
    path = images.file(content)
    disk = images.disk(path)
    for _ in range(5):  # somebody else may read the file into the page cache in between
        cold(disk, path)
        warm(path, 4096)
        slow, fast = BlockRequest(IN, 1024, length=4096), BlockRequest(IN, 0, length=4096)
        done = disk.do(slow, fast)
        if isinstance(disk.store, BlockFile) and disk.store.jobs:
            break
    assert done == [fast, slow]
    assert fast.result == content[:4096]
    assert slow.result == content[1024 * SECTOR :][:4096]


def test_a_read_that_is_half_cached_goes_on_in_the_worker(images: Images, cold: Callable[[Disk, Path], None]) -> None:
    content = pattern(64 << 10)
    path = images.file(content)
    disk = images.disk(path)
    store = disk.store
    assert isinstance(store, BlockFile)
    cold(disk, path)
    warm(path, 8192)
    assert cached(path) == [0, 1]
    answer = disk.one(IN, 1, length=32 << 10, pieces=(1000, 9000))
    assert (answer.result, answer.written) == (content[SECTOR:][: 32 << 10], (32 << 10) + 1)
    assert (store.inline_reads, store.jobs) == (0, 1)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no tmpfs")
def test_a_file_without_nowait_is_found_out_when_it_is_opened(images: Images, ring: int) -> None:
    content = pattern(1 << 20)
    path = images.file(content, Path("/dev/shm"))
    try:
        disk = images.disk(path, ring)
        path.unlink()
        store = disk.store
        assert isinstance(store, BlockFile)
        if store.nowait:
            pytest.skip("tmpfs has RWF_NOWAIT here")
        reads = [BlockRequest(IN, 8 * i, length=4096) for i in range(40)]
        disk.do(*reads)
        assert [r.result for r in reads] == [content[4096 * i :][:4096] for i in range(40)]
        assert disk.one(WRITE_ZEROES, 0, segments((1, 2000, 0))).status == OK    # no ZERO_RANGE there either
        expected = content[:SECTOR] + bytes(2000 * SECTOR) + content[2001 * SECTOR :]
        assert disk.one(IN, 0, length=1 << 20).result == expected
    finally:
        path.unlink(missing_ok=True)


def test_a_batch_wakes_the_worker_once(images: Images) -> None:
    disk = images.disk(images.file())
    store = disk.store
    assert isinstance(store, BlockFile)
    disk.do(*(BlockRequest(OUT, i, bytes(SECTOR)) for i in range(40)))
    assert (store.jobs, store.batches, store.inflight) == (40, 1, 0)


def test_an_idle_file_has_no_threads(images: Images) -> None:
    disk = images.disk(images.file())
    disk.one(IN, 0, length=SECTOR)
    disk.do(BlockRequest(IN, 0, length=SECTOR))
    assert isinstance(disk.store, BlockFile)
    if disk.store.nowait:
        assert workers() == []


# -- past the page cache


def ring_of(disk: Disk) -> BlockFile:
    """The disk's file; the test is skipped where the kernel gives no io_uring."""
    assert isinstance(disk.store, BlockFile)
    if disk.store.ring_jobs < 0:
        pytest.skip("no io_uring here")
    return disk.store


def test_the_ring_does_whole_transfers_without_a_thread(images: Images) -> None:
    path = images.file(pattern(1 << 20))
    disk = images.direct(path)
    store = ring_of(disk)
    data = pattern(16 << 10, 5)
    written, read = disk.do(BlockRequest(OUT, 64, data), BlockRequest(IN, 1024, length=8192))
    assert {written.status, read.status} == {OK}
    assert path.read_bytes()[64 * SECTOR :][: len(data)] == data
    assert (store.jobs, store.ring_jobs, store.ring_rest, store.inflight, workers()) == (2, 2, 0, 0, [])


def test_memory_of_any_alignment_goes_past_the_page_cache(images: Images) -> None:
    content = pattern(1 << 20)
    disk = images.direct(images.file(content))
    store = ring_of(disk)
    read = disk.one(IN, 8, length=8192, pieces=(101, 3000))
    assert read.result == content[8 * SECTOR :][:8192]
    assert store.ring_jobs == 1    # whether a thread has to go on is up to kernel and disk


def test_more_than_the_ring_holds(images: Images) -> None:
    """What finds no room in the ring, and what has too many pieces for it, is done all the same."""
    content = pattern(1 << 20)
    disk = images.direct(images.file(content), V1 | int(RingFeature.INDIRECT_DESC))
    store = ring_of(disk)
    many = [BlockRequest(IN, 8 * i, length=4096, indirect=True) for i in range(200)]
    disk.issue(*many, BlockRequest(IN, 0, length=40 * SECTOR, pieces=(SECTOR,) * 40, indirect=True))
    for _ in range(4):    # a turn takes some
        disk.issue()
    assert store.inflight == 201
    disk.finish()
    assert [r.result for r in many] == [content[4096 * i :][:4096] for i in range(200)]
    assert store.ring_jobs < 201
    assert store.inflight == 0


def test_the_disk_has_the_first_transfers_before_the_turn_ends(images: Images) -> None:
    """Every four of them; the last ones, however few, with submit()."""
    disk = images.direct(images.file())
    store = ring_of(disk)
    disk.submits = False
    disk.issue(*(BlockRequest(OUT, 8 * i, pattern(4096, i)) for i in range(10)))
    assert (store.batches, store.ring_jobs, store.inflight) == (2, 8, 10)
    store.submit()
    assert (store.batches, store.ring_jobs) == (3, 10)
    assert [r.status for r in disk.finish()] == [OK] * 10


def test_the_end_of_a_file_that_was_cut_short_is_an_error_of_the_file(images: Images) -> None:
    path = images.file()
    disk = images.direct(path)
    store = ring_of(disk)
    os.truncate(path, 4096)
    across, inside = BlockRequest(IN, 0, length=8192), BlockRequest(IN, 0, length=4096)
    disk.do(across, inside)
    assert (across.status, inside.status) == (IOERR, OK)
    assert (store.errors, store.refusals, store.ring_rest) == (1, 0, 1)


def test_writethrough_holds_for_the_ring(images: Images) -> None:
    path = images.file()
    disk = images.direct(path)
    store = ring_of(disk)
    store.writethrough = True
    assert disk.one(OUT, 0, pattern(4096)).status == OK
    assert path.read_bytes()[:4096] == pattern(4096)
    assert store.ring_jobs == 1


def test_memory_that_is_gone_before_the_ring_sees_it_is_the_guest_s_fault(images: Images) -> None:
    path = images.file(b"\xee" * (1 << 20))
    disk = images.direct(path)
    ring_of(disk)
    disk.submits = False
    disk.issue(BlockRequest(OUT, 0, b"\1" * 4096))
    disk.queue.device.stop()
    disk.table.revoke()
    disk.store.submit()
    while disk.queue.stats.inflight:
        disk.reap()
    assert path.read_bytes() == b"\xee" * (1 << 20)
    assert (disk.store.errors, disk.store.refusals) == (0, 1)


def test_closing_waits_for_what_the_disk_has(images: Images) -> None:
    """The descriptors and the ring are gone afterwards, and every request has been completed."""
    disk = images.direct(images.file())
    store = ring_of(disk)
    disk.issue(*(BlockRequest(OUT, 8 * i, pattern(4096, i)) for i in range(60)))
    assert store.close()
    assert (store.inflight, disk.queue.stats.inflight) == (0, 0)
    links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)]
    assert not [link for link in links if "io_uring" in link]


# -- mistakes of the guest


def mistakes(size: int) -> dict[str, BlockRequest]:
    last = size // SECTOR
    return {
        "past the end": BlockRequest(IN, last, length=SECTOR),
        "across the end": BlockRequest(OUT, last - 1, bytes(2 * SECTOR)),
        "sector beyond all": BlockRequest(OUT, 2**64 - 1, bytes(SECTOR)),
        "sector that wraps": BlockRequest(IN, 2**55, length=SECTOR),
        "odd read": BlockRequest(IN, 0, length=SECTOR + 1),
        "odd write": BlockRequest(OUT, 0, bytes(100)),
        "discard past the end": BlockRequest(DISCARD, 0, segments((0, 1, 0), (last, 1, 0))),
        "zeroes that wrap": BlockRequest(WRITE_ZEROES, 0, segments((2**64 - 1, 2, 0))),
        "too many ranges": BlockRequest(DISCARD, 0, segments((0, 1, 0)) * 1025),
    }


@pytest.mark.parametrize("ring", [V1], indirect=True, ids=["split"])
@pytest.mark.parametrize("name", mistakes(1 << 20))
def test_a_mistake_fails_its_request_alone(disk: Disk, name: str) -> None:
    bad = mistakes(1 << 20)[name]
    good = BlockRequest(IN, 0, length=SECTOR)
    disk.do(bad, good)
    assert (bad.status, bad.written, good.status) == (IOERR, 1, OK)
    assert (disk.store.refusals, disk.store.errors, disk.queue.stats.guest_errors) == (1, 0, 1)
    assert [type(error) for error in disk.errors] == [GuestError]
    assert disk.queue.stats.requests(0, 1) == 1


@pytest.mark.parametrize("kind", [IN, OUT, FLUSH, DISCARD])
def test_a_request_without_room_for_its_status_is_completed_with_nothing(disk: Disk, kind: int) -> None:
    header = disk.memory.alloc(16 + SECTOR)
    disk.memory.write(header, REQUEST_HEADER.pack(kind, 0, 0) + segments((0, 1, 0)) * (SECTOR // 16))
    disk.driver.queue.submit([(header, 16 + SECTOR)], [])
    disk.queue.turn(disk.handle)
    assert [used.written for used in disk.driver.queue.used()] == [0]
    assert disk.queue.stats.guest_errors == 1


def test_a_read_only_file_takes_no_writes(images: Images) -> None:
    path = images.file()
    disk = images.disk(path, flags=os.O_RDONLY)
    for bad in (BlockRequest(OUT, 0, b"\1" * SECTOR), BlockRequest(DISCARD, 0, segments((0, 1, 0)))):
        assert disk.do(bad)[0].status == IOERR
    assert disk.one(FLUSH).status == OK
    assert path.read_bytes() == bytes(1 << 20)


# -- failures of the file


def test_a_full_disk_is_an_error_of_the_file(images: Images) -> None:
    disk = images.disk(Path("/dev/full"), size=1 << 20)
    assert disk.one(OUT, 0, bytes(SECTOR)).status == IOERR
    assert [error.errno for error in disk.errors if isinstance(error, OSError)] == [errno.ENOSPC]
    assert (disk.store.errors, disk.store.refusals, disk.queue.stats.guest_errors) == (1, 0, 0)


def test_a_descriptor_that_cannot_write_fails_the_write(images: Images) -> None:
    disk = images.disk(images.file(), flags=os.O_RDONLY, size=1 << 20)
    assert disk.one(OUT, 0, bytes(SECTOR)).status == IOERR
    assert disk.one(IN, 0, length=SECTOR).status == OK
    assert [error.errno for error in disk.errors if isinstance(error, OSError)] == [errno.EBADF]


class Failing(threading.Thread):
    """A thread whose pread(2) and preadv(2) fail with ``error``, and those of threads that it starts (seccomp(2))."""

    def __init__(self, error: int, job: Callable[[], None]) -> None:
        super().__init__()
        self.error, self.job = error, job
        self.raised: BaseException | None = None

    def run(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        calls = (17, 295)  # pread64, preadv
        words = [(0x20, 0, 0, 0)]  # the number of the call
        words += [(0x15, len(calls) - i, 0, number) for i, number in enumerate(calls)]
        words += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050000 | self.error)]  # allow, or fail with this
        code = b"".join(struct.pack("HBBI", *word) for word in words)
        filters = ctypes.create_string_buffer(code)
        program = struct.pack("H6xQ", len(words), ctypes.addressof(filters))
        assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
        assert libc.prctl(22, 2, program) == 0, os.strerror(ctypes.get_errno())  # PR_SET_SECCOMP, a filter
        try:
            self.job()
        except BaseException as error:
            self.raised = error

    def outcome(self) -> None:
        self.start()
        self.join()
        if self.raised is not None:
            raise self.raised


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of system calls are those of x86-64")
def test_an_integrity_error_of_the_disk_is_no_miscompare(images: Images) -> None:
    """The block layer answers EILSEQ where a disk's protection information does not fit. That is to be told of."""

    def read_and_compare() -> None:
        disk = images.disk(images.file(bytes(2 << 20)))
        assert disk.one(IN, 0, length=(1 << 20) + SECTOR).status == IOERR
        assert disk.one(COMPARE, 0, bytes(SECTOR)).status == IOERR
        assert [error.errno for error in disk.errors if isinstance(error, OSError)] == [errno.EIO] * 2
        assert disk.store.errors == 2

    Failing(errno.EILSEQ, read_and_compare).outcome()


def test_a_short_write_is_continued_and_its_cause_reported(images: Images) -> None:
    path = images.file(b"")
    os.truncate(path, 1 << 20)
    disk = images.disk(path)
    with path.open("r+b") as file:  # a hole out of the page cache: what it holds is written by a copy, not by pwrite
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, hard))
    try:
        assert disk.one(OUT, 0, b"\1" * 16384).status == IOERR
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [error.errno for error in disk.errors if isinstance(error, OSError)] == [errno.EFBIG]
    assert path.read_bytes()[:10001] == b"\1" * 10000 + b"\0"


def test_a_file_that_was_cut_short_fails_reads_past_its_end(images: Images) -> None:
    path = images.file()
    disk = images.disk(path)
    os.truncate(path, 4096)
    assert disk.one(IN, 4, length=8192).status == IOERR
    assert disk.one(IN, 4, length=SECTOR).status == OK


# -- in flight, with a worker that is held up


TRACER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
tid = int(sys.argv[1])
SEIZE, INTERRUPT, DETACH, WALL = 0x4206, 0x4207, 17, 0x40000000
if libc.ptrace(SEIZE, tid, None, None) or libc.ptrace(INTERRUPT, tid, None, None):
    sys.exit(os.strerror(ctypes.get_errno()))
os.waitpid(tid, WALL)
print("stopped", flush=True)
sys.stdin.read()
libc.ptrace(DETACH, tid, None, None)
"""


def workers() -> list[int]:
    """Thread ids of the workers of this process."""
    tasks = Path("/proc/self/task").iterdir()
    return [int(task.name) for task in tasks if (task / "comm").read_text().strip() == "hcd-block"]


class Held:
    """A disk with one worker, which stands still until ``release``."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        assert disk.one(FLUSH).status == OK    # starts the worker
        (tid,) = workers()
        self._tracer = subprocess.Popen(
            [sys.executable, "-c", TRACER, str(tid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._tracer.stdout is not None
        self.works = self._tracer.stdout.readline() == "stopped\n"

    def release(self) -> None:
        self._tracer.communicate()


@pytest.fixture
def held(images: Images) -> Iterator[Callable[[Disk], Held]]:
    made: list[Held] = []

    def hold(disk: Disk) -> Held:
        made.append(Held(disk))
        if not made[-1].works:
            pytest.skip("threads of this process cannot be traced")
        return made[-1]

    yield hold
    for one in made:
        one.release()


def test_memory_that_is_revoked_in_flight_is_not_written_to_the_disk(
    images: Images, held: Callable[[Disk], Held]
) -> None:
    path = images.file(b"\xee" * (1 << 20))
    disk = images.disk(path, workers=1)
    worker = held(disk)
    disk.issue(BlockRequest(OUT, 0, b"\1" * 4096), BlockRequest(OUT, 8, b"\1" * 4096))
    disk.queue.device.stop()
    disk.table.revoke()
    worker.release()
    while disk.queue.stats.inflight:
        disk.reap()
    assert path.read_bytes() == b"\xee" * (1 << 20)
    assert (disk.store.errors, disk.store.refusals) == (0, 2)
    assert [type(error) for error in disk.errors] == [GuestError, GuestError]


def test_requests_keep_their_memory_when_everything_else_lets_go_of_it(
    images: Images, held: Callable[[Disk], Held]
) -> None:
    path = images.file()
    disk = images.disk(path, workers=1)
    worker = held(disk)
    disk.issue(BlockRequest(OUT, 0, pattern(4096)))
    disk.queue.device.stop()
    disk.queue.device.set_memory(map_memory(disk.memory))
    disk.table = map_memory(disk.memory)
    worker.release()
    disk.reap()
    assert path.read_bytes()[:4096] == pattern(4096)
    assert disk.queue.stats.inflight == 0


def test_no_status_is_written_after_the_ring_was_stopped(images: Images, held: Callable[[Disk], Held]) -> None:
    disk = images.disk(images.file(), workers=1)
    worker = held(disk)
    status = disk.memory.alloc(1)
    header = disk.memory.alloc(16)
    disk.memory.write(header, REQUEST_HEADER.pack(FLUSH, 0, 0))
    disk.memory.write(status, b"\x77")
    disk.driver.queue.submit([(header, 16)], [(status, 1)])
    disk.queue.turn(disk.handle)
    disk.queue.device.stop()
    worker.release()
    disk.reap()
    assert disk.queue.stats.inflight == 0
    assert disk.memory.read(status, 1) == b"\x77"


def test_closing_fails_what_has_not_begun(images: Images, held: Callable[[Disk], Held]) -> None:
    path = images.file()
    disk = images.disk(path, workers=1)
    worker = held(disk)
    writes = [BlockRequest(OUT, 8 * i, b"\1" * 4096) for i in range(4)]
    disk.issue(*writes)
    assert not disk.store.close(0.05), "the worker stands still, so it cannot be joined"
    disk.queue.scheduler.flush()
    disk.driver.poll()
    assert [write.status for write in writes] == [IOERR] * 4
    assert path.read_bytes() == bytes(1 << 20)
    assert (disk.errors, disk.store.errors) == ([], 0)
    worker.release()
    assert disk.store.close()


def test_closing_twice_and_after_use(images: Images) -> None:
    disk = images.disk(images.file())
    disk.do(*(BlockRequest(OUT, i, bytes(SECTOR)) for i in range(40)))
    assert disk.store.fileno() >= 0
    assert disk.store.close()
    assert disk.store.fileno() == -1
    assert disk.store.close()


def test_closing_waits_for_running_requests(images: Images) -> None:
    disk = images.disk(images.file())
    writes = [BlockRequest(OUT, 8 * i, b"\1" * 4096) for i in range(60)]
    disk.issue(*writes, BlockRequest(FLUSH))
    assert disk.store.close()
    disk.queue.scheduler.flush()
    disk.driver.poll()
    assert {write.status for write in writes} <= {OK, IOERR}
    assert disk.driver.inflight == 0


def test_a_file_that_is_dropped_without_closing_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    disk = Disk(BlockFile(os.open(path, os.O_RDWR)))
    disk.do(*(BlockRequest(OUT, i, bytes(SECTOR)) for i in range(40)))
    disk.queue.close()
    disk.memory.close()
    # no_leaks looks at threads, descriptors and memory


# -- handlers that are wrong


def test_a_handler_that_completes_a_request_itself_is_told(images: Images) -> None:
    disk = images.disk(images.file())

    def handle(queue: Virtqueue) -> None:
        for request in queue:
            request.skip(16)
            disk.store.write(request, 0)
            request.complete(1)
        disk.store.submit()

    disk.driver.add(BlockRequest(OUT, 0, bytes(SECTOR)))
    disk.driver.queue.publish()
    disk.queue.turn(handle)
    with pytest.raises(ValueError, match="completed already"):
        disk.reap()
    assert isinstance(disk.store, BlockFile)
    assert disk.store.inflight == 0


def test_a_request_that_is_done_is_refused(disk: Disk) -> None:
    kept: list[Request] = []

    def handle(queue: Virtqueue) -> None:
        for request in queue:
            kept.append(request)
            request.complete(0)

    header = disk.memory.alloc(16)
    disk.driver.queue.submit([(header, 16)], [(disk.memory.alloc(SECTOR + 1), SECTOR + 1)])
    disk.queue.turn(handle)
    for method in (disk.store.read, disk.store.write):
        with pytest.raises(ValueError, match="completed already"):
            method(kept[0], 0)
    with pytest.raises(ValueError, match="completed already"):
        disk.store.flush(kept[0])


@pytest.mark.parametrize("size", [0, 100, 513])
def test_memory_of_odd_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 512"):
        BlockRam(size)


def test_a_bad_descriptor_stays_the_caller_s(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        BlockFile(9999)
    path = tmp_path / "image"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(ValueError, match="workers"):
        BlockFile(fd, workers=0)
    os.close(fd)
