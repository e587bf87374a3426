"""SCSI commands, sense data and pages as bytes, against the numbers of SPC-4 and SBC-3."""

from __future__ import annotations

import struct

import pytest
from hcd_protocols.virtio.scsi import pack_lun, parse_lun
from hypothesis import given
from hypothesis import strategies as st

from hcd.devices import scsi_pages
from hcd.devices.scsi_cdb import (
    COMMANDS,
    Extent,
    Op,
    Refused,
    Sense,
    cdb_length,
    extent,
    find_command,
    fixed_sense,
    parameter_room,
    unmap_extents,
)

TRAITS = scsi_pages.Traits(
    blocks=2048, block_size=512, serial=b"disk-1", read_only=False, write_cache=True, most_blocks=1 << 20
)


def cdb(*parts: int) -> bytes:
    return bytes(parts).ljust(32, b"\0")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (cdb(Op.READ_6, 0xFF, 0x34, 0x56, 7), Extent(0x1F3456, 7)),
        (cdb(Op.WRITE_6, 0, 0, 1, 0), Extent(1, 256)),
        (cdb(Op.READ_10, 0, 1, 2, 3, 4, 0, 5, 6), Extent(0x01020304, 0x0506)),
        (cdb(Op.WRITE_10, 0x08, 0, 0, 0, 4, 0, 0, 0), Extent(4, 0, True)),
        (cdb(Op.READ_12, 0x10, 1, 2, 3, 4, 5, 6, 7, 8), Extent(0x01020304, 0x05060708)),
        (cdb(Op.WRITE_16, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12), Extent(0x0102030405060708, 0x090A0B0C)),
        (cdb(Op.SYNCHRONIZE_CACHE_10, 0x02, 0, 0, 0, 9), Extent(9, 0)),
    ],
)
def test_where_data_goes(raw: bytes, expected: Extent) -> None:
    """A length of 0 means 256 in the shortest form alone."""
    assert extent(raw) == expected


def test_protection_information_is_refused() -> None:
    with pytest.raises(Refused) as caught:
        extent(cdb(Op.READ_10, 0x20))
    assert (caught.value.sense, caught.value.field) == (Sense.INVALID_FIELD, 1)


@pytest.mark.parametrize(
    ("lba", "blocks", "inside"),
    [(0, 2048, True), (2048, 0, True), (2047, 1, True), (2047, 2, False), (2049, 0, False), (1 << 63, 1 << 31, False)],
)
def test_the_end_of_the_disk(lba: int, blocks: int, inside: bool) -> None:
    if inside:
        Extent(lba, blocks).check(2048)
    else:
        with pytest.raises(Refused, match="5/21/00"):
            Extent(lba, blocks).check(2048)


def test_sense_data() -> None:
    """SPC-4, 4.5.3: fixed format, with a pointer to the field where there is one."""
    assert fixed_sense(Sense.INVALID_FIELD, 2) == bytes.fromhex("70 00 05 00000000 0a 00000000 24 00 00 c0 00 02")
    assert fixed_sense(Sense.NO_SENSE) == bytes.fromhex("70 00 00 00000000 0a 00000000 00 00 00 00 00 00")


@given(st.binary(min_size=32, max_size=32))
def test_any_cdb_is_a_command_or_refused(raw: bytes) -> None:
    """Whatever a guest sends: sense, never anything else."""
    try:
        command = find_command(raw)
        assert command is COMMANDS[raw[0]]
        if command.name in ("read", "write", "verify", "write_same", "synchronize_cache"):
            extent(raw)
        elif command.name == "report_opcodes":
            scsi_pages.report_opcodes(raw)
        elif command.name == "mode_sense":
            scsi_pages.mode_sense(raw, TRAITS)
        elif command.name == "inquiry":
            scsi_pages.vital_data(raw[2], TRAITS)
    except Refused as refused:
        fixed_sense(refused.sense, refused.field)


@given(st.binary(max_size=80))
def test_any_unmap_list_is_read_or_refused(data: bytes) -> None:
    try:
        extents = unmap_extents(data, 4)
    except Refused:
        return
    assert len(extents) <= 4


