"""What a front end asks for, as the back end's connection hands it on: one frozen class per request.

An event is legal when it arrives: sizes, descriptors, ring numbers, memory arithmetic and negotiation were
checked. Requests that the connection answers by itself (GET_FEATURES, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM,
GET_MAX_MEM_SLOTS) have no event. File descriptors in an event belong to whoever took the event;
``fds_carried`` lists them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from hcd_protocols.vhost_user.messages import FrontendRequest

__all__ = [
    "AddMemReg",
    "CheckDeviceState",
    "Event",
    "GetConfig",
    "GetInflightFd",
    "GetSharedObject",
    "GetShmemConfig",
    "GetStatus",
    "GetVringBase",
    "GetVringBaseSkipDrain",
    "IotlbMsg",
    "MemoryRegion",
    "NetSetMtu",
    "RemMemReg",
    "ResetDevice",
    "ResetOwner",
    "SendRarp",
    "SetBackendReqFd",
    "SetConfig",
    "SetDeviceStateFd",
    "SetFeatures",
    "SetInflightFd",
    "SetLogBase",
    "SetLogFd",
    "SetMemTable",
    "SetOwner",
    "SetProtocolFeatures",
    "SetStatus",
    "SetVringAddr",
    "SetVringBase",
    "SetVringCall",
    "SetVringEnable",
    "SetVringEndian",
    "SetVringErr",
    "SetVringKick",
    "SetVringNum",
    "VringEvent",
    "VringFdEvent",
    "VringKick",
]

_R = FrontendRequest


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """One region of guest memory. ``size`` in bytes, ``mmap_offset`` into the region's file descriptor."""

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events. ``need_reply``: the front end waits for the u64 status that ``ack`` sends."""

    request: ClassVar[FrontendRequest]
    need_reply: bool = field(default=False, kw_only=True)

    @property
    def fds_carried(self) -> tuple[int, ...]:
        """The file descriptors that this event hands over."""
        return ()


@dataclass(frozen=True, slots=True)
class SetFeatures(Event):
    """The driver's features. Without PROTOCOL_FEATURES among them, every ring is enabled from here on.

    They may hold bits that were not offered: see ``features.UNFILTERED``.
    """

    request: ClassVar[FrontendRequest] = _R.SET_FEATURES
    features: int


@dataclass(frozen=True, slots=True)
class SetProtocolFeatures(Event):
    """A part of the offered protocol features."""

    request: ClassVar[FrontendRequest] = _R.SET_PROTOCOL_FEATURES
    features: int


@dataclass(frozen=True, slots=True)
class SetOwner(Event):
    """The front end takes possession."""

    request: ClassVar[FrontendRequest] = _R.SET_OWNER


@dataclass(frozen=True, slots=True)
class ResetOwner(Event):
    """Deprecated; every ring is disabled."""

    request: ClassVar[FrontendRequest] = _R.RESET_OWNER


@dataclass(frozen=True, slots=True)
class ResetDevice(Event):
    """Back to the state before SET_FEATURES; memory, protocol features and connection stay."""

    request: ClassVar[FrontendRequest] = _R.RESET_DEVICE


@dataclass(frozen=True, slots=True)
class SetMemTable(Event):
    """The whole memory table anew, one descriptor per region. Rings may be running."""

    request: ClassVar[FrontendRequest] = _R.SET_MEM_TABLE
    regions: tuple[MemoryRegion, ...]
    fds: tuple[int, ...]

    @property
    def fds_carried(self) -> tuple[int, ...]:
        return self.fds


@dataclass(frozen=True, slots=True)
class AddMemReg(Event):
    """One region more."""

    request: ClassVar[FrontendRequest] = _R.ADD_MEM_REG
    region: MemoryRegion
    fd: int

    @property
    def fds_carried(self) -> tuple[int, ...]:
        return (self.fd,)


@dataclass(frozen=True, slots=True)
class RemMemReg(Event):
    """One region less. ``region`` is as it was added, with the offset of then."""

    request: ClassVar[FrontendRequest] = _R.REM_MEM_REG
    region: MemoryRegion


@dataclass(frozen=True, slots=True)
class VringEvent(Event):
    """Base of what concerns one ring; ``index`` is below the number of queues."""

    index: int


@dataclass(frozen=True, slots=True)
class SetVringNum(VringEvent):
    """Ring size in entries; a power of two unless the ring is packed. A started, disabled ring stops."""

    request: ClassVar[FrontendRequest] = _R.SET_VRING_NUM
    num: int


@dataclass(frozen=True, slots=True)
class SetVringAddr(VringEvent):
    """Front-end addresses of the ring's parts; ``log`` is a guest address, used when bit 0 of ``flags`` is
    set.
    """

    request: ClassVar[FrontendRequest] = _R.SET_VRING_ADDR
    flags: int
    desc: int
    used: int
    avail: int
    log: int


@dataclass(frozen=True, slots=True)
class SetVringBase(VringEvent):
    """Where to begin. Split: the next available index. Packed: bits 0-14 and 15 the next available slot
    with the driver's wrap counter, 16-30 and 31 the same of the used side. A started, disabled ring stops."""

    request: ClassVar[FrontendRequest] = _R.SET_VRING_BASE
    base: int


