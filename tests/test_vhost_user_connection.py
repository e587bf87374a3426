"""The back end's connection: what is legal when, what is answered and in which order, and who owns
descriptors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
from hcd_protocols.errors import ProtocolError
from hcd_protocols.vhost_user import events
from hcd_protocols.vhost_user.connection import BackendConnection
from hcd_protocols.vhost_user.features import QEMU_7_2_MASK, ProtocolFeature, TransportFeature
from hcd_protocols.vhost_user.frontend import FrontendConnection
from hcd_protocols.vhost_user.messages import (
    FRONTEND_REQUESTS,
    Answer,
    FrontendRequest,
    build_message,
)
from hcd_protocols.vhost_user.state import RingState
from hypothesis import given, settings
from hypothesis import strategies as st

R = FrontendRequest
P = ProtocolFeature
T = TransportFeature
OFFERED = T.PROTOCOL_FEATURES | T.VERSION_1 | T.RING_PACKED | T.INDIRECT_DESC | T.EVENT_IDX
DRIVER = OFFERED & ~T.RING_PACKED
PROTOCOL = P.MQ | P.REPLY_ACK | P.BACKEND_REQ | P.CONFIG | P.RESET_DEVICE | P.CONFIGURE_MEM_SLOTS | P.STATUS
REGION = events.MemoryRegion(0, 0x10_0000, 0x7F00_0000_0000, 0)
OTHER = events.MemoryRegion(0x10_0000, 0x10_0000, 0x7F00_1000_0000, 0)
Say = Callable[[FrontendConnection], object]


class Link:
    """A back end's connection and the front end that talks to it, with what came out of both."""

    def __init__(self, *, ack_all: bool = False, **limits: int) -> None:
        settled = {"features": int(OFFERED), "protocol_features": int(PROTOCOL), "num_queues": 2}
        self.back = BackendConnection(**(settled | {"config_size": 60} | limits))
        self.front = FrontendConnection(ack_all=ack_all)

    def say(self, *requests: Say) -> list[events.Event]:
        """Send requests; the events that they make, all of them unanswered."""
        for request in requests:
            request(self.front)
        for data, fds in self.front.data_to_send():
            self.back.receive_data(data, fds)
        return list(iter(self.back.next_event, None))

    def one(self, request: Say) -> events.Event:
        (event,) = self.say(request)
        return event

    def answers(self) -> list[tuple[FrontendRequest, bytes]]:
        """What the back end answered, as the front end reads it."""
        for data, fds in self.back.data_to_send():
            self.front.receive_data(data, fds)
        return [(reply.request, reply.payload) for reply in iter(self.front.next_reply, None)]

    def refuse(self, request: Say, match: str) -> None:
        with pytest.raises(ProtocolError, match=match):
            self.say(request)


def negotiate(front: FrontendConnection, features: int = DRIVER, protocol: int = PROTOCOL) -> None:
    front.get_features()
    front.get_protocol_features()
    front.set_protocol_features(protocol)
    front.set_owner()
    front.set_features(features)


def configure(front: FrontendConnection, index: int = 0) -> None:
    front.set_vring_num(index, 256)
    front.set_vring_base(index, 0)
    front.set_vring_addr(index, 0x7F00_0000_0000, 0x7F00_0000_2000, 0x7F00_0000_1000)


def ready(**limits: int) -> Link:
    """A link with features negotiated and nothing else."""
    link = Link(**limits)
    link.say(negotiate)
    link.answers()
    return link


# -- what is legal when: every request in every state


def fresh(link: Link) -> None:
    """Nothing was said."""


def agreed(link: Link) -> None:
    link.say(negotiate)


def stopped(link: Link) -> None:
    link.say(negotiate, lambda f: f.add_mem_reg(REGION, 90), configure)


def disabled(link: Link) -> None:
    stopped(link)
    link.say(lambda f: f.set_vring_kick(0, 91))


def running(link: Link) -> None:
    disabled(link)
    link.say(lambda f: f.set_vring_enable(0, True))


def bare(link: Link) -> None:
    """Running without protocol features, as a front end that does not know bit 30 does it."""
    link.say(
        lambda f: f.set_owner(),
        lambda f: f.set_features(T.VERSION_1),
        lambda f: f.set_mem_table([REGION], [90]),
        configure,
        lambda f: f.set_vring_kick(0, 91),
    )


def dead(link: Link) -> None:
    link.back.receive_data(bytes(12))
    with pytest.raises(ProtocolError):
        link.back.next_event()


STATES = (fresh, agreed, stopped, disabled, running, bare, dead)


