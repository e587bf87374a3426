"""Both ends of a vhost-user connection against each other, in the message orders of real front ends."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest
from hcd_protocols.errors import ProtocolError
from hcd_protocols.vhost_user import events
from hcd_protocols.vhost_user.channel import BackChannel, BackChannelPeer
from hcd_protocols.vhost_user.connection import BackendConnection
from hcd_protocols.vhost_user.events import MemoryRegion
from hcd_protocols.vhost_user.features import ProtocolFeature, TransportFeature
from hcd_protocols.vhost_user.frontend import FrontendConnection
from hcd_protocols.vhost_user.messages import BackendRequest, FrontendRequest, build_message
from hcd_protocols.vhost_user.state import RingState

R = FrontendRequest
P = ProtocolFeature
T = TransportFeature
PROTOCOL = (
    P.MQ
    | P.REPLY_ACK
    | P.MTU
    | P.RARP
    | P.BACKEND_REQ
    | P.CONFIG
    | P.INFLIGHT_SHMFD
    | P.RESET_DEVICE
    | P.CONFIGURE_MEM_SLOTS
    | P.STATUS
)
FEATURES = T.PROTOCOL_FEATURES | T.VERSION_1 | T.RING_PACKED | T.INDIRECT_DESC | T.EVENT_IDX
#: what SeaBIOS and Linux accept of it through QEMU
DRIVER = FEATURES & ~T.RING_PACKED
LOW = MemoryRegion(0, 0xC_0000, 0x7F00_0000_0000, 0)
HIGH = MemoryRegion(0x10_0000, 0x3FF0_0000, 0x7F00_0010_0000, 0x10_0000)


class ConnectionPair:
    """A front end and a back end with a link between them that cuts the stream into pieces.

    The back end answers everything at once: yes, and zeroes. ``seen`` is what it was asked to do. A
    descriptor that crosses the link is counted, and so is every one that comes out.
    """

    def __init__(self, *, piece: int = 4096, ack_all: bool = False, num_queues: int = 2) -> None:
        self.back = BackendConnection(
            features=int(FEATURES), protocol_features=int(PROTOCOL), num_queues=num_queues, config_size=60
        )
        self.front = FrontendConnection(ack_all=ack_all)
        self.piece = piece
        self.seen: list[FrontendRequest] = []
        self.crossed: list[int] = []
        self.owned: list[int] = []
        self._fd = 100

    def fd(self) -> int:
        self._fd += 1
        return self._fd

    def _pieces(self, data: bytes, fds: tuple[int, ...]) -> Iterator[tuple[bytes, tuple[int, ...]]]:
        for place in range(0, len(data), self.piece):
            yield data[place : place + self.piece], fds if place == 0 else ()

    def pump(self) -> list[FrontendRequest]:
        """Carry everything over and back; the requests that were answered."""
        for data, fds in self.front.data_to_send():
            self.crossed += fds
            for piece in self._pieces(data, fds):
                self.back.receive_data(*piece)
                while event := self.back.next_event():
                    self.seen.append(event.request)
                    self.owned += event.fds_carried
                    self._answer(event)
        answered = []
        for data, fds in self.back.data_to_send():
            for piece in self._pieces(data, fds):
                self.front.receive_data(*piece)
                while reply := self.front.next_reply():
                    answered.append(reply.request)
        return answered

    def _answer(self, event: events.Event) -> None:
        match event:
            case events.GetVringBase():
                self.back.reply_vring_base(event, 0)
            case events.GetConfig():
                self.back.reply_config(event, bytes(event.size))
            case events.GetStatus():
                self.back.reply_status(event, self.back.status)
            case events.GetInflightFd():
                self.back.reply_inflight(event, 4096, 0, event.num_queues, event.queue_size, 55)
            case _:
                self.back.ack(event)

    def settle(self) -> None:
        """Everything was answered, and every descriptor came out once."""
        assert self.front.outstanding == 0
        assert sorted(self.owned + self.back.take_unclaimed_fds()) == self.crossed


def qemu_realize(pair: ConnectionPair, nvqs: int) -> None:
    """1, 15, 16, 17, 36, 21, 3, 1, {13, 14} for each ring."""
    front = pair.front
    for request in (front.get_features, front.get_protocol_features):
        request()
    front.set_protocol_features(int(PROTOCOL))
    front.get_queue_num()
    front.get_max_mem_slots()
    front.set_backend_req_fd(pair.fd(), need_reply=True)
    front.set_owner()
    front.get_features()
    for index in range(nvqs):
        front.set_vring_call(index, pair.fd())
        front.set_vring_err(index, pair.fd())


def qemu_ring(pair: ConnectionPair, index: int) -> None:
    """8, 10, 9, 12."""
    pair.front.set_vring_num(index, 128)
    pair.front.set_vring_base(index, 0)
    pair.front.set_vring_addr(index, LOW.user_addr, LOW.user_addr + 0x2000, LOW.user_addr + 0x1000)
    pair.front.set_vring_kick(index, pair.fd())


def qemu_status(pair: ConnectionPair, *statuses: int) -> None:
    for status in statuses:
        pair.front.get_status()
        pair.front.set_status(status)


def qemu_regions(pair: ConnectionPair, *regions: MemoryRegion) -> None:
    for region in regions:
        pair.front.add_mem_reg(region, pair.fd(), need_reply=True)


def qemu_blk(pair: ConnectionPair) -> None:
    """Realize with GET_CONFIG; SeaBIOS and then Linux start the device, with more memory and more rings."""
    front = pair.front
    qemu_realize(pair, 2)
    front.get_config(0, 57)
    for configured in (1, 2):
        front.set_features(DRIVER)
        qemu_status(pair, 0x08)
        if configured == 1:
            front.get_inflight_fd(2, 128)
        front.set_inflight_fd(4096, 0, 2, 128, pair.fd())
        for index in range(2):
            front.set_vring_call(index, pair.fd())
        front.set_features(DRIVER)
        front.get_status()
        qemu_regions(pair, *((LOW,) if configured == 1 else (HIGH,)))
        for index in range(configured):
            qemu_ring(pair, index)
        for index in range(2):
            front.set_vring_enable(index, True)
        qemu_status(pair, 0x0F)
        pair.pump()
        assert [ring.state for ring in pair.back.vrings[:configured]] == [RingState.RUNNING] * configured
        front.set_vring_call(0, None)
        front.set_status(0)
        for index in range(2):
            front.set_vring_enable(index, False)
        for index in range(configured):
            front.get_vring_base(index)
        pair.pump()
        assert {ring.state for ring in pair.back.vrings} == {RingState.STOPPED}
    front.rem_mem_reg(LOW, need_reply=True)


def qemu_scsi(pair: ConnectionPair) -> None:
    """Two resets at first; CALL comes after ENABLE."""
    front = pair.front
    qemu_realize(pair, 2)
    front.reset_device()
    front.reset_device()
    front.get_inflight_fd(2, 128)
    front.set_inflight_fd(4096, 0, 2, 128, pair.fd())
    front.set_features(DRIVER)
    qemu_status(pair, 0x08)
    qemu_regions(pair, LOW, HIGH)
    for index in range(2):
        qemu_ring(pair, index)
    for index in range(2):
        front.set_vring_enable(index, True)
    for index in range(2):
        front.set_vring_call(index, pair.fd())
    pair.pump()
    assert {ring.state for ring in pair.back.vrings} == {RingState.RUNNING}


def qemu_net(pair: ConnectionPair) -> None:
    """Rings are enabled at realize and at every reset, before features and memory."""
    front = pair.front
    qemu_realize(pair, 2)
    for _ in range(3):
        for index in range(2):
            front.set_vring_enable(index, True)
    front.net_set_mtu(1500, need_reply=True)
    front.set_features(DRIVER)
    qemu_status(pair, 0x08)
    qemu_regions(pair, LOW, HIGH)
    for index in range(2):
        qemu_ring(pair, index)
        front.set_vring_call(index, pair.fd())
    qemu_status(pair, 0x0F)
    front.send_rarp(b"\x52\x54\0\0\0\1")
    pair.pump()
    assert {ring.state for ring in pair.back.vrings} == {RingState.RUNNING}


def user_mode_linux(pair: ConnectionPair) -> None:
    """NEED_REPLY on everything; a table of 72 bytes with one region; no ring is ever stopped, only
    disabled.
    """
    front = pair.front
    front.set_owner()
    front.get_features()
    front.get_protocol_features()
    front.set_protocol_features(int(P.REPLY_ACK | P.BACKEND_REQ | P.CONFIG))
    front.set_backend_req_fd(pair.fd())
    for probe in range(2):
        front.set_features(DRIVER)
        front.get_config(0, 8)
        front.get_config(8, 4)
        front.set_mem_table([LOW], [pair.fd()])
        data, fds = front._to_send.pop()
        front._to_send.append((data[:8] + struct.pack("=I", 72) + data[12:] + bytes(32), fds))
        front.set_vring_call(0, pair.fd())
        front.set_vring_num(0, 256)
        front.set_vring_addr(0, 0x1000, 0x3000, 0x2000)
        front.set_vring_base(0, 0)
        front.set_vring_kick(0, pair.fd())
        front.set_vring_enable(0, True)
        pair.pump()
        assert pair.back.vrings[0].state is RingState.RUNNING, f"probe {probe}"
        front.set_vring_enable(0, False)
        front.get_features()


def dpdk_testpmd(pair: ConnectionPair) -> None:
    """virtio-user of DPDK 22.11: a table for all memory, statuses in between, stopped and started again."""
    front = pair.front
    front.set_owner()
    front.get_features()
    front.get_protocol_features()
    front.set_protocol_features(int(P.MQ | P.REPLY_ACK | P.STATUS))
    for index in range(2):
        front.set_vring_call(index, pair.fd())
    for _ in range(2):
        front.set_features(FEATURES)
        front.set_status(0x0B)
        front.get_status()
        front.get_status()
        front.set_mem_table([LOW, HIGH], [pair.fd(), pair.fd()])
        for index in range(2):
            front.set_vring_num(index, 256)
            front.set_vring_base(index, 0x8000)
            front.set_vring_addr(index, 0x1000, 0x3000, 0x2000)
            front.set_vring_kick(index, pair.fd())
        for index in range(2):
            front.set_vring_enable(index, True)
        front.set_status(0x0F)
        pair.pump()
        assert {ring.state for ring in pair.back.vrings} == {RingState.RUNNING}
        for index in range(2):
            front.set_vring_enable(index, False)
            front.get_vring_base(index)


FRONT_ENDS = (qemu_blk, qemu_scsi, qemu_net, user_mode_linux, dpdk_testpmd)
each_front_end = pytest.mark.parametrize("order", FRONT_ENDS, ids=lambda order: order.__name__)


@each_front_end
@pytest.mark.parametrize("piece", [1, 7, 12, 4096])
def test_start_up_orders_of_real_front_ends(order: Callable[[ConnectionPair], None], piece: int) -> None:
    """Every message is accepted, every answer comes, every descriptor arrives: whole and in pieces."""
    pair = ConnectionPair(piece=piece, ack_all=order is user_mode_linux)
    order(pair)
    pair.pump()
    pair.settle()


def test_the_order_that_the_back_end_sees_is_qemus() -> None:
    """The whole life of a block device, as it was traced (without what the connection answers by itself)."""
    pair = ConnectionPair()
    qemu_blk(pair)
    pair.pump()
    start = [40, 39, 32, 13, 13, 2, 40, 37, 8, 10, 9, 12]
    stop = [13, 39, 18, 18, 11]
    assert [int(request) for request in pair.seen] == [
        *[16, 21, 3, 13, 14, 13, 14, 24],
        *[2, 40, 39, 31, *start[2:], 18, 18, 40, 39, *stop],
        *[2, *start, 8, 10, 9, 12, 18, 18, 40, 39, *stop, 11],
        38,
    ]


@each_front_end
def test_a_break_anywhere_leaves_no_descriptor_behind(order: Callable[[ConnectionPair], None]) -> None:
    """The front end goes away after any message: what it sent came out in events or with close()."""
    whole = ConnectionPair(ack_all=order is user_mode_linux)
    sent: list[tuple[bytes, tuple[int, ...]]] = []
    keep = whole.front.data_to_send

    def record() -> list[tuple[bytes, tuple[int, ...]]]:
        ready = keep()
        sent.extend(ready)
        return ready

    whole.front.data_to_send = record  # type: ignore[method-assign]
    order(whole)
    whole.pump()
    for count in range(1, len(sent)):
        back = ConnectionPair().back
        out: list[int] = []
        for data, fds in sent[: count - 1]:
            back.receive_data(data, fds)
            while event := back.next_event():
                out += event.fds_carried
        last, fds = sent[count - 1]
        back.receive_data(last[:-1], fds)
        out += back.close() + back.take_unclaimed_fds()
        assert sorted(out) == [fd for _, some in sent[:count] for fd in some]


# -- the front end's own checks


def asked(say: Callable[[FrontendConnection], object]) -> FrontendConnection:
    front = FrontendConnection()
    front.set_protocol_features(int(PROTOCOL))
    say(front)
    front.data_to_send()
    return front


def u64(request: FrontendRequest, value: int = 0, flags: int = 5) -> bytes:
    return build_message(request, struct.pack("=Q", value), flags)


@pytest.mark.parametrize(
    ("say", "reply", "fds", "expected"),
    [
        (lambda f: f.set_owner(), u64(R.SET_OWNER), (), "expected none, no answer is due"),
        (lambda f: f.get_features(), u64(R.GET_STATUS), (), r"expected one to GET_FEATURES \(1\)"),
        (lambda f: f.get_features(), u64(R.GET_FEATURES, flags=0xD), (), "expected flags 0x5, got 0xd"),
        (lambda f: f.get_features(), u64(R.GET_FEATURES, flags=1), (), "expected a reply, got a request"),
        (lambda f: f.get_features(), build_message(R.GET_FEATURES, bytes(4), 5), (), "8 bytes, got 4"),
        (lambda f: f.get_features(), u64(R.GET_FEATURES), (9,), "at most 0 file descriptors, got 1"),
        (lambda f: f.get_config(0, 8), u64(R.GET_CONFIG), (), "expected 20 or 0 bytes, got 8"),
        (lambda f: f.get_inflight_fd(1, 8), u64(R.GET_INFLIGHT_FD), (9,), "expected 20 or 24 bytes"),
    ],
    ids=[
        "unasked",
        "other request",
        "flags",
        "request",
        "size",
        "descriptor",
        "config size",
        "inflight size",
    ],
)
def test_replies_that_a_front_end_refuses(
    say: Callable[[FrontendConnection], object], reply: bytes, fds: tuple[int, ...], expected: str
) -> None:
    front = asked(say)
    front.receive_data(reply, fds)
    with pytest.raises(ProtocolError, match=expected):
        front.next_reply()
    with pytest.raises(ProtocolError, match=expected):
        front.next_reply()
    assert tuple(front.take_unclaimed_fds()) == fds


def test_a_reply_byte_by_byte_and_a_reply_cut_short() -> None:
    reply = u64(R.GET_FEATURES, 42)
    front = asked(lambda f: f.get_features())
    for place in range(len(reply)):
        assert front.next_reply() is None
        front.receive_data(reply[place : place + 1])
    received = front.next_reply()
    assert received is not None
    assert (received.value, received.is_ack) == (42, False)
    assert front.offered_features == 42
    front = asked(lambda f: f.get_features())
    front.receive_data(reply[:-1])
    with pytest.raises(ProtocolError, match="end of the stream"):
        front.receive_eof()


def test_a_reply_that_says_no_to_config() -> None:
    front = asked(lambda f: f.get_config(0, 8))
    front.receive_data(build_message(R.GET_CONFIG, b"", 5))
    reply = front.next_reply()
    assert reply is not None
    assert reply.config is None
    with pytest.raises(ValueError, match="no u64"):
        _ = reply.value
    with pytest.raises(ValueError, match=r"not in a reply to GET_CONFIG \(24\)"):
        _ = reply.vring_base


def test_answers_are_expected_only_where_the_protocol_has_them() -> None:
    front = FrontendConnection()
    front.set_owner(need_reply=True)
    assert front.outstanding == 0
    front.set_protocol_features(int(P.REPLY_ACK))
    front.set_owner()
    assert front.outstanding == 0
    front.set_owner(need_reply=True)
    front.get_vring_base(0)
    assert front.outstanding == 2


def test_close_gives_back_descriptors_of_replies_that_nobody_read() -> None:
    front = asked(lambda f: f.get_inflight_fd(1, 8))
    front.receive_data(build_message(R.GET_INFLIGHT_FD, bytes(24), 5), [9])
    assert front.close() == [9]


# -- the back channel


def test_config_change_and_its_status() -> None:
    """Without NEED_REPLY the front end answers nothing; with it, a status."""
    channel, peer = BackChannel(), BackChannelPeer()
    assert channel.config_change() == struct.pack("=III", 2, 1, 0)
    for byte in channel.config_change(need_reply=True):
        assert peer.next_message() is None
        peer.receive_data(bytes([byte]))
    message = peer.next_message()
    assert message is not None
    assert message.request is BackendRequest.CONFIG_CHANGE_MSG
    channel.receive_data(peer.reply(message, 1))
    reply = channel.next_reply()
    assert reply is not None
    assert (reply.request, reply.status) == (BackendRequest.CONFIG_CHANGE_MSG, 1)
    assert channel.next_reply() is None


def test_every_back_end_request_crosses_the_channel() -> None:
    channel, peer = BackChannel(), BackChannelPeer()
    sent = [
        (channel.iotlb(0x1000, 3, 1), ()),
        (channel.config_change(), ()),
        (channel.host_notifier(1, 4096, 0, True), (7,)),
        (channel.vring_call(1), ()),
        (channel.vring_err(1), ()),
        (channel.shared_object(BackendRequest.SHARED_OBJECT_ADD, bytes(16)), ()),
        (channel.shared_object(BackendRequest.SHARED_OBJECT_REMOVE, bytes(16)), ()),
        (channel.shared_object(BackendRequest.SHARED_OBJECT_LOOKUP, bytes(16)), ()),
        (channel.shmem_map(1, 0, 4096, 8192, True), (8,)),
        (channel.shmem_unmap(1, 4096, 8192), ()),
    ]
    for number, (data, fds) in enumerate(sent, 1):
        assert peer.message_length(data[:12]) == len(data)
        peer.receive_data(data, fds)
        message = peer.next_message()
        assert message is not None
        assert (int(message.request), message.fds) == (number, fds)
        assert bool(peer.reply(message)) == (message.request is BackendRequest.SHARED_OBJECT_LOOKUP)
    with pytest.raises(ValueError, match="not about a shared object"):
        channel.shared_object(BackendRequest.IOTLB_MSG, bytes(16))


def test_the_channel_refuses_what_was_not_asked_and_gives_descriptors_back() -> None:
    channel, peer = BackChannel(), BackChannelPeer()
    channel.receive_data(build_message(BackendRequest.CONFIG_CHANGE_MSG, bytes(8), 5), [7])
    with pytest.raises(ProtocolError, match="expected a u64 for nothing"):
        channel.next_reply()
    assert channel.take_unclaimed_fds() == [7]
    peer.receive_data(build_message(BackendRequest.CONFIG_CHANGE_MSG), [8])
    with pytest.raises(ProtocolError, match=r"CONFIG_CHANGE_MSG \(2\): expected 0 file descriptors, got 1"):
        peer.next_message()
    assert peer.take_unclaimed_fds() == [8]
    with pytest.raises(ProtocolError, match="unknown request 11: expected 1 to 10"):
        BackChannelPeer().message_length(struct.pack("=III", 11, 1, 0))
