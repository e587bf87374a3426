"""From a message to an event, by its own fields alone: nothing here knows what was said before.

One function per payload shape, one table that names the function of each request. Whether the event is
legal in the state of the connection is decided in ``state``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from hcd_protocols.codec import Layout
from hcd_protocols.errors import ProtocolError
from hcd_protocols.vhost_user import events
from hcd_protocols.vhost_user.layouts import CONFIG_HEADER_SIZE, MAX_TABLE_REGIONS
from hcd_protocols.vhost_user.messages import (
    NO_FD,
    VRING_INDEX_MASK,
    FrontendRequest,
    RequestSpec,
)
from hcd_protocols.vhost_user.stream import Message

__all__ = ["DECODERS", "check_fds", "decode", "parse_region"]

Decoder = Callable[[RequestSpec, Message, bool], events.Event]
_R = FrontendRequest
_ADDRESS_SPACE = 1 << 64
_FILE_OFFSETS = 1 << 63


def decode(message: Message, need_reply: bool) -> events.Event:
    """The event of ``message``. ProtocolError when its fields contradict each other or its descriptors."""
    spec = message.header.spec
    return DECODERS[int(spec.request)](spec, message, need_reply)


def check_fds(spec: RequestSpec, count: int) -> None:
    """ProtocolError unless ``count`` descriptors may come with the request."""
    if not spec.min_fds <= count <= spec.max_fds:
        expected = str(spec.min_fds) if spec.min_fds == spec.max_fds else f"{spec.min_fds} to {spec.max_fds}"
        raise ProtocolError(f"{spec.name}: expected {expected} file descriptors, got {count}")


def parse_region(spec: RequestSpec, fields: Mapping[str, Any]) -> events.MemoryRegion:
    """A region whose arithmetic holds: not empty, and no sum of it wraps."""
    region = events.MemoryRegion(fields["guest_addr"], fields["size"], fields["user_addr"], fields["mmap_offset"])
    if region.size == 0:
        raise ProtocolError(f"{spec.name}: expected a memory region of at least one byte, got size 0")
    for what, begin, limit in (
        ("guest address", region.guest_addr, _ADDRESS_SPACE),
        ("user address", region.user_addr, _ADDRESS_SPACE),
        ("mmap offset", region.mmap_offset, _FILE_OFFSETS),
    ):
        if begin + region.size > limit:
            raise ProtocolError(
                f"{spec.name}: expected a memory region that ends below {limit:#x}, "
                f"got {what} {begin:#x} with size {region.size:#x}"
            )
    return region


def _parse(spec: RequestSpec, message: Message, layout: Layout | None = None) -> Mapping[str, Any]:
    return (layout or spec.layout).parse(message.payload)


def _bare(event: type[events.Event]) -> Decoder:
    return lambda spec, message, need_reply: event(need_reply=need_reply)


def _u64(make: Callable[..., events.Event], most: int = _ADDRESS_SPACE - 1) -> Decoder:
    def decoder(spec: RequestSpec, message: Message, need_reply: bool) -> events.Event:
        value = int(_parse(spec, message)["value"])
        if value > most:
            raise ProtocolError(f"{spec.name}: expected at most {most}, got {value}")
        return make(value, need_reply=need_reply)

    return decoder


def _state(make: Callable[..., events.Event]) -> Decoder:
    def decoder(spec: RequestSpec, message: Message, need_reply: bool) -> events.Event:
        fields = _parse(spec, message)
        return make(fields["index"], fields["num"], need_reply=need_reply)

    return decoder


def _flag(make: Callable[..., events.Event]) -> Decoder:
    def decoder(spec: RequestSpec, message: Message, need_reply: bool) -> events.Event:
        fields = _parse(spec, message)
        if fields["num"] > 1:
            raise ProtocolError(f"{spec.name}: expected 0 or 1, got {fields['num']}")
        return make(fields["index"], bool(fields["num"]), need_reply=need_reply)

    return decoder


def _index(make: Callable[..., events.Event]) -> Decoder:
    # The number beside the index means nothing in these.
    return lambda spec, message, need_reply: make(_parse(spec, message)["index"], need_reply=need_reply)


def _one_fd(make: Callable[..., events.Event]) -> Decoder:
    def decoder(spec: RequestSpec, message: Message, need_reply: bool) -> events.Event:
        return make(message.fds[0], need_reply=need_reply)

    return decoder


def _vring_fd(make: Callable[..., events.Event]) -> Decoder:
    def decoder(spec: RequestSpec, message: Message, need_reply: bool) -> events.Event:
        value = int(_parse(spec, message)["value"])
        if value & ~(VRING_INDEX_MASK | NO_FD):
            raise ProtocolError(f"{spec.name}: expected a ring index and bit 8, got {value:#x}")
        expected = 0 if value & NO_FD else 1
        if len(message.fds) != expected:
            raise ProtocolError(
                f"{spec.name}: expected {expected} file descriptors with {value:#x}, got {len(message.fds)}"
            )
        fd = message.fds[0] if message.fds else None
        return make(value & VRING_INDEX_MASK, fd, need_reply=need_reply)

    return decoder


def _mem_table(spec: RequestSpec, message: Message, need_reply: bool) -> events.Event:
    fields = _parse(spec, message)
    count, found = int(fields["nregions"]), len(fields["regions"])
    if not 1 <= count <= MAX_TABLE_REGIONS or count > found:
        raise ProtocolError(
            f"{spec.name}: expected 1 to {min(found, MAX_TABLE_REGIONS)} regions "
            f"in {len(message.payload)} bytes, got {count}"
        )
    if count != len(message.fds):
        raise ProtocolError(f"{spec.name}: expected {count} file descriptors, got {len(message.fds)}")
    regions = tuple(parse_region(spec, region) for region in fields["regions"][:count])
    return events.SetMemTable(regions, message.fds, need_reply=need_reply)


def _add_region(spec: RequestSpec, message: Message, need_reply: bool) -> events.Event:
    region = parse_region(spec, _parse(spec, message)["region"])
    return events.AddMemReg(region, message.fds[0], need_reply=need_reply)


def _remove_region(spec: RequestSpec, message: Message, need_reply: bool) -> events.Event:
    return events.RemMemReg(parse_region(spec, _parse(spec, message)["region"]), need_reply=need_reply)


def _vring_addr(spec: RequestSpec, message: Message, need_reply: bool) -> events.Event:
    fields = _parse(spec, message)
    if fields["flags"] & ~1:
        raise ProtocolError(f"{spec.name}: expected flags 0 or 1, got {fields['flags']:#x}")
    return events.SetVringAddr(
        fields["index"],
        fields["flags"],
        fields["desc"],
        fields["used"],
        fields["avail"],
        fields["log"],
        need_reply=need_reply,
    )


def _config(spec: RequestSpec, message: Message) -> Mapping[str, Any]:
    fields = _parse(spec, message)
    data = len(message.payload) - CONFIG_HEADER_SIZE
    # A front end may leave out the empty space that a GET_CONFIG drags along.
    bare = data == 0 and spec.request is _R.GET_CONFIG
    if fields["size"] != data and not bare:
        raise ProtocolError(f"{spec.name}: expected {fields['size']} bytes of configuration, got {data}")
    return fields


def _get_config(spec: RequestSpec, message: Message, need_reply: bool) -> events.Event:
    fields = _config(spec, message)
    return events.GetConfig(fields["offset"], fields["size"], fields["flags"], need_reply=need_reply)


def _set_config(spec: RequestSpec, message: Message, need_reply: bool) -> events.Event:
    fields = _config(spec, message)
    return events.SetConfig(fields["offset"], fields["flags"], fields["data"], need_reply=need_reply)


def _rarp(spec: RequestSpec, message: Message, need_reply: bool) -> events.Event:
    return events.SendRarp(message.payload[:6], need_reply=need_reply)


def _log_base(spec: RequestSpec, message: Message, need_reply: bool) -> events.Event:
    fields = _parse(spec, message)
    size, offset = fields["mmap_size"], fields["mmap_offset"]
    _check_area(spec, size, offset)
    return events.SetLogBase(message.fds[0], size, offset, need_reply=need_reply)


def _check_area(spec: RequestSpec, size: int, offset: int) -> None:
    if size == 0 or size + offset > _FILE_OFFSETS:
        raise ProtocolError(
            f"{spec.name}: expected a mapping that ends below {_FILE_OFFSETS:#x}, "
            f"got size {size:#x} at offset {offset:#x}"
        )


def _get_inflight(spec: RequestSpec, message: Message, need_reply: bool) -> events.Event:
    fields = _parse(spec, message)
    return events.GetInflightFd(
        fields["mmap_size"],
        fields["mmap_offset"],
        fields["num_queues"],
        fields["queue_size"],
        need_reply=need_reply,
    )


def _set_inflight(spec: RequestSpec, message: Message, need_reply: bool) -> events.Event:
    fields = _parse(spec, message)
    _check_area(spec, fields["mmap_size"], fields["mmap_offset"])
    return events.SetInflightFd(
        message.fds[0],
        fields["mmap_size"],
        fields["mmap_offset"],
        fields["num_queues"],
        fields["queue_size"],
        need_reply=need_reply,
    )


def _iotlb(spec: RequestSpec, message: Message, need_reply: bool) -> events.Event:
    fields = _parse(spec, message)
    return events.IotlbMsg(
        fields["iova"],
        fields["size"],
        fields["uaddr"],
        fields["perm"],
        fields["type"],
        need_reply=need_reply,
    )


def _shared_object(spec: RequestSpec, message: Message, need_reply: bool) -> events.Event:
    return events.GetSharedObject(_parse(spec, message)["uuid"], need_reply=need_reply)


def _device_state(spec: RequestSpec, message: Message, need_reply: bool) -> events.Event:
    fields = _parse(spec, message)
    if fields["direction"] > 1 or fields["phase"] != 0:
        raise ProtocolError(
            f"{spec.name}: expected direction 0 or 1 and phase 0, got {fields['direction']} and {fields['phase']}"
        )
    return events.SetDeviceStateFd(message.fds[0], fields["direction"], fields["phase"], need_reply=need_reply)


#: Requests that become events. The others are answered by the connection, or not supported.
DECODERS: Mapping[int, Decoder] = MappingProxyType(
    {
        _R.SET_FEATURES: _u64(events.SetFeatures),
        _R.SET_OWNER: _bare(events.SetOwner),
        _R.RESET_OWNER: _bare(events.ResetOwner),
        _R.SET_MEM_TABLE: _mem_table,
        _R.SET_LOG_BASE: _log_base,
        _R.SET_LOG_FD: _one_fd(events.SetLogFd),
        _R.SET_VRING_NUM: _state(events.SetVringNum),
        _R.SET_VRING_ADDR: _vring_addr,
        _R.SET_VRING_BASE: _state(events.SetVringBase),
        _R.GET_VRING_BASE: _index(events.GetVringBase),
        _R.SET_VRING_KICK: _vring_fd(events.SetVringKick),
        _R.SET_VRING_CALL: _vring_fd(events.SetVringCall),
        _R.SET_VRING_ERR: _vring_fd(events.SetVringErr),
        _R.SET_PROTOCOL_FEATURES: _u64(events.SetProtocolFeatures),
        _R.SET_VRING_ENABLE: _flag(events.SetVringEnable),
        _R.SEND_RARP: _rarp,
        _R.NET_SET_MTU: _u64(events.NetSetMtu, most=0xFFFF),
        _R.SET_BACKEND_REQ_FD: _one_fd(events.SetBackendReqFd),
        _R.IOTLB_MSG: _iotlb,
        _R.SET_VRING_ENDIAN: _flag(events.SetVringEndian),
        _R.GET_CONFIG: _get_config,
        _R.SET_CONFIG: _set_config,
        _R.GET_INFLIGHT_FD: _get_inflight,
        _R.SET_INFLIGHT_FD: _set_inflight,
        _R.RESET_DEVICE: _bare(events.ResetDevice),
        _R.VRING_KICK: _index(events.VringKick),
        _R.ADD_MEM_REG: _add_region,
        _R.REM_MEM_REG: _remove_region,
        _R.SET_STATUS: _u64(events.SetStatus, most=0xFF),
        _R.GET_STATUS: _bare(events.GetStatus),
        _R.GET_SHARED_OBJECT: _shared_object,
        _R.SET_DEVICE_STATE_FD: _device_state,
        _R.CHECK_DEVICE_STATE: _bare(events.CheckDeviceState),
        _R.GET_SHMEM_CONFIG: _bare(events.GetShmemConfig),
        _R.GET_VRING_BASE_SKIP_DRAIN: _index(events.GetVringBaseSkipDrain),
    }
)