def raw(request: FrontendRequest) -> Say:
    """A message of the right size with the right number of descriptors."""
    spec = FRONTEND_REQUESTS[request]

    def say(front: FrontendConnection) -> None:
        fds = tuple(range(60, 60 + spec.min_fds))
        front._to_send.append((build_message(request, bytes(spec.min_size)), fds))

    return say


#: Per request: how it is said about ring 0, and whether it is legal (+) in each of STATES.
LEGAL: dict[FrontendRequest, tuple[Say, str]] = {
    R.GET_FEATURES: (lambda f: f.get_features(), "++++++-"),
    R.SET_FEATURES: (lambda f: f.set_features(DRIVER), "+++++--"),
    R.SET_OWNER: (lambda f: f.set_owner(), "++++++-"),
    R.RESET_OWNER: (lambda f: f.reset_owner(), "++++++-"),
    R.SET_MEM_TABLE: (lambda f: f.set_mem_table([REGION], [70]), "++++++-"),
    R.SET_LOG_BASE: (lambda f: f.set_log_base(4096, 0, 70), "-------"),
    R.SET_LOG_FD: (lambda f: f.set_log_fd(70), "-------"),
    R.SET_VRING_NUM: (lambda f: f.set_vring_num(0, 128), "++++---"),
    R.SET_VRING_ADDR: (lambda f: f.set_vring_addr(0, 1, 2, 3), "++++++-"),
    R.SET_VRING_BASE: (lambda f: f.set_vring_base(0, 5), "++++---"),
    R.GET_VRING_BASE: (lambda f: f.get_vring_base(0), "++++++-"),
    R.SET_VRING_KICK: (lambda f: f.set_vring_kick(0, 70), "++++++-"),
    R.SET_VRING_CALL: (lambda f: f.set_vring_call(0, 70), "++++++-"),
    R.SET_VRING_ERR: (lambda f: f.set_vring_err(0, 70), "++++++-"),
    R.GET_PROTOCOL_FEATURES: (lambda f: f.get_protocol_features(), "++++++-"),
    R.SET_PROTOCOL_FEATURES: (lambda f: f.set_protocol_features(PROTOCOL), "++++++-"),
    R.GET_QUEUE_NUM: (lambda f: f.get_queue_num(), "-++++--"),
    R.SET_VRING_ENABLE: (lambda f: f.set_vring_enable(0, True), "++++++-"),
    R.SEND_RARP: (lambda f: f.send_rarp(bytes(6)), "-------"),
    R.NET_SET_MTU: (lambda f: f.net_set_mtu(1500), "-------"),
    R.SET_BACKEND_REQ_FD: (lambda f: f.set_backend_req_fd(70), "-++++--"),
    R.IOTLB_MSG: (lambda f: f.iotlb_msg(0, 1, 0, 3, 2), "-------"),
    R.SET_VRING_ENDIAN: (lambda f: f.set_vring_endian(0, True), "-------"),
    R.GET_CONFIG: (lambda f: f.get_config(0, 57), "-++++--"),
    R.SET_CONFIG: (lambda f: f.set_config(32, b"\1"), "-++++--"),
    R.CREATE_CRYPTO_SESSION: (raw(R.CREATE_CRYPTO_SESSION), "-------"),
    R.CLOSE_CRYPTO_SESSION: (raw(R.CLOSE_CRYPTO_SESSION), "-------"),
    R.POSTCOPY_ADVISE: (raw(R.POSTCOPY_ADVISE), "-------"),
    R.POSTCOPY_LISTEN: (raw(R.POSTCOPY_LISTEN), "-------"),
    R.POSTCOPY_END: (raw(R.POSTCOPY_END), "-------"),
    R.GET_INFLIGHT_FD: (lambda f: f.get_inflight_fd(1, 128), "-------"),
    R.SET_INFLIGHT_FD: (lambda f: f.set_inflight_fd(4096, 0, 1, 128, 70), "-------"),
    R.GPU_SET_SOCKET: (raw(R.GPU_SET_SOCKET), "-------"),
    R.RESET_DEVICE: (lambda f: f.reset_device(), "-++++--"),
    R.VRING_KICK: (lambda f: f.vring_kick(0), "-------"),
    R.GET_MAX_MEM_SLOTS: (lambda f: f.get_max_mem_slots(), "-++++--"),
    R.ADD_MEM_REG: (lambda f: f.add_mem_reg(OTHER, 70), "-++++--"),
    R.REM_MEM_REG: (lambda f: f.rem_mem_reg(REGION), "--+++--"),
    R.SET_STATUS: (lambda f: f.set_status(15), "-++++--"),
    R.GET_STATUS: (lambda f: f.get_status(), "-++++--"),
    R.GET_SHARED_OBJECT: (lambda f: f.get_shared_object(bytes(16)), "-------"),
    R.SET_DEVICE_STATE_FD: (lambda f: f.set_device_state_fd(0, 0, 70), "-------"),
    R.CHECK_DEVICE_STATE: (lambda f: f.check_device_state(), "-------"),
    R.GET_SHMEM_CONFIG: (lambda f: f.get_shmem_config(), "-------"),
    R.GET_VRING_BASE_SKIP_DRAIN: (lambda f: f.get_vring_base_skip_drain(0), "-------"),
}


