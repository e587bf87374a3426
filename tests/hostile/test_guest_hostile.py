"""Drivers that break the rules of virtio, against a real hcd process.

A broken ring stops for good, with an error in the log that names device, queue and cause, and a count in the err
eventfd; the device's other queue goes on, and the queue itself works again once it is set up anew. A bad request is
answered with an error, and its queue goes on. The ``hostile`` fixture checks after every test that other devices
serve and that nothing was left behind.
"""

from __future__ import annotations

import os
import random
import select
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from hcd_protocols.vhost_user import TransportFeature
from hcd_protocols.virtio.blk import REQUEST_HEADER, SEGMENT, RequestType

from hcd.frontend.blk import BLOCK_FEATURES, BlockDriver, BlockRequest
from hcd.frontend.client import Frontend
from hcd.frontend.net import NET_FEATURES, NetDriver
from hcd.frontend.queue import Queue
from hcd.frontend.ring import INDIRECT, NEXT, WRITE, DriverRing
from hcd.frontend.ring_packed import PackedDescriptor, PackedRing
from hcd.frontend.ring_split import SplitRing

pytestmark = pytest.mark.long

SIZE = 64
SECTOR = 512
#: sparse, so that 64 descriptors of it make more than 4 GiB
MEMORY_SIZE = 128 << 20
DISK_SECTORS = (1 << 20) // SECTOR
PATIENCE_MS = 10_000

#: (address, length, flags); NEXT is added where the chain goes on
Chain = Sequence[tuple[int, int, int]]


