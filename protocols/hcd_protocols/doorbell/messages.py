"""Messages of the doorbell protocol: bytes to dataclasses and back.

A message is one packet of a SOCK_SEQPACKET socket. Its size stands in its header too, and both must agree with its
type and its count of items: there is exactly one way to write a message down.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hcd_protocols.codec import Layout
from hcd_protocols.doorbell import layouts
from hcd_protocols.doorbell.items import (
    Capability,
    DoorbellItem,
    InterruptItem,
    Item,
    Kind,
    MemoryItem,
    Place,
    Reference,
)
from hcd_protocols.errors import ProtocolError

__all__ = [
    "Clock",
    "End",
    "Error",
    "Hello",
    "Message",
    "Remove",
    "Status",
    "StatusEntry",
    "Table",
    "Type",
    "Welcome",
    "decode",
    "encode",
]


class Type(enum.IntEnum):
    """Message types. Below 0x40 the VMM sends, from 0x81 hcd does; ERROR comes from either."""

    HELLO = 0x01
    HOLD_DOORBELLS = 0x02
    HOLD_INTERRUPTS = 0x03
    HOLD_MEMORY = 0x04
    STATUS = 0x05
    CLOCK = 0x06
    ERROR = 0x40
    WELCOME = 0x81
    DOORBELLS = 0x82
    INTERRUPTS = 0x83
    MEMORY = 0x84
    REMOVE = 0x85
    END = 0x86


FLAG_DATAMATCH = 1 << 0
FLAG_HELD = 1 << 1
FLAG_STAMP = 1 << 2


@dataclass(frozen=True, slots=True)
class Hello:
    """The VMM's first message. ``held``: how many items HOLD messages are going to bring."""

    name: str
    capabilities: Capability
    held: int = 0
    lowest: int = 1
    highest: int = 1


@dataclass(frozen=True, slots=True)
class Welcome:
    """hcd's answer: the device, and how much its table is going to bring."""

    device: str
    doorbells: int
    interrupts: int
    memory: int
    version: int = 1


@dataclass(frozen=True, slots=True)
class Table:
    """Items of one kind. From hcd: a part of the table; from the VMM (``hold``): what it has from before.

    ``held``, one for each item: the VMM has its descriptor already and the message brings none. Always False for
    ``hold``.
    """

    items: tuple[Item, ...]
    held: tuple[bool, ...]
    hold: bool = False


@dataclass(frozen=True, slots=True)
class Remove:
    references: tuple[Reference, ...]


@dataclass(frozen=True, slots=True)
class End:
    """The table, or a change to it, is complete."""


@dataclass(frozen=True, slots=True)
class StatusEntry:
    id: int
    error: int
    value: int


@dataclass(frozen=True, slots=True)
class Status:
    """The VMM's answer to a table message or REMOVE, in the order of its items."""

    entries: tuple[StatusEntry, ...]


@dataclass(frozen=True, slots=True)
class Clock:
    """How the guest's TSC relates to the host's: guest = host + ``tsc_offset``, both at ``tsc_khz``; 0: unknown."""

    tsc_khz: int
    tsc_offset: int


@dataclass(frozen=True, slots=True)
class Error:
    """Why the sender is about to close. ``code`` is an errno."""

    code: int
    text: str


Message = Hello | Welcome | Table | Remove | End | Status | Clock | Error

#: fixed part and item of each type; exactly one of them is there
_FIXED: Mapping[Type, Layout] = {
    Type.HELLO: layouts.HELLO,
    Type.CLOCK: layouts.CLOCK,
    Type.ERROR: layouts.ERROR,
    Type.WELCOME: layouts.WELCOME,
    Type.END: layouts.END,
}
_ITEMS: Mapping[Type, Layout] = {
    Type.HOLD_DOORBELLS: layouts.DOORBELL,
    Type.HOLD_INTERRUPTS: layouts.INTERRUPT,
    Type.HOLD_MEMORY: layouts.MEMORY,
    Type.STATUS: layouts.STATUS,
    Type.DOORBELLS: layouts.DOORBELL,
    Type.INTERRUPTS: layouts.INTERRUPT,
    Type.MEMORY: layouts.MEMORY,
    Type.REMOVE: layouts.REFERENCE,
}
_TABLES = {Kind.DOORBELL: Type.DOORBELLS, Kind.INTERRUPT: Type.INTERRUPTS, Kind.MEMORY: Type.MEMORY}
_HOLDS = {Kind.DOORBELL: Type.HOLD_DOORBELLS, Kind.INTERRUPT: Type.HOLD_INTERRUPTS, Kind.MEMORY: Type.HOLD_MEMORY}


# -- to bytes


