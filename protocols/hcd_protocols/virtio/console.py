"""Console device: configuration space (virtio 1.3 5.3.4) and control messages of multiport devices (5.3.6.2).

What goes through the queues of a port has no header: bytes, as the two ends send them.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from construct import Int16ul, Int32ul, Struct

from hcd_protocols.codec import Layout

__all__ = [
    "CONFIG",
    "CONFIG_SIZE",
    "CONTROL",
    "CONTROL_RX",
    "CONTROL_TX",
    "EMERGENCY_OFFSET",
    "EMERGENCY_SIZE",
    "RESIZE",
    "ConsoleConfig",
    "ControlEvent",
    "port_of_queue",
    "queues_of_port",
]

#: a control message: port, event, value
CONTROL = struct.Struct("<IHH")
#: what follows a control message RESIZE: rows, columns. The specification had them the other way round; every driver
#: and device that is out there does it like this.
RESIZE = struct.Struct("<HH")

CONFIG = Layout(
    "console configuration",
    Struct("cols" / Int16ul, "rows" / Int16ul, "max_nr_ports" / Int32ul, "emerg_wr" / Int32ul),
    12,
)
CONFIG_SIZE = 12
#: where the emergency write register is, and its size: its lowest byte is put out (5.3.4)
EMERGENCY_OFFSET, EMERGENCY_SIZE = 8, 4

#: the control queues of a multiport device
CONTROL_RX, CONTROL_TX = 2, 3


class ControlEvent(enum.IntEnum):
    """5.3.6.2, field "event"."""

    DEVICE_READY = 0
    DEVICE_ADD = 1
    DEVICE_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7


def queues_of_port(port: int) -> tuple[int, int]:
    """The receive queue and the transmit queue of a port (5.3.2)."""
    first = 0 if port == 0 else 2 * port + 2
    return first, first + 1


def port_of_queue(queue: int) -> int:
    """The port that a queue belongs to, -1 for the control queues."""
    return 0 if queue < 2 else queue // 2 - 1 if queue > CONTROL_TX else -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsoleConfig:
    """The configuration space. ``cols`` and ``rows`` hold with SIZE, ``max_nr_ports`` with MULTIPORT."""

    cols: int = 0
    rows: int = 0
    max_nr_ports: int = 1

    def to_bytes(self) -> bytes:
        """CONFIG_SIZE bytes. ValueError for a number that does not fit its field."""
        return CONFIG.build(cols=self.cols, rows=self.rows, max_nr_ports=self.max_nr_ports, emerg_wr=0)

    @classmethod
    def from_bytes(cls, data: bytes) -> ConsoleConfig:
        """From the beginning of a configuration space. ProtocolError when it is too short."""
        fields = CONFIG.parse(data)
        return cls(cols=fields["cols"], rows=fields["rows"], max_nr_ports=fields["max_nr_ports"])