class Driver:
    """The victim's two queues, and a few places in guest memory."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend
        self.memory = frontend.memory
        self.queue: Queue = frontend.queues[0]
        self.header = self.memory.alloc(16)
        self.memory.write(self.header, REQUEST_HEADER.pack(RequestType.IN, 0, 0))
        self.status = self.memory.alloc(1)
        self.buffer = self.memory.alloc(8192, SECTOR)
        self.end = self.memory.regions[0].end

    @property
    def packed(self) -> bool:
        return isinstance(self.queue.ring, PackedRing)

    def offer(self, chain: Chain) -> None:
        """Make ``chain`` available as it is, and ring."""
        ring = self.queue.ring
        flags = [flags | NEXT * (i + 1 < len(chain)) for i, (_, _, flags) in enumerate(chain)]
        if isinstance(ring, PackedRing):
            ring.offer([PackedDescriptor(a, n, 0, flags[i]) for i, (a, n, _) in enumerate(chain)])
        elif isinstance(ring, SplitRing):
            for i, (addr, length, _) in enumerate(chain):
                ring.write_descriptor(i, addr, length, flags[i], (i + 1) % ring.size)
            ring.offer(0)
        self.queue.kick()

    def table(self, chain: Chain, *, following: Sequence[int] = ()) -> tuple[int, int]:
        """Write an indirect table; where it is and how long. ``following``: its next fields (split)."""
        data = b""
        for i, (addr, length, flags) in enumerate(chain):
            flags |= NEXT * (i + 1 < len(chain))
            if self.packed:
                data += struct.pack("<QIHH", addr, length, 0, flags)
            else:
                data += struct.pack("<QIHH", addr, length, flags, following[i] if following else i + 1)
        gpa = self.memory.alloc(len(data))
        self.memory.write(gpa, data)
        return gpa, len(data)

    @property
    def good(self) -> list[tuple[int, int, int]]:
        """A chain that reads one sector."""
        return [(self.header, 16, 0), (self.buffer, SECTOR, WRITE), (self.status, 1, WRITE)]

    def use(self, index: int) -> None:
        """Verified I/O on queue ``index``."""
        disk = BlockDriver(self.memory, self.frontend.queues[index])
        data = os.urandom(SECTOR)
        disk.write(index, data)
        assert disk.read(index, SECTOR) == data

    def set_up_again(self) -> None:
        """Stop the first queue and start it with a new ring."""
        self.frontend.stop_queue(0)
        self.queue.close()
        self.queue = self.frontend.start_queue(0, SIZE)


@contextmanager
def driving(hostile: Any, *, packed: bool = False, **options: Any) -> Iterator[Driver]:
    with hostile.open(size=SIZE, packed=packed, memory_size=MEMORY_SIZE, **options) as frontend:
        yield Driver(frontend)


def expect_broken(hostile: Any, driver: Driver, cause: str) -> None:
    """The first queue is broken because of ``cause``; the second serves; both do after a new set-up."""
    ready = select.select([driver.queue.err_fd], [], [], PATIENCE_MS / 1000)[0]
    assert ready, f"the front end is told; the log is {hostile.log}"
    hostile.expect_log("queue 0", cause, "broke its ring")
    driver.use(1)
    driver.set_up_again()
    driver.use(0)


# -- rings that break


def outside(d: Driver) -> Chain:
    return [(d.header, 16, 0), (d.end + (1 << 20), SECTOR, WRITE), (d.status, 1, WRITE)]


def in_no_region(d: Driver) -> Chain:
    return [(0, 16, 0), (d.status, 1, WRITE)]


def across_the_end(d: Driver) -> Chain:
    return [(d.header, 16, 0), (d.end - 256, SECTOR, WRITE), (d.status, 1, WRITE)]


def around_the_address_space(d: Driver) -> Chain:
    return [(d.header, 16, 0), ((1 << 64) - 256, SECTOR, WRITE), (d.status, 1, WRITE)]


def of_zero_length(d: Driver) -> Chain:
    return [(d.header, 16, 0), (d.buffer, 0, WRITE), (d.status, 1, WRITE)]


def of_four_gib(d: Driver) -> Chain:
    return [(d.header, 16, 0), (d.buffer, 0xFFFF_FFFF, WRITE), (d.status, 1, WRITE)]


def of_more_than_four_gib_together(d: Driver) -> Chain:
    start = d.memory.regions[0].gpa
    return [(d.header, 16, 0), *[(start, MEMORY_SIZE, WRITE)] * 40, (d.status, 1, WRITE)]


def writable_before_readable(d: Driver) -> Chain:
    return [(d.status, 1, WRITE), (d.header, 16, 0)]


def indirect_of_odd_size(d: Driver) -> Chain:
    gpa, _ = d.table(d.good)
    return [(gpa, 17, INDIRECT)]


def indirect_of_no_size(d: Driver) -> Chain:
    gpa, _ = d.table(d.good)
    return [(gpa, 0, INDIRECT)]


def indirect_of_four_gib(d: Driver) -> Chain:
    gpa, _ = d.table(d.good)
    return [(gpa, 0xFFFF_FFF0, INDIRECT)]


def indirect_longer_than_the_ring(d: Driver) -> Chain:
    gpa, length = d.table([(d.header, 16, 0), *[(d.buffer, 16, WRITE)] * SIZE])
    return [(gpa, length, INDIRECT)]


def indirect_outside(d: Driver) -> Chain:
    return [(d.end, 48, INDIRECT)]


def indirect_across_the_end(d: Driver) -> Chain:
    # Its first entry is there and sound: split has flags and next where packed has id and flags.
    d.memory.write(d.end - 16, struct.pack("<QIHH", d.header, 16, *((0, NEXT) if d.packed else (NEXT, 1))))
    return [(d.end - 16, 48, INDIRECT)]


def indirect_in_indirect(d: Driver) -> Chain:
    gpa, length = d.table(d.good)
    outer, outer_length = d.table([(gpa, length, INDIRECT)])
    return [(outer, outer_length, INDIRECT)]


def indirect_with_a_next(d: Driver) -> Chain:
    gpa, length = d.table(d.good)
    return [(gpa, length, INDIRECT), (d.status, 1, WRITE)]


BROKEN_CHAINS: dict[Callable[[Driver], Chain], str] = {
    outside: "address 0x[0-9a-f]+.*outside",
    in_no_region: "address 0x0.*outside",
    across_the_end: "address 0x[0-9a-f]+.*outside",
    around_the_address_space: "address 0xf+00.*outside",
    of_zero_length: "zero length",
    of_four_gib: "outside",
    of_more_than_four_gib_together: "4 GiB",
    writable_before_readable: "readable.*after.*writable",
    indirect_of_odd_size: "indirect table of 17 bytes",
    indirect_of_no_size: "indirect table of 0 bytes",
    indirect_of_four_gib: "indirect table of 4294967280 bytes",
    indirect_longer_than_the_ring: "indirect table of 1040 bytes",
    indirect_outside: "indirect table at .*outside",
    indirect_across_the_end: "indirect table at .*outside",
    indirect_in_indirect: "indirect table holds an indirect",
    indirect_with_a_next: "indirect descriptor has the NEXT",
}


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("make", BROKEN_CHAINS, ids=lambda make: make.__name__)
def test_a_broken_chain_breaks_its_ring(hostile: Any, make: Callable[[Driver], Chain], packed: bool) -> None:
    with driving(hostile, packed=packed) as driver:
        driver.offer(make(driver))
        expect_broken(hostile, driver, BROKEN_CHAINS[make])


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_an_indirect_descriptor_without_the_feature_breaks_its_ring(hostile: Any, packed: bool) -> None:
    with hostile.frontend(memory_size=MEMORY_SIZE) as frontend:
        frontend.negotiate(device=BLOCK_FEATURES, packed=packed)
        frontend.set_features(frontend.features & ~int(TransportFeature.INDIRECT_DESC))
        frontend.share_memory()
        for index in range(2):
            frontend.start_queue(index, SIZE)
        driver = Driver(frontend)
        driver.offer([(*driver.table(driver.good), INDIRECT)])
        expect_broken(hostile, driver, "indirect descriptor.*not negotiated")


def raw_split(driver: Driver) -> SplitRing:
    assert isinstance(driver.queue.ring, SplitRing)
    return driver.queue.ring


@pytest.mark.parametrize("head", [SIZE, SIZE + 1, 0xFFFF])
def test_a_head_outside_the_table_breaks_its_ring(hostile: Any, head: int) -> None:
    with driving(hostile) as driver:
        raw_split(driver).offer(head)
        driver.queue.kick()
        expect_broken(hostile, driver, f"descriptor index {head} ")


@pytest.mark.parametrize("following", [SIZE, 0xFFFF])
def test_a_next_outside_the_table_breaks_its_ring(hostile: Any, following: int) -> None:
    with driving(hostile) as driver:
        raw_split(driver).write_descriptor(0, driver.header, 16, NEXT, following)
        raw_split(driver).offer(0)
        driver.queue.kick()
        expect_broken(hostile, driver, f"next descriptor {following} ")


@pytest.mark.parametrize("links", [[0], [1, 0], [1, 2, 1]], ids=["itself", "two", "not to the head"])
def test_a_chain_that_loops_breaks_its_ring(hostile: Any, links: list[int]) -> None:
    with driving(hostile) as driver:
        for index, following in enumerate(links):
            raw_split(driver).write_descriptor(index, driver.header, 16, NEXT, following)
        raw_split(driver).offer(0)
        driver.queue.kick()
        expect_broken(hostile, driver, "longer than the ring|loops")


@pytest.mark.parametrize(("links", "cause"), [([0, 0], "loops|longer"), ([3, 0], "next descriptor 3 ")])
def test_an_indirect_table_with_bad_links_breaks_its_ring(hostile: Any, links: list[int], cause: str) -> None:
    with driving(hostile) as driver:
        gpa, length = driver.table([(driver.header, 16, NEXT), (driver.header, 16, NEXT)], following=links)
        driver.offer([(gpa, length, INDIRECT)])
        expect_broken(hostile, driver, cause)


@pytest.mark.parametrize("jump", [SIZE + 1, 0x8000, 0xFFFF])
def test_an_available_index_that_jumps_breaks_its_ring(hostile: Any, jump: int) -> None:
    with driving(hostile) as driver:
        raw_split(driver).avail_idx = jump
        driver.queue.kick()
        expect_broken(hostile, driver, f"available index moved by {jump} in a ring of {SIZE}")


def raw_packed(driver: Driver) -> PackedRing:
    assert isinstance(driver.queue.ring, PackedRing)
    return driver.queue.ring


@pytest.mark.parametrize("buffer_id", [SIZE, 0xFFFF])
def test_a_buffer_id_outside_the_ring_breaks_it(hostile: Any, buffer_id: int) -> None:
    with driving(hostile, packed=True) as driver:
        raw_packed(driver).offer([PackedDescriptor(driver.header, 16, buffer_id, 0)])
        driver.queue.kick()
        expect_broken(hostile, driver, f"buffer id {buffer_id} ")


def test_a_packed_chain_without_end_breaks_its_ring(hostile: Any) -> None:
    with driving(hostile, packed=True) as driver:
        raw_packed(driver).offer([PackedDescriptor(driver.header, 16, 0, NEXT)] * SIZE)
        driver.queue.kick()
        expect_broken(hostile, driver, "longer than the ring|loops")


def test_a_broken_ring_is_left_alone_until_it_is_set_up_again(hostile: Any) -> None:
    with driving(hostile) as driver:
        raw_split(driver).offer(SIZE)
        driver.queue.kick()
        hostile.expect_log("queue 0", "broke its ring")
        used = raw_split(driver).used_idx
        for _ in range(100):
            driver.offer(driver.good)
        driver.frontend.sync()
        driver.use(1)
        assert raw_split(driver).used_idx == used
        assert len([line for line in hostile.log if "broke its ring" in line]) == 1


@pytest.mark.parametrize("same", [True, False], ids=["one address", "ever other addresses"])
def test_breaking_a_ring_again_and_again_does_not_flood_the_log(hostile: Any, same: bool) -> None:
    with driving(hostile) as driver:
        for n in range(60):
            driver.offer([(driver.end + (0 if same else n * 4096), 16, 0)])
            assert select.select([driver.queue.err_fd], [], [], PATIENCE_MS / 1000)[0]
            driver.set_up_again()
    assert 1 <= len(hostile.log) <= 20, f"{len(hostile.log)} lines"


# -- chains that are unusual but legal


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_a_header_in_pieces_is_a_header(hostile: Any, packed: bool, indirect: bool) -> None:
    """Layout is the driver's choice (virtio 1.3, 2.7.4): no device may count on descriptor borders."""
    with driving(hostile, packed=packed) as driver:
        d, memory = driver, driver.memory
        disk = BlockDriver(memory, d.queue)
        data = os.urandom(SECTOR)
        disk.write(3, data)
        memory.write(d.header, REQUEST_HEADER.pack(RequestType.IN, 0, 3))
        token = d.queue.submit(
            [(d.header, 1), (d.header + 1, 6), (d.header + 7, 9)],
            [(d.buffer, 1), (d.buffer + 1, 510), (d.buffer + 511, 1), (d.status, 1)],
            indirect,
        )
        assert d.queue.wait_for(token) == SECTOR + 1
        assert memory.read(d.buffer, SECTOR) == data
        assert memory.read(d.status, 1) == b"\0"