def encode(message: Message) -> bytes:
    """The packet of ``message``. ValueError for what does not fit: a mistake of the caller."""
    match message:
        case Hello():
            return _fixed(
                Type.HELLO,
                magic=layouts.MAGIC,
                lowest=message.lowest,
                highest=message.highest,
                capabilities=int(message.capabilities),
                held=message.held,
                name=_pad(message.name, layouts.NAME_SIZE),
            )
        case Welcome():
            return _fixed(
                Type.WELCOME,
                version=message.version,
                doorbells=message.doorbells,
                interrupts=message.interrupts,
                memory=message.memory,
                name=_pad(message.device, layouts.NAME_SIZE),
            )
        case Clock():
            return _fixed(Type.CLOCK, tsc_khz=message.tsc_khz, tsc_offset=message.tsc_offset)
        case Error():
            return _fixed(Type.ERROR, code=message.code, text=_pad(message.text, layouts.TEXT_SIZE))
        case End():
            return _fixed(Type.END)
        case Table():
            kinds = _HOLDS if message.hold else _TABLES
            entries = [_item(item, held) for item, held in zip(message.items, message.held, strict=True)]
            return _listed(kinds[message.items[0].reference.kind], entries)
        case Remove():
            return _listed(Type.REMOVE, [{"id": one.id, "kind": int(one.kind)} for one in message.references])
        case Status():
            return _listed(
                Type.STATUS, [{"id": one.id, "error": one.error, "value": one.value} for one in message.entries]
            )


def _fixed(kind: Type, **fields: object) -> bytes:
    layout = _FIXED[kind]
    head = layouts.HEADER.build(type=int(kind), count=0, size=layouts.HEADER_SIZE + layout.min_size)
    return head + layout.build(**fields)


def _listed(kind: Type, entries: Sequence[Mapping[str, object]]) -> bytes:
    if not 1 <= len(entries) <= layouts.MAX_ITEMS:
        raise ValueError(f"{kind.name}: {len(entries)} items; expected 1 to {layouts.MAX_ITEMS}")
    layout = _ITEMS[kind]
    size = layouts.HEADER_SIZE + len(entries) * layout.min_size
    head = layouts.HEADER.build(type=int(kind), count=len(entries), size=size)
    return head + b"".join(layout.build(**entry) for entry in entries)


def _item(item: Item, held: bool) -> Mapping[str, object]:
    flags = FLAG_HELD if held else 0
    match item:
        case DoorbellItem():
            flags |= FLAG_DATAMATCH if item.datamatch is not None else 0
            flags |= FLAG_STAMP if item.stamp is not None else 0
            return {
                "id": item.id,
                "place": int(item.place),
                "width": item.width,
                "flags": flags,
                "address": item.address,
                "datamatch": item.datamatch or 0,
                "stamp": item.stamp or 0,
                "name": _pad(item.name, layouts.NAME_SIZE),
            }
        case InterruptItem():
            return {"id": item.id, "flags": flags, "name": _pad(item.name, layouts.NAME_SIZE)}
        case MemoryItem():
            return {"id": item.id, "flags": flags, "size": item.size, "wanted": item.wanted}


def _pad(text: str, size: int) -> bytes:
    """``text`` cut to ``size`` - 1 bytes, whole characters only, and filled up with NULs."""
    data = text.encode()[: size - 1].decode(errors="ignore").encode()
    return data.ljust(size, b"\0")


# -- from bytes


def decode(packet: bytes) -> Message:
    """The message in ``packet``. ProtocolError says what was expected and what came."""
    head = layouts.HEADER.parse(packet)
    try:
        kind = Type(head["type"])
    except ValueError:
        raise ProtocolError(f"unknown message type {head['type']:#x}") from None
    _check_size(kind, head["count"], head["size"], len(packet))
    body = packet[layouts.HEADER_SIZE :]
    if kind in _FIXED:
        return _FIXED_DECODERS[kind](_parse(kind, _FIXED[kind], body))
    layout = _ITEMS[kind]
    step = layout.min_size
    entries = [_parse(kind, layout, body[at : at + step]) for at in range(0, len(body), step)]
    return _LIST_DECODERS[kind](kind, entries)


def _check_size(kind: Type, count: int, size: int, got: int) -> None:
    if kind in _FIXED:
        if count:
            raise ProtocolError(f"{kind.name}: expected a count of 0, got {count}")
        expected = layouts.HEADER_SIZE + _FIXED[kind].min_size
    else:
        if not 1 <= count <= layouts.MAX_ITEMS:
            raise ProtocolError(f"{kind.name}: expected 1 to {layouts.MAX_ITEMS} items, got {count}")
        expected = layouts.HEADER_SIZE + count * _ITEMS[kind].min_size
    if not size == got == expected:
        raise ProtocolError(f"{kind.name}: expected {expected} bytes, got {got} (its header says {size})")


