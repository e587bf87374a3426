"""Virtio ids, feature bits and layouts against the numbers of the specification."""

from __future__ import annotations

import struct

import pytest
from hcd_protocols.vhost_user.features import TransportFeature
from hcd_protocols.virtio import (
    BlkFeature,
    ConsoleFeature,
    DeviceId,
    NetFeature,
    RingFeature,
    blk,
    console,
    net,
    rng,
    scsi,
)


def test_device_ids() -> None:
    """Chapter 5: the ones that hcd implements, and the ends of the list."""
    assert (DeviceId.NET, DeviceId.BLOCK, DeviceId.ENTROPY, DeviceId.SPI) == (1, 2, 4, 45)
    assert {14, 15, 37} & {int(device) for device in DeviceId} == set()


def test_ring_and_transport_features_agree() -> None:
    """vhost-user takes its bits from virtio, under the same names, with two of its own in the reserved range."""
    shared = {bit.name: bit.value for bit in TransportFeature}
    assert shared.pop("LOG_ALL") == 1 << 26
    assert shared.pop("PROTOCOL_FEATURES") == 1 << 30
    assert {name: RingFeature[name].value for name in shared} == shared


def test_feature_bits() -> None:
    """Sections 6, 5.2.3 and 5.1.3, by number."""
    bits = {24: "NOTIFY_ON_EMPTY", 28: "INDIRECT_DESC", 29: "EVENT_IDX", 32: "VERSION_1", 34: "RING_PACKED"}
    assert {1 << bit: name for bit, name in bits.items()}.items() <= {
        bit.value: bit.name for bit in RingFeature
    }.items()
    assert [BlkFeature.RO, BlkFeature.FLUSH, BlkFeature.MQ] == [1 << 5, 1 << 9, 1 << 12]
    assert [BlkFeature.DISCARD, BlkFeature.WRITE_ZEROES, BlkFeature.ZONED] == [1 << 13, 1 << 14, 1 << 17]
    assert [NetFeature.MTU, NetFeature.MAC, NetFeature.MRG_RXBUF] == [1 << 3, 1 << 5, 1 << 15]
    assert [NetFeature.STATUS, NetFeature.MQ, NetFeature.SPEED_DUPLEX] == [1 << 16, 1 << 22, 1 << 63]


@pytest.mark.parametrize(
    ("field", "offset", "size"),
    [
        ("capacity", 0, 8),
        ("size_max", 8, 4),
        ("seg_max", 12, 4),
        ("cylinders", 16, 2),
        ("heads", 18, 1),
        ("sectors", 19, 1),
        ("blk_size", 20, 4),
        ("physical_block_exp", 24, 1),
        ("alignment_offset", 25, 1),
        ("min_io_size", 26, 2),
        ("opt_io_size", 28, 4),
        ("writeback", 32, 1),
        ("num_queues", 34, 2),
        ("max_discard_sectors", 36, 4),
        ("max_discard_seg", 40, 4),
        ("discard_sector_alignment", 44, 4),
        ("max_write_zeroes_sectors", 48, 4),
        ("max_write_zeroes_seg", 52, 4),
        ("write_zeroes_may_unmap", 56, 1),
    ],
)
def test_block_configuration_offsets(field: str, offset: int, size: int) -> None:
    """5.2.4: a field that is all ones shows in its bytes and in no other."""
    zero = dict.fromkeys(blk.BlkConfig.__dataclass_fields__, 0)
    raw = blk.BlkConfig(**zero | {field: (1 << 8 * size) - 1}).to_bytes()
    assert raw == bytes(offset) + b"\xff" * size + bytes(60 - offset - size)


def test_block_configuration_round_trip_and_ends() -> None:
    config = blk.BlkConfig(capacity=2048, blk_size=4096, num_queues=4, writeback=1)
    raw = config.to_bytes()
    assert len(raw) == blk.CONFIG_SIZE
    assert blk.BlkConfig.from_bytes(raw) == config
    assert blk.BlkConfig.from_bytes(raw[:57]) == config
    assert raw[blk.WCE_OFFSET] == 1
    assert blk.CONFIG.min_size == 96
    with pytest.raises(ValueError, match="block configuration"):
        blk.BlkConfig(capacity=0, num_queues=1 << 16).to_bytes()


