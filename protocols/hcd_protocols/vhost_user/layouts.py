"""Payload layouts of vhost-user, in construct.

All numbers are in the byte order of the machine, as both ends run on it. Layouts come from vhost-user.rst,
section "Payload".
"""

from __future__ import annotations

from typing import Any

from construct import (
    Array,
    Bytes,
    Construct,
    GreedyBytes,
    GreedyRange,
    Int8un,
    Int16un,
    Int32un,
    Int64sn,
    Int64un,
    Optional,
    Padding,
    Struct,
)

from hcd_protocols.codec import Layout

__all__ = [
    "CONFIG",
    "CONFIG_HEADER_SIZE",
    "CRYPTO_SESSION",
    "DEVICE_STATE",
    "EMPTY",
    "HEADER",
    "HEADER_SIZE",
    "INFLIGHT",
    "IOTLB",
    "LOG",
    "MAX_CONFIG_SIZE",
    "MAX_PAYLOAD",
    "MAX_TABLE_REGIONS",
    "MEM_REGION",
    "MEM_REGION_XEN",
    "MEM_TABLE",
    "MEM_TABLE_XEN",
    "MMAP",
    "SHARED_OBJECT",
    "SHMEM_CONFIG",
    "SINGLE_REGION",
    "SINGLE_REGION_XEN",
    "U64",
    "VRING_ADDR",
    "VRING_AREA",
    "VRING_STATE",
]

#: bytes of a message's header
HEADER_SIZE = 12
#: the largest payload that either end of this implementation takes
MAX_PAYLOAD = 4096
#: regions in one SET_MEM_TABLE; the protocol hands over at most eight fds a message
MAX_TABLE_REGIONS = 8
#: offset, size and flags in front of configuration bytes
CONFIG_HEADER_SIZE = 12
#: the largest piece of configuration space that QEMU moves in one message
MAX_CONFIG_SIZE = 256

_KEY_SIZE, _AUTH_KEY_SIZE = 64, 512
_CRYPTO_FIXED = 8 + _KEY_SIZE + _AUTH_KEY_SIZE


_REGION = Struct(
    "guest_addr" / Int64un,
    "size" / Int64un,
    "user_addr" / Int64un,
    "mmap_offset" / Int64un,
)
#: flags: bit 0 foreign mapping, bit 1 grant mapping, bit 8 do not map in advance
_REGION_XEN = Struct(
    "guest_addr" / Int64un,
    "size" / Int64un,
    "user_addr" / Int64un,
    "mmap_offset" / Int64un,
    "xen_flags" / Int32un,
    "xen_domid" / Int32un,
)


def _table(region: Construct) -> Construct:
    # The count is compared with the regions found by whoever reads it: user-mode Linux sends room for two
    # and fills one.
    return Struct("nregions" / Int32un, Padding(4), "regions" / GreedyRange(region))


def _setup_size(context: Any) -> int:
    # The middle of a crypto session is a C structure whose size depends on the version of the front end.
    return len(context.setup) if context._building else max(0, context._params.size - _CRYPTO_FIXED)


HEADER = Layout("header", Struct("request" / Int32un, "flags" / Int32un, "size" / Int32un), HEADER_SIZE)
EMPTY = Layout("no payload", Struct(), 0)
U64 = Layout("u64", Struct("value" / Int64un), 8)
VRING_STATE = Layout("vring state", Struct("index" / Int32un, "num" / Int32un), 8)
VRING_ADDR = Layout(
    "vring address",
    Struct(
        "index" / Int32un,
        "flags" / Int32un,
        "desc" / Int64un,
        "used" / Int64un,
        "avail" / Int64un,
        "log" / Int64un,
    ),
    40,
)
MEM_REGION = Layout("memory region", _REGION, 32)
MEM_REGION_XEN = Layout("memory region (Xen)", _REGION_XEN, 40)
MEM_TABLE = Layout("memory table", _table(_REGION), 8, 8 + 32 * MAX_TABLE_REGIONS)
MEM_TABLE_XEN = Layout("memory table (Xen)", _table(_REGION_XEN), 8, 8 + 40 * MAX_TABLE_REGIONS)
SINGLE_REGION = Layout("single memory region", Struct(Padding(8), "region" / _REGION), 40)
SINGLE_REGION_XEN = Layout("single memory region (Xen)", Struct(Padding(8), "region" / _REGION_XEN), 48)
LOG = Layout("log", Struct("mmap_size" / Int64un, "mmap_offset" / Int64un), 16)
IOTLB = Layout(
    "IOTLB",
    Struct(
        "iova" / Int64un,
        "size" / Int64un,
        "uaddr" / Int64un,
        "perm" / Int8un,
        "type" / Int8un,
        Padding(6),
    ),
    32,
)
CONFIG = Layout(
    "config",
    Struct("offset" / Int32un, "size" / Int32un, "flags" / Int32un, "data" / GreedyBytes),
    CONFIG_HEADER_SIZE,
    CONFIG_HEADER_SIZE + MAX_CONFIG_SIZE,
)
#: vring: bits 0 to 7 the index, bit 8 set when no fd comes along
VRING_AREA = Layout("vring area", Struct("vring" / Int64un, "size" / Int64un, "offset" / Int64un), 24)
#: 20 bytes in the text, 24 in a C structure, and so on the wire
INFLIGHT = Layout(
    "inflight",
    Struct(
        "mmap_size" / Int64un,
        "mmap_offset" / Int64un,
        "num_queues" / Int16un,
        "queue_size" / Int16un,
        Optional(Padding(4)),
    ),
    20,
    24,
)
CRYPTO_SESSION = Layout(
    "crypto session",
    Struct(
        "session_id" / Int64sn,
        "setup" / Bytes(_setup_size),
        "key" / Bytes(_KEY_SIZE),
        "auth_key" / Bytes(_AUTH_KEY_SIZE),
    ),
    _CRYPTO_FIXED,
    MAX_PAYLOAD,
)
SHARED_OBJECT = Layout("shared object", Struct("uuid" / Bytes(16)), 16)
DEVICE_STATE = Layout("device state", Struct("direction" / Int32un, "phase" / Int32un), 8)
MMAP = Layout(
    "mmap",
    Struct(
        "shmid" / Int8un,
        Padding(7),
        "fd_offset" / Int64un,
        "shm_offset" / Int64un,
        "len" / Int64un,
        "flags" / Int64un,
    ),
    40,
)
#: sizes[shmid] is the size of that shared-memory region, 0 where there is none
SHMEM_CONFIG = Layout(
    "shared memory configuration",
    Struct("nregions" / Int32un, Padding(4), "sizes" / Array(256, Int64un)),
    2056,
)
