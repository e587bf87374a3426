"""The front end against qemu-storage-daemon: a back end that none of this project wrote.

It serves split rings alone. What it does not do (packed rings, status, a back channel) is tested against hcd.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hcd_protocols.vhost_user import ProtocolFeature, TransportFeature
from hcd_protocols.virtio.blk import RequestType

from hcd.frontend.blk import BlockDriver, BlockRequest, read_config
from hcd.frontend.client import Frontend
from hcd.frontend.errors import BackendError, RequestFailed
from hcd.frontend.memory import MemorySlot, SharedMemory

pytestmark = pytest.mark.guest

DISK_SIZE = 8 << 20
NUM_QUEUES = 4
SECTOR = 512


class StorageDaemon:
    """qemu-storage-daemon with one export on an inherited listening socket: no wait for it to listen."""

    def __init__(self, directory: Path) -> None:
        self.image = directory / "disk.img"
        with self.image.open("wb") as file:
            file.truncate(DISK_SIZE)
        self.path = str(directory / "export.sock")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen()
        self.start()

    def start(self) -> None:
        fd = self._listener.fileno()
        export = "type=vhost-user-blk,id=export,node-name=disk,writable=on"
        self.process = subprocess.Popen(
            [
                "qemu-storage-daemon",
                *("--blockdev", f"driver=file,node-name=file,filename={self.image}"),
                *("--blockdev", "driver=raw,file=file,node-name=disk,discard=unmap"),
                *("--export", f"{export},num-queues={NUM_QUEUES},addr.type=fd,addr.str={fd}"),
            ],
            pass_fds=[fd],
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self._listener.close()


@pytest.fixture
def storage(short_dir: Path, need: Callable[..., None]) -> Iterator[StorageDaemon]:
    need("qemu-storage-daemon")
    daemon = StorageDaemon(short_dir)
    yield daemon
    daemon.close()


@pytest.fixture
def frontend(storage: StorageDaemon) -> Iterator[Frontend]:
    with Frontend.open(storage.path) as opened:
        yield opened


@pytest.fixture
def disk(frontend: Frontend) -> BlockDriver:
    return BlockDriver(frontend.memory, frontend.queues[0])


def pattern(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def test_what_is_written_is_read_back_and_lies_in_the_file(storage: StorageDaemon, disk: BlockDriver) -> None:
    data = pattern(1, 64 * SECTOR)
    disk.write(100, data)
    disk.flush()
    assert disk.read(100, len(data)) == data
    assert disk.read(99, SECTOR) == bytes(SECTOR)
    assert storage.image.read_bytes()[100 * SECTOR :][: len(data)] == data


def test_identity_and_configuration_are_the_exports(frontend: Frontend, disk: BlockDriver) -> None:
    assert disk.get_id() == "vhost_user_blk"
    config = read_config(frontend)
    assert config.capacity == DISK_SIZE // SECTOR
    assert config.num_queues == NUM_QUEUES == frontend.max_queues


def test_zeroes_and_discards_clear_the_sectors(disk: BlockDriver) -> None:
    data = pattern(2, 16 * SECTOR)
    disk.write(0, data)
    disk.write_zeroes(2, 4)
    disk.discard(8, 8)
    expected = data[: 2 * SECTOR] + bytes(4 * SECTOR) + data[6 * SECTOR : 8 * SECTOR]
    assert disk.read(0, 8 * SECTOR) == expected


def test_a_failed_request_names_itself_and_its_status(disk: BlockDriver) -> None:
    end = DISK_SIZE // SECTOR
    with pytest.raises(RequestFailed, match=f"IN at sector {end} failed with status 1") as failed:
        disk.read(end, SECTOR)
    assert failed.value.status == 1
    unknown = disk.run(BlockRequest(99))
    assert unknown.status == 2
    assert str(unknown) == "99 at sector 0"


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_many_in_flight_on_every_queue(storage: StorageDaemon, event_idx: bool, indirect: bool) -> None:
    with Frontend.open(storage.path, queues=NUM_QUEUES, size=64, event_idx=event_idx) as frontend:
        for index in range(NUM_QUEUES):
            disk = BlockDriver(frontend.memory, frontend.queues[index])
            chunks = {8 * n: pattern(1000 * index + n, 8 * SECTOR) for n in range(200)}
            writes = [
                BlockRequest(RequestType.OUT, sector, data, pieces=(512, 1024), indirect=indirect)
                for sector, data in chunks.items()
            ]
            reads = [BlockRequest(RequestType.IN, s, length=8 * SECTOR, indirect=indirect) for s in chunks]
            assert sum(request.check() is not None for request in disk.pipeline(writes, 12)) == len(writes)
            for request in disk.pipeline(reads, 12):
                assert request.check().result == chunks[request.sector]
                assert request.written == 8 * SECTOR + 1
            assert disk.inflight == 0
            assert 0 < frontend.queues[index].kicks <= len(writes) + len(reads)


def test_kicks_are_counted_as_they_leave(frontend: Frontend, disk: BlockDriver) -> None:
    queue = frontend.queues[0]
    assert queue.kicks == 0
    queue.read_calls()  # libvhost-user calls once when it gets the eventfd
    calls = queue.calls
    disk.write(0, bytes(SECTOR))
    assert queue.kicks == 1, "an idle device wants to be rung"
    assert queue.calls == calls + 1
    queue.kick()
    assert queue.kicks == 2


def test_requests_finish_out_of_order_and_wait_for_keeps_the_others(frontend: Frontend) -> None:
    queue, memory = frontend.queues[0], frontend.memory
    status = memory.alloc(2)
    headers = [memory.alloc(16) for _ in range(2)]
    for gpa in headers:
        memory.write(gpa, bytes([RequestType.FLUSH]) + bytes(15))
    tokens = [queue.submit([(headers[i], 16)], [(status + i, 1)]) for i in range(2)]
    assert queue.wait_for(tokens[1]) == 1
    assert queue.wait_for(tokens[0]) == 1
    assert queue.used() == []


def test_a_stopped_queue_goes_on_where_it_stood(frontend: Frontend, disk: BlockDriver) -> None:
    for n in range(5):
        disk.write(n, pattern(n, SECTOR))
    base = frontend.stop_queue(0)
    assert base == 5
    disk.submit(BlockRequest(RequestType.IN, 3, length=SECTOR))
    frontend.sync()
    assert disk.poll() == [], "a stopped ring is left alone"
    frontend.hand_over(frontend.queues[0], base)
    assert disk.wait()[0].check().result == pattern(3, SECTOR)


def test_a_front_end_connects_again_after_the_back_end_died(storage: StorageDaemon) -> None:
    with Frontend.open(storage.path) as frontend:
        disk = BlockDriver(frontend.memory, frontend.queues[0])
        disk.write(7, pattern(7, SECTOR))
        storage.kill()
        disk.submit(BlockRequest(RequestType.IN, 7, length=SECTOR))
        with pytest.raises(BackendError, match="queue 0: the back end hung up"):
            disk.wait()
        storage.start()
        frontend.reconnect()
        assert disk.wait()[0].check().result == pattern(7, SECTOR), "the chain that was out is served now"
        disk.write(8, pattern(8, SECTOR))
        assert disk.read(7, 2 * SECTOR) == pattern(7, SECTOR) + pattern(8, SECTOR)


@pytest.mark.parametrize("slots", [False, True])
def test_several_regions_by_table_and_by_slots(storage: StorageDaemon, slots: bool) -> None:
    layout = [
        MemorySlot(0, 1 << 20),
        MemorySlot(1 << 20, 1 << 20, user_addr=0x5000_0000, mmap_offset=1 << 16),
        MemorySlot(1 << 32, 1 << 20),
    ]
    protocol = ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG
    protocol |= ProtocolFeature.CONFIGURE_MEM_SLOTS * slots
    with SharedMemory(layout) as memory, Frontend(storage.path, memory=memory) as frontend:
        frontend.negotiate(protocol=protocol)
        assert frontend.has(ProtocolFeature.CONFIGURE_MEM_SLOTS) == slots
        frontend.share_memory()
        queue = frontend.start_queue(0, region=2)
        disk = BlockDriver(memory, queue)
        data = pattern(3, 8 * SECTOR)
        disk.write(0, data)
        header, status, across = memory.alloc(16), memory.alloc(1), (1 << 20) - 1024
        memory.write(header, bytes(16))
        pieces = [(across, 1024), (1 << 20, 7 * SECTOR - 512)]
        token = queue.submit([(header, 16)], [*pieces, (status, 1)])
        assert queue.wait_for(token) == 8 * SECTOR + 1
        assert memory.read(across, 8 * SECTOR) == data


def test_without_acks_sync_shows_what_was_refused(storage: StorageDaemon) -> None:
    with Frontend.open(storage.path, acks=False) as frontend:
        assert BlockDriver(frontend.memory, frontend.queues[0]).read(0, SECTOR) == bytes(SECTOR)
        frontend.sync()


def test_what_is_required_and_not_offered_is_an_error(storage: StorageDaemon) -> None:
    with (
        Frontend(storage.path) as frontend,
        pytest.raises(BackendError, match="does not offer RING_PACKED"),
    ):
        frontend.negotiate(packed=True)


def test_only_masked_features_are_taken(storage: StorageDaemon) -> None:
    with Frontend(storage.path) as frontend:
        frontend.negotiate(event_idx=False, device=0)
        wanted = TransportFeature.VERSION_1 | TransportFeature.INDIRECT_DESC
        assert frontend.features == wanted | TransportFeature.PROTOCOL_FEATURES


def test_garbage_is_answered_with_a_hang_up(storage: StorageDaemon) -> None:
    with Frontend(storage.path) as frontend:
        frontend.send_raw(b"\xff" * 12)
        assert frontend.wait_hangup() == b""
        with pytest.raises(BackendError, match="hung up"):
            frontend.sync()


def test_nobody_at_the_address_is_a_backend_error(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(BackendError, match=r"cannot connect to .*nowhere"):
        Frontend(tmp_path / "nowhere")
    assert os.listdir("/proc/self/fd") == before, "nothing stays open"


def test_a_silent_back_end_runs_into_the_timeout() -> None:
    ours, theirs = socket.socketpair()
    with theirs, Frontend(ours, timeout=0.01) as frontend, pytest.raises(BackendError, match="not answer"):
        frontend.sync()


def test_everything_is_closed_again(storage: StorageDaemon) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Frontend.open(storage.path, queues=2) as frontend:
        frontend.open_back_channel()
        assert len(os.listdir("/proc/self/fd")) > before
    assert len(os.listdir("/proc/self/fd")) == before
