"""SCSI commands as bytes: what is in a CDB, and sense data. Pure functions; SPC-4 and SBC-3, big-endian.

Nothing here knows of devices or disks. A CDB that asks for what cannot be raises :class:`Refused` with the sense that
the initiator gets.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "COMMANDS",
    "Command",
    "Extent",
    "Op",
    "Refused",
    "Sense",
    "SenseCode",
    "Service",
    "Status",
    "cdb_length",
    "extent",
    "find_command",
    "fixed_sense",
    "parameter_room",
    "unmap_extents",
]


class Op(enum.IntEnum):
    """Operation codes of the commands that hcd knows."""

    TEST_UNIT_READY = 0x00
    REQUEST_SENSE = 0x03
    READ_6 = 0x08
    WRITE_6 = 0x0A
    INQUIRY = 0x12
    MODE_SELECT_6 = 0x15
    MODE_SENSE_6 = 0x1A
    START_STOP_UNIT = 0x1B
    READ_CAPACITY_10 = 0x25
    READ_10 = 0x28
    WRITE_10 = 0x2A
    VERIFY_10 = 0x2F
    SYNCHRONIZE_CACHE_10 = 0x35
    WRITE_SAME_10 = 0x41
    UNMAP = 0x42
    MODE_SELECT_10 = 0x55
    MODE_SENSE_10 = 0x5A
    READ_16 = 0x88
    WRITE_16 = 0x8A
    VERIFY_16 = 0x8F
    SYNCHRONIZE_CACHE_16 = 0x91
    WRITE_SAME_16 = 0x93
    SERVICE_ACTION_IN_16 = 0x9E
    REPORT_LUNS = 0xA0
    MAINTENANCE_IN = 0xA3
    READ_12 = 0xA8
    WRITE_12 = 0xAA


class Service(enum.IntEnum):
    """Service actions."""

    READ_CAPACITY_16 = 0x10
    REPORT_OPCODES = 0x0C


class Status(enum.IntEnum):
    """SAM-5, 5.3."""

    GOOD = 0x00
    CHECK_CONDITION = 0x02


class SenseCode(NamedTuple):
    """Sense key, additional sense code and its qualifier."""

    key: int
    asc: int
    ascq: int


class Sense:
    """What an initiator is told."""

    NO_SENSE = SenseCode(0, 0, 0)
    NOT_READY_STOPPED = SenseCode(2, 0x04, 0x02)
    WRITE_ERROR = SenseCode(3, 0x0C, 0)
    READ_ERROR = SenseCode(3, 0x11, 0)
    INTERNAL = SenseCode(4, 0x44, 0)
    PARAMETER_LENGTH = SenseCode(5, 0x1A, 0)
    INVALID_OPCODE = SenseCode(5, 0x20, 0)
    LBA_OUT_OF_RANGE = SenseCode(5, 0x21, 0)
    INVALID_FIELD = SenseCode(5, 0x24, 0)
    NO_SUCH_UNIT = SenseCode(5, 0x25, 0)
    INVALID_PARAMETER = SenseCode(5, 0x26, 0)
    NO_SAVED_PARAMETERS = SenseCode(5, 0x39, 0)
    RESET = SenseCode(6, 0x29, 0)
    MODE_CHANGED = SenseCode(6, 0x2A, 0x01)
    CAPACITY_CHANGED = SenseCode(6, 0x2A, 0x09)
    LUNS_CHANGED = SenseCode(6, 0x3F, 0x0E)
    WRITE_PROTECTED = SenseCode(7, 0x27, 0)
    NO_SPACE = SenseCode(7, 0x27, 0x07)
    MISCOMPARE = SenseCode(14, 0x1D, 0)


class Refused(Exception):
    """The command ends with CHECK CONDITION. ``field``: the byte of the CDB that is wrong, -1 for none."""

    def __init__(self, sense: SenseCode, field: int = -1) -> None:
        super().__init__(f"sense {sense.key:x}/{sense.asc:02x}/{sense.ascq:02x}")
        self.sense = sense
        self.field = field


def fixed_sense(sense: SenseCode, field: int = -1) -> bytes:
    """Sense data in fixed format, 18 bytes (SPC-4, 4.5.3). ``field`` as in :class:`Refused`."""
    specific = b"\xc0" + field.to_bytes(2, "big") if field >= 0 else bytes(3)
    return bytes([0x70, 0, sense.key, 0, 0, 0, 0, 10, 0, 0, 0, 0, sense.asc, sense.ascq, 0]) + specific


def cdb_length(opcode: int) -> int:
    """Bytes of a CDB by its group code; 0 for groups that are reserved, vendor-specific or of variable length."""
    return (6, 10, 10, 0, 16, 12, 0, 0)[opcode >> 5]


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of blocks. ``fua``: it must be on stable storage before the command ends."""

    lba: int
    blocks: int
    fua: bool = False

    def check(self, capacity: int) -> None:
        """Refused unless the range is inside of ``capacity`` blocks."""
        if self.lba > capacity or self.blocks > capacity - self.lba:
            raise Refused(Sense.LBA_OUT_OF_RANGE)


