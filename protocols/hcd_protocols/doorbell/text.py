"""One line of text for a message of the doorbell protocol, for people who look for a fault.

Messages that are not legal are shown as far as they can be read. Of a long table the first items are shown and the
others counted, and descriptors are counted: their numbers mean nothing to the other side.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from hcd_protocols.doorbell import layouts
from hcd_protocols.doorbell.items import Capability, DoorbellItem, InterruptItem, Item
from hcd_protocols.doorbell.messages import (
    Clock,
    Error,
    Hello,
    Message,
    Remove,
    Status,
    StatusEntry,
    Table,
    Type,
    Welcome,
    decode,
)
from hcd_protocols.errors import ProtocolError

__all__ = ["message_text"]

#: items of a table that are shown
SHOWN = 8
#: two names stand for this number; people know the other one
_ERRNOS = {**errno.errorcode, errno.EOPNOTSUPP: "EOPNOTSUPP"}


def message_text(packet: bytes, fds: int = 0) -> str:
    """``packet`` is one message; ``fds`` came with it."""
    number = int.from_bytes(packet[:2], "little") if len(packet) >= layouts.HEADER_SIZE else -1
    try:
        words = [Type(number).name, *_words(decode(packet))]
    except ValueError:
        words = [f"message {number:#x} <{len(packet)} bytes>" if number >= 0 else f"<{len(packet)} bytes>"]
    except ProtocolError as error:
        words = [f"{Type(number).name} <{len(packet)} bytes> ({error})"]
    return " ".join([*words, *([f"fds={fds}"] if fds else [])])


def _words(message: Message) -> list[str]:
    match message:
        case Hello():
            return [f'"{message.name}"', f"versions={message.lowest}-{message.highest}",
                    f"capabilities={_capabilities(message.capabilities)}", f"held={message.held}"]
        case Welcome():
            return [f'"{message.device}"', f"version={message.version}", f"doorbells={message.doorbells}",
                    f"interrupts={message.interrupts}", f"memory={message.memory}"]
        case Table():
            return [_list(_item(item, held) for item, held in zip(message.items, message.held, strict=True))]
        case Remove():
            return [_list(map(str, message.references))]
        case Status():
            return [_list(map(_entry, message.entries))]
        case Clock():
            return [f"tsc_khz={message.tsc_khz}", f"tsc_offset={message.tsc_offset}"]
        case Error():
            return [_error(message.code), f'"{message.text}"']
    return []


def _list(texts: Iterable[str]) -> str:
    found = list(texts)
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return "[" + ", ".join([*found[:SHOWN], *more]) + "]"


def _item(item: Item, held: bool) -> str:
    match item:
        case DoorbellItem():
            stamp = "" if item.stamp is None else f" stamp={item.stamp:#x}"
            text = f"{item.id} {item.name} {item.place.name.lower()} {item}{stamp}"
        case InterruptItem():
            text = f"{item.id} {item.name}"
        case _:
            text = f"{item.id} size={item.size} wanted={item.wanted:#x}"
    return f"{text} held" if held else text


def _entry(entry: StatusEntry) -> str:
    outcome = _error(entry.error) if entry.error else "ok"
    return f"{entry.id} {outcome}" + (f" {entry.value:#x}" if entry.value else "")


def _error(code: int) -> str:
    return _ERRNOS.get(code, f"errno {code}")


def _capabilities(found: Capability) -> str:
    names = "|".join(name for flag in Capability if found & flag and (name := flag.name))
    return f"{int(found):#x}" + (f" ({names})" if names else "")