def test_status_and_data_in_one_descriptor_are_told_apart(hostile: Any) -> None:
    with driving(hostile) as driver:
        driver.memory.write(driver.buffer, b"\xa5" * (SECTOR + 1))
        token = driver.queue.submit([(driver.header, 16)], [(driver.buffer, SECTOR + 1)])
        assert driver.queue.wait_for(token) == SECTOR + 1
        assert driver.memory.read(driver.buffer, SECTOR + 1) == bytes(SECTOR + 1)


# -- bad requests: an answer, and the queue goes on


def expect_refused(hostile: Any, driver: Driver, readable: bytes, writable: int, cause: str) -> bytes:
    """A request of these bytes is answered and not with success; what the device wrote."""
    memory, queue = driver.memory, driver.queue
    source, target = memory.alloc(max(len(readable), 1)), memory.alloc(max(writable, 1))
    memory.write(source, readable)
    memory.write(target, b"\xa5" * writable)
    token = queue.submit([(source, len(readable))] * bool(readable), [(target, writable)] * bool(writable))
    written = queue.wait_for(token)
    answer = memory.read(target, writable)
    if writable:
        assert written in (0, 1)
        assert answer[-1] in (1, 2, 0xA5)
        assert answer[:-1] == b"\xa5" * (writable - 1), "no data of a refused request"
    else:
        assert written == 0
    hostile.expect_log("queue 0", cause)
    driver.use(0)
    driver.use(1)
    return answer


