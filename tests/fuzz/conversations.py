"""Valid conversations, as material for mutations: (bytes, number of descriptors) of each message, in order."""

from __future__ import annotations

import functools
from collections.abc import Callable

from hcd_protocols import doorbell
from hcd_protocols.vhost_user import (
    BackChannel,
    BackendConnection,
    FrontendConnection,
    ProtocolFeature,
    TransportFeature,
    events,
)
from hcd_protocols.vhost_user.connection import UNSUPPORTED_PROTOCOL_FEATURES
from hcd_protocols.vhost_user.events import MemoryRegion
from hcd_protocols.vhost_user.messages import BackendRequest as Asked

__all__ = [
    "FEATURES",
    "PROTOCOL",
    "Spoken",
    "ask",
    "back_channel",
    "back_end",
    "doorbell_host",
    "doorbell_vmm",
    "front_end",
    "items",
    "make_backend",
]

#: message and how many descriptors go along
Spoken = tuple[bytes, int]

FEATURES = int(
    TransportFeature.PROTOCOL_FEATURES
    | TransportFeature.VERSION_1
    | TransportFeature.EVENT_IDX
    | TransportFeature.INDIRECT_DESC
    | TransportFeature.RING_PACKED
    | TransportFeature.LOG_ALL
    | TransportFeature.ACCESS_PLATFORM
)
PROTOCOL = int(ProtocolFeature((1 << 24) - 1) & ~UNSUPPORTED_PROTOCOL_FEATURES)


def make_backend() -> BackendConnection:
    """A connection that offers everything."""
    return BackendConnection(
        features=FEATURES, protocol_features=PROTOCOL, num_queues=3, max_mem_slots=4, max_queue_size=256,
        config_size=60,
    )


def _region(number: int) -> MemoryRegion:
    return MemoryRegion(number << 24, 1 << 20, 0x7000_0000 + (number << 24), 0)


def _negotiate(front: FrontendConnection, protocol: int = PROTOCOL, features: int = FEATURES) -> None:
    front.get_features()
    front.get_protocol_features()
    front.set_protocol_features(protocol)
    front.set_owner(need_reply=True)
    front.get_queue_num()
    front.get_max_mem_slots()
    front.set_features(features & ~int(TransportFeature.LOG_ALL | TransportFeature.RING_PACKED))


def _ring(front: FrontendConnection, index: int) -> None:
    front.set_vring_num(index, 128, need_reply=True)
    front.set_vring_base(index, 0)
    front.set_vring_addr(index, 0x7100_0000, 0x7100_1000, 0x7100_2000)
    front.set_vring_call(index, 1)
    front.set_vring_err(index, None)
    front.set_vring_kick(index, 1)
    front.set_vring_enable(index, True, need_reply=True)


def _usual(front: FrontendConnection) -> None:
    _negotiate(front)
    front.set_mem_table([_region(1), _region(2)], [1, 1], need_reply=True)
    front.get_config(0, 60)
    for index in range(3):
        _ring(front, index)
    front.set_status(15)
    front.get_status()
    front.set_config(32, b"\1")
    front.vring_kick(1)
    for index in range(3):
        front.set_vring_enable(index, False)
        front.get_vring_base(index)
    front.reset_device()


def _slots(front: FrontendConnection) -> None:
    _negotiate(front)
    front.set_backend_req_fd(1, need_reply=True)
    for number in (1, 2, 3):
        front.add_mem_reg(_region(number), 1, need_reply=True)
    _ring(front, 0)
    front.rem_mem_reg(_region(2))
    front.rem_mem_reg(_region(3), 1)
    front.add_mem_reg(_region(2), 1)
    front.set_features(FEATURES & ~int(TransportFeature.RING_PACKED))


