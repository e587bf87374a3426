"""Block device: configuration space (virtio 1.3 5.2.4) and requests (5.2.6). Little-endian; sectors are 512
bytes.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from construct import Int8ul, Int16ul, Int32ul, Int64ul, Padding, Struct

from hcd_protocols.codec import Layout

__all__ = [
    "CONFIG",
    "CONFIG_SIZE",
    "FLAG_UNMAP",
    "ID_SIZE",
    "REQUEST_HEADER",
    "SECTOR_SIZE",
    "SEGMENT",
    "STATUS",
    "WCE_OFFSET",
    "BlkConfig",
    "RequestType",
    "Status",
]

SECTOR_SIZE = 512
#: bytes of the answer to GET_ID, padded with zeroes; no terminator when it is full (5.2.6)
ID_SIZE = 20

#: head of a request: type, reserved (the I/O priority in legacy drivers), sector
REQUEST_HEADER = struct.Struct("<IIQ")
#: one segment of DISCARD, WRITE_ZEROES or SECURE_ERASE: sector, number of sectors, flags
SEGMENT = struct.Struct("<QII")
#: tail of a request
STATUS = struct.Struct("<B")
#: bit 0 of a segment's flags: the sectors may be unmapped (legal for WRITE_ZEROES only)
FLAG_UNMAP = 1


class RequestType(enum.IntEnum):
    """5.2.6, field "type" of the header."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14
    ZONE_APPEND = 15
    ZONE_REPORT = 16
    ZONE_OPEN = 18
    ZONE_CLOSE = 20
    ZONE_FINISH = 22
    ZONE_RESET = 24
    ZONE_RESET_ALL = 26


class Status(enum.IntEnum):
    """5.2.6, last byte of a request."""

    OK = 0
    IOERR = 1
    UNSUPP = 2
    ZONE_INVALID_CMD = 3
    ZONE_UNALIGNED_WP = 4
    ZONE_OPEN_RESOURCE = 5
    ZONE_ACTIVE_RESOURCE = 6


#: The whole space, with the fields of SECURE_ERASE (from 60) and ZONED (from 72).
CONFIG = Layout(
    "block configuration",
    Struct(
        "capacity" / Int64ul,
        "size_max" / Int32ul,
        "seg_max" / Int32ul,
        "cylinders" / Int16ul,
        "heads" / Int8ul,
        "sectors" / Int8ul,
        "blk_size" / Int32ul,
        "physical_block_exp" / Int8ul,
        "alignment_offset" / Int8ul,
        "min_io_size" / Int16ul,
        "opt_io_size" / Int32ul,
        "writeback" / Int8ul,
        Padding(1),
        "num_queues" / Int16ul,
        "max_discard_sectors" / Int32ul,
        "max_discard_seg" / Int32ul,
        "discard_sector_alignment" / Int32ul,
        "max_write_zeroes_sectors" / Int32ul,
        "max_write_zeroes_seg" / Int32ul,
        "write_zeroes_may_unmap" / Int8ul,
        Padding(3),
        "max_secure_erase_sectors" / Int32ul,
        "max_secure_erase_seg" / Int32ul,
        "secure_erase_sector_alignment" / Int32ul,
        "zone_sectors" / Int32ul,
        "max_open_zones" / Int32ul,
        "max_active_zones" / Int32ul,
        "max_append_sectors" / Int32ul,
        "write_granularity" / Int32ul,
        "zone_model" / Int8ul,
        Padding(3),
    ),
    96,
)

#: bytes of the space up to and with WRITE_ZEROES: what a device without SECURE_ERASE and ZONED shows
CONFIG_SIZE = 60
#: where ``writeback`` is, the only byte that a driver may write (with CONFIG_WCE)
WCE_OFFSET = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class BlkConfig:
    """The configuration space up to WRITE_ZEROES. Units: ``capacity`` and everything named so in sectors of
    512 bytes, ``blk_size`` in bytes, ``min_io_size`` and ``opt_io_size`` in blocks of ``blk_size``,
    ``physical_block_exp`` is the number of logical blocks in a physical one as a power of two."""

    capacity: int
    size_max: int = 0
    seg_max: int = 0
    cylinders: int = 0
    heads: int = 0
    sectors: int = 0
    blk_size: int = 512
    physical_block_exp: int = 0
    alignment_offset: int = 0
    min_io_size: int = 0
    opt_io_size: int = 0
    writeback: int = 0
    num_queues: int = 1
    max_discard_sectors: int = 0
    max_discard_seg: int = 0
    discard_sector_alignment: int = 0
    max_write_zeroes_sectors: int = 0
    max_write_zeroes_seg: int = 0
    write_zeroes_may_unmap: int = 0

    def to_bytes(self) -> bytes:
        """CONFIG_SIZE bytes. ValueError for a number that does not fit its field."""
        fields = dict.fromkeys(_UNUSED, 0) | {name: getattr(self, name) for name in _FIELDS}
        return CONFIG.build(**fields)[:CONFIG_SIZE]

    @classmethod
    def from_bytes(cls, data: bytes) -> BlkConfig:
        """From the beginning of a configuration space; what is missing counts as zero."""
        fields = CONFIG.parse(data.ljust(CONFIG.min_size, b"\0"))
        return cls(**{name: int(fields[name]) for name in _FIELDS})


_FIELDS = tuple(BlkConfig.__dataclass_fields__)
_UNUSED = (
    "max_secure_erase_sectors",
    "max_secure_erase_seg",
    "secure_erase_sector_alignment",
    "zone_sectors",
    "max_open_zones",
    "max_active_zones",
    "max_append_sectors",
    "write_granularity",
    "zone_model",
)