def head(kind: int, sector: int = 0) -> bytes:
    return REQUEST_HEADER.pack(kind, 0, sector)


IN, OUT = RequestType.IN, RequestType.OUT
BEYOND = "end|size|sector|beyond|past"


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize(
    ("readable", "writable", "cause"),
    [
        pytest.param(head(IN)[:8], SECTOR + 1, "8 readable bytes", id="header cut short"),
        pytest.param(head(IN)[:1], 1, "1 readable bytes", id="header of one byte"),
        pytest.param(b"", SECTOR + 1, "0 readable bytes", id="no header"),
        pytest.param(head(IN), 0, "status|writable", id="read without a status byte"),
        pytest.param(head(OUT) + bytes(SECTOR), 0, "status|writable", id="write without a status byte"),
        pytest.param(head(IN, DISK_SECTORS), SECTOR + 1, BEYOND, id="read past the end"),
        pytest.param(head(IN, DISK_SECTORS - 1), 2 * SECTOR + 1, BEYOND, id="read across the end"),
        pytest.param(head(IN, (1 << 64) - 1), SECTOR + 1, BEYOND, id="read at sector 2^64-1"),
        pytest.param(head(IN, 1 << 55), SECTOR + 1, BEYOND, id="read at byte 2^64"),
        pytest.param(head(OUT, DISK_SECTORS) + bytes(SECTOR), 1, BEYOND, id="write past the end"),
        pytest.param(head(OUT, DISK_SECTORS - 1) + bytes(2 * SECTOR), 1, BEYOND, id="write across the end"),
        pytest.param(head(IN), 100, "sector|multiple|bytes", id="read of 99 bytes"),
        pytest.param(head(OUT) + bytes(100), 1, "sector|multiple|bytes", id="write of 100 bytes"),
        pytest.param(head(99), 1, "type 99", id="unknown type"),
        pytest.param(head(0xFFFF_FFFF), 1, "type 4294967295", id="type 2^32-1"),
        pytest.param(head(RequestType.DISCARD) + bytes(8), 1, "8 bytes of segments", id="half a segment"),
        pytest.param(head(RequestType.DISCARD), 1, "0 bytes of segments", id="no segment"),
        pytest.param(head(RequestType.DISCARD) + bytes(16 * 64), 1, "1024 bytes of segments", id="64 segments"),
        pytest.param(
            head(RequestType.DISCARD) + SEGMENT.pack(DISK_SECTORS - 1, 2, 0), 1, BEYOND, id="discard across the end"
        ),
        pytest.param(
            head(RequestType.DISCARD) + SEGMENT.pack((1 << 64) - 1, 2, 0), 1, BEYOND, id="discard at sector 2^64-1"
        ),
        pytest.param(
            head(RequestType.WRITE_ZEROES) + SEGMENT.pack(0, 0xFFFF_FFFF, 0), 1, "4294967295", id="2^32-1 zeroes"
        ),
        pytest.param(head(RequestType.WRITE_ZEROES) + SEGMENT.pack(0, 1, 0x80), 1, "flags 0x80", id="unknown flags"),
    ],
)
def test_a_bad_block_request_is_answered_with_an_error(
    hostile: Any, readable: bytes, writable: int, cause: str, packed: bool
) -> None:
    with driving(hostile, packed=packed) as driver:
        expect_refused(hostile, driver, readable, writable, cause)