def test_block_request_layouts() -> None:
    """5.2.6: 16 bytes of header, 16 per segment, one of status."""
    assert blk.REQUEST_HEADER.pack(blk.RequestType.OUT, 0, 8) == bytes([1, *[0] * 7, 8, *[0] * 7])
    assert blk.SEGMENT.pack(1, 2, blk.FLAG_UNMAP) == struct.pack("<QII", 1, 2, 1)
    assert (blk.REQUEST_HEADER.size, blk.SEGMENT.size, blk.STATUS.size, blk.ID_SIZE) == (16, 16, 1, 20)
    numbers = {kind.name: int(kind) for kind in blk.RequestType}
    assert numbers["GET_ID"] == 8
    assert (numbers["FLUSH"], numbers["DISCARD"], numbers["WRITE_ZEROES"]) == (4, 11, 13)
    assert [int(status) for status in blk.Status][:3] == [0, 1, 2]


def test_network_configuration() -> None:
    """5.1.4: MAC address, status, queue pairs, MTU, speed, duplex."""
    config = net.NetConfig(mac=b"\x52\x54\0\1\2\3", max_virtqueue_pairs=2, mtu=9000, speed=10000, duplex=1)
    raw = config.to_bytes()
    assert raw == b"\x52\x54\0\1\2\3" + struct.pack("<HHHIB3x", 1, 2, 9000, 10000, 1)
    assert len(raw) == net.CONFIG_SIZE
    assert net.NetConfig.from_bytes(raw) == config
    with pytest.raises(ValueError, match="network configuration"):
        net.NetConfig(mac=b"short").to_bytes()


@pytest.mark.parametrize(
    ("features", "size"),
    [
        (0, 10),
        (NetFeature.MRG_RXBUF, 12),
        (RingFeature.VERSION_1, 12),
        (RingFeature.VERSION_1 | NetFeature.MRG_RXBUF, 12),
        (RingFeature.VERSION_1 | NetFeature.HASH_REPORT, 20),
    ],
)
def test_network_header_sizes(features: int, size: int) -> None:
    assert net.header_size(features) == size


def test_network_headers_of_both_byte_orders() -> None:
    fields = (1, 0, 0x1234, 0, 0, 0)
    assert net.HEADER_LEGACY.pack(*fields)[2:4] == b"\x34\x12"
    assert net.HEADER_LEGACY_BIG.pack(*fields)[2:4] == b"\x12\x34"
    assert net.HEADER.pack(*fields, 1)[10:] == b"\1\0"
    assert net.HEADER_MERGEABLE_BIG.pack(*fields, 1)[10:] == b"\0\1"


def test_entropy_device_has_one_queue() -> None:
    assert rng.NUM_QUEUES == 1


def test_console_configuration_and_messages() -> None:
    """5.3.3, 5.3.4, 5.3.6.2."""
    assert [int(bit) for bit in ConsoleFeature] == [1, 2, 4]
    config = console.ConsoleConfig(cols=132, rows=50, max_nr_ports=3)
    assert config.to_bytes() == struct.pack("<HHII", 132, 50, 3, 0)
    assert console.ConsoleConfig.from_bytes(config.to_bytes()) == config
    assert (len(config.to_bytes()), console.EMERGENCY_OFFSET) == (console.CONFIG_SIZE, 8)
    with pytest.raises(ValueError, match="console configuration"):
        console.ConsoleConfig(cols=1 << 16).to_bytes()
    assert console.CONTROL.pack(1, console.ControlEvent.PORT_NAME, 2) == bytes([1, 0, 0, 0, 7, 0, 2, 0])


def test_scsi_layouts() -> None:
    """5.6.4 and 5.6.6."""
    config = scsi.ScsiConfig(num_queues=4)
    raw = config.to_bytes()
    assert raw == struct.pack("<IIIIIIIHHI", 4, 126, 0xFFFF, 128, 16, 96, 32, 0, 255, 16383)
    assert (len(raw), scsi.ScsiConfig.from_bytes(raw)) == (scsi.CONFIG_SIZE, config)
    assert (scsi.COMMAND_SIZE, scsi.RESPONSE_SIZE, scsi.TMF.size, scsi.EVENT.size) == (51, 108, 24, 16)
    assert scsi.RESPONSE_HEADER.pack(1, 2, 3, 4, 5) == bytes([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 4, 5])
    with pytest.raises(ValueError, match="SCSI host configuration"):
        scsi.ScsiConfig(max_target=1 << 16).to_bytes()
