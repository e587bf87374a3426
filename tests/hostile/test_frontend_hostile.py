"""Front ends that break the vhost-user protocol, against a real hcd process.

Each one loses its own connection, or sees its message refused, and nothing else happens: the log says which device
and why, every other device serves on, and no file descriptor, mapping or thread stays behind. The ``hostile``
fixture checks the last three after every test.
"""

from __future__ import annotations

import array
import os
import random
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from hcd_protocols.vhost_user import FrontendRequest, ProtocolFeature
from hcd_protocols.vhost_user.layouts import CONFIG, INFLIGHT, MEM_TABLE, SINGLE_REGION, U64, VRING_ADDR, VRING_STATE
from hcd_protocols.vhost_user.messages import FLAG_NEED_REPLY, NO_FD, VERSION
from hcd_protocols.virtio.blk import RequestType

from hcd.frontend.blk import BLOCK_FEATURES, BlockDriver, BlockRequest
from hcd.frontend.client import Frontend
from hcd.frontend.errors import BackendError
from hcd.frontend.memory import MemorySlot, SharedMemory
from hcd.frontend.queue import Queue

pytestmark = pytest.mark.long

R = FrontendRequest
SECTOR = 512
WHOLE_TABLE = ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG | ProtocolFeature.MQ
TRACKED = WHOLE_TABLE | ProtocolFeature.INFLIGHT_SHMFD
BY_SLOTS = WHOLE_TABLE | ProtocolFeature.CONFIGURE_MEM_SLOTS


def message(request: int, payload: bytes = b"", *, flags: int = VERSION, size: int | None = None) -> bytes:
    return struct.pack("=III", request, flags, len(payload) if size is None else size) + payload


def u64(value: int) -> bytes:
    return U64.build(value=value)


def state(index: int, num: int = 0) -> bytes:
    return VRING_STATE.build(index=index, num=num)


def region(gpa: int, size: int, user: int = 0x7000_0000, offset: int = 0) -> dict[str, int]:
    return {"guest_addr": gpa, "size": size, "user_addr": user, "mmap_offset": offset}


def inflight(size: int, offset: int, queues: int, entries: int) -> bytes:
    return INFLIGHT.build(mmap_size=size, mmap_offset=offset, num_queues=queues, queue_size=entries)


def table(*regions: dict[str, int]) -> bytes:
    return MEM_TABLE.build(nregions=len(regions), regions=list(regions))


@contextmanager
def fds(count: int, size: int = 1 << 20) -> Iterator[list[int]]:
    """``count`` memfds of ``size`` bytes."""
    opened = [os.memfd_create("hostile") for _ in range(count)]
    try:
        for fd in opened:
            os.ftruncate(fd, size)
        yield opened
    finally:
        for fd in opened:
            os.close(fd)


def negotiated(hostile: Any, protocol: int = WHOLE_TABLE) -> Frontend:
    frontend: Frontend = hostile.frontend()
    frontend.negotiate(device=BLOCK_FEATURES, protocol=protocol)
    return frontend


# -- messages that cannot be what they say


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        pytest.param(message(99), "99", id="unknown request"),
        pytest.param(message(0), "0", id="request 0"),
        pytest.param(message(0xFFFF_FFFF), "4294967295", id="request 2^32-1"),
        pytest.param(message(R.SET_FEATURES, bytes(4)), "SET_FEATURES.*8.*4", id="short"),
        pytest.param(message(R.SET_FEATURES, bytes(16)), "SET_FEATURES.*8.*16", id="too long"),
        pytest.param(message(R.SET_OWNER, bytes(8)), "SET_OWNER.*8", id="payload where none belongs"),
        pytest.param(message(R.SET_VRING_ADDR, bytes(8)), "SET_VRING_ADDR.*8", id="half an address"),
        pytest.param(message(R.SET_MEM_TABLE, bytes(4)), "SET_MEM_TABLE.*4", id="half a table"),
        pytest.param(message(R.SET_OWNER, flags=0), "SET_OWNER|version|flags", id="version 0"),
        pytest.param(message(R.SET_OWNER, flags=2), "SET_OWNER|version|flags", id="version 2"),
        pytest.param(message(R.SET_OWNER, flags=3), "SET_OWNER|version|flags", id="version 3"),
        pytest.param(message(R.SET_OWNER, flags=VERSION | 4), "SET_OWNER|reply|flags", id="a reply"),
        pytest.param(message(R.SET_FEATURES, size=0xFFFF_FFFF), "4294967295", id="payload of 4 GiB"),
        pytest.param(message(R.GET_CONFIG, size=0x8000_0000), "2147483648", id="payload of 2 GiB"),
    ],
)
def test_a_message_that_is_none_ends_the_connection(hostile: Any, data: bytes, cause: str) -> None:
    with hostile.frontend() as frontend:
        frontend.send_raw(data)
        assert frontend.wait_hangup() == b""
        hostile.expect_log("broke the protocol", cause)


