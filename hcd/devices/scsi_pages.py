"""What a disk tells about itself: INQUIRY data, vital product data pages, mode pages, capacities. Pure functions.

SPC-4 (6.4, 7.5, 7.8) and SBC-3 (5.15, 5.16, 6.4, 6.5). A page that does not exist is Refused.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from hcd_protocols.virtio.scsi import pack_lun

from hcd.devices.scsi_cdb import COMMANDS, Op, Refused, Sense, cdb_length

__all__ = [
    "MAX_UNMAP_EXTENTS",
    "NO_UNIT",
    "Traits",
    "capacity_10",
    "capacity_16",
    "inquiry",
    "mode_pages",
    "mode_sense",
    "report_luns",
    "report_opcodes",
    "vital_data",
]

VENDOR, PRODUCT, REVISION = b"HCD     ", b"VIRTUAL DISK    ", b"1   "
#: descriptors of one UNMAP
MAX_UNMAP_EXTENTS = 64
#: what a file system keeps together
PHYSICAL = 4096
CACHING, CONTROL, ALL_PAGES = 0x08, 0x0A, 0x3F
CURRENT, CHANGEABLE, DEFAULT, SAVED = range(4)
WCE = 0x04
WRITE_PROTECTED, DPO_FUA = 0x80, 0x10


@dataclass(frozen=True, slots=True)
class Traits:
    """A disk, as far as pages tell of it. ``blocks`` and ``most_blocks`` (of UNMAP and WRITE SAME) in blocks."""

    blocks: int
    block_size: int
    serial: bytes
    read_only: bool
    write_cache: bool
    most_blocks: int


def inquiry(first: int = 0x00) -> bytes:
    """Standard INQUIRY data: a disk (``first`` 0), or no unit (0x7f). SPC-4, command queueing."""
    head = bytes([first, 0, 6, 0x12, 31, 0, 0, 0x02])
    return head + VENDOR + PRODUCT + REVISION


NO_UNIT = inquiry(0x7F)


def vital_data(page: int, traits: Traits) -> bytes:
    """One vital product data page, header included."""
    body = {
        0x00: lambda: bytes([0x00, 0x80, 0x83, 0xB0, 0xB1, 0xB2]),
        0x80: lambda: traits.serial,
        0x83: lambda: _designators(traits.serial),
        0xB0: lambda: _block_limits(traits),
        0xB1: lambda: struct.pack(">H", 1).ljust(60, b"\0"),  # no rotation
        0xB2: lambda: bytes([0, 0 if traits.read_only else 0xE0, 0x02, 0]),  # UNMAP, WRITE SAME (16) and (10); thin
    }.get(page)
    if body is None:
        raise Refused(Sense.INVALID_FIELD, 2)
    data = body()
    return struct.pack(">BBH", 0, page, len(data)) + data


def _designators(serial: bytes) -> bytes:
    """By vendor and serial number in ASCII, and a name of 8 bytes that is made from it (NAA 3: locally assigned)."""
    text = VENDOR + serial
    name = bytearray(hashlib.sha256(text).digest()[:8])
    name[0] = 0x30 | name[0] & 0x0F
    return bytes([0x02, 0x01, 0, len(text)]) + text + bytes([0x01, 0x03, 0, 8]) + bytes(name)


def _block_limits(traits: Traits) -> bytes:
    together = max(1, PHYSICAL // traits.block_size)
    unmap, extents = (0, 0) if traits.read_only else (traits.most_blocks, MAX_UNMAP_EXTENTS)
    # WSNZ 0, no COMPARE AND WRITE; granularity; no limit of a transfer; none preferred; no prefetch
    head = struct.pack(">BBHIII", 0, 0, together, 0, 0, 0)
    return (head + struct.pack(">IIIIQ", unmap, extents, together, 1 << 31, traits.most_blocks)).ljust(60, b"\0")


def capacity_10(traits: Traits) -> bytes:
    """The last block and the block size; all ones where the last block needs more than 4 bytes."""
    return struct.pack(">II", min(traits.blocks - 1, 0xFFFFFFFF), traits.block_size)


def capacity_16(traits: Traits) -> bytes:
    """The same, with the physical block size and that blocks can be unmapped; what they read as then is not said."""
    exponent = max(0, (PHYSICAL // traits.block_size).bit_length() - 1)
    flags = 0 if traits.read_only else 0x8000
    return struct.pack(">QIBBH", traits.blocks - 1, traits.block_size, 0, exponent, flags).ljust(32, b"\0")


def report_luns(units: Sequence[tuple[int, int]]) -> bytes:
    """``units`` are (target, unit); of each its unit is listed."""
    luns = b"".join(bytes([0, unit]) + bytes(6) if unit < 256 else pack_lun(target, unit)[2:] + bytes(2)
                    for target, unit in units)
    return struct.pack(">II", len(luns), 0) + luns


# -- mode pages


def mode_pages(control: int, traits: Traits) -> dict[int, bytes]:
    """The pages by code. ``control``: current, changeable or default values."""
    caching = bytearray(18)
    caching[0] = WCE if control in (CHANGEABLE, DEFAULT) or traits.write_cache else 0
    # no descriptor sense, unrestricted reordering, unit attentions are kept, tasks abort with the nexus
    mode = bytes(10) if control == CHANGEABLE else bytes([0x00, 0x10, 0, 0, 0, 0, 0xFF, 0xFF, 0, 0])
    return {CACHING: bytes([CACHING, 18]) + bytes(caching), CONTROL: bytes([CONTROL, 10]) + mode}


def mode_sense(cdb: bytes, traits: Traits) -> bytes:
    """The answer to MODE SENSE (6) and (10)."""
    control, page, subpage = cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]
    if control == SAVED:
        raise Refused(Sense.NO_SAVED_PARAMETERS)
    pages = mode_pages(control, traits)
    if subpage not in (0x00, 0xFF) or page not in (*pages, ALL_PAGES):
        raise Refused(Sense.INVALID_FIELD, 2)
    body = b"".join(data for code, data in sorted(pages.items()) if page in (code, ALL_PAGES))
    descriptor = b"" if cdb[1] & 0x08 else struct.pack(">II", min(traits.blocks, 0xFFFFFFFF), traits.block_size)
    specific = DPO_FUA | (WRITE_PROTECTED if traits.read_only else 0)
    if cdb[0] == Op.MODE_SENSE_6:
        return bytes([3 + len(descriptor) + len(body), 0, specific, len(descriptor)]) + descriptor + body
    head = struct.pack(">HBBHH", 6 + len(descriptor) + len(body), 0, specific, 0, len(descriptor))
    return head + descriptor + body


# -- what is supported


def report_opcodes(cdb: bytes) -> bytes:
    """The answer to REPORT SUPPORTED OPERATION CODES: all commands, or one of them."""
    option, timeouts = cdb[2] & 0x07, bool(cdb[2] & 0x80)
    opcode, service = cdb[3], int.from_bytes(cdb[4:6], "big")
    timeout = struct.pack(">HBBII", 10, 0, 0, 0, 0) if timeouts else b""
    if option == 0:
        return _all_opcodes(timeout)
    command = COMMANDS.get(opcode)
    if option > 3 or (command is not None and (command.service is None) == (option == 2) and option != 3):
        raise Refused(Sense.INVALID_FIELD, 2)
    if command is None or (command.service is not None and command.service != service):
        return bytes([0, 0x01, 0, 0])
    usage = bytes.fromhex(command.usage)
    return bytes([0, 0x80 * timeouts | 0x03]) + struct.pack(">H", len(usage)) + usage + timeout


def _all_opcodes(timeout: bytes) -> bytes:
    entries = b""
    for opcode, command in sorted(COMMANDS.items()):
        flags = 0x02 * bool(timeout) | (command.service is not None)
        entries += struct.pack(">BBHBBH", opcode, 0, command.service or 0, 0, flags, cdb_length(opcode)) + timeout
    return struct.pack(">I", len(entries)) + entries