def test_bad_requests_without_end_do_not_flood_the_log(hostile: Any) -> None:
    with driving(hostile) as driver:
        disk = BlockDriver(driver.memory, driver.queue)
        bad = [BlockRequest(IN, DISK_SECTORS + n, length=SECTOR) for n in range(2000)]
        assert all(request.status == 1 for request in disk.pipeline(bad, 8))
        driver.use(0)
    assert 1 <= len(hostile.log) <= 20, f"{len(hostile.log)} lines"


def make_available(ring: DriverRing, count: int, buffer: int) -> None:
    """``count`` chains of one writable descriptor, whether or not earlier ones came back."""
    for n in range(count):
        if isinstance(ring, PackedRing):
            ring.offer([PackedDescriptor(buffer, 16, n, WRITE)])
        elif isinstance(ring, SplitRing):
            ring.write_descriptor(n, buffer, 16, WRITE)
            ring.offer(n)


def caught_up(ring: DriverRing) -> bool:
    """Whether the device, with EVENT_IDX, sleeps and has taken everything."""
    if isinstance(ring, PackedRing):
        return ring.device_event == (ring.next_position, 2)
    assert isinstance(ring, SplitRing)
    return ring.avail_event == ring.avail_idx


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_driver_cannot_have_more_in_flight_than_its_ring_holds(hostile: Any, packed: bool) -> None:
    """Heads that are out already are made available again while the device holds them, or memory grows for ever."""
    with hostile.frontend("slow", memory_size=1 << 20) as frontend:
        frontend.negotiate(packed=packed, device=0)
        frontend.share_memory()
        queue = frontend.start_queue(0, SIZE)
        buffer = frontend.memory.alloc(16)
        for _ in range(5):
            make_available(queue.ring, SIZE, buffer)
            queue.kick()
            hostile.wait_until(
                lambda: caught_up(queue.ring) or select.select([queue.err_fd], [], [], 0)[0],
                lambda: "the device has taken what is there",
            )
        hostile.expect_log("queue 0", "broke its ring", device="slow")