def test_four_gib_of_payload_are_not_waited_for_or_stored(hostile: Any) -> None:
    before = hostile.resident()
    with hostile.frontend() as frontend:
        frontend.send_raw(message(R.SET_CONFIG, bytes(32), size=0xFFFF_FFFF))
        frontend.wait_hangup()
    hostile.expect_log("SET_CONFIG|4294967295")
    assert hostile.resident() - before < 16 << 20


@pytest.mark.parametrize(
    ("data", "count", "cause"),
    [
        pytest.param(message(R.SET_FEATURES, u64(0)), 1, "SET_FEATURES.*0 file desc.*got 1", id="features+1"),
        pytest.param(message(R.GET_FEATURES), 8, "GET_FEATURES.*got 8", id="a question with 8"),
        pytest.param(message(R.SET_VRING_KICK, u64(0)), 2, "SET_VRING_KICK.*got 2", id="kick+2"),
        pytest.param(message(R.SET_VRING_KICK, u64(0)), 0, "SET_VRING_KICK.*got 0", id="kick without one"),
        pytest.param(message(R.SET_VRING_CALL, u64(NO_FD)), 1, "SET_VRING_CALL.*got 1", id="call, no fd, and one"),
        pytest.param(
            message(R.SET_MEM_TABLE, table(region(0, 4096))), 2, "SET_MEM_TABLE.*got 2", id="table too many"
        ),
        pytest.param(
            message(R.SET_MEM_TABLE, table(region(0, 4096), region(8192, 4096))),
            1,
            "SET_MEM_TABLE.*got 1",
            id="table too few",
        ),
        pytest.param(message(R.SET_MEM_TABLE, table(region(0, 4096))), 0, "SET_MEM_TABLE.*got 0", id="table without"),
    ],
)
def test_the_wrong_number_of_fds_ends_the_connection(hostile: Any, data: bytes, count: int, cause: str) -> None:
    with negotiated(hostile) as frontend, fds(count) as opened:
        frontend.send_raw(data, opened)
        frontend.wait_hangup()
        hostile.expect_log("broke the protocol", cause)


def test_more_fds_than_anybody_takes_are_all_closed(hostile: Any) -> None:
    """The receiver's control buffer is too small: the kernel closes the rest and says MSG_CTRUNC."""
    with hostile.frontend() as frontend, fds(1) as opened:
        many = array.array("i", opened * 250)
        frontend.link.sock.sendmsg([message(R.GET_FEATURES)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, many)])
        frontend.wait_hangup()
        hostile.expect_log("broke the protocol", "descriptors")


def test_fds_in_the_middle_of_a_message_are_closed(hostile: Any) -> None:
    with negotiated(hostile) as frontend, fds(1) as opened:
        data = message(R.SET_VRING_KICK, u64(0))
        frontend.send_raw(data[:14])
        frontend.send_raw(data[14:], opened)
        frontend.wait_hangup()
        hostile.expect_log("broke the protocol", "queue 0")


def test_fds_of_messages_that_never_become_whole_are_closed(hostile: Any) -> None:
    with hostile.frontend() as frontend, fds(8) as opened:
        frontend.send_raw(message(R.SET_MEM_TABLE, size=264)[:6], opened)
    hostile.expect_log("middle of a message")


