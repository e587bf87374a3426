"""One line of text for a message of either direction, for people who look for a fault.

Illegal messages are shown as far as they can be read. Bytes of the configuration space are payload: their number is
shown. File descriptors are counted, their numbers mean nothing to the other side.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from hcd_protocols.codec import Layout
from hcd_protocols.errors import ProtocolError
from hcd_protocols.vhost_user import layouts
from hcd_protocols.vhost_user.features import ProtocolFeature, TransportFeature
from hcd_protocols.vhost_user.layouts import HEADER_SIZE
from hcd_protocols.vhost_user.messages import (
    BACKEND_REQUESTS,
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    FRONTEND_REQUESTS,
    NO_FD,
    VRING_INDEX_MASK,
    FrontendRequest,
    RequestSpec,
)

__all__ = ["message_text"]

_R = FrontendRequest

#: replies that are no plain u64
_REPLIES: Mapping[int, Layout] = {
    _R.GET_VRING_BASE: layouts.VRING_STATE,
    _R.GET_VRING_BASE_SKIP_DRAIN: layouts.VRING_STATE,
    _R.GET_CONFIG: layouts.CONFIG,
    _R.GET_INFLIGHT_FD: layouts.INFLIGHT,
    _R.GET_SHMEM_CONFIG: layouts.SHMEM_CONFIG,
}
_FEATURES = frozenset({_R.GET_FEATURES, _R.SET_FEATURES})
_PROTOCOL_FEATURES = frozenset({_R.GET_PROTOCOL_FEATURES, _R.SET_PROTOCOL_FEATURES})
_RING_FDS = frozenset({_R.SET_VRING_KICK, _R.SET_VRING_CALL, _R.SET_VRING_ERR})
#: fields that are addresses or offsets
_HEX = frozenset({"desc", "used", "avail", "log", "guest_addr", "user_addr", "mmap_offset", "iova", "uaddr"})


def message_text(message: bytes, fds: int = 0, *, back_channel: bool = False) -> str:
    """``message`` is whole, header and payload; ``fds`` came with it. ``back_channel``: a request of the back end."""
    header = layouts.HEADER.parse(message[:HEADER_SIZE].ljust(HEADER_SIZE, b"\0"))
    table = BACKEND_REQUESTS if back_channel else FRONTEND_REQUESTS
    number, flags = int(header["request"]), int(header["flags"])
    spec = table.get(number)
    reply = bool(flags & FLAG_REPLY)
    words = [f"request {number}" if spec is None else spec.request.name]
    if spec is not None:
        words += _payload(spec, message[HEADER_SIZE:], reply=reply, plain=back_channel)
    elif len(message) > HEADER_SIZE:
        words.append(_size(message[HEADER_SIZE:]))
    if fds:
        words.append(f"fds={fds}")
    if flags & FLAG_NEED_REPLY and not reply:
        words.append("need_reply")
    return " ".join(words)


def _payload(spec: RequestSpec, payload: bytes, *, reply: bool, plain: bool) -> list[str]:
    layout = spec.layout
    if reply:
        layout = layouts.U64 if plain else _REPLIES.get(int(spec.request), layouts.U64)
    if layout is layouts.EMPTY or not payload:
        return []
    try:
        fields = layout.parse(payload)
    except ProtocolError:
        return [_size(payload)]
    if "value" in fields and not plain:
        return _value(spec, int(fields["value"]), reply=reply)
    return _fields(fields)


def _fields(found: Mapping[str, Any]) -> list[str]:
    """construct's own have names with an underscore."""
    return [f"{name}={_shown(name, value)}" for name, value in found.items() if not name.startswith("_")]


def _value(spec: RequestSpec, value: int, *, reply: bool) -> list[str]:
    """A u64 is whatever its request says."""
    if spec.request in _RING_FDS and not reply:
        return [f"index={value & VRING_INDEX_MASK}", *(["no fd"] if value & NO_FD else [])]
    asks = spec.request.name.startswith("GET_")
    if asks == reply and spec.request in _FEATURES:
        return [_bits(value, TransportFeature)]
    if asks == reply and spec.request in _PROTOCOL_FEATURES:
        return [_bits(value, ProtocolFeature)]
    if reply and not asks:
        return ["ok" if value == 0 else f"failed status={value:#x}"]
    return [f"value={value:#x}"]


def _bits(value: int, known: type[enum.IntFlag]) -> str:
    names = "|".join(name for flag in known if value & flag and (name := flag.name))
    return f"{value:#x} ({names})" if names else f"{value:#x}"


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bytes):
        return _size(value)
    if isinstance(value, Mapping):
        return "{" + " ".join(_fields(value)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_shown(name, one) for one in value if one) + "]"
    return f"{value:#x}" if name in _HEX else str(value)


def _size(data: bytes) -> str:
    return f"<{len(data)} bytes>"