def _rare(front: FrontendConnection) -> None:
    _negotiate(front)
    front.send_rarp(b"\x52\x54\0\0\0\1")
    front.net_set_mtu(1500, need_reply=True)
    front.set_vring_endian(0, True)
    front.get_inflight_fd(3, 256)
    front.set_inflight_fd(1 << 16, 0, 3, 256, 1, need_reply=True)
    front.set_log_base(1 << 16, 0, 1)
    front.set_log_fd(1)
    front.iotlb_msg(0x1000, 0x1000, 0x7000_0000, 3, 2)
    front.get_shared_object(bytes(range(16)))
    front.set_device_state_fd(0, 0, 1)
    front.check_device_state()
    front.get_shmem_config()
    front.get_vring_base_skip_drain(1)
    front.reset_owner()


def _packed(front: FrontendConnection) -> None:
    _negotiate(front)
    front.set_features(FEATURES)
    front.set_mem_table([_region(1)], [1])
    _ring(front, 0)
    front.get_vring_base(0)
    _ring(front, 0)


def _old(front: FrontendConnection) -> None:
    """A front end without protocol features."""
    front.get_features()
    front.set_owner()
    front.set_features(int(TransportFeature.VERSION_1))
    front.set_mem_table([_region(1)], [1])
    for index in (0, 1):
        front.set_vring_num(index, 64)
        front.set_vring_addr(index, 0x7100_0000, 0x7100_1000, 0x7100_2000)
        front.set_vring_call(index, 1)
        front.set_vring_kick(index, 1)
    front.get_vring_base(0)


_FRONT_ENDS: tuple[Callable[[FrontendConnection], None], ...] = (_usual, _slots, _rare, _packed, _old)


@functools.cache
def front_end() -> tuple[tuple[Spoken, ...], ...]:
    """What front ends say to a vhost-user back end."""
    spoken = []
    for say in _FRONT_ENDS:
        for ack_all in (False, True):
            front = FrontendConnection(ack_all=ack_all)
            say(front)
            spoken.append(tuple((data, len(fds)) for data, fds in front.data_to_send()))
    return tuple(spoken)


def ask(front: FrontendConnection) -> None:
    """Ask what has an answer of every kind."""
    front.get_features()
    front.get_protocol_features()
    front.set_protocol_features(PROTOCOL)
    front.set_features(int(TransportFeature.VERSION_1), need_reply=True)
    front.get_queue_num()
    front.get_config(0, 8)
    front.get_inflight_fd(1, 64)
    front.get_status()
    front.get_vring_base(0)
    front.get_shared_object(bytes(16))
    front.get_shmem_config()


@functools.cache
def back_end() -> tuple[tuple[Spoken, ...], ...]:
    """What a back end answers to ``ask``."""
    front, back = FrontendConnection(), make_backend()
    ask(front)
    spoken: list[Spoken] = []
    for data, _ in front.data_to_send():
        back.receive_data(data)
        while (event := back.next_event()) is not None:
            _reply(back, event)
        spoken += [(answer, len(fds)) for answer, fds in back.data_to_send()]
    return (tuple(spoken),)


def _reply(back: BackendConnection, event: events.Event) -> None:
    match event:
        case events.GetConfig():
            back.reply_config(event, bytes(event.size))
        case events.GetInflightFd():
            back.reply_inflight(event, 4096, 0, 1, 64, 1)
        case events.GetStatus():
            back.reply_status(event, 7)
        case events.GetVringBase():
            back.reply_vring_base(event, 5)
        case events.GetSharedObject():
            back.reply_shared_object(event, 1)
        case events.GetShmemConfig():
            back.reply_shmem_config(event, {1: 4096})
        case _:
            back.ack(event)


@functools.cache
def back_channel() -> tuple[tuple[Spoken, ...], ...]:
    """What a back end asks of a front end."""
    channel = BackChannel()
    uuid = bytes(range(16))
    spoken = [(channel.config_change(ack), 0) for ack in (False, True)]
    spoken += [(channel.iotlb(0x1000, 3, 1), 0), (channel.host_notifier(1, 4096, 0, True, True), 1)]
    spoken += [(channel.vring_call(1), 0), (channel.vring_err(0, True), 0)]
    for request in (Asked.SHARED_OBJECT_ADD, Asked.SHARED_OBJECT_LOOKUP, Asked.SHARED_OBJECT_REMOVE):
        spoken.append((channel.shared_object(request, uuid), 0))
    spoken += [(channel.shmem_map(1, 0, 0, 4096, True, True), 1), (channel.shmem_unmap(1, 0, 4096), 0)]
    return (tuple(spoken),)


