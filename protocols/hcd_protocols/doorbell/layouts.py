"""The bytes of the doorbell socket protocol, in construct. docs/doorbells.md has the same tables in words.

All numbers are little-endian, all layouts have a fixed size, and there is no padding but the fields that are named
so. Reserved fields are zero; a receiver refuses others, so that a later version can give them a meaning.
"""

from __future__ import annotations

from construct import Bytes, Const, Int8ul, Int16ul, Int32sl, Int32ul, Int64sl, Int64ul, Struct

from hcd_protocols.codec import Layout

__all__ = [
    "CLOCK",
    "DOORBELL",
    "END",
    "ERROR",
    "HEADER",
    "HEADER_SIZE",
    "HELLO",
    "INTERRUPT",
    "MAGIC",
    "MAX_ITEMS",
    "MAX_MESSAGE",
    "MEMORY",
    "NAME_SIZE",
    "REFERENCE",
    "STATUS",
    "TEXT_SIZE",
    "VERSION",
    "WELCOME",
]

#: of the protocol
VERSION = 1
HEADER_SIZE = 8
#: items of one message: no more file descriptors fit into one (SCM_MAX_FD, unix(7))
MAX_ITEMS = 253
MAGIC = b"hcd-bell"
#: bytes of a name, at least one NUL at the end included
NAME_SIZE = 32
#: bytes of an error's text, at least one NUL at the end included
TEXT_SIZE = 120

_ZERO16 = "zero" / Const(0, Int16ul)
_ZERO32 = "zero" / Const(0, Int32ul)
_NAME = "name" / Bytes(NAME_SIZE)

#: size: of the whole message, this header included
HEADER = Layout("header", Struct("type" / Int16ul, "count" / Int16ul, "size" / Int32ul), HEADER_SIZE)

HELLO = Layout(
    "HELLO",
    Struct(
        "magic" / Bytes(8),
        "lowest" / Int16ul,
        "highest" / Int16ul,
        "capabilities" / Int32ul,
        "held" / Int32ul,
        _ZERO32,
        _NAME,
    ),
    56,
)
WELCOME = Layout(
    "WELCOME",
    Struct("version" / Int16ul, _ZERO16, "doorbells" / Int32ul, "interrupts" / Int32ul, "memory" / Int32ul, _NAME),
    48,
)
CLOCK = Layout("CLOCK", Struct("tsc_khz" / Int32ul, _ZERO32, "tsc_offset" / Int64sl), 16)
ERROR = Layout("ERROR", Struct("code" / Int32ul, _ZERO32, "text" / Bytes(TEXT_SIZE)), 128)
END = Layout("END", Struct(), 0)

DOORBELL = Layout(
    "doorbell",
    Struct(
        "id" / Int32ul,
        "place" / Int8ul,
        "width" / Int8ul,
        "flags" / Int16ul,
        "address" / Int64ul,
        "datamatch" / Int64ul,
        "stamp" / Int32ul,
        _ZERO32,
        _NAME,
    ),
    64,
)
INTERRUPT = Layout("interrupt", Struct("id" / Int32ul, _ZERO16, "flags" / Int16ul, _NAME), 40)
MEMORY = Layout("memory", Struct("id" / Int32ul, _ZERO16, "flags" / Int16ul, "size" / Int64ul, "wanted" / Int64ul), 24)
STATUS = Layout("status", Struct("id" / Int32ul, "error" / Int32sl, "value" / Int64ul), 16)
REFERENCE = Layout("reference", Struct("id" / Int32ul, "kind" / Int16ul, _ZERO16), 8)

#: the longest message: a full table of doorbells
MAX_MESSAGE = HEADER_SIZE + MAX_ITEMS * DOORBELL.min_size
