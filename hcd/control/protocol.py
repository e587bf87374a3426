"""The control protocol: one JSON object a line, in UTF-8. Without a socket.

The daemon greets with ``{"hcd": "0.1.0", "protocol": 1}``. Then each line of the client is a call, and each call is
answered, in order, with one line: ``{"result": {...}}`` or ``{"error": {"kind": "...", "text": "..."}}``. ``trace``
answers with lines ``{"event": {...}}`` until somebody hangs up. ``id`` in a call, any JSON value, is given back in its
answers. New calls, arguments and keys may come without another version; whoever reads ignores keys that it does not
know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "CALLS",
    "MAX_ANSWER",
    "MAX_CALL",
    "VERSION",
    "Call",
    "CallError",
    "LineTooLong",
    "Lines",
    "encode",
    "parse_call",
]

VERSION = 1
#: bytes of a line: a call is a name and a few words, a snapshot is some kilobytes for each device
MAX_CALL = 4096
MAX_ANSWER = 64 << 20

#: every call with its arguments and their types; those in parentheses may be left out
CALLS: Mapping[str, Mapping[str, type]] = {
    "snapshot": {},
    "reload": {},
    "resize": {"device": str, "(size)": int},
    "trace": {"device": str, "(rate)": int},
}


class LineTooLong(Exception):
    """The peer sends a line without end; nothing after it can be understood."""


class CallError(Exception):
    """A call was not carried out. ``kind``: what whoever called may want to tell apart.

    ``request``: not understood; ``unknown``: no such call or device; ``permission``; ``busy``: too many connections;
    ``refused``: the operator's to correct, the text says what; ``failed``: a defect of hcd or of a device type.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Call:
    """One call. ``arguments`` are those that :data:`CALLS` declares, checked."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: Any = None


class Lines:
    """Cuts bytes into lines of ``most`` bytes at most."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._buffer = bytearray()
        self._searched = 0

    @property
    def pending(self) -> bool:
        """A line has begun and is not complete."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next_line(self) -> bytes | None:
        """The next line, without its end; empty ones are skipped. None when more bytes are needed. LineTooLong."""
        while True:
            end = self._buffer.find(b"\n", self._searched)
            if (end if end >= 0 else len(self._buffer)) > self._most:
                raise LineTooLong
            if end < 0:
                self._searched = len(self._buffer)
                return None
            line = bytes(self._buffer[:end]).strip()
            del self._buffer[: end + 1]
            self._searched = 0
            if line:
                return line


def encode(message: Mapping[str, Any]) -> bytes:
    """One line. ASCII alone, so that what a guest chose (a name) steers no terminal. Dataclasses become objects."""
    return json.dumps(message, separators=(",", ":"), default=_fields).encode("ascii") + b"\n"


def _fields(value: Any) -> dict[str, Any]:
    """Of a dataclass with slots; its values are not copied, as dataclasses.asdict() would."""
    return {name: getattr(value, name) for name in type(value).__slots__}


def parse_call(line: bytes) -> Call:
    """CallError when it is not one."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        text = 'not understood; expected one JSON object a line, such as {"call": "snapshot"}'
        raise CallError("request", text) from None
    if not isinstance(found, dict) or not isinstance(found.get("call"), str):
        raise CallError("request", f'"call" is missing; expected one of {", ".join(CALLS)}')
    name = found.pop("call")
    ident = found.pop("id", None)
    if name not in CALLS:
        raise CallError("unknown", f'there is no call "{name[:40]}"; expected one of {", ".join(CALLS)}')
    _check(name, found)
    return Call(name, found, ident)


def _check(name: str, found: Mapping[str, Any]) -> None:
    declared = {key.strip("()"): (key[0] != "(", kind) for key, kind in CALLS[name].items()}
    for key in found:
        if key not in declared:
            expected = ", ".join(declared) or "nothing"
            raise CallError("request", f'{name}: "{key[:40]}" is not known; expected {expected}')
    for key, (needed, kind) in declared.items():
        if key not in found:
            if needed:
                raise CallError("request", f'{name}: "{key}" is missing')
        elif type(found[key]) is not kind:
            noun = "a string" if kind is str else "an integer"
            raise CallError("request", f'{name}: "{key}" is to be {noun}')
