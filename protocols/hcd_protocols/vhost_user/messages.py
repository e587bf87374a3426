"""Messages of vhost-user: their names, the header, and one table that says what is legal about each.

vhost-user.rst, sections "Header", "Front-end message types" and "Back-end message types".
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hcd_protocols.codec import Layout
from hcd_protocols.errors import ProtocolError
from hcd_protocols.vhost_user import layouts
from hcd_protocols.vhost_user.features import ProtocolFeature, TransportFeature
from hcd_protocols.vhost_user.layouts import HEADER_SIZE, MAX_PAYLOAD

__all__ = [
    "BACKEND_REQUESTS",
    "FLAG_NEED_REPLY",
    "FLAG_REPLY",
    "FRONTEND_REQUESTS",
    "NO_FD",
    "REPLY_FLAGS",
    "VERSION",
    "VERSION_MASK",
    "VRING_INDEX_MASK",
    "Answer",
    "BackendRequest",
    "FrontendRequest",
    "Header",
    "RequestSpec",
    "build_message",
    "describe",
    "parse_header",
]

VERSION = 1
VERSION_MASK = 0x3
FLAG_REPLY = 1 << 2
FLAG_NEED_REPLY = 1 << 3
#: the flags of every reply: QEMU and user-mode Linux accept exactly this
REPLY_FLAGS = VERSION | FLAG_REPLY

#: the u64 of SET_VRING_KICK, CALL and ERR: bits 0 to 7 are the ring, bit 8 says that no fd comes along
VRING_INDEX_MASK = 0xFF
NO_FD = 1 << 8


class FrontendRequest(enum.IntEnum):
    """What a front end asks of a back end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44
    GET_VRING_BASE_SKIP_DRAIN = 45


