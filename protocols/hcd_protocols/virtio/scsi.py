"""SCSI host device: configuration space (virtio 1.3 5.6.4), requests and responses of its queues (5.6.6).

A command is header, CDB and data for the device, then the response and room for data. What is in the CDB and in the
data is SCSI's and big-endian; everything here is little-endian.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from construct import Int16ul, Int32ul, Struct

from hcd_protocols.codec import Layout

__all__ = [
    "AN",
    "AN_RESPONSE",
    "CDB_SIZE",
    "COMMAND_HEADER",
    "COMMAND_SIZE",
    "CONFIG",
    "CONFIG_SIZE",
    "CONTROLQ",
    "EVENT",
    "EVENTQ",
    "FIRST_REQUESTQ",
    "RESPONSE_HEADER",
    "RESPONSE_SIZE",
    "SENSE_SIZE",
    "TMF",
    "ControlType",
    "Event",
    "ResetReason",
    "Response",
    "ScsiConfig",
    "TaskFunction",
    "pack_lun",
    "parse_lun",
]

#: the queues (5.6.2)
CONTROLQ, EVENTQ, FIRST_REQUESTQ = 0, 1, 2
#: the sizes that hold until a driver writes others into the configuration space (5.6.4)
CDB_SIZE, SENSE_SIZE = 32, 96

#: head of a command: lun, tag, task attribute, priority, crn
COMMAND_HEADER = struct.Struct("<8sQBBB")
#: with the CDB
COMMAND_SIZE = COMMAND_HEADER.size + CDB_SIZE
#: head of a response: length of the sense data, residual, status qualifier, status, response
RESPONSE_HEADER = struct.Struct("<IIHBB")
#: with the sense data
RESPONSE_SIZE = RESPONSE_HEADER.size + SENSE_SIZE
#: a task management request: type, subtype, lun, tag; its answer is one byte
TMF = struct.Struct("<II8sQ")
#: an asynchronous notification request: type, lun, events; and its answer: events, response
AN = struct.Struct("<I8sI")
AN_RESPONSE = struct.Struct("<IB")
#: an event: event, lun, reason
EVENT = struct.Struct("<I8sI")


class Response(enum.IntEnum):
    """5.6.6.1 and 5.6.6.2, what became of a command or of a task management function."""

    OK = 0
    OVERRUN = 1
    ABORTED = 2
    BAD_TARGET = 3
    RESET = 4
    BUSY = 5
    TRANSPORT_FAILURE = 6
    TARGET_FAILURE = 7
    NEXUS_FAILURE = 8
    FAILURE = 9
    FUNCTION_SUCCEEDED = 10
    FUNCTION_REJECTED = 11
    INCORRECT_LUN = 12


class ControlType(enum.IntEnum):
    """5.6.6.2, field "type"."""

    TMF = 0
    AN_QUERY = 1
    AN_SUBSCRIBE = 2


class TaskFunction(enum.IntEnum):
    """5.6.6.2, field "subtype"."""

    ABORT_TASK = 0
    ABORT_TASK_SET = 1
    CLEAR_ACA = 2
    CLEAR_TASK_SET = 3
    I_T_NEXUS_RESET = 4
    LOGICAL_UNIT_RESET = 5
    QUERY_TASK = 6
    QUERY_TASK_SET = 7


class Event(enum.IntFlag):
    """5.6.6.3, field "event". PARAM_CHANGE carries the additional sense code in its reason."""

    NO_EVENT = 0
    TRANSPORT_RESET = 1
    ASYNC_NOTIFY = 2
    PARAM_CHANGE = 3
    EVENTS_MISSED = 1 << 31


class ResetReason(enum.IntEnum):
    """5.6.6.3, the reason of TRANSPORT_RESET."""

    HARD = 0
    RESCAN = 1
    REMOVED = 2


def parse_lun(lun: bytes) -> tuple[int, int] | None:
    """(target, logical unit) of the 8 bytes that a driver sends (5.6.6.1); None for what is neither."""
    if lun[0] != 1 or lun[2] & 0x80 or any(lun[4:]):
        return None
    return lun[1], (lun[2] & 0x3F) << 8 | lun[3]


def pack_lun(target: int, unit: int) -> bytes:
    """The 8 bytes of a logical unit: a peripheral device address of SAM up to 255, flat space above.

    Linux understands it in events like this alone; what it sends is always in flat space.
    """
    return bytes([1, target, 0 if unit < 256 else 0x40 | unit >> 8, unit & 0xFF, 0, 0, 0, 0])


CONFIG = Layout(
    "SCSI host configuration",
    Struct(
        "num_queues" / Int32ul,
        "seg_max" / Int32ul,
        "max_sectors" / Int32ul,
        "cmd_per_lun" / Int32ul,
        "event_info_size" / Int32ul,
        "sense_size" / Int32ul,
        "cdb_size" / Int32ul,
        "max_channel" / Int16ul,
        "max_target" / Int16ul,
        "max_lun" / Int32ul,
    ),
    36,
)
CONFIG_SIZE = 36


@dataclass(frozen=True, slots=True, kw_only=True)
class ScsiConfig:
    """The configuration space. ``max_sectors`` in sectors of 512 bytes."""

    num_queues: int = 1
    seg_max: int = 126
    max_sectors: int = 0xFFFF
    cmd_per_lun: int = 128
    event_info_size: int = EVENT.size
    sense_size: int = SENSE_SIZE
    cdb_size: int = CDB_SIZE
    max_channel: int = 0
    max_target: int = 255
    max_lun: int = 16383

    def to_bytes(self) -> bytes:
        """CONFIG_SIZE bytes. ValueError for a number that does not fit its field."""
        return CONFIG.build(**{name: getattr(self, name) for name in _FIELDS})

    @classmethod
    def from_bytes(cls, data: bytes) -> ScsiConfig:
        """From the beginning of a configuration space. ProtocolError when it is too short."""
        fields = CONFIG.parse(data)
        return cls(**{name: int(fields[name]) for name in _FIELDS})


_FIELDS = tuple(ScsiConfig.__dataclass_fields__)