@dataclass(frozen=True, slots=True)
class GetVringBase(VringEvent):
    """Stop the ring; answer with ``reply_vring_base`` when its requests are done."""

    request: ClassVar[FrontendRequest] = _R.GET_VRING_BASE


@dataclass(frozen=True, slots=True)
class GetVringBaseSkipDrain(GetVringBase):
    """Stop the ring, but suspend what is in flight rather than completing it."""

    request: ClassVar[FrontendRequest] = _R.GET_VRING_BASE_SKIP_DRAIN


@dataclass(frozen=True, slots=True)
class VringFdEvent(VringEvent):
    """Base of what brings an eventfd for a ring. None: the ring is to be polled, or no interrupt is
    wanted.
    """

    fd: int | None

    @property
    def fds_carried(self) -> tuple[int, ...]:
        return () if self.fd is None else (self.fd,)


@dataclass(frozen=True, slots=True)
class SetVringKick(VringFdEvent):
    """The eventfd that the driver rings; starts the ring."""

    request: ClassVar[FrontendRequest] = _R.SET_VRING_KICK


@dataclass(frozen=True, slots=True)
class SetVringCall(VringFdEvent):
    """The eventfd that interrupts the driver; may change at any time."""

    request: ClassVar[FrontendRequest] = _R.SET_VRING_CALL


@dataclass(frozen=True, slots=True)
class SetVringErr(VringFdEvent):
    """The eventfd that tells of a broken ring."""

    request: ClassVar[FrontendRequest] = _R.SET_VRING_ERR


@dataclass(frozen=True, slots=True)
class SetVringEnable(VringEvent):
    """Enable or disable the ring; legal for rings that were never configured, and before SET_FEATURES."""

    request: ClassVar[FrontendRequest] = _R.SET_VRING_ENABLE
    enable: bool


@dataclass(frozen=True, slots=True)
class SetVringEndian(VringEvent):
    """Byte order of a legacy ring."""

    request: ClassVar[FrontendRequest] = _R.SET_VRING_ENDIAN
    big: bool


@dataclass(frozen=True, slots=True)
class VringKick(VringEvent):
    """An in-band kick."""

    request: ClassVar[FrontendRequest] = _R.VRING_KICK


@dataclass(frozen=True, slots=True)
class GetConfig(Event):
    """Answer ``size`` bytes at ``offset`` with ``reply_config``; both lie inside the configuration space."""

    request: ClassVar[FrontendRequest] = _R.GET_CONFIG
    offset: int
    size: int
    flags: int