@pytest.mark.parametrize("length", [1, 11, 12, 13, 19])
def test_the_end_in_the_middle_of_a_message_is_noticed(hostile: Any, length: int) -> None:
    with hostile.frontend() as frontend:
        frontend.send_raw(message(R.SET_FEATURES, u64(0))[:length])
    hostile.expect_log("broke the protocol", "middle of a message")


def test_a_half_closed_connection_ends(hostile: Any) -> None:
    with hostile.frontend() as frontend:
        frontend.sync()
        frontend.link.sock.shutdown(socket.SHUT_WR)
        assert frontend.wait_hangup() == b""


# -- messages at the wrong time or about the wrong thing


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        pytest.param(message(R.GET_QUEUE_NUM), "GET_QUEUE_NUM.*MQ", id="queue number"),
        pytest.param(
            message(R.GET_CONFIG, CONFIG.build(offset=0, size=8, flags=0, data=bytes(8))),
            "GET_CONFIG.*CONFIG",
            id="configuration",
        ),
        pytest.param(message(R.GET_STATUS), "GET_STATUS.*STATUS", id="status"),
        pytest.param(message(R.GET_MAX_MEM_SLOTS), "GET_MAX_MEM_SLOTS.*CONFIGURE_MEM_SLOTS", id="memory slots"),
        pytest.param(message(R.RESET_DEVICE), "RESET_DEVICE.*RESET_DEVICE", id="reset"),
        pytest.param(message(R.VRING_KICK, state(0)), "VRING_KICK.*INBAND", id="in-band kick"),
        pytest.param(message(R.SET_VRING_ENDIAN, state(0, 1)), "SET_VRING_ENDIAN.*CROSS_ENDIAN", id="endian"),
        pytest.param(message(R.POSTCOPY_ADVISE), "POSTCOPY_ADVISE.*PAGEFAULT", id="postcopy"),
    ],
)
def test_a_message_before_its_feature_was_negotiated_ends_the_connection(
    hostile: Any, data: bytes, cause: str
) -> None:
    with hostile.frontend() as frontend:
        frontend.send_raw(data)
        assert frontend.wait_hangup() == b""
        hostile.expect_log("broke the protocol", cause, "not negotiated")


def test_an_ack_tells_of_the_failure_before_the_end(hostile: Any) -> None:
    with negotiated(hostile) as frontend:
        frontend.send_raw(message(R.SET_STATUS, u64(1), flags=VERSION | FLAG_NEED_REPLY))
        answer = frontend.wait_hangup()
        assert answer[:8] == struct.pack("=II", R.SET_STATUS, 5)
        assert answer[12:] != bytes(8)
        hostile.expect_log("broke the protocol", "SET_STATUS")


def test_features_that_were_never_offered_end_the_connection(hostile: Any) -> None:
    with hostile.frontend() as frontend:
        frontend.send_raw(message(R.SET_FEATURES, u64(1 << 63)))
        frontend.wait_hangup()
        hostile.expect_log("broke the protocol", "SET_FEATURES")


@pytest.mark.parametrize(
    ("request_", "payload", "count"),
    [
        (R.SET_VRING_NUM, state(2, 128), 0),
        (R.SET_VRING_NUM, state(0xFFFF_FFFF, 128), 0),
        (R.SET_VRING_BASE, state(200), 0),
        (R.GET_VRING_BASE, state(2), 0),
        (R.SET_VRING_ENABLE, state(256, 1), 0),
        (R.SET_VRING_ADDR, VRING_ADDR.build(index=9, flags=0, desc=0, used=0, avail=0, log=0), 0),
        (R.SET_VRING_KICK, u64(255), 1),
        (R.SET_VRING_CALL, u64(2), 1),
        (R.SET_VRING_ERR, u64(77), 1),
        *((kind, state(0xFFFF_FFFF), 0) for kind in (R.SET_VRING_BASE, R.GET_VRING_BASE, R.SET_VRING_ENABLE)),
        (R.SET_VRING_ADDR, VRING_ADDR.build(index=0xFFFF_FFFF, flags=0, desc=0, used=0, avail=0, log=0), 0),
        *((kind, u64(0xFFFF_FFFF), 1) for kind in (R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR)),
    ],
    ids=lambda value: value.name if isinstance(value, R) else None,
)
def test_a_ring_index_out_of_range_ends_the_connection(
    hostile: Any, request_: FrontendRequest, payload: bytes, count: int
) -> None:
    with negotiated(hostile) as frontend, fds(count) as opened:
        frontend.send_raw(message(request_, payload), opened)
        frontend.wait_hangup()
        hostile.expect_log("broke the protocol", request_.name)


