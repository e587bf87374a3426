"""The doorbell socket protocol (transport ``kvm``), sans-IO: hcd's end and the VMM's.

hcd cannot register anything in the virtual machine of another process, so the VMM does it: it connects, says what its
kernel can do, gets the device's doorbells and interrupts with an eventfd each, registers them and answers what became
of each. docs/doorbells.md is the specification.
"""

from __future__ import annotations

from hcd_protocols.doorbell.host import (
    Answers,
    Attach,
    ClockChanged,
    HostConnection,
    HostEvent,
    PeerError,
)
from hcd_protocols.doorbell.items import (
    Capability,
    DoorbellItem,
    Held,
    InterruptItem,
    Item,
    Kind,
    MemoryItem,
    Outcome,
    Place,
    Reference,
)
from hcd_protocols.doorbell.layouts import HEADER_SIZE, MAX_ITEMS, MAX_MESSAGE, VERSION
from hcd_protocols.doorbell.vmm import Added, Refused, Removed, TableComplete, VmmConnection, VmmEvent, Welcomed
from hcd_protocols.errors import ProtocolError

__all__ = [
    "HEADER_SIZE",
    "MAX_ITEMS",
    "MAX_MESSAGE",
    "VERSION",
    "Added",
    "Answers",
    "Attach",
    "Capability",
    "ClockChanged",
    "DoorbellItem",
    "Held",
    "HostConnection",
    "HostEvent",
    "InterruptItem",
    "Item",
    "Kind",
    "MemoryItem",
    "Outcome",
    "PeerError",
    "Place",
    "ProtocolError",
    "Reference",
    "Refused",
    "Removed",
    "TableComplete",
    "VmmConnection",
    "VmmEvent",
    "Welcomed",
]
