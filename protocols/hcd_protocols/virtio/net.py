"""Network device: configuration space (virtio 1.3 5.1.4) and the header in front of each packet (5.1.6)."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from construct import Bytes, Int8ul, Int16ul, Int32ul, Struct

from hcd_protocols.codec import Layout
from hcd_protocols.virtio.features import NetFeature, RingFeature

__all__ = [
    "CONFIG",
    "CONFIG_SIZE",
    "HEADER",
    "HEADER_HASH",
    "HEADER_LEGACY",
    "HEADER_LEGACY_BIG",
    "HEADER_MERGEABLE_BIG",
    "MAX_PACKET",
    "GsoType",
    "HeaderFlag",
    "LinkStatus",
    "NetConfig",
    "header_size",
]

#: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers
HEADER = struct.Struct("<BBHHHHH")
#: without VERSION_1 and MRG_RXBUF num_buffers is left out (5.1.6.1)
HEADER_LEGACY = struct.Struct("<BBHHHH")
#: legacy drivers speak the byte order of their guest
HEADER_LEGACY_BIG = struct.Struct(">BBHHHH")
HEADER_MERGEABLE_BIG = struct.Struct(">BBHHHHH")
#: with HASH_REPORT: hash_value, hash_report and padding in addition
HEADER_HASH = struct.Struct("<BBHHHHHIHH")
#: the largest packet behind a header: what segmentation offload lets a driver send (5.1.6.3)
MAX_PACKET = 65550


class HeaderFlag(enum.IntFlag):
    """5.1.6, field "flags"."""

    NEEDS_CSUM = 1
    DATA_VALID = 2
    RSC_INFO = 4


class GsoType(enum.IntEnum):
    """5.1.6, field "gso_type"; ECN is a bit that is set in addition."""

    NONE = 0
    TCPV4 = 1
    UDP = 3
    TCPV6 = 4
    UDP_L4 = 5
    ECN = 0x80


class LinkStatus(enum.IntFlag):
    """5.1.4, field "status"."""

    LINK_UP = 1
    ANNOUNCE = 2


def header_size(features: int) -> int:
    """Bytes of the header that the negotiated ``features`` ask for."""
    if features & NetFeature.HASH_REPORT:
        return HEADER_HASH.size
    if features & (NetFeature.MRG_RXBUF | RingFeature.VERSION_1):
        return HEADER.size
    return HEADER_LEGACY.size


CONFIG = Layout(
    "network configuration",
    Struct(
        "mac" / Bytes(6),
        "status" / Int16ul,
        "max_virtqueue_pairs" / Int16ul,
        "mtu" / Int16ul,
        "speed" / Int32ul,
        "duplex" / Int8ul,
        "rss_max_key_size" / Int8ul,
        "rss_max_indirection_table_length" / Int16ul,
        "supported_hash_types" / Int32ul,
        "supported_tunnel_types" / Int32ul,
    ),
    28,
)

#: bytes of the space up to and with the duplex mode, padded: what a device without RSS shows
CONFIG_SIZE = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class NetConfig:
    """The configuration space up to SPEED_DUPLEX. ``speed`` in Mbit/s, 0xffffffff unknown; ``duplex`` 0
    half, 1 full, 0xff unknown."""

    mac: bytes = bytes(6)
    status: int = int(LinkStatus.LINK_UP)
    max_virtqueue_pairs: int = 1
    mtu: int = 1500
    speed: int = 0xFFFFFFFF
    duplex: int = 0xFF

    def to_bytes(self) -> bytes:
        """CONFIG_SIZE bytes. ValueError for a number that does not fit, or a MAC address not of 6 bytes."""
        fields = dict.fromkeys(_UNUSED, 0) | {name: getattr(self, name) for name in _FIELDS}
        return CONFIG.build(**fields)[:CONFIG_SIZE]

    @classmethod
    def from_bytes(cls, data: bytes) -> NetConfig:
        """From the beginning of a configuration space; what is missing counts as zero."""
        fields = CONFIG.parse(data.ljust(CONFIG.min_size, b"\0"))
        return cls(**{name: fields[name] for name in _FIELDS})


_FIELDS = tuple(NetConfig.__dataclass_fields__)
_UNUSED = (
    "rss_max_key_size",
    "rss_max_indirection_table_length",
    "supported_hash_types",
    "supported_tunnel_types",
)