@pytest.mark.parametrize(
    ("packed", "size"),
    [(False, size) for size in (0, 3, 1 << 15, 1 << 31, 0xFFFF_FFFF)]
    + [(True, size) for size in (0, 1 << 15, 1 << 31, 0xFFFF_FFFF)],
)
def test_a_ring_of_no_legal_size_ends_the_connection(hostile: Any, size: int, packed: bool) -> None:
    """Packed rings may have any size up to the limit, so 3 is legal there."""
    with hostile.frontend() as frontend:
        frontend.negotiate(device=BLOCK_FEATURES, protocol=WHOLE_TABLE, packed=packed)
        frontend.send_raw(message(R.SET_VRING_NUM, state(0, size)))
        frontend.wait_hangup()
        hostile.expect_log("broke the protocol", "SET_VRING_NUM", str(size))


@pytest.mark.parametrize("base", [0xFFFF_FFFF, 0x7FFF_FFFF, 0x0001_FFFF])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_ring_may_begin_nowhere(hostile: Any, packed: bool, base: int) -> None:
    """A split ring takes 16 bits of it, and then has more chains than it can hold; a packed one has no such slot."""
    with hostile.frontend(memory_size=1 << 20) as frontend:
        frontend.negotiate(device=BLOCK_FEATURES, packed=packed)
        frontend.share_memory()
        with suppress(BackendError):
            frontend.queues[0] = queue = Queue(0, frontend.make_ring(64))
            frontend.hand_over(queue, base)
            queue.ring.add([(frontend.memory.alloc(16), 16)], [(frontend.memory.alloc(1), 1)])
            queue.publish()
            queue.kick()
            frontend.sync()
        if packed:
            frontend.wait_hangup()
            hostile.expect_log("broke the protocol", "queue 0", "base")


# -- memory that is none


@pytest.mark.parametrize(
    ("regions", "cause"),
    [
        pytest.param([region(0, 8192), region(4096, 8192)], "overlap", id="overlap"),
        pytest.param([region(0, 4096), region(0, 4096)], "overlap", id="twice the same"),
        pytest.param([region(0x1000, 4096), region(0, 1 << 20)], "overlap", id="one inside the other"),
        pytest.param([region((1 << 64) - 4096, 8192)], "region", id="guest address wraps"),
        pytest.param([region(0, 8192, user=(1 << 64) - 4096)], "region", id="user address wraps"),
        pytest.param([region(0, 8192, offset=(1 << 64) - 4096)], "region", id="offset wraps"),
        pytest.param([region(0, 4096, offset=(1 << 63) - 4096)], "region", id="offset beyond any file"),
        pytest.param([region(0, 0)], "region", id="empty"),
        pytest.param([region(0, 2 << 20)], "file", id="longer than its file"),
        pytest.param([region(0, 1 << 40)], "file", id="a terabyte of nothing"),
        pytest.param([region(0, 4096, offset=1 << 20)], "file", id="offset at the end of the file"),
    ],
)
@pytest.mark.parametrize("slots", [False, True], ids=["table", "slots"])
def test_impossible_memory_ends_the_connection(
    hostile: Any, regions: list[dict[str, int]], cause: str, slots: bool
) -> None:
    with negotiated(hostile, BY_SLOTS if slots else WHOLE_TABLE) as frontend, fds(len(regions)) as opened:
        if slots:
            for fields, fd in zip(regions, opened, strict=True):
                frontend.send_raw(message(R.ADD_MEM_REG, SINGLE_REGION.build(region=fields)), [fd])
        else:
            frontend.send_raw(message(R.SET_MEM_TABLE, table(*regions)), opened)
        frontend.wait_hangup()
        hostile.expect_log("broke the protocol", cause)