def test_unmap_list() -> None:
    """SBC-3, 5.28.2; what the lengths say counts, not what is there."""
    descriptors = struct.pack(">QI4xQI4x", 8, 16, 1 << 40, 1)
    head = struct.pack(">HH4x", 6 + 32, 32)
    assert unmap_extents(head + descriptors, 4) == [Extent(8, 16), Extent(1 << 40, 1)]
    assert unmap_extents(struct.pack(">HH4x", 6 + 16, 16) + descriptors, 4) == [Extent(8, 16)]
    assert unmap_extents(b"", 4) == []
    with pytest.raises(Refused, match="5/1a/00"):
        unmap_extents(bytes(7), 4)
    with pytest.raises(Refused, match="5/26/00"):
        unmap_extents(head + descriptors, 1)


def test_every_command_has_a_usage_map_of_its_length() -> None:
    for opcode, command in COMMANDS.items():
        usage = bytes.fromhex(command.usage)
        assert len(usage) == cdb_length(opcode)
        assert usage[0] == opcode
        assert command.service is None or usage[1] == command.service


def test_unknown_commands() -> None:
    """PERSISTENT RESERVE IN and OUT, vendor-specific ones, service actions that are not there."""
    for opcode in (0x5E, 0x5F, 0x7F, 0xC0, 0xFF):
        with pytest.raises(Refused, match="5/20/00"):
            find_command(cdb(opcode))
    with pytest.raises(Refused, match="5/24/00"):
        find_command(cdb(Op.SERVICE_ACTION_IN_16, 0x12))
    with pytest.raises(Refused, match="5/24/00"):
        find_command(cdb(Op.TEST_UNIT_READY, 0, 0, 0, 0, 0x04))


def test_allocation_lengths() -> None:
    assert parameter_room(cdb(Op.INQUIRY, 0, 0, 1, 2)) == 0x0102
    assert parameter_room(cdb(Op.MODE_SENSE_10, 0, 0, 0, 0, 0, 0, 3, 4)) == 0x0304
    assert parameter_room(cdb(Op.REPORT_LUNS, 0, 0, 0, 0, 0, 1, 2, 3, 4)) == 0x01020304


def test_inquiry() -> None:
    """SPC-4, 6.4.2: direct access, SPC-4, response format 2, 36 bytes."""
    data = scsi_pages.inquiry()
    assert (len(data), data[0], data[2], data[3] & 0x0F, data[4]) == (36, 0, 6, 2, 31)
    assert data[8:16] == b"HCD     "
    assert scsi_pages.NO_UNIT[0] == 0x7F


def test_vital_product_data() -> None:
    """Each page of the list is there, has its number and its length; block limits by offset (SBC-3, 6.5.3)."""
    listed = scsi_pages.vital_data(0x00, TRAITS)[4:]
    assert list(listed) == [0x00, 0x80, 0x83, 0xB0, 0xB1, 0xB2]
    for page in listed:
        data = scsi_pages.vital_data(page, TRAITS)
        assert (data[0], data[1], int.from_bytes(data[2:4], "big")) == (0, page, len(data) - 4)
    limits = scsi_pages.vital_data(0xB0, TRAITS)
    assert len(limits) == 64
    assert struct.unpack(">H", limits[6:8]) == (8,)
    assert struct.unpack(">III", limits[20:32]) == (1 << 20, scsi_pages.MAX_UNMAP_EXTENTS, 8)
    assert struct.unpack(">Q", limits[36:44]) == (1 << 20,)
    assert scsi_pages.vital_data(0xB1, TRAITS)[4:6] == b"\0\1"
    assert scsi_pages.vital_data(0xB2, TRAITS)[5:7] == b"\xe0\x02"
    with pytest.raises(Refused, match="5/24/00"):
        scsi_pages.vital_data(0x81, TRAITS)


def test_device_identification() -> None:
    """SPC-4, 7.8.6: a designator by vendor, and a name; both follow from the serial number."""
    data = scsi_pages.vital_data(0x83, TRAITS)[4:]
    length = data[3]
    assert data[:4] == bytes([2, 1, 0, length])
    assert data[4 : 4 + length] == b"HCD     disk-1"
    name = data[4 + length :]
    assert name[:4] == bytes([1, 3, 0, 8])
    assert name[4] >> 4 == 3
    assert data != scsi_pages.vital_data(0x83, scsi_pages.Traits(2048, 512, b"disk-2", False, True, 1))[4:]