def negotiated_state(back: BackendConnection) -> tuple[object, ...]:
    return back.features, back.protocol_features, back.status, back.regions, str(back.vrings)


def test_the_table_names_every_request_in_every_state() -> None:
    assert set(LEGAL) == set(R)
    assert {len(marks) for _, marks in LEGAL.values()} == {len(STATES)}


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
@pytest.mark.parametrize("request_", list(R), ids=lambda request: request.name)
def test_legal_when(request_: FrontendRequest, state: Callable[[Link], None]) -> None:
    """Legal: exactly one event or answer. Illegal: an error that names the request, nothing changes, for
    good.
    """
    say, marks = LEGAL[request_]
    link = Link()
    state(link)
    link.answers()
    before = negotiated_state(link.back)
    if marks[STATES.index(state)] == "+":
        seen = link.say(say)
        answered = link.back.data_to_send()
        assert [event.request for event in seen] + [None for _ in answered] in ([request_], [None])
        assert not link.back.failed
        return
    say(link.front)
    ((message, fds),) = link.front.data_to_send()
    link.back.receive_data(message, fds)
    name = "unknown request 0" if state is dead else rf"{request_.name} \({int(request_)}\)"
    for _ in range(2):
        with pytest.raises(ProtocolError, match=name):
            link.back.next_event()
    with pytest.raises(ProtocolError, match=name):
        link.back.message_length(message[:12])
    with pytest.raises(ProtocolError, match=name):
        link.back.receive_eof()
    assert negotiated_state(link.back) == before
    assert tuple(link.back.take_unclaimed_fds()) == fds
    assert link.back.failed


def test_states_are_what_their_names_say() -> None:
    for state, expected in (
        (agreed, RingState.STOPPED),
        (stopped, RingState.STOPPED),
        (disabled, RingState.DISABLED),
        (running, RingState.RUNNING),
        (bare, RingState.RUNNING),
    ):
        link = Link()
        state(link)
        assert link.back.vrings[0].state is expected


# -- negotiation


def test_offers_are_answered_without_an_event() -> None:
    link = Link(max_mem_slots=64, queue_num=1)
    assert link.say(lambda f: f.get_features(), lambda f: f.get_protocol_features()) == []
    assert link.front.offered_features is None
    link.answers()
    assert link.front.offered_features == OFFERED
    assert link.front.offered_protocol_features == PROTOCOL
    link.say(negotiate)
    link.answers()
    assert link.say(lambda f: f.get_queue_num(), lambda f: f.get_max_mem_slots()) == []
    assert [int.from_bytes(payload, "little") for _, payload in link.answers()] == [1, 64]


def test_features_that_were_not_offered_are_refused() -> None:
    link = ready()
    link.refuse(lambda f: f.set_features(DRIVER | 1 << 5), r"SET_FEATURES \(2\): .* 0x20 was not offered")
    link = ready()
    link.refuse(lambda f: f.set_features(DRIVER | T.LOG_ALL), "0x4000000 was not offered")


@pytest.mark.parametrize("feature", [T.INDIRECT_DESC, T.EVENT_IDX, T.RING_RESET, T.ANY_LAYOUT, T.NOTIFY_ON_EMPTY])
def test_features_that_qemu_lets_through_unasked_are_taken(feature: int) -> None:
    link = Link(features=int(T.PROTOCOL_FEATURES | T.VERSION_1))
    link.say(lambda f: negotiate(f, T.VERSION_1 | feature))
    assert link.back.features == T.VERSION_1 | feature


def test_features_may_be_set_twice_and_even_change_while_nothing_runs() -> None:
    link = ready()
    assert link.one(lambda f: f.set_features(T.VERSION_1)) == events.SetFeatures(T.VERSION_1)
    assert link.one(lambda f: f.set_features(DRIVER)) == events.SetFeatures(DRIVER)
    assert link.back.features == DRIVER