# -- net


@contextmanager
def network(
    hostile: Any, one: str = "net0", other: str = "net1", packed: bool = False
) -> Iterator[tuple[NetDriver, NetDriver]]:
    """Drivers of two net devices on the hub; ``packed`` rings for the first."""
    with hostile.open(one, device=NET_FEATURES, packed=packed) as a, hostile.open(other, device=NET_FEATURES) as b:
        yield (
            NetDriver(a.memory, a.queues[0], a.queues[1], features=a.features),
            NetDriver(b.memory, b.queues[0], b.queues[1], features=b.features),
        )


def frame(number: int) -> bytes:
    return b"\xff" * 6 + b"\x52\x54\x00\x00\x00\x01" + b"\x88\xb5" + number.to_bytes(4, "big") + bytes(60)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_frames_of_no_legal_length_are_dropped_and_the_next_ones_arrive(hostile: Any, packed: bool) -> None:
    one, other = ("net1", "net0") if packed else ("net0", "net1")
    before, lengths = hostile.guest_errors(one), (1, 11, 12, 13, 25, 70_000, 1 << 20)
    with network(hostile, one, other, packed) as (sender, receiver):
        for length in lengths:
            gpa = sender.memory.alloc(length)
            sender.tx.wait_for(sender.tx.submit([(gpa, length)], []))
            sender.send(frame(length))
            assert receiver.receive() == frame(length)
        hostile.expect_log("queue 1", "bytes to send are no frame", device=one)
    assert hostile.guest_errors(one) == before + len(lengths)


def test_a_frame_in_writable_memory_is_dropped_and_the_next_one_arrives(hostile: Any) -> None:
    with network(hostile) as (sender, receiver):
        sender.tx.wait_for(sender.tx.submit([], [(sender.memory.alloc(100), 100)]))
        sender.send(frame(1))
        assert receiver.receive() == frame(1)


def test_receive_buffers_that_are_too_small_lose_frames_and_nothing_else(hostile: Any) -> None:
    with (
        hostile.open("net0", device=NET_FEATURES) as a,
        hostile.open("net1", device=0) as b,
    ):
        sender = NetDriver(a.memory, a.queues[0], a.queues[1], features=a.features)
        small = b.memory.alloc(8)
        for _ in range(4):
            b.queues[0].submit([], [(small, 8)])
        for n in range(8):
            sender.send(frame(n))
        hostile.bystander.check()