def items() -> tuple[list[doorbell.Item], ...]:
    bells: list[doorbell.Item] = [
        doorbell.DoorbellItem(1, "pio0", doorbell.Place.PIO, 0x510, 4, 7),
        doorbell.DoorbellItem(2, "mmio0", doorbell.Place.MMIO, 0xFE00_0000, 8, None, 16),
        doorbell.DoorbellItem(3, "hyperv0", doorbell.Place.HYPERV, 77, 0),
    ]
    return bells, [doorbell.InterruptItem(1, "line0")], [doorbell.MemoryItem(1, 8192)]


@functools.cache
def doorbell_vmm() -> tuple[tuple[Spoken, ...], ...]:
    """What a VMM says to hcd's doorbell socket: with a table that it answers, and with items held from before."""
    everything = doorbell.Capability(0xFF)
    kinds = items()
    fresh = doorbell.VmmConnection("qemu", everything)
    host = doorbell.HostConnection()
    spoken = [(data, len(fds)) for data, fds in fresh.data_to_send()]
    for data, _ in spoken:
        host.receive_data(data)
    assert host.next_event() is not None
    _offer(host, kinds)
    while packets := host.data_to_send():
        for data, fds in packets:
            fresh.receive_data(data, fds)
        while (event := fresh.next_event()) is not None:
            if isinstance(event, doorbell.Added):
                fresh.answer([0] * len(event.items))
        for data, fds in fresh.data_to_send():
            spoken.append((data, len(fds)))
            host.receive_data(data)
        while host.next_event() is not None:
            pass
    fresh.set_clock(tsc_khz=2_000_000, tsc_offset=-5)
    spoken += [(data, len(fds)) for data, fds in fresh.data_to_send()]
    again = doorbell.VmmConnection("crosvm", everything, [doorbell.Held(item, 1) for kind in kinds for item in kind])
    again.set_clock(tsc_khz=0, tsc_offset=0)
    kept = [(data, len(fds)) for data, fds in again.data_to_send()]
    again.send_error("over")
    kept += [(data, len(fds)) for data, fds in again.data_to_send()]
    return tuple(spoken), tuple(kept)


def _offer(host: doorbell.HostConnection, kinds: tuple[list[doorbell.Item], ...]) -> None:
    host.welcome("bells", doorbells=3, interrupts=1, memory=1)
    for kind in kinds:
        host.add(kind, [1] * len(kind))
    host.end()


@functools.cache
def doorbell_host() -> tuple[tuple[Spoken, ...], ...]:
    """What hcd says to a VMM."""
    vmm = doorbell.VmmConnection("qemu", doorbell.Capability(0xFF))
    host = doorbell.HostConnection()
    kinds = items()
    spoken: list[Spoken] = []
    for data, _ in vmm.data_to_send():
        host.receive_data(data)
    assert host.next_event() is not None
    _offer(host, kinds)
    host.remove([kinds[0][0].reference, kinds[1][0].reference])
    host.end()
    while packets := host.data_to_send():
        for data, fds in packets:
            spoken.append((data, len(fds)))
            vmm.receive_data(data, fds)
        while (event := vmm.next_event()) is not None:
            if isinstance(event, doorbell.Added):
                vmm.answer([0] * len(event.items))
            elif isinstance(event, doorbell.Removed):
                vmm.answer([0] * len(event.references))
        for data, _ in vmm.data_to_send():
            host.receive_data(data)
        while host.next_event() is not None:
            pass
    return (tuple(spoken),)