def test_features_of_a_running_ring_change_in_nothing_but_logging() -> None:
    link = Link(features=int(OFFERED | T.LOG_ALL))
    running(link)
    link.say(lambda f: f.set_features(DRIVER | T.LOG_ALL))
    assert link.back.features == DRIVER | T.LOG_ALL
    link.say(lambda f: f.set_features(DRIVER))
    link.refuse(lambda f: f.set_features(DRIVER & ~T.EVENT_IDX), "no change but LOG_ALL while ring 0")


def test_protocol_features_must_be_offered_and_complete() -> None:
    link = Link()
    link.refuse(lambda f: f.set_protocol_features(PROTOCOL | P.MTU), "0x10 was not offered")
    inband = int(PROTOCOL | P.INBAND_NOTIFICATIONS)
    link = Link(protocol_features=inband)
    link.say(lambda f: f.set_protocol_features(inband))
    link = Link(protocol_features=inband)
    link.refuse(
        lambda f: f.set_protocol_features(inband & ~P.REPLY_ACK),
        "INBAND_NOTIFICATIONS needs REPLY_ACK, which is missing",
    )


def test_a_back_end_cannot_offer_what_the_connection_cannot_do() -> None:
    for limits in (
        {"protocol_features": int(P.PAGEFAULT)},
        {"features": 0},
        {"num_queues": 0},
        {"num_queues": 257},
    ):
        with pytest.raises(ValueError, match=r"PAGEFAULT|PROTOCOL_FEATURES|1 to 256 queues"):
            Link(**limits)


def test_protocol_features_need_bit_30() -> None:
    link = Link(features=int(T.VERSION_1), protocol_features=0)
    link.refuse(
        lambda f: f.get_protocol_features(),
        r"GET_PROTOCOL_FEATURES \(15\) needs feature PROTOCOL_FEATURES, which was not offered",
    )


def test_a_front_end_that_comes_back_without_negotiating_goes_on_where_it_was() -> None:
    """QEMU 7.2's rng device after a restart of the back end: SET_FEATURES with bit 30, and no message 15 or
    16.
    """
    link = Link(protocol_features=int(PROTOCOL | P.SHMEM))
    link.front.protocol_features = int(PROTOCOL)  # agreed on with the back end of before
    event = link.one(lambda f: f.set_features(DRIVER, need_reply=True))
    assert event.need_reply
    assert link.back.protocol_features == (PROTOCOL | P.SHMEM) & QEMU_7_2_MASK
    link.say(lambda f: f.get_status(), lambda f: f.add_mem_reg(REGION, 9))


def test_a_front_end_that_asked_for_features_must_negotiate_protocol_features() -> None:
    link = Link()
    link.say(lambda f: f.get_features(), lambda f: f.set_features(DRIVER))
    assert link.back.protocol_features == 0
    link.refuse(lambda f: f.get_status(), "needs protocol feature STATUS, which was not negotiated")


def test_bit_30_in_a_second_set_features_negotiates_nothing() -> None:
    link = Link()
    link.say(lambda f: f.set_features(T.VERSION_1), lambda f: f.set_features(DRIVER))
    assert link.back.protocol_features == 0


# -- rings


def test_without_bit_30_every_ring_is_enabled_at_once() -> None:
    link = Link()
    link.say(lambda f: f.set_features(T.VERSION_1))
    assert [ring.enabled for ring in link.back.vrings] == [True, True]
    assert not link.back.vrings[0].started


def test_rings_may_be_enabled_before_anything_else() -> None:
    """QEMU's network devices enable at realize, and rings that they never configure."""
    link = Link()
    assert link.one(lambda f: f.set_vring_enable(1, True)) == events.SetVringEnable(1, True)
    link.say(negotiate)
    assert [ring.enabled for ring in link.back.vrings] == [False, True]


@pytest.mark.parametrize("order", list(itertools.permutations(["num", "addr", "kick"])), ids="-".join)
def test_a_ring_starts_when_size_addresses_and_kick_are_known(order: tuple[str, ...]) -> None:
    """In whatever order they come."""
    steps: dict[str, Say] = {
        "num": lambda f: f.set_vring_num(0, 256),
        "addr": lambda f: f.set_vring_addr(0, 1, 2, 3),
        "kick": lambda f: f.set_vring_kick(0, None),
    }
    link = ready()
    for step in order:
        assert not link.back.vrings[0].started
        link.say(steps[step])
    assert link.back.vrings[0].started


def test_get_vring_base_stops_at_once_and_answers_when_told() -> None:
    link = Link()
    running(link)
    link.answers()
    event = link.one(lambda f: f.get_vring_base(0))
    assert isinstance(event, events.GetVringBase)
    assert link.back.vrings[0].state is RingState.STOPPED
    assert link.back.vrings[0].enabled
    assert link.answers() == []
    link.back.reply_vring_base(event, 77)
    assert link.answers() == [(R.GET_VRING_BASE, bytes([0, 0, 0, 0, 77, 0, 0, 0]))]
    assert link.back.vrings[0].base == 77