def extent(cdb: bytes) -> Extent:
    """Address and length of READ, WRITE, VERIFY, SYNCHRONIZE CACHE and WRITE SAME, by the format of the opcode.

    In READ(6) and WRITE(6) a length of 0 means 256; everywhere else it means none. RDPROTECT and its like, bits 5 to 7
    of byte 1, ask for protection information, which no disk here has.
    """
    length = cdb_length(cdb[0])
    if length == 6:
        return Extent(int.from_bytes(cdb[1:4], "big") & 0x1FFFFF, cdb[4] or 256)
    if cdb[1] & 0xE0:
        raise Refused(Sense.INVALID_FIELD, 1)
    fua = bool(cdb[1] & 0x08)
    if length == 10:
        return Extent(int.from_bytes(cdb[2:6], "big"), int.from_bytes(cdb[7:9], "big"), fua)
    if length == 12:
        return Extent(int.from_bytes(cdb[2:6], "big"), int.from_bytes(cdb[6:10], "big"), fua)
    return Extent(int.from_bytes(cdb[2:10], "big"), int.from_bytes(cdb[10:14], "big"), fua)


#: where the allocation length or parameter list length stands: first byte, end
_ROOM: Mapping[int, tuple[int, int]] = {
    Op.REQUEST_SENSE: (4, 5),
    Op.INQUIRY: (3, 5),
    Op.MODE_SELECT_6: (4, 5),
    Op.MODE_SENSE_6: (4, 5),
    Op.UNMAP: (7, 9),
    Op.MODE_SELECT_10: (7, 9),
    Op.MODE_SENSE_10: (7, 9),
    Op.SERVICE_ACTION_IN_16: (10, 14),
    Op.REPORT_LUNS: (6, 10),
    Op.MAINTENANCE_IN: (6, 10),
}


def parameter_room(cdb: bytes) -> int:
    """The allocation length of a command that answers with data, or the length of the parameter list it brings."""
    first, end = _ROOM[cdb[0]]
    return int.from_bytes(cdb[first:end], "big")


def unmap_extents(data: bytes, most: int) -> list[Extent]:
    """The block descriptors of an UNMAP parameter list (SBC-3, 5.28.2); at most ``most`` of them."""
    if not data:
        return []
    if len(data) < 8:
        raise Refused(Sense.PARAMETER_LENGTH)
    count = min(int.from_bytes(data[2:4], "big"), len(data) - 8) // 16
    if count > most:
        raise Refused(Sense.INVALID_PARAMETER)
    return [
        Extent(int.from_bytes(data[at : at + 8], "big"), int.from_bytes(data[at + 8 : at + 12], "big"))
        for at in range(8, 8 + 16 * count, 16)
    ]


class Command(NamedTuple):
    """A command that is supported: its name, and its usage map (SPC-4, 6.35.3): which bits of the CDB are looked at."""

    name: str
    usage: str
    service: int | None = None


