"""Every vhost-user message on the wire: layouts, sizes, descriptors; whole, in pieces, and with more behind
it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hcd_protocols.codec import Layout
from hcd_protocols.errors import ProtocolError
from hcd_protocols.vhost_user import events, layouts
from hcd_protocols.vhost_user.connection import UNSUPPORTED_PROTOCOL_FEATURES, BackendConnection
from hcd_protocols.vhost_user.decode import DECODERS
from hcd_protocols.vhost_user.features import ProtocolFeature, TransportFeature
from hcd_protocols.vhost_user.messages import (
    BACKEND_REQUESTS,
    FRONTEND_REQUESTS,
    Answer,
    BackendRequest,
    FrontendRequest,
    build_message,
    parse_header,
)

R = FrontendRequest
ALL_PROTOCOL = (1 << 24) - 1 & ~UNSUPPORTED_PROTOCOL_FEATURES
ALL_FEATURES = TransportFeature.PROTOCOL_FEATURES | (
    TransportFeature.LOG_ALL | TransportFeature.ACCESS_PLATFORM | TransportFeature.VERSION_1
)
REGION = events.MemoryRegion(0x10_0000, 0x4000, 0x7F00_0000_0000, 0x2000)
REGION_BYTES = struct.pack("=QQQQ", 0x10_0000, 0x4000, 0x7F00_0000_0000, 0x2000)
UUID = bytes(range(16))


def state(index: int, num: int) -> bytes:
    return struct.pack("=II", index, num)


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


@dataclass(frozen=True)
class Sample:
    """A legal message, and the event that it makes; None when the connection answers by itself."""

    request: FrontendRequest
    payload: bytes = b""
    fds: tuple[int, ...] = ()
    event: events.Event | None = None

    @property
    def message(self) -> bytes:
        return build_message(self.request, self.payload)


SAMPLES = (
    Sample(R.GET_FEATURES),
    Sample(R.SET_FEATURES, u64(1 << 32 | 1 << 30), event=events.SetFeatures(1 << 32 | 1 << 30)),
    Sample(R.SET_OWNER, event=events.SetOwner()),
    Sample(R.RESET_OWNER, event=events.ResetOwner()),
    Sample(
        R.SET_MEM_TABLE,
        struct.pack("=II", 1, 0) + REGION_BYTES,
        (7,),
        events.SetMemTable((REGION,), (7,)),
    ),
    Sample(R.SET_LOG_BASE, struct.pack("=QQ", 4096, 64), (7,), events.SetLogBase(7, 4096, 64)),
    Sample(R.SET_LOG_FD, fds=(7,), event=events.SetLogFd(7)),
    Sample(R.SET_VRING_NUM, state(1, 256), event=events.SetVringNum(1, 256)),
    Sample(
        R.SET_VRING_ADDR,
        struct.pack("=IIQQQQ", 1, 1, 0x1000, 0x2000, 0x3000, 0x4000),
        event=events.SetVringAddr(1, 1, 0x1000, 0x2000, 0x3000, 0x4000),
    ),
    Sample(R.SET_VRING_BASE, state(1, 0x80008000), event=events.SetVringBase(1, 0x80008000)),
    Sample(R.GET_VRING_BASE, state(1, 0), event=events.GetVringBase(1)),
    Sample(R.SET_VRING_KICK, u64(1), (7,), events.SetVringKick(1, 7)),
    Sample(R.SET_VRING_CALL, u64(1 | 0x100), (), events.SetVringCall(1, None)),
    Sample(R.SET_VRING_ERR, u64(1), (7,), events.SetVringErr(1, 7)),
    Sample(R.GET_PROTOCOL_FEATURES),
    Sample(R.SET_PROTOCOL_FEATURES, u64(1), event=events.SetProtocolFeatures(1)),
    Sample(R.GET_QUEUE_NUM),
    Sample(R.SET_VRING_ENABLE, state(1, 1), event=events.SetVringEnable(1, True)),
    Sample(R.SEND_RARP, b"\x52\x54\0\1\2\3\0\0", event=events.SendRarp(b"\x52\x54\0\1\2\3")),
    Sample(R.NET_SET_MTU, u64(9000), event=events.NetSetMtu(9000)),
    Sample(R.SET_BACKEND_REQ_FD, fds=(7,), event=events.SetBackendReqFd(7)),
    Sample(
        R.IOTLB_MSG,
        struct.pack("=QQQBB6x", 0x1000, 0x2000, 0x3000, 3, 2),
        event=events.IotlbMsg(0x1000, 0x2000, 0x3000, 3, 2),
    ),
    Sample(R.SET_VRING_ENDIAN, state(1, 1), event=events.SetVringEndian(1, True)),
    Sample(R.GET_CONFIG, struct.pack("=III5x", 4, 5, 0), event=events.GetConfig(4, 5, 0)),
    Sample(R.SET_CONFIG, struct.pack("=III", 32, 1, 0) + b"\1", event=events.SetConfig(32, 0, b"\1")),
    Sample(
        R.GET_INFLIGHT_FD,
        struct.pack("=QQHH4x", 0, 0, 2, 128),
        event=events.GetInflightFd(0, 0, 2, 128),
    ),
    Sample(
        R.SET_INFLIGHT_FD,
        struct.pack("=QQHH4x", 8192, 64, 2, 128),
        (7,),
        events.SetInflightFd(7, 8192, 64, 2, 128),
    ),
    Sample(R.RESET_DEVICE, event=events.ResetDevice()),
    Sample(R.VRING_KICK, state(1, 0), event=events.VringKick(1)),
    Sample(R.GET_MAX_MEM_SLOTS),
    Sample(R.ADD_MEM_REG, bytes(8) + REGION_BYTES, (7,), events.AddMemReg(REGION, 7)),
    Sample(R.REM_MEM_REG, bytes(8) + REGION_BYTES, (), events.RemMemReg(REGION)),
    Sample(R.SET_STATUS, u64(15), event=events.SetStatus(15)),
    Sample(R.GET_STATUS, event=events.GetStatus()),
    Sample(R.GET_SHARED_OBJECT, UUID, event=events.GetSharedObject(UUID)),
    Sample(R.SET_DEVICE_STATE_FD, struct.pack("=II", 1, 0), (7,), events.SetDeviceStateFd(7, 1, 0)),
    Sample(R.CHECK_DEVICE_STATE, event=events.CheckDeviceState()),
    Sample(R.GET_SHMEM_CONFIG, event=events.GetShmemConfig()),
    Sample(R.GET_VRING_BASE_SKIP_DRAIN, state(1, 0), event=events.GetVringBaseSkipDrain(1)),
)
UNSUPPORTED = {
    R.CREATE_CRYPTO_SESSION,
    R.CLOSE_CRYPTO_SESSION,
    R.POSTCOPY_ADVISE,
    R.POSTCOPY_LISTEN,
    R.POSTCOPY_END,
    R.GPU_SET_SOCKET,
}
each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.request.name)
each_request = pytest.mark.parametrize("request_", list(R), ids=lambda request: request.name)


def negotiated(sample: Sample | None = None) -> BackendConnection:
    """A connection on which everything is negotiated that can be, with what ``sample`` refers to in place."""
    connection = BackendConnection(
        features=int(ALL_FEATURES), protocol_features=int(ALL_PROTOCOL), num_queues=2, config_size=60
    )
    connection.receive_data(build_message(R.SET_PROTOCOL_FEATURES, u64(ALL_PROTOCOL)))
    if sample and sample.request is R.REM_MEM_REG:
        connection.receive_data(build_message(R.ADD_MEM_REG, bytes(8) + REGION_BYTES), [99])
    while connection.next_event():
        pass
    connection.data_to_send()
    return connection


def outcome(connection: BackendConnection) -> tuple[list[events.Event], int]:
    """All events that are ready, and the number of messages that the connection answered by itself."""
    ready = list(iter(connection.next_event, None))
    return ready, len(connection.data_to_send())


def check(sample: Sample, connection: BackendConnection) -> None:
    if sample.event is None:
        assert outcome(connection) == ([], 1)
    else:
        ready, answered = outcome(connection)
        assert ready == [sample.event]
        assert type(ready[0]) is type(sample.event)
        assert ready[0].request is sample.request
        assert ready[0].fds_carried == sample.fds
        assert answered == 0
    assert connection.take_unclaimed_fds() == []


# -- the whole vocabulary


def test_requests_are_numbered_without_a_gap() -> None:
    """45 front-end and 10 back-end requests, each with a row in its table."""
    assert [int(request) for request in R] == list(range(1, 46))
    assert [int(request) for request in BackendRequest] == list(range(1, 11))
    assert set(FRONTEND_REQUESTS) == set(range(1, 46))
    assert set(BACKEND_REQUESTS) == set(range(1, 11))


def test_every_request_has_a_sample_or_is_named_unsupported() -> None:
    sampled = {sample.request for sample in SAMPLES}
    assert sampled | UNSUPPORTED == set(R)
    assert {FrontendRequest(number) for number in DECODERS} == {sample.request for sample in SAMPLES if sample.event}


def test_protocol_features_are_bits_0_to_23() -> None:
    assert [feature.value for feature in ProtocolFeature] == [1 << bit for bit in range(24)]


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        (layouts.HEADER, (12, 12)),
        (layouts.U64, (8, 8)),
        (layouts.VRING_STATE, (8, 8)),
        (layouts.VRING_ADDR, (40, 40)),
        (layouts.MEM_REGION, (32, 32)),
        (layouts.MEM_REGION_XEN, (40, 40)),
        (layouts.MEM_TABLE, (8, 264)),
        (layouts.MEM_TABLE_XEN, (8, 328)),
        (layouts.SINGLE_REGION, (40, 40)),
        (layouts.SINGLE_REGION_XEN, (48, 48)),
        (layouts.LOG, (16, 16)),
        (layouts.IOTLB, (32, 32)),
        (layouts.CONFIG, (12, 268)),
        (layouts.VRING_AREA, (24, 24)),
        (layouts.INFLIGHT, (20, 24)),
        (layouts.CRYPTO_SESSION, (584, 4096)),
        (layouts.SHARED_OBJECT, (16, 16)),
        (layouts.DEVICE_STATE, (8, 8)),
        (layouts.MMAP, (40, 40)),
        (layouts.SHMEM_CONFIG, (2056, 2056)),
    ],
    ids=lambda value: value.name if isinstance(value, Layout) else "",
)
def test_layout_sizes(layout: Layout, sizes: tuple[int, int]) -> None:
    """Sizes as the specification has them; a layout parses at its smallest size and at no smaller one."""
    assert (layout.min_size, layout.max_size) == sizes
    layout.parse(bytes(layout.min_size))
    with pytest.raises(ProtocolError, match=re.escape(layout.name)):
        layout.parse(bytes(layout.min_size - 1))


def test_layouts_that_only_other_back_ends_use_survive_a_round_trip() -> None:
    xen = {"guest_addr": 1, "size": 2, "user_addr": 3, "mmap_offset": 4, "xen_flags": 0x101, "xen_domid": 7}
    raw = layouts.MEM_REGION_XEN.build(**xen)
    assert raw == struct.pack("=QQQQII", 1, 2, 3, 4, 0x101, 7)
    assert layouts.SINGLE_REGION_XEN.build(region=xen) == bytes(8) + raw
    assert layouts.MEM_TABLE_XEN.parse(struct.pack("=II", 1, 0) + raw)["regions"][0]["xen_domid"] == 7
    session = layouts.CRYPTO_SESSION.build(session_id=-1, setup=b"abcd", key=bytes(64), auth_key=bytes(512))
    assert len(session) == 588
    assert layouts.CRYPTO_SESSION.parse(session)["session_id"] == -1
    assert layouts.CRYPTO_SESSION.parse(session)["setup"] == b"abcd"


def test_inflight_is_24_bytes_on_the_wire_and_20_are_understood() -> None:
    raw = layouts.INFLIGHT.build(mmap_size=8192, mmap_offset=64, num_queues=2, queue_size=128)
    assert raw == struct.pack("=QQHH4x", 8192, 64, 2, 128)
    assert layouts.INFLIGHT.parse(raw[:20])["queue_size"] == 128


def test_values_that_do_not_fit_are_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="vring state"):
        layouts.VRING_STATE.build(index=1 << 32, num=0)
    with pytest.raises(ValueError, match="u64"):
        layouts.U64.build(value=-1)
    with pytest.raises(ValueError, match="vring state"):
        layouts.VRING_STATE.build(index=1)


# -- headers


def test_header_bytes() -> None:
    assert build_message(R.SET_STATUS, u64(15)) == struct.pack("=IIIQ", 39, 1, 8, 15)


@pytest.mark.parametrize("number", [0, 46, 255, 1 << 31])
def test_unknown_request(number: int) -> None:
    with pytest.raises(ProtocolError, match=f"unknown request {number}: expected 1 to 45"):
        parse_header(struct.pack("=III", number, 1, 0), FRONTEND_REQUESTS)


@pytest.mark.parametrize("version", [0, 2, 3])
def test_wrong_version(version: int) -> None:
    with pytest.raises(ProtocolError, match=rf"SET_OWNER \(3\): expected version 1, got {version}"):
        parse_header(struct.pack("=III", 3, version, 0), FRONTEND_REQUESTS)


def test_a_reply_is_no_request_and_a_request_no_reply() -> None:
    with pytest.raises(ProtocolError, match=r"SET_OWNER \(3\): expected a request, got a reply"):
        parse_header(struct.pack("=III", 3, 5, 0), FRONTEND_REQUESTS)
    with pytest.raises(ProtocolError, match=r"SET_OWNER \(3\): expected a reply, got a request"):
        parse_header(struct.pack("=III", 3, 1, 0), FRONTEND_REQUESTS, reply=True)


@each_request
def test_payload_sizes_outside_the_range_end_the_connection_before_they_are_buffered(
    request_: FrontendRequest,
) -> None:
    """One byte too few, one too many, and 4 GiB: the header alone is enough to refuse."""
    spec = FRONTEND_REQUESTS[request_]
    for size in (spec.min_size - 1, spec.max_size + 1, 0xFFFFFFFF):
        if size < 0:
            continue
        connection = negotiated()
        header = struct.pack("=III", request_, 1, size)
        with pytest.raises(ProtocolError, match=rf"{request_.name} \({int(request_)}\): expected a payload"):
            negotiated().message_length(header)
        connection.receive_data(header)
        with pytest.raises(ProtocolError, match=rf"got {size}"):
            connection.next_event()


def test_message_length_counts_the_header() -> None:
    connection = negotiated()
    assert connection.message_length(struct.pack("=III", R.SET_OWNER, 1, 0)) == 12
    assert connection.message_length(struct.pack("=III", R.SET_MEM_TABLE, 1, 72)) == 84


# -- every message, in every way in which it may come


@each_sample
def test_whole(sample: Sample) -> None:
    connection = negotiated(sample)
    connection.receive_data(sample.message, sample.fds)
    check(sample, connection)


@each_sample
def test_byte_by_byte(sample: Sample) -> None:
    """Nothing comes out before the last byte, and the descriptors come with the first."""
    connection = negotiated(sample)
    for place in range(len(sample.message)):
        assert outcome(connection) == ([], 0)
        connection.receive_data(sample.message[place : place + 1], sample.fds if place == 0 else ())
    check(sample, connection)


@each_sample
def test_header_first_and_payload_later(sample: Sample) -> None:
    connection = negotiated(sample)
    connection.receive_data(sample.message[:12], sample.fds)
    connection.receive_data(sample.message[12:])
    check(sample, connection)


@each_sample
def test_with_the_next_message_behind_it(sample: Sample) -> None:
    """A chunk ends in the middle of the next message, whose descriptor comes with its own chunk."""
    connection = negotiated(sample)
    follower = build_message(R.SET_VRING_CALL, u64(0))
    connection.receive_data(sample.message, sample.fds)
    connection.receive_data(follower[:5], [8])
    check(sample, connection)
    connection.receive_data(follower[5:])
    assert connection.next_event() == events.SetVringCall(0, 8)


@each_sample
def test_glued_to_the_message_before(sample: Sample) -> None:
    """The kernel ends a read behind the bytes that carried descriptors: they belong to the last message in
    it.
    """
    connection = negotiated(sample)
    connection.receive_data(build_message(R.SET_OWNER) + sample.message, sample.fds)
    assert connection.next_event() == events.SetOwner()
    check(sample, connection)


@each_sample
def test_too_many_fds(sample: Sample) -> None:
    """One descriptor more than the request can have: refused, and every one comes back to be closed."""
    spec = FRONTEND_REQUESTS[sample.request]
    fds = list(range(100, 100 + spec.max_fds + 1))
    connection = negotiated(sample)
    connection.receive_data(sample.message, fds)
    with pytest.raises(ProtocolError, match=rf"{sample.request.name} .*file descriptors.* got {len(fds)}"):
        connection.next_event()
    assert connection.take_unclaimed_fds() == fds


@pytest.mark.parametrize("sample", [sample for sample in SAMPLES if sample.fds], ids=lambda sample: sample.request.name)
def test_too_few_fds(sample: Sample) -> None:
    connection = negotiated(sample)
    connection.receive_data(sample.message)
    with pytest.raises(ProtocolError, match=rf"{sample.request.name} .*file descriptors.* got 0"):
        connection.next_event()


@each_sample
def test_cut_short_by_the_end_of_the_stream(sample: Sample) -> None:
    """Every proper prefix is an error at EOF, and its descriptors come back; the whole message is not."""
    for place in range(1, len(sample.message)):
        connection = negotiated(sample)
        connection.receive_data(sample.message[:place], sample.fds)
        with pytest.raises(ProtocolError, match="end of the stream"):
            connection.receive_eof()
        assert tuple(connection.take_unclaimed_fds()) == sample.fds
    connection = negotiated(sample)
    connection.receive_data(sample.message, sample.fds)
    connection.receive_eof()
    check(sample, connection)


def test_eof_in_the_message_after_a_whole_one() -> None:
    connection = negotiated()
    connection.receive_data(build_message(R.SET_OWNER) + build_message(R.SET_OWNER)[:4])
    connection.receive_eof()
    assert connection.next_event() == events.SetOwner()
    with pytest.raises(ProtocolError, match="end of the stream"):
        connection.next_event()


def test_descriptors_in_the_middle_of_a_message() -> None:
    message = build_message(R.SET_VRING_CALL, u64(0))
    connection = negotiated()
    connection.receive_data(message[:4])
    connection.receive_data(message[4:], [9])
    with pytest.raises(ProtocolError, match=r"SET_VRING_CALL \(13\): expected .* first byte"):
        connection.next_event()
    assert connection.take_unclaimed_fds() == [9]


def test_descriptors_without_a_byte_belong_to_nobody() -> None:
    connection = negotiated()
    connection.receive_data(b"", [9])
    assert connection.next_event() is None
    assert connection.take_unclaimed_fds() == [9]


# -- messages that contradict themselves


def refused() -> Iterator[tuple[str, FrontendRequest, bytes, tuple[int, ...], str]]:
    table = struct.pack("=II", 2, 0) + REGION_BYTES + struct.pack("=QQQQ", 0x20_0000, 4096, 0, 0)
    yield "no region", R.SET_MEM_TABLE, bytes(8), (1,), "expected 1 to 0 regions in 8 bytes, got 0"
    yield "more regions than bytes", R.SET_MEM_TABLE, table[:40], (1, 2), "regions in 40 bytes, got 2"
    yield (
        "2^32-1 regions",
        R.SET_MEM_TABLE,
        struct.pack("=II", 0xFFFFFFFF, 0) + table[8:],
        (1, 2),
        "got 4294967295",
    )
    yield "one fd for two regions", R.SET_MEM_TABLE, table, (1,), "expected 2 file descriptors, got 1"
    yield "three fds for two regions", R.SET_MEM_TABLE, table, (1, 2, 3), "expected 2 .*, got 3"
    for name, numbers in {
        "size 0": (0, 0, 0, 0),
        "guest address wraps": ((1 << 64) - 4096, 4097, 0, 0),
        "user address wraps": (0, 4097, (1 << 64) - 4096, 0),
        "offset wraps": (0, 4097, 0, (1 << 63) - 4096),
        "everything": ((1 << 64) - 1,) * 4,
    }.items():
        region = struct.pack("=QQQQ", *numbers)
        yield name, R.SET_MEM_TABLE, struct.pack("=II", 1, 0) + region, (1,), "expected a memory region"
        yield name, R.ADD_MEM_REG, bytes(8) + region, (1,), "expected a memory region"
    for request in (R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR):
        yield "fd beside the no-fd bit", request, u64(0x100), (1,), "expected 0 file descriptors"
        yield "no fd", request, u64(0), (), "expected 1 file descriptors"
        yield "reserved bits", request, u64(0x200), (1,), "expected a ring index and bit 8"
        yield "truncated index", request, u64(1 << 32), (1,), "expected a ring index and bit 8"
    yield "neither on nor off", R.SET_VRING_ENABLE, state(0, 2), (), "expected 0 or 1, got 2"
    yield "neither endian", R.SET_VRING_ENDIAN, state(0, 2), (), "expected 0 or 1, got 2"
    yield "unknown ring flags", R.SET_VRING_ADDR, struct.pack("=II32x", 0, 2), (), "expected flags 0 or 1"
    config = struct.pack("=III", 0, 8, 0)
    yield "config size and payload differ", R.GET_CONFIG, config + bytes(4), (), "expected 8 bytes"
    yield "config without its bytes", R.SET_CONFIG, config, (), "expected 8 bytes of configuration, got 0"
    yield "config past the end", R.SET_CONFIG, struct.pack("=III", 60, 1, 0) + b"x", (), "below 60"
    yield "config wraps", R.SET_CONFIG, struct.pack("=III", 0xFFFFFFFF, 1, 0) + b"x", (), "below 60"
    yield "a status of nine bits", R.SET_STATUS, u64(0x100), (), "at most 255, got 256"
    yield "an MTU of 17 bits", R.NET_SET_MTU, u64(0x10000), (), "at most 65535, got 65536"
    yield "empty log", R.SET_LOG_BASE, struct.pack("=QQ", 0, 0), (1,), "expected a mapping"
    yield "log wraps", R.SET_LOG_BASE, struct.pack("=QQ", 4096, (1 << 64) - 4096), (1,), "expected a mapping"
    yield "inflight wraps", R.SET_INFLIGHT_FD, struct.pack("=QQHH", 1, 1 << 63, 1, 1), (1,), "a mapping"
    for name, queues, size in (("queues", 3, 64), ("no queue", 0, 64), ("entries", 1, 0), ("big", 1, 65535)):
        area = struct.pack("=QQHH4x", 4096, 0, queues, size)
        yield f"inflight: {name}", R.GET_INFLIGHT_FD, area, (), "expected 1 to 2 queues of 1 to 32768"
        yield f"inflight: {name}", R.SET_INFLIGHT_FD, area, (1,), "expected 1 to 2 queues of 1 to 32768"
    yield "direction", R.SET_DEVICE_STATE_FD, state(2, 0), (1,), "expected direction 0 or 1"
    yield "phase", R.SET_DEVICE_STATE_FD, state(0, 1), (1,), "phase 0"
    for request in (R.SET_VRING_NUM, R.SET_VRING_BASE, R.GET_VRING_BASE, R.SET_VRING_ENABLE, R.VRING_KICK):
        for index in (2, 1 << 31, 0xFFFFFFFF):
            yield f"ring {index}", request, state(index, 0), (), f"expected a ring below 2, got {index}"
    yield "ring 2", R.SET_VRING_ADDR, struct.pack("=I36x", 2), (), "expected a ring below 2, got 2"
    for request in (R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR):
        for index in (2, 255):
            yield f"ring {index}", request, u64(index), (1,), f"expected a ring below 2, got {index}"
    for num in (0, 3, 65536, 1 << 31):
        yield f"{num} entries", R.SET_VRING_NUM, state(0, num), (), f"a power of two, 1 to 32768.*got {num}"


@pytest.mark.parametrize(
    ("request_", "payload", "fds", "expected"),
    [
        pytest.param(request_, payload, fds, expected, id=f"{request_.name}: {name}")
        for name, request_, payload, fds, expected in refused()
    ],
)
def test_refused(request_: FrontendRequest, payload: bytes, fds: tuple[int, ...], expected: str) -> None:
    """The error names the request and what was expected; every descriptor comes back."""
    connection = negotiated()
    before = connection.features, connection.protocol_features, connection.regions, str(connection.vrings)
    connection.receive_data(build_message(request_, payload), fds)
    with pytest.raises(ProtocolError, match=rf"{request_.name} \({int(request_)}\): .*{expected}"):
        connection.next_event()
    assert tuple(connection.take_unclaimed_fds()) == fds
    after = connection.features, connection.protocol_features, connection.regions, str(connection.vrings)
    assert after == before


def test_what_front_ends_are_forgiven() -> None:
    """Room for two regions of which one is filled, an fd with REM_MEM_REG, GET_CONFIG without empty space."""
    connection = negotiated()
    connection.receive_data(build_message(R.SET_MEM_TABLE, struct.pack("=II", 1, 0) + REGION_BYTES + bytes(32)), [7])
    assert connection.next_event() == events.SetMemTable((REGION,), (7,))
    moved = struct.pack("=QQQQ", REGION.guest_addr, REGION.size, REGION.user_addr, 0)
    connection.receive_data(build_message(R.REM_MEM_REG, bytes(8) + moved), [8])
    assert connection.next_event() == events.RemMemReg(REGION)
    assert connection.take_unclaimed_fds() == [8]
    connection.receive_data(build_message(R.GET_CONFIG, struct.pack("=III", 0, 60, 0)))
    assert connection.next_event() == events.GetConfig(0, 60, 0)


@pytest.mark.parametrize("request_", sorted(UNSUPPORTED), ids=lambda request: request.name)
def test_unsupported_requests_say_why(request_: FrontendRequest) -> None:
    spec = FRONTEND_REQUESTS[request_]
    connection = negotiated()
    connection.receive_data(build_message(request_, bytes(spec.min_size)), range(50, 50 + spec.min_fds))
    with pytest.raises(ProtocolError, match=r"needs protocol feature|is not supported by this back end"):
        connection.next_event()


def test_answers_of_the_table() -> None:
    """Which requests have a reply of their own, from the specification's list."""
    assert {FrontendRequest(number) for number, spec in FRONTEND_REQUESTS.items() if spec.answer is Answer.REPLY} == {
        R.GET_FEATURES,
        R.SET_LOG_BASE,
        R.GET_VRING_BASE,
        R.GET_PROTOCOL_FEATURES,
        R.GET_QUEUE_NUM,
        R.GET_CONFIG,
        R.CREATE_CRYPTO_SESSION,
        R.POSTCOPY_ADVISE,
        R.POSTCOPY_END,
        R.GET_INFLIGHT_FD,
        R.GET_MAX_MEM_SLOTS,
        R.GET_STATUS,
        R.GET_SHARED_OBJECT,
        R.SET_DEVICE_STATE_FD,
        R.CHECK_DEVICE_STATE,
        R.GET_SHMEM_CONFIG,
        R.GET_VRING_BASE_SKIP_DRAIN,
    }