def test_a_ring_is_set_up_anew_without_being_stopped() -> None:
    """User-mode Linux never asks for the base: it disables the ring and begins again."""
    link = Link()
    running(link)
    link.say(lambda f: f.set_vring_enable(0, False), lambda f: f.set_vring_num(0, 64))
    assert link.back.vrings[0].state is RingState.STOPPED
    link.say(configure, lambda f: f.set_vring_kick(0, 95), lambda f: f.set_vring_enable(0, True))
    assert link.back.vrings[0].state is RingState.RUNNING


def test_ring_sizes() -> None:
    """Split: a power of two. Packed: any. Neither 0 nor beyond what the back end bears."""
    for num in (1, 2, 256, 1024):
        ready(max_queue_size=1024).say(lambda f, num=num: f.set_vring_num(0, num))  # type: ignore[misc]
    for num in (0, 3, 2048, 1 << 31):
        ready(max_queue_size=1024).refuse(
            lambda f, num=num: f.set_vring_num(0, num),  # type: ignore[misc]
            rf"SET_VRING_NUM \(8\): expected a power of two, 1 to 1024 entries for ring 0, got {num}",
        )
    packed = ready(max_queue_size=1024)
    packed.say(lambda f: f.set_features(OFFERED), lambda f: f.set_vring_num(0, 3))
    packed.refuse(lambda f: f.set_vring_num(0, 1025), "expected 1 to 1024 entries")


def test_a_ring_of_the_other_format_has_to_be_described_again() -> None:
    link = ready()
    link.say(lambda f: f.set_features(OFFERED), lambda f: f.set_vring_num(0, 3))
    link.say(lambda f: f.set_vring_addr(0, 1, 2, 3), lambda f: f.set_vring_kick(0, 9))
    assert link.back.vrings[0].started
    link.say(lambda f: f.set_features(DRIVER))
    assert link.back.vrings[0].num == 0
    assert not link.back.vrings[0].started


def test_reset_device_forgets_rings_and_keeps_memory() -> None:
    link = Link()
    running(link)
    link.say(lambda f: f.set_status(15), lambda f: f.reset_device())
    assert link.back.vrings[0].state is RingState.STOPPED
    assert (link.back.vrings[0].num, link.back.vrings[0].enabled) == (0, False)
    assert (link.back.features, link.back.status) == (0, 0)
    assert link.back.regions == (REGION,)
    assert link.back.protocol_features == PROTOCOL


def test_reset_owner_disables_rings() -> None:
    link = Link()
    running(link)
    link.say(lambda f: f.reset_owner())
    assert link.back.vrings[0].state is RingState.DISABLED


def test_in_band_kick_starts_a_ring() -> None:
    inband = int(PROTOCOL | P.INBAND_NOTIFICATIONS)
    link = Link(protocol_features=inband)
    link.say(lambda f: negotiate(f, protocol=inband), configure)
    assert link.one(lambda f: f.vring_kick(0)) == events.VringKick(0)
    assert link.back.vrings[0].started


# -- memory


def test_a_table_replaces_the_table_while_rings_run() -> None:
    link = Link()
    running(link)
    link.say(lambda f: f.set_mem_table([OTHER], [8]))
    assert link.back.regions == (OTHER,)
    assert link.back.vrings[0].state is RingState.RUNNING


@pytest.mark.parametrize("shift", [-0xF_F000, -1, 0, 1, 0xF_FFFF])
def test_regions_that_overlap_are_refused(shift: int) -> None:
    """In one table, and against the table; touching is no overlap."""
    base = events.MemoryRegion(0x100_0000, 0x10_0000, 0, 0)
    beside = events.MemoryRegion(0x100_0000 + shift, 0x10_0000, 0x7000_0000, 0)
    ready().refuse(lambda f: f.set_mem_table([base, beside], [8, 9]), r"SET_MEM_TABLE \(5\): .* overlap")
    link = ready()
    link.say(lambda f: f.add_mem_reg(base, 8))
    link.refuse(lambda f: f.add_mem_reg(beside, 9), r"ADD_MEM_REG \(37\): .* overlap")
    assert link.back.regions == (base,)


def test_regions_that_touch_and_that_reach_the_end_of_the_address_space() -> None:
    last = events.MemoryRegion((1 << 64) - 4096, 4096, (1 << 64) - 4096, 0)
    link = ready()
    link.say(lambda f: f.set_mem_table([REGION, OTHER, last], [7, 8, 9]))
    assert link.back.regions == (REGION, OTHER, last)