@dataclass(frozen=True, slots=True)
class SetConfig(Event):
    """Write ``data`` at ``offset``. ``flags``: 0 writable fields, 1 live migration."""

    request: ClassVar[FrontendRequest] = _R.SET_CONFIG
    offset: int
    flags: int
    data: bytes


@dataclass(frozen=True, slots=True)
class SetStatus(Event):
    """The virtio device status; 0 is a reset."""

    request: ClassVar[FrontendRequest] = _R.SET_STATUS
    status: int


@dataclass(frozen=True, slots=True)
class GetStatus(Event):
    """Answer with ``reply_status``; the connection's ``status`` is what was set last."""

    request: ClassVar[FrontendRequest] = _R.GET_STATUS


@dataclass(frozen=True, slots=True)
class _FdEvent(Event):
    """Base of what brings exactly one descriptor."""

    fd: int

    @property
    def fds_carried(self) -> tuple[int, ...]:
        return (self.fd,)


@dataclass(frozen=True, slots=True)
class SetBackendReqFd(_FdEvent):
    """The back channel's socket."""

    request: ClassVar[FrontendRequest] = _R.SET_BACKEND_REQ_FD


@dataclass(frozen=True, slots=True)
class SetLogFd(_FdEvent):
    """An eventfd that tells of log changes."""

    request: ClassVar[FrontendRequest] = _R.SET_LOG_FD


@dataclass(frozen=True, slots=True)
class SetLogBase(_FdEvent):
    """The dirty log; answer with ``reply_u64``. ``size`` and ``offset`` in bytes."""

    request: ClassVar[FrontendRequest] = _R.SET_LOG_BASE
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class SendRarp(Event):
    """The guest with address ``mac`` (6 bytes) moved to this host."""

    request: ClassVar[FrontendRequest] = _R.SEND_RARP
    mac: bytes


@dataclass(frozen=True, slots=True)
class NetSetMtu(Event):
    """The MTU of the link, in bytes."""

    request: ClassVar[FrontendRequest] = _R.NET_SET_MTU
    mtu: int


@dataclass(frozen=True, slots=True)
class IotlbMsg(Event):
    """An update or invalidation of I/O addresses. ``kind``: 1 miss, 2 update, 3 invalidate, 4 access
    failure.
    """

    request: ClassVar[FrontendRequest] = _R.IOTLB_MSG
    iova: int
    size: int
    uaddr: int
    perm: int
    kind: int


@dataclass(frozen=True, slots=True)
class GetInflightFd(Event):
    """The front end asks for an area that tracks requests; answer with ``reply_inflight``."""

    request: ClassVar[FrontendRequest] = _R.GET_INFLIGHT_FD
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


@dataclass(frozen=True, slots=True)
class SetInflightFd(_FdEvent):
    """The area that tracks requests, from this or an earlier back end."""

    request: ClassVar[FrontendRequest] = _R.SET_INFLIGHT_FD
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


@dataclass(frozen=True, slots=True)
class GetSharedObject(Event):
    """A look-up of a shared object; answer with ``reply_shared_object``."""

    request: ClassVar[FrontendRequest] = _R.GET_SHARED_OBJECT
    uuid: bytes


@dataclass(frozen=True, slots=True)
class SetDeviceStateFd(_FdEvent):
    """A pipe for the device's state; answer with ``reply_device_state``.

    ``direction``: 0 save, 1 load. ``phase``: 0 stopped.
    """

    request: ClassVar[FrontendRequest] = _R.SET_DEVICE_STATE_FD
    direction: int
    phase: int


@dataclass(frozen=True, slots=True)
class CheckDeviceState(Event):
    """Did the transfer of state succeed? Answer with ``reply_u64``, 0 for yes."""

    request: ClassVar[FrontendRequest] = _R.CHECK_DEVICE_STATE


@dataclass(frozen=True, slots=True)
class GetShmemConfig(Event):
    """The sizes of the shared-memory regions; answer with ``reply_shmem_config``."""

    request: ClassVar[FrontendRequest] = _R.GET_SHMEM_CONFIG