def _parse(kind: Type, layout: Layout, data: bytes) -> Mapping[str, Any]:
    try:
        return layout.parse(data)
    except ProtocolError:  # the size is right, so a reserved field is not zero
        raise ProtocolError(f"{kind.name}: a reserved field is not zero") from None


def _text(kind: str, raw: bytes) -> str:
    data, _, rest = raw.partition(b"\0")
    if len(data) == len(raw) or rest.strip(b"\0"):
        raise ProtocolError(f"{kind}: a text does not end in NUL bytes alone")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ProtocolError(f"{kind}: a text is not UTF-8") from None
    if not text.isprintable():
        raise ProtocolError(f"{kind}: a text holds control characters")
    return text


def _hello(fields: Mapping[str, Any]) -> Hello:
    if fields["magic"] != layouts.MAGIC:
        raise ProtocolError(f"HELLO: expected the magic {layouts.MAGIC!r}, got {bytes(fields['magic'])!r}")
    if not 0 < fields["lowest"] <= fields["highest"]:
        raise ProtocolError(f"HELLO: versions {fields['lowest']} to {fields['highest']}")
    return Hello(
        _text("HELLO", fields["name"]),
        Capability(fields["capabilities"]),
        fields["held"],
        fields["lowest"],
        fields["highest"],
    )


def _welcome(fields: Mapping[str, Any]) -> Welcome:
    device = _text("WELCOME", fields["name"])
    return Welcome(device, fields["doorbells"], fields["interrupts"], fields["memory"], fields["version"])


_FIXED_DECODERS: Mapping[Type, Callable[[Mapping[str, Any]], Message]] = {
    Type.HELLO: _hello,
    Type.WELCOME: _welcome,
    Type.CLOCK: lambda fields: Clock(fields["tsc_khz"], fields["tsc_offset"]),
    Type.ERROR: lambda fields: Error(fields["code"], _text("ERROR", fields["text"])),
    Type.END: lambda fields: End(),
}


def _doorbell(fields: Mapping[str, Any]) -> DoorbellItem:
    flags = fields["flags"]
    return DoorbellItem(
        fields["id"],
        _text("doorbell", fields["name"]),
        Place(fields["place"]),
        fields["address"],
        fields["width"],
        _optional("datamatch", fields["datamatch"], bool(flags & FLAG_DATAMATCH)),
        _optional("stamp", fields["stamp"], bool(flags & FLAG_STAMP)),
    )


def _optional(what: str, value: int, there: bool) -> int | None:
    if value and not there:
        raise ValueError(f"a {what} without its flag")
    return value if there else None


_ITEM_DECODERS: Mapping[Layout, tuple[int, Callable[[Mapping[str, Any]], Item]]] = {
    layouts.DOORBELL: (FLAG_DATAMATCH | FLAG_STAMP, _doorbell),
    layouts.INTERRUPT: (0, lambda fields: InterruptItem(fields["id"], _text("interrupt", fields["name"]))),
    layouts.MEMORY: (0, lambda fields: MemoryItem(fields["id"], fields["size"], fields["wanted"])),
}


def _table(kind: Type, entries: Sequence[Mapping[str, Any]]) -> Table:
    hold = kind in _HOLDS.values()
    own_flags, make = _ITEM_DECODERS[_ITEMS[kind]]
    known = own_flags if hold else own_flags | FLAG_HELD
    items = []
    for fields in entries:
        if fields["flags"] & ~known:
            raise ProtocolError(f"{kind.name}: unknown flags {fields['flags'] & ~known:#x}")
        try:
            items.append(make(fields))
        except ValueError as error:
            raise ProtocolError(f"{kind.name}: {error}") from None
    return Table(tuple(items), tuple(bool(fields["flags"] & FLAG_HELD) for fields in entries), hold)


def _remove(kind: Type, entries: Sequence[Mapping[str, Any]]) -> Remove:
    try:
        return Remove(tuple(Reference(Kind(fields["kind"]), fields["id"]) for fields in entries))
    except ValueError as error:
        raise ProtocolError(f"{kind.name}: {error}") from None


def _status(kind: Type, entries: Sequence[Mapping[str, Any]]) -> Status:
    if any(fields["error"] < 0 for fields in entries):
        raise ProtocolError(f"{kind.name}: an error below 0; expected an errno")
    return Status(tuple(StatusEntry(fields["id"], fields["error"], fields["value"]) for fields in entries))


_LIST_DECODERS: Mapping[Type, Callable[[Type, Sequence[Mapping[str, Any]]], Message]] = {
    **dict.fromkeys((*_TABLES.values(), *_HOLDS.values()), _table),
    Type.REMOVE: _remove,
    Type.STATUS: _status,
}