def test_memory_slots_run_out() -> None:
    link = ready(max_mem_slots=1)
    link.say(lambda f: f.add_mem_reg(REGION, 7))
    link.refuse(lambda f: f.add_mem_reg(OTHER, 8), "expected at most 1 memory regions")


def test_a_region_is_removed_by_address_and_size_whatever_its_offset() -> None:
    region = events.MemoryRegion(0, 4096, 0x7000, 512)
    link = ready()
    link.say(lambda f: f.add_mem_reg(region, 7), lambda f: f.add_mem_reg(OTHER, 8))
    asked = events.MemoryRegion(0, 4096, 0x7000, 0)
    assert link.one(lambda f: f.rem_mem_reg(asked)) == events.RemMemReg(region)
    assert link.back.regions == (OTHER,)
    link.refuse(lambda f: f.rem_mem_reg(asked), r"REM_MEM_REG \(38\): expected a region of the table")


def test_memory_that_the_back_end_could_not_take_is_forgotten() -> None:
    link = ready()
    good, bad = link.say(lambda f: f.add_mem_reg(REGION, 7), lambda f: f.add_mem_reg(OTHER, 8))
    link.back.ack(good)
    link.back.ack(bad, ok=False)
    assert link.back.regions == (REGION,)
    table = link.one(lambda f: f.set_mem_table([OTHER], [9]))
    link.back.ack(table, ok=False)
    assert link.back.regions == ()


# -- answers


def test_need_reply_counts_only_with_reply_ack() -> None:
    link = Link(ack_all=True)
    without = int(PROTOCOL & ~P.REPLY_ACK)
    for event in link.say(lambda f: negotiate(f, protocol=without)):
        assert not event.need_reply
        link.back.ack(event)
    assert [request for request, _ in link.answers()] == [R.GET_FEATURES, R.GET_PROTOCOL_FEATURES]


def test_set_protocol_features_is_acknowledged_by_its_own_terms() -> None:
    """User-mode Linux asks for the status of the very message that makes statuses possible."""
    link = Link(ack_all=True)
    event = link.one(lambda f: f.set_protocol_features(PROTOCOL))
    assert event.need_reply
    link.back.ack(event)
    assert link.answers() == [(R.SET_PROTOCOL_FEATURES, bytes(8))]
    off = link.one(lambda f: f.set_protocol_features(0))
    assert not off.need_reply


def test_a_failed_request_is_answered_with_something_else_than_zero() -> None:
    link = ready()
    event = link.one(lambda f: f.set_owner(need_reply=True))
    link.back.ack(event, ok=False)
    ((request, payload),) = link.answers()
    assert request is R.SET_OWNER
    assert int.from_bytes(payload, "little") != 0


def test_every_answer_has_exactly_the_flags_of_a_reply() -> None:
    link = ready()
    event = link.one(lambda f: f.set_owner(need_reply=True))
    link.back.ack(event)
    link.say(lambda f: f.get_features())
    flags = [int.from_bytes(data[4:8], "little") for data, _ in link.back.data_to_send()]
    assert flags == [5, 5]


def test_an_answer_is_given_once() -> None:
    link = ready()
    event = link.one(lambda f: f.get_status())
    assert isinstance(event, events.GetStatus)
    link.back.reply_status(event, 15)
    with pytest.raises(ValueError, match=r"GET_STATUS \(40\) was answered already"):
        link.back.reply_status(event, 15)
    acked = link.one(lambda f: f.set_owner(need_reply=True))
    link.back.ack(acked)
    with pytest.raises(ValueError, match=r"SET_OWNER \(3\) was answered already"):
        link.back.ack(acked)


def test_an_answer_is_given_to_the_connection_that_asked() -> None:
    event = ready().one(lambda f: f.get_status())
    assert isinstance(event, events.GetStatus)
    with pytest.raises(ValueError, match="not of this connection"):
        ready().back.reply_status(event, 0)


def test_a_request_with_a_reply_takes_no_status() -> None:
    link = ready()
    event = link.one(lambda f: f.get_vring_base(0))
    with pytest.raises(ValueError, match="wants a reply"):
        link.back.ack(event)


def test_an_event_that_wants_no_answer_may_be_acknowledged_in_vain() -> None:
    link = ready()
    event = link.one(lambda f: f.set_owner())
    link.back.ack(event)
    link.back.ack(event)
    assert link.answers() == []