def _pipe() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def _read_only_file() -> int:
    fd = os.memfd_create("read-only")
    os.ftruncate(fd, 1 << 20)
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.close(fd)
    return read_only


UNMAPPABLE = {
    "directory": lambda: os.open("/", os.O_RDONLY),
    "pipe": _pipe,
    "socket": lambda: socket.socket(socket.AF_UNIX).detach(),
    "eventfd": lambda: os.eventfd(0),
    "null device": lambda: os.open("/dev/null", os.O_RDWR),
    "read-only file": _read_only_file,
}


@pytest.mark.parametrize("kind", UNMAPPABLE)
def test_an_fd_that_cannot_be_mapped_ends_the_connection(hostile: Any, kind: str) -> None:
    fd = UNMAPPABLE[kind]()
    try:
        with negotiated(hostile) as frontend:
            frontend.send_raw(message(R.SET_MEM_TABLE, table(region(0, 4096))), [fd])
            frontend.wait_hangup()
            hostile.expect_log("broke the protocol", "memory|map|fd")
    finally:
        os.close(fd)


def test_the_second_bad_region_takes_the_first_ones_mapping_along(hostile: Any) -> None:
    with negotiated(hostile) as frontend, fds(1) as opened:
        regions = [region(0, 4096), region(8192, 4096)]
        frontend.send_raw(message(R.SET_MEM_TABLE, table(*regions)), [opened[0], UNMAPPABLE["directory"]()])
        frontend.wait_hangup()
        hostile.expect_log("broke the protocol")


def test_a_region_that_is_not_there_cannot_be_removed(hostile: Any) -> None:
    with negotiated(hostile, BY_SLOTS) as frontend:
        frontend.send_raw(message(R.REM_MEM_REG, SINGLE_REGION.build(region=region(0x1234000, 4096))))
        frontend.wait_hangup()
        hostile.expect_log("broke the protocol", "REM_MEM_REG|0x1234000")