def test_a_receive_ring_that_breaks_while_a_frame_is_spread_over_it_hurts_nobody_else(hostile: Any) -> None:
    """The first buffer is too small for the frame, and the second is none: the device has taken one and breaks the
    ring on the next. (Failing the one that it held was the end of the process.)"""
    with hostile.open("net0", device=NET_FEATURES) as a, hostile.open("net1", device=NET_FEATURES, size=SIZE) as b:
        sender = NetDriver(a.memory, a.queues[0], a.queues[1], features=a.features)
        queue = b.queues[0]
        small = b.memory.alloc(64)
        queue.ring.write_descriptor(0, small, 64, WRITE, 0)
        queue.ring.write_descriptor(1, small, 64, WRITE | NEXT, SIZE)
        queue.ring.offer(0)
        queue.ring.offer(1)
        sender.send(frame(1) + bytes(500))
        assert select.select([queue.err_fd], [], [], PATIENCE_MS / 1000)[0]
        hostile.expect_log("queue 0", "next descriptor", "broke its ring", device="net1")
        sender.send(*(frame(n) for n in range(8)))


# -- noise


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("seed", range(4))
def test_random_rings_hurt_nobody(hostile: Any, seed: int, packed: bool) -> None:
    """Descriptors, indexes and flags at random, some of them near what is legal."""
    rng = random.Random(seed)
    with driving(hostile, packed=packed) as driver:
        start = driver.memory.regions[0].gpa
        addresses = [driver.header, driver.buffer, driver.status, start, driver.end - 8, driver.end, 0]
        for _ in range(40):
            ring = driver.queue.ring
            for slot in range(SIZE):
                addr = rng.choice(addresses) if rng.random() < 0.9 else rng.getrandbits(64)
                length = rng.choice([1, 16, 17, SECTOR, 4096, 48, 0xFFFF_FFFF, 0]) if rng.random() < 0.95 else 0
                flags = rng.choice([0, NEXT, WRITE, NEXT | WRITE, NEXT, INDIRECT, rng.getrandbits(16)])
                if isinstance(ring, PackedRing):
                    flags |= ring.available_flags
                    ring.write_descriptor(slot, addr, length, rng.randrange(SIZE + 1), flags)
                elif isinstance(ring, SplitRing):
                    ring.write_descriptor(slot, addr, length, flags, rng.randrange(SIZE + 1))
                    ring.write_avail(slot, rng.randrange(SIZE))
            if isinstance(ring, SplitRing):
                ring.avail_idx = rng.randrange(SIZE + 1)
            driver.queue.kick()
            driver.frontend.sync()
            driver.set_up_again()
        driver.use(0)
    assert len(hostile.log) < 60


def test_a_ring_that_changes_while_it_is_read_hurts_nobody(hostile: Any) -> None:
    """The driver rewrites descriptors under the device's hands; what was checked must be what is used."""
    with driving(hostile) as driver:
        ring, queue = raw_split(driver), driver.queue
        good = (driver.buffer, SECTOR, WRITE | NEXT, 2)
        bad = [(driver.end, SECTOR, WRITE | NEXT, 2), (driver.buffer, 0xFFFF_FFFF, WRITE | NEXT, 1)]
        for n in range(300):
            ring.write_descriptor(0, driver.header, 16, NEXT, 1)
            ring.write_descriptor(1, *good)
            ring.write_descriptor(2, driver.status, 1, WRITE, 0)
            ring.offer(0)
            queue.kick()
            for _ in range(20):
                ring.write_descriptor(1, *bad[n % 2])
                ring.write_descriptor(1, *good)
            if queue.read_errors():
                driver.set_up_again()
                ring, queue = raw_split(driver), driver.queue
        driver.set_up_again()
        driver.use(0)


def test_a_guest_that_dies_with_chains_out_leaves_nothing(hostile: Any) -> None:
    """The connection ends while chains of every kind are out."""
    for indirect in (False, True):
        with driving(hostile) as driver:
            for _ in range(SIZE // 3):
                status = (driver.status, 1)
                driver.queue.ring.add([(driver.header, 16)], [(driver.buffer, SECTOR), status], indirect)
            driver.queue.publish()