def test_answers_go_out_in_the_order_of_the_requests() -> None:
    """An answer that is ready early waits for the older ones; equal requests are told apart."""
    link = ready()
    first, second, third = link.say(
        lambda f: f.get_vring_base(0),
        lambda f: f.get_status(),
        lambda f: f.get_features(),
        lambda f: f.get_status(),
    )
    assert isinstance(first, events.GetVringBase)
    assert isinstance(second, events.GetStatus)
    assert isinstance(third, events.GetStatus)
    assert second == third
    link.back.reply_status(third, 3)
    link.back.reply_status(second, 2)
    assert link.answers() == []
    link.back.reply_vring_base(first, 9)
    assert [(request, payload[0]) for request, payload in link.answers()] == [
        (R.GET_VRING_BASE, 0),
        (R.GET_STATUS, 2),
        (R.GET_FEATURES, int(OFFERED) & 0xFF),
        (R.GET_STATUS, 3),
    ]


def test_config_is_served_at_any_place_inside() -> None:
    link = ready()
    for offset, size in ((0, 60), (0, 57), (59, 1), (32, 4)):
        event = link.one(lambda f, o=offset, s=size: f.get_config(o, s))  # type: ignore[misc]
        assert isinstance(event, events.GetConfig)
        link.back.reply_config(event, bytes([offset]) * size)
        ((_, payload),) = link.answers()
        assert payload[12:] == bytes([offset]) * size


@pytest.mark.parametrize(("offset", "size"), [(0, 61), (60, 1), (61, 0), (0xFFFFFFFF, 256), (0, 0)])
def test_config_outside_is_an_empty_reply_and_the_connection_lives(offset: int, size: int) -> None:
    link = ready()
    assert link.say(lambda f: f.get_config(offset, size)) == []
    assert link.answers() == [(R.GET_CONFIG, b"")]
    assert link.one(lambda f: f.set_owner()) == events.SetOwner()


def test_config_that_cannot_be_read_is_an_empty_reply_and_a_wrong_length_a_local_mistake() -> None:
    link = ready()
    event = link.one(lambda f: f.get_config(0, 8))
    assert isinstance(event, events.GetConfig)
    with pytest.raises(ValueError, match="expected 8 bytes of configuration, got 7"):
        link.back.reply_config(event, bytes(7))
    link.back.reply_config(event, b"")
    assert link.answers() == [(R.GET_CONFIG, b"")]


def test_status_is_remembered() -> None:
    link = ready()
    link.say(lambda f: f.set_status(11))
    assert link.back.status == 11


def test_replies_of_rarer_requests() -> None:
    wanted = int(PROTOCOL | P.INFLIGHT_SHMFD | P.LOG_SHMFD | P.SHARED_OBJECT | P.DEVICE_STATE | P.SHMEM)
    link = Link(protocol_features=wanted)
    link.say(lambda f: negotiate(f, protocol=wanted))
    link.answers()
    back = link.back
    for request in (
        lambda f: f.get_inflight_fd(2, 128),
        lambda f: f.set_log_base(4096, 0, 7),
        lambda f: f.get_shared_object(bytes(16)),
        lambda f: f.set_device_state_fd(0, 0, 7),
        lambda f: f.check_device_state(),
        lambda f: f.get_shmem_config(),
    ):
        match link.one(request):
            case events.GetInflightFd() as event:
                back.reply_inflight(event, 8192, 0, event.num_queues, event.queue_size, 33)
            case events.GetSharedObject() as event:
                back.reply_shared_object(event, 34)
            case events.SetDeviceStateFd() as event:
                back.reply_device_state(event)
            case events.GetShmemConfig() as event:
                back.reply_shmem_config(event, {0: 4096, 7: 8192})
            case event:
                back.reply_u64(event, 0)
    for data, fds in back.data_to_send():
        link.front.receive_data(data, fds)
    inflight, log, shared, state, result, shmem = iter(link.front.next_reply, None)
    assert (inflight.inflight, inflight.fds) == ((8192, 0, 2, 128), (33,))
    assert log.value == 0
    assert shared.fds == (34,)
    assert (state.value, state.fds) == (0x100, ())
    assert result.ok
    assert shmem.shmem_sizes == {0: 4096, 7: 8192}


# -- errors


def test_an_illegal_request_that_asked_for_a_status_gets_one_before_the_end() -> None:
    link = ready()
    link.refuse(lambda f: f.send_rarp(bytes(6), need_reply=True), "needs protocol feature RARP")
    ((request, payload),) = link.answers()
    assert request is R.SEND_RARP
    assert int.from_bytes(payload, "little") == 1


def test_an_illegal_request_with_a_reply_of_its_own_gets_nothing() -> None:
    link = ready()
    link.refuse(lambda f: f.get_shmem_config(), "needs protocol feature SHMEM")
    assert link.back.data_to_send() == []