#: by opcode; the first byte of each usage map is the opcode itself, in the second is the service action if there is one
COMMANDS: Mapping[int, Command] = {
    Op.TEST_UNIT_READY: Command("test_unit_ready", "00 00 00 00 00 04"),
    Op.REQUEST_SENSE: Command("request_sense", "03 00 00 00 ff 04"),
    Op.READ_6: Command("read", "08 1f ff ff ff 04"),
    Op.WRITE_6: Command("write", "0a 1f ff ff ff 04"),
    Op.INQUIRY: Command("inquiry", "12 01 ff ff ff 04"),
    Op.MODE_SELECT_6: Command("mode_select", "15 11 00 00 ff 04"),
    Op.MODE_SENSE_6: Command("mode_sense", "1a 08 ff ff ff 04"),
    Op.START_STOP_UNIT: Command("start_stop", "1b 01 00 00 f1 04"),
    Op.READ_CAPACITY_10: Command("read_capacity_10", "25 00 00 00 00 00 00 00 00 04"),
    Op.READ_10: Command("read", "28 f8 ff ff ff ff 00 ff ff 04"),
    Op.WRITE_10: Command("write", "2a f8 ff ff ff ff 00 ff ff 04"),
    Op.VERIFY_10: Command("verify", "2f f6 ff ff ff ff 00 ff ff 04"),
    Op.SYNCHRONIZE_CACHE_10: Command("synchronize_cache", "35 00 ff ff ff ff 00 ff ff 04"),
    Op.WRITE_SAME_10: Command("write_same", "41 f8 ff ff ff ff 00 ff ff 04"),
    Op.UNMAP: Command("unmap", "42 01 00 00 00 00 00 ff ff 04"),
    Op.MODE_SELECT_10: Command("mode_select", "55 11 00 00 00 00 00 ff ff 04"),
    Op.MODE_SENSE_10: Command("mode_sense", "5a 08 ff ff 00 00 00 ff ff 04"),
    Op.READ_16: Command("read", "88 f8 ff ff ff ff ff ff ff ff ff ff ff ff 00 04"),
    Op.WRITE_16: Command("write", "8a f8 ff ff ff ff ff ff ff ff ff ff ff ff 00 04"),
    Op.VERIFY_16: Command("verify", "8f f6 ff ff ff ff ff ff ff ff ff ff ff ff 00 04"),
    Op.SYNCHRONIZE_CACHE_16: Command("synchronize_cache", "91 00 ff ff ff ff ff ff ff ff ff ff ff ff 00 04"),
    Op.WRITE_SAME_16: Command("write_same", "93 f9 ff ff ff ff ff ff ff ff ff ff ff ff 00 04"),
    Op.SERVICE_ACTION_IN_16: Command(
        "read_capacity_16", "9e 10 00 00 00 00 00 00 00 00 ff ff ff ff 00 04", Service.READ_CAPACITY_16
    ),
    Op.REPORT_LUNS: Command("report_luns", "a0 00 ff 00 00 00 ff ff ff ff 00 04"),
    Op.MAINTENANCE_IN: Command("report_opcodes", "a3 0c 87 ff ff ff ff ff ff ff 00 04", Service.REPORT_OPCODES),
    Op.READ_12: Command("read", "a8 f8 ff ff ff ff ff ff ff ff 00 04"),
    Op.WRITE_12: Command("write", "aa f8 ff ff ff ff ff ff ff ff 00 04"),
}


def find_command(cdb: bytes) -> Command:
    """The command that a CDB asks for. Refused for one that is not supported, and for NACA, which nothing here has."""
    command = COMMANDS.get(cdb[0])
    if command is None:
        raise Refused(Sense.INVALID_OPCODE)
    if command.service is not None and cdb[1] & 0x1F != command.service:
        raise Refused(Sense.INVALID_FIELD, 1)
    if cdb[cdb_length(cdb[0]) - 1] & 0x04:
        raise Refused(Sense.INVALID_FIELD, cdb_length(cdb[0]) - 1)
    return command