def test_capacity() -> None:
    assert scsi_pages.capacity_10(TRAITS) == struct.pack(">II", 2047, 512)
    large = scsi_pages.Traits(1 << 33, 512, b"x", False, True, 1)
    assert scsi_pages.capacity_10(large) == struct.pack(">II", 0xFFFFFFFF, 512)
    data = scsi_pages.capacity_16(large)
    assert (len(data), data[:12], data[13], data[14]) == (32, struct.pack(">QI", (1 << 33) - 1, 512), 3, 0x80)


@pytest.mark.parametrize(("opcode", "head"), [(Op.MODE_SENSE_6, 4), (Op.MODE_SENSE_10, 8)])
def test_mode_pages(opcode: int, head: int) -> None:
    """SPC-4, 7.5: header, block descriptor, pages; what can be changed is the write cache."""
    data = scsi_pages.mode_sense(cdb(opcode, 0, 0x3F), TRAITS)
    assert int.from_bytes(data[: head // 4], "big") == len(data) - head // 4
    assert data[head : head + 8] == struct.pack(">II", 2048, 512)
    assert data[head + 8 : head + 11] == b"\x08\x12\x04"
    assert data[head + 28 : head + 30] == b"\x0a\x0a"
    without = scsi_pages.mode_sense(cdb(opcode, 0x08, 0x08), TRAITS)
    assert without[head : head + 2] == b"\x08\x12"
    changeable = scsi_pages.mode_sense(cdb(opcode, 0x08, 0x48), TRAITS)[head + 2 :]
    assert changeable == b"\x04".ljust(18, b"\0")
    protected = scsi_pages.Traits(2048, 512, b"x", True, False, 1)
    specific = scsi_pages.mode_sense(cdb(opcode, 0x08, 0x08), protected)
    assert specific[2 if head == 4 else 3] & 0x80
    assert specific[head + 2] == 0
    for page, text in ((0xC8, "5/39/00"), (0x1C, "5/24/00")):
        with pytest.raises(Refused, match=text):
            scsi_pages.mode_sense(cdb(opcode, 0, page), TRAITS)


def test_supported_operation_codes() -> None:
    """SPC-4, 6.35: all, one, one with its service action, and one that is not there."""
    everything = scsi_pages.report_opcodes(cdb(Op.MAINTENANCE_IN, 0x0C))
    assert int.from_bytes(everything[:4], "big") == len(everything) - 4 == 8 * len(COMMANDS)
    one = scsi_pages.report_opcodes(cdb(Op.MAINTENANCE_IN, 0x0C, 1, Op.READ_10))
    assert one == bytes([0, 3, 0, 10]) + bytes.fromhex(COMMANDS[Op.READ_10].usage)
    service = scsi_pages.report_opcodes(cdb(Op.MAINTENANCE_IN, 0x0C, 2, Op.SERVICE_ACTION_IN_16, 0, 0x10))
    assert service[:4] == bytes([0, 3, 0, 16])
    timeouts = scsi_pages.report_opcodes(cdb(Op.MAINTENANCE_IN, 0x0C, 0x81, Op.READ_10))
    assert timeouts[1] == 0x83
    assert timeouts[14:16] == b"\0\x0a"
    assert scsi_pages.report_opcodes(cdb(Op.MAINTENANCE_IN, 0x0C, 1, 0x5F)) == bytes([0, 1, 0, 0])
    with pytest.raises(Refused, match="5/24/00"):
        scsi_pages.report_opcodes(cdb(Op.MAINTENANCE_IN, 0x0C, 2, Op.READ_10))


def test_logical_unit_numbers() -> None:
    """virtio 1.3, 5.6.6.1: target and unit, in flat space or as peripheral device address; nothing else."""
    for target, unit in ((0, 0), (255, 255), (3, 256), (7, 16383)):
        assert parse_lun(pack_lun(target, unit)) == (target, unit)
    assert parse_lun(bytes([1, 2, 0x40, 3, 0, 0, 0, 0])) == (2, 3)
    assert pack_lun(2, 3) == bytes([1, 2, 0, 3, 0, 0, 0, 0])
    for raw in (bytes(8), bytes([0xC1, 1, 0, 0, 0, 0, 0, 0]), bytes([1, 0, 0x80, 0, 0, 0, 0, 0]), bytes([1] * 8)):
        assert parse_lun(raw) is None
    assert scsi_pages.report_luns([(0, 0), (0, 300)]) == bytes.fromhex("00000010 00000000") + bytes(8) + bytes(
        [0x41, 0x2C, 0, 0, 0, 0, 0, 0]
    )