def test_an_error_behind_a_good_message_does_not_touch_it() -> None:
    """Descriptors of the good message are its event's; only those of the bad one come back."""
    link = ready()
    good = build_message(R.SET_VRING_CALL, bytes(8))
    bad = build_message(R.SET_VRING_CALL, bytes([9]) + bytes(7))
    link.back.receive_data(good, [7])
    link.back.receive_data(bad, [8])
    assert link.back.next_event() == events.SetVringCall(0, 7)
    with pytest.raises(ProtocolError, match="expected a ring below 2, got 9"):
        link.back.next_event()
    assert link.back.take_unclaimed_fds() == [8]


def test_what_comes_after_an_error_belongs_to_nobody() -> None:
    link = Link()
    dead(link)
    link.back.receive_data(build_message(R.SET_VRING_CALL, bytes(8)), [7])
    assert link.back.take_unclaimed_fds() == [7]
    assert link.back.take_unclaimed_fds() == []


def test_a_bad_header_that_was_only_looked_at_ends_the_connection_too() -> None:
    link = ready()
    with pytest.raises(ProtocolError, match="unknown request 99"):
        link.back.message_length(b"c\0\0\0\1\0\0\0\0\0\0\0")
    with pytest.raises(ProtocolError, match="unknown request 99"):
        link.back.next_event()


def test_close_gives_back_what_was_not_read() -> None:
    link = ready()
    link.back.receive_data(build_message(R.SET_VRING_CALL, bytes(8)), [7])
    link.back.receive_data(build_message(R.SET_VRING_ERR, bytes(8))[:6], [8])
    assert link.back.close() == [7, 8]
    with pytest.raises(ProtocolError, match="closed"):
        link.back.next_event()


# -- whatever comes


def legal_shape(draw: st.DrawFn) -> tuple[bytes, list[int]]:
    """A message that passes the header check, with fields and descriptors at random but likely small."""
    request = draw(st.sampled_from(list(R)))
    spec = FRONTEND_REQUESTS[request]
    small = st.integers(0, 3) | st.sampled_from([4096, 0x10_0000, 1 << 31, 1 << 63, (1 << 64) - 1])
    most = min(spec.max_size, spec.min_size + 80)
    size = draw(st.sampled_from(sorted({spec.min_size, most, min(spec.min_size + 32, most)})))
    words = draw(st.lists(small, min_size=size // 8 + 1, max_size=size // 8 + 1))
    payload = b"".join(word.to_bytes(8, "little") for word in words)[:size]
    count = draw(st.integers(spec.min_fds, min(spec.max_fds + 1, 3)))
    flags = draw(st.sampled_from([1, 9]))
    return build_message(request, payload, flags), [0] * count


message = st.composite(lambda draw: legal_shape(draw))()
garbage = st.tuples(st.binary(max_size=40), st.lists(st.just(0), max_size=3))


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


@settings(max_examples=400)
@given(
    start=st.sampled_from(STATES),
    chunks=st.lists(st.tuples(message | garbage, st.lists(st.integers(0, 400), max_size=3)), max_size=12),
    answer=st.booleans(),
)
def test_only_protocol_errors_and_every_descriptor_once(
    start: Callable[[Link], None],
    chunks: list[tuple[tuple[bytes, list[int]], list[int]]],
    answer: bool,
) -> None:
    """Random messages and garbage in random pieces: nothing but ProtocolError, and no fd lost or given
    twice.
    """
    link = Link(protocol_features=int(PROTOCOL | P.INFLIGHT_SHMFD | P.LOG_SHMFD | P.CROSS_ENDIAN | P.RARP))
    start(link)
    link.back.take_unclaimed_fds()
    given_fds: list[int] = []
    taken: list[int] = []
    number = 1000
    for (data, fds), places in chunks:
        for place, piece in enumerate(cut(data, places)):
            mine = list(range(number, number + len(fds))) if place == 0 else []
            number += len(mine)
            given_fds += mine
            link.back.receive_data(piece, mine)
            try:
                while event := link.back.next_event():
                    taken += event.fds_carried
                    if answer and FRONTEND_REQUESTS[event.request].answer is Answer.ACK:
                        link.back.ack(event)
            except ProtocolError:
                assert link.back.failed
        link.back.data_to_send()
    taken += link.back.take_unclaimed_fds()
    taken += link.back.close()
    assert sorted(taken) == given_fds


@settings(max_examples=200)
@given(data=st.binary(min_size=12, max_size=12))
def test_any_header_is_a_length_or_a_protocol_error(data: bytes) -> None:
    try:
        assert 12 <= Link().back.message_length(data) <= 12 + 4096
    except ProtocolError as error:
        assert str(error)  # noqa: PT017 - the point is that nothing else is raised