@pytest.mark.parametrize("part", ["desc", "driver", "device"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_ring_that_leaves_its_region_ends_the_connection(hostile: Any, part: str, packed: bool) -> None:
    with hostile.frontend(memory_size=1 << 20) as frontend:
        frontend.negotiate(device=BLOCK_FEATURES, packed=packed)
        frontend.share_memory()
        ring = frontend.make_ring(128)
        setattr(ring, part, frontend.memory.regions[0].end - (16 if part == "desc" else 0))
        addresses = {
            name: getattr(ring, name) + frontend.memory.regions[0].user_addr - frontend.memory.regions[0].gpa
            for name in ("desc", "driver", "device")
        }
        frontend.send_raw(message(R.SET_VRING_NUM, state(0, 128)))
        address = VRING_ADDR.build(
            index=0,
            flags=0,
            desc=addresses["desc"],
            avail=addresses["driver"],
            used=addresses["device"],
            log=0,
        )
        frontend.send_raw(message(R.SET_VRING_ADDR, address))
        with closing_fd(os.eventfd(0)) as kick:
            frontend.send_raw(message(R.SET_VRING_KICK, u64(0)), [kick])
            frontend.send_raw(message(R.SET_VRING_ENABLE, state(0, 1)))
            frontend.wait_hangup()
        hostile.expect_log("broke the protocol", "queue 0|ring 0|SET_VRING_ADDR")


@contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def test_memory_truncated_under_a_running_ring_hurts_that_connection_alone(hostile: Any) -> None:
    """An unsealed memfd that shrinks turns every access into SIGBUS."""
    with SharedMemory.of_size(1 << 20, seal=False) as memory, hostile.open(memory=memory) as frontend:
        disk = BlockDriver(memory, frontend.queues[0])
        disk.write(0, bytes(SECTOR))
        os.ftruncate(memory.regions[0].fd, 0)
        frontend.queues[0].kick()
        with pytest.raises(BackendError):
            kick_until_the_end(frontend)
    hostile.expect_log("memory|truncated")


@pytest.mark.parametrize("left", [0, 4096])
@pytest.mark.parametrize("name", ["", "file"], ids=["memory", "file"])
def test_memory_truncated_under_running_io_hurts_that_connection_alone(hostile: Any, name: str, left: int) -> None:
    """Reads and writes are with the device, and with the threads that serve a file, when their buffers go away."""
    before = hostile.protocol_errors(name)
    for _ in range(8):
        with SharedMemory.of_size(1 << 20, seal=False) as memory, hostile.open(name, memory=memory) as frontend:
            for queue in frontend.queues.values():
                disk = BlockDriver(memory, queue)
                for n in range(12):
                    if n % 2:
                        disk.add(BlockRequest(RequestType.OUT, 64 * n, bytes(32768)))
                    else:
                        disk.add(BlockRequest(RequestType.IN, 64 * n, length=32768))
                queue.publish()
                queue.kick()
            os.ftruncate(memory.regions[0].fd, left)
            with pytest.raises(BackendError):
                kick_until_the_end(frontend)
    hostile.wait_until(lambda: hostile.protocol_errors(name) == before + 8, lambda: "8 connections ended for it")


def kick_until_the_end(frontend: Frontend) -> None:
    """BackendError when the back end has hung up."""
    while True:
        for queue in frontend.queues.values():
            queue.kick()
        frontend.sync()


# -- records of requests in flight that are none


@pytest.mark.parametrize("kind", ["directory", "pipe", "socket", "eventfd", "null device", "read-only file"])
def test_an_inflight_region_that_is_no_memory_ends_the_connection(hostile: Any, kind: str) -> None:
    with negotiated(hostile, TRACKED) as frontend, closing_fd(UNMAPPABLE[kind]()) as fd:
        frontend.send_raw(message(R.SET_INFLIGHT_FD, inflight(1 << 16, 0, 2, 64)), [fd])
        frontend.wait_hangup()
        hostile.expect_log("broke the protocol", "in-flight region")


@pytest.mark.parametrize(
    ("size", "offset", "queues", "entries"),
    [
        pytest.param(64, 0, 2, 64, id="too small"),
        pytest.param(2 << 20, 0, 2, 64, id="longer than its file"),
        pytest.param(1 << 16, 1 << 20, 2, 64, id="behind the end"),
        pytest.param(1 << 16, 8, 2, 64, id="not aligned"),
        pytest.param(1 << 62, 0, 2, 64, id="of no file's size"),
        pytest.param(1 << 16, (1 << 63) - (1 << 16), 2, 64, id="at the end of all offsets"),
        pytest.param(1 << 16, 0, 0, 64, id="for no queue"),
        pytest.param(1 << 16, 0, 65535, 64, id="for more queues than there are"),
        pytest.param(1 << 16, 0, 2, 0, id="for queues of nothing"),
        pytest.param(1 << 16, 0, 2, 65535, id="for queues larger than any"),
    ],
)
def test_an_impossible_inflight_region_ends_the_connection(
    hostile: Any, size: int, offset: int, queues: int, entries: int
) -> None:
    with negotiated(hostile, TRACKED) as frontend, fds(1) as opened:
        frontend.send_raw(message(R.SET_INFLIGHT_FD, inflight(size, offset, queues, entries)), opened)
        frontend.wait_hangup()
        hostile.expect_log("broke the protocol", "in-flight region|SET_INFLIGHT_FD")


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_record_of_nonsense_hurts_that_connection_alone(hostile: Any, packed: bool) -> None:
    """Garbage, and records that are nearly right: the ring starts, or the connection ends."""
    chance = random.Random(packed)
    for kind in range(24):
        with hostile.frontend(memory_size=1 << 20) as frontend, fds(1) as opened, suppress(BackendError):
            frontend.negotiate(device=BLOCK_FEATURES, packed=packed, protocol=TRACKED)
            frontend.share_memory()
            garbage = bytearray(chance.randbytes(1 << 16)) if kind % 2 else bytearray(1 << 16)
            for start in (0, 16 + 16 * 64 + 48, 32 + 32 * 64 + 32):
                garbage[start + 8 : start + 12] = struct.pack("<HH", 1, 64)  # version and entries
                garbage[start + 16 + 16 * (kind % 8)] = 1  # something in flight
            os.pwrite(opened[0], garbage, 0)
            frontend.send_raw(message(R.SET_INFLIGHT_FD, inflight(1 << 16, 0, 2, 64)), opened)
            for index in range(2):
                frontend.start_queue(index, 64).kick()
            frontend.sync()
    assert len(hostile.log) < 90


def test_an_inflight_region_truncated_under_running_io_hurts_that_connection_alone(hostile: Any) -> None:
    with hostile.frontend() as frontend, fds(1) as opened:
        frontend.negotiate(device=BLOCK_FEATURES, protocol=TRACKED)
        frontend.share_memory()
        frontend.send_raw(message(R.SET_INFLIGHT_FD, inflight(1 << 16, 0, 2, 128)), opened)
        disk = BlockDriver(frontend.memory, frontend.start_queue(0))
        disk.write(0, bytes(SECTOR))
        os.ftruncate(opened[0], 0)
        with suppress(BackendError):
            disk.write(0, bytes(SECTOR))
        frontend.wait_hangup()
    hostile.expect_log("broke the protocol", "truncated")


# -- descriptors for kicks and calls that are none


@pytest.mark.parametrize("request_", [R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR])
@pytest.mark.parametrize("kind", ["directory", "null device", "read-only file"])
def test_a_doorbell_that_is_no_eventfd_ends_the_connection(
    hostile: Any, request_: FrontendRequest, kind: str
) -> None:
    with negotiated(hostile) as frontend, closing_fd(UNMAPPABLE[kind]()) as fd:
        frontend.send_raw(message(request_, u64(0)), [fd])
        frontend.wait_hangup()
        hostile.expect_log("broke the protocol", "queue 0", "eventfd")


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_kick_fd_that_is_a_pipe_or_a_socket_ends_the_connection(hostile: Any, kind: str) -> None:
    with negotiated(hostile) as frontend, closing_fd(UNMAPPABLE[kind]()) as fd:
        frontend.send_raw(message(R.SET_VRING_KICK, u64(0)), [fd])
        frontend.wait_hangup()
        hostile.expect_log("broke the protocol", "queue 0", f"{kind}")


def test_a_call_socket_that_nobody_reads_does_not_stop_the_ring(hostile: Any) -> None:
    ours, theirs = socket.socketpair()
    with ours, hostile.open() as frontend:
        with theirs:
            frontend.link.tell(frontend.link.connection.set_vring_call, 0, theirs.fileno())
        disk = BlockDriver(frontend.memory, frontend.queues[0], polled=True)
        for n in range(2000):
            read_with_call(disk, n % 64)
        ours.close()
        read_with_call(disk, 1)


def test_a_call_eventfd_that_is_full_does_not_stop_the_ring(hostile: Any) -> None:
    with hostile.open() as frontend:
        queue = frontend.queues[0]
        os.eventfd_write(queue.call_fd, 0xFFFF_FFFF_FFFF_FFFE)
        disk = BlockDriver(frontend.memory, queue, polled=True)
        for n in range(10):
            read_with_call(disk, n)


def test_a_call_eventfd_that_is_full_and_blocks_again_stops_nobody_else(hostile: Any) -> None:
    """O_NONBLOCK belongs to the open file, which the front end shares: it can take it away at any time."""
    with hostile.open() as frontend:
        queue = frontend.queues[0]
        os.eventfd_write(queue.call_fd, 0xFFFF_FFFF_FFFF_FFFE)
        with blocking(queue.call_fd):
            queue.ring.enable_interrupts()
            disk = BlockDriver(frontend.memory, queue)
            disk.submit(BlockRequest(RequestType.IN, 0, length=SECTOR))
            hostile.bystander.check(patience=2.0)


def test_a_kick_eventfd_that_blocks_again_stops_nobody_else(hostile: Any) -> None:
    """The front end empties the eventfd that it has just rung: whoever reads it then finds nothing."""
    with hostile.open() as frontend:
        queue = frontend.queues[0]
        with blocking(queue.kick_fd):
            for _ in range(2000):
                queue.kick()
                if select.select([queue.kick_fd], [], [], 0)[0]:
                    os.set_blocking(queue.kick_fd, False)
                    with suppress(BlockingIOError):
                        os.eventfd_read(queue.kick_fd)
                    os.set_blocking(queue.kick_fd, True)
            hostile.bystander.check()


@contextmanager
def blocking(fd: int) -> Iterator[None]:
    """Reads and writes of the eventfd block; in the end whoever sleeps in one is let go."""
    os.set_blocking(fd, True)
    try:
        yield
    finally:
        os.set_blocking(fd, False)
        with suppress(BlockingIOError):
            os.eventfd_read(fd)
        os.eventfd_write(fd, 1)


def read_with_call(disk: BlockDriver, sector: int) -> None:
    """One read for which the device has to call; its end is seen in the ring."""
    disk.queue.ring.enable_interrupts()
    disk.read(sector, SECTOR)


def test_a_front_end_that_kicks_without_end_leaves_room_for_others(hostile: Any) -> None:
    with hostile.open() as frontend:
        for _ in range(20_000):
            frontend.queues[0].kick()
        hostile.bystander.check()


# -- front ends that do not play along


def send_until_full(sock: socket.socket, data: bytes) -> int:
    """Send ``data`` again and again until nothing more goes out for a while; how often it went."""
    sock.settimeout(0.2)
    count = 0
    with suppress(TimeoutError):
        while True:
            sock.sendall(data)
            count += 1
    return count


def test_a_front_end_that_stops_reading_holds_up_nobody(hostile: Any) -> None:
    with hostile.frontend() as frontend:
        before = hostile.resident()
        assert send_until_full(frontend.link.sock, message(R.GET_FEATURES)) > 100
        hostile.bystander.check()
        assert hostile.resident() - before < 16 << 20


def test_a_second_front_end_is_refused_while_the_first_is_there(hostile: Any) -> None:
    with hostile.open() as first, hostile.frontend() as second:
        assert second.wait_hangup() == b""
        BlockDriver(first.memory, first.queues[0]).write(0, bytes(SECTOR))
        hostile.expect_log("second front end")


def test_a_front_end_that_comes_and_goes_leaves_nothing_and_says_little(hostile: Any) -> None:
    for _ in range(100):
        with hostile.frontend() as frontend:
            frontend.send_raw(message(99))
            frontend.wait_hangup()
    broken = [line for line in hostile.log if "broke the protocol" in line]
    assert 1 <= len(broken) <= 20, f"{len(broken)} lines about the same thing"
    assert len(hostile.log) <= 60, f"a flood of logs: {len(hostile.log)} lines for 100 connections"


def test_dying_with_requests_in_flight_leaves_nothing(hostile: Any) -> None:
    for _ in range(20):
        with hostile.open() as frontend:
            disk = BlockDriver(frontend.memory, frontend.queues[0])
            for n in range(16):
                disk.add(BlockRequest(RequestType.IN, n, length=SECTOR))
            frontend.queues[0].publish()


def test_memory_taken_away_under_a_running_ring_stops_it_until_it_is_back(hostile: Any) -> None:
    """REM_MEM_REG of the region that holds the ring: nothing may be touched, and nothing ends."""
    slots = [MemorySlot(0x1000_0000, 1 << 20), MemorySlot(0x2000_0000, 1 << 20)]
    with SharedMemory(slots) as memory, hostile.frontend(memory=memory) as frontend:
        frontend.negotiate(device=BLOCK_FEATURES, protocol=BY_SLOTS)
        frontend.share_memory()
        queue = frontend.start_queue(0, region=0)
        disk = BlockDriver(memory, queue)
        disk.write(0, b"x" * SECTOR)
        kept = memory.regions[:]
        memory.regions[:] = kept[1:]
        frontend.share_memory()
        queue.kick()
        frontend.sync()
        memory.regions[:] = kept
        frontend.share_memory()
        assert disk.read(0, SECTOR) == b"x" * SECTOR