class BackendRequest(enum.IntEnum):
    """What a back end asks of a front end, on the socket that SET_BACKEND_REQ_FD brought."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


class Answer(enum.Enum):
    """What goes back for a request."""

    #: a reply with a body of its own, always
    REPLY = "reply"
    #: a u64 status, only if NEED_REPLY is set and REPLY_ACK was negotiated
    ACK = "ack"
    #: nothing, ever
    NONE = "none"


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """What is legal about one request, whatever its fields say. Sizes in bytes of payload."""

    request: FrontendRequest | BackendRequest
    layout: Layout
    min_size: int
    max_size: int
    min_fds: int
    max_fds: int
    answer: Answer
    #: protocol features that must all be negotiated
    needs: ProtocolFeature
    #: virtio-level features that the back end must have offered
    offers: TransportFeature

    @property
    def name(self) -> str:
        return describe(self.request)


def describe(request: FrontendRequest | BackendRequest) -> str:
    """Name and number, as errors show them."""
    return f"{request.name} ({request.value})"


_R, _A, _N = Answer.REPLY, Answer.ACK, Answer.NONE
_Any = FrontendRequest | BackendRequest
_NOTHING = ProtocolFeature(0)


def _spec(
    request: _Any,
    layout: Layout = layouts.EMPTY,
    answer: Answer = _A,
    fds: tuple[int, int] = (0, 0),
    needs: ProtocolFeature = _NOTHING,
    offers: TransportFeature = TransportFeature(0),  # noqa: B008 - a constant
    size: tuple[int, int] | None = None,
) -> RequestSpec:
    low, high = size or (layout.min_size, layout.max_size)
    return RequestSpec(request, layout, low, high, fds[0], fds[1], answer, needs, offers)


def _table(*specs: RequestSpec) -> dict[int, RequestSpec]:
    return {int(spec.request): spec for spec in specs}


_F = FrontendRequest
_P = ProtocolFeature
_T = TransportFeature
_XEN_TABLE = (layouts.MEM_TABLE.min_size, layouts.MEM_TABLE_XEN.max_size)
_XEN_REGION = (layouts.SINGLE_REGION.min_size, layouts.SINGLE_REGION_XEN.max_size)

#: All requests of a front end. For memory the range covers the Xen form, too.
FRONTEND_REQUESTS: Mapping[int, RequestSpec] = MappingProxyType(
    _table(
        _spec(_F.GET_FEATURES, answer=_R),
        _spec(_F.SET_FEATURES, layouts.U64),
        _spec(_F.SET_OWNER),
        _spec(_F.RESET_OWNER),
        _spec(_F.SET_MEM_TABLE, layouts.MEM_TABLE, fds=(1, layouts.MAX_TABLE_REGIONS), size=_XEN_TABLE),
        _spec(_F.SET_LOG_BASE, layouts.LOG, _R, fds=(1, 1), needs=_P.LOG_SHMFD),
        _spec(_F.SET_LOG_FD, fds=(1, 1), offers=_T.LOG_ALL),
        _spec(_F.SET_VRING_NUM, layouts.VRING_STATE),
        _spec(_F.SET_VRING_ADDR, layouts.VRING_ADDR),
        _spec(_F.SET_VRING_BASE, layouts.VRING_STATE),
        _spec(_F.GET_VRING_BASE, layouts.VRING_STATE, _R),
        _spec(_F.SET_VRING_KICK, layouts.U64, fds=(0, 1)),
        _spec(_F.SET_VRING_CALL, layouts.U64, fds=(0, 1)),
        _spec(_F.SET_VRING_ERR, layouts.U64, fds=(0, 1)),
        _spec(_F.GET_PROTOCOL_FEATURES, answer=_R, offers=_T.PROTOCOL_FEATURES),
        _spec(_F.SET_PROTOCOL_FEATURES, layouts.U64, offers=_T.PROTOCOL_FEATURES),
        _spec(_F.GET_QUEUE_NUM, answer=_R, needs=_P.MQ),
        _spec(_F.SET_VRING_ENABLE, layouts.VRING_STATE, offers=_T.PROTOCOL_FEATURES),
        _spec(_F.SEND_RARP, layouts.U64, needs=_P.RARP),
        _spec(_F.NET_SET_MTU, layouts.U64, needs=_P.MTU),
        _spec(_F.SET_BACKEND_REQ_FD, fds=(1, 1), needs=_P.BACKEND_REQ),
        _spec(_F.IOTLB_MSG, layouts.IOTLB, offers=_T.ACCESS_PLATFORM),
        _spec(_F.SET_VRING_ENDIAN, layouts.VRING_STATE, needs=_P.CROSS_ENDIAN),
        _spec(_F.GET_CONFIG, layouts.CONFIG, _R, needs=_P.CONFIG, size=(12, MAX_PAYLOAD)),
        _spec(_F.SET_CONFIG, layouts.CONFIG, needs=_P.CONFIG, size=(12, MAX_PAYLOAD)),
        _spec(_F.CREATE_CRYPTO_SESSION, layouts.CRYPTO_SESSION, _R, needs=_P.CRYPTO_SESSION),
        _spec(_F.CLOSE_CRYPTO_SESSION, layouts.U64, _N, needs=_P.CRYPTO_SESSION),
        _spec(_F.POSTCOPY_ADVISE, answer=_R, needs=_P.PAGEFAULT),
        _spec(_F.POSTCOPY_LISTEN, needs=_P.PAGEFAULT),
        _spec(_F.POSTCOPY_END, answer=_R, needs=_P.PAGEFAULT),
        _spec(_F.GET_INFLIGHT_FD, layouts.INFLIGHT, _R, needs=_P.INFLIGHT_SHMFD),
        _spec(_F.SET_INFLIGHT_FD, layouts.INFLIGHT, fds=(1, 1), needs=_P.INFLIGHT_SHMFD),
        _spec(_F.GPU_SET_SOCKET, fds=(1, 1)),
        _spec(_F.RESET_DEVICE, needs=_P.RESET_DEVICE),
        _spec(_F.VRING_KICK, layouts.VRING_STATE, needs=_P.INBAND_NOTIFICATIONS),
        _spec(_F.GET_MAX_MEM_SLOTS, answer=_R, needs=_P.CONFIGURE_MEM_SLOTS),
        _spec(
            _F.ADD_MEM_REG,
            layouts.SINGLE_REGION,
            fds=(1, 1),
            needs=_P.CONFIGURE_MEM_SLOTS,
            size=_XEN_REGION,
        ),
        # old front ends send the fd of the region along, for nobody to use
        _spec(
            _F.REM_MEM_REG,
            layouts.SINGLE_REGION,
            fds=(0, 1),
            needs=_P.CONFIGURE_MEM_SLOTS,
            size=_XEN_REGION,
        ),
        _spec(_F.SET_STATUS, layouts.U64, needs=_P.STATUS),
        _spec(_F.GET_STATUS, answer=_R, needs=_P.STATUS),
        _spec(_F.GET_SHARED_OBJECT, layouts.SHARED_OBJECT, _R, needs=_P.SHARED_OBJECT),
        _spec(_F.SET_DEVICE_STATE_FD, layouts.DEVICE_STATE, _R, fds=(1, 1), needs=_P.DEVICE_STATE),
        _spec(_F.CHECK_DEVICE_STATE, answer=_R, needs=_P.DEVICE_STATE),
        _spec(_F.GET_SHMEM_CONFIG, answer=_R, needs=_P.SHMEM),
        _spec(_F.GET_VRING_BASE_SKIP_DRAIN, layouts.VRING_STATE, _R, needs=_P.GET_VRING_BASE_SKIP_DRAIN),
    )
)

_B = BackendRequest

#: All requests of a back end. SHARED_OBJECT_LOOKUP has a body of its own: a status, with the object's fd
#: beside it.
BACKEND_REQUESTS: Mapping[int, RequestSpec] = MappingProxyType(
    _table(
        _spec(_B.IOTLB_MSG, layouts.IOTLB, needs=_P.BACKEND_REQ),
        _spec(_B.CONFIG_CHANGE_MSG, needs=_P.BACKEND_REQ),
        _spec(
            _B.VRING_HOST_NOTIFIER_MSG,
            layouts.VRING_AREA,
            fds=(0, 1),
            needs=_P.BACKEND_REQ | _P.HOST_NOTIFIER,
        ),
        _spec(_B.VRING_CALL, layouts.VRING_STATE, needs=_P.BACKEND_REQ | _P.INBAND_NOTIFICATIONS),
        _spec(_B.VRING_ERR, layouts.VRING_STATE, needs=_P.BACKEND_REQ | _P.INBAND_NOTIFICATIONS),
        _spec(_B.SHARED_OBJECT_ADD, layouts.SHARED_OBJECT, needs=_P.BACKEND_REQ | _P.SHARED_OBJECT),
        _spec(_B.SHARED_OBJECT_REMOVE, layouts.SHARED_OBJECT, needs=_P.BACKEND_REQ | _P.SHARED_OBJECT),
        _spec(_B.SHARED_OBJECT_LOOKUP, layouts.SHARED_OBJECT, _R, needs=_P.BACKEND_REQ | _P.SHARED_OBJECT),
        _spec(_B.SHMEM_MAP, layouts.MMAP, fds=(1, 1), needs=_P.BACKEND_REQ | _P.SHMEM),
        _spec(_B.SHMEM_UNMAP, layouts.MMAP, needs=_P.BACKEND_REQ | _P.SHMEM),
    )
)


@dataclass(frozen=True, slots=True)
class Header:
    """A header that belongs to a known message and may be followed by a payload of its size."""

    spec: RequestSpec
    flags: int
    size: int

    @property
    def need_reply(self) -> bool:
        return bool(self.flags & FLAG_NEED_REPLY)


def parse_header(data: bytes, table: Mapping[int, RequestSpec], *, reply: bool = False) -> Header:
    """Check the first 12 bytes of a message against ``table``. With ``reply`` it must be a reply, of any
    size.
    """
    fields = layouts.HEADER.parse(data[:HEADER_SIZE])
    number, flags, size = int(fields["request"]), int(fields["flags"]), int(fields["size"])
    spec = table.get(number)
    if spec is None:
        raise ProtocolError(f"unknown request {number}: expected 1 to {max(table)}")
    if flags & VERSION_MASK != VERSION:
        raise ProtocolError(f"{spec.name}: expected version {VERSION}, got {flags & VERSION_MASK}")
    if bool(flags & FLAG_REPLY) != reply:
        expected, got = ("a reply", "a request") if reply else ("a request", "a reply")
        raise ProtocolError(f"{spec.name}: expected {expected}, got {got} (flags {flags:#x})")
    low, high = (0, MAX_PAYLOAD) if reply else (spec.min_size, spec.max_size)
    if not low <= size <= high:
        expected = f"{low} bytes" if low == high else f"{low} to {high} bytes"
        raise ProtocolError(f"{spec.name}: expected a payload of {expected}, got {size}")
    return Header(spec, flags, size)


def build_message(request: FrontendRequest | BackendRequest, payload: bytes = b"", flags: int = VERSION) -> bytes:
    """The bytes of one message, header and payload."""
    return layouts.HEADER.build(request=int(request), flags=flags, size=len(payload)) + payload
