"""What one session leaves for the next process: the content of its state file.

JSON, because people want to read it when something went wrong; hcd reads only its own VERSION. Names are those of
entries in the store. ``SavedSession`` is what the protocol remembers, the rest is what hcd itself does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from hcd_protocols.vhost_user import SavedSession

from hcd.config import DeviceSpec
from hcd.handover.statefile import StateError
from hcd.plugins import load

__all__ = ["VERSION", "InflightRecord", "Record", "RingRecord", "fingerprint"]

#: of the content; raised whenever an older reader would go wrong with it
VERSION = 1


@dataclass(frozen=True, slots=True)
class RingRecord:
    """The descriptors of one ring, by name, "" for none. ``spurious``: its kick counts a ring that nobody rang."""

    kick: str = ""
    call: str = ""
    err: str = ""
    spurious: bool = False


@dataclass(frozen=True, slots=True)
class InflightRecord:
    """The region that tracks requests. ``own``: hcd made it for itself, the front end knows nothing of it."""

    name: str
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int
    own: bool


@dataclass(frozen=True, slots=True)
class Record:
    """One session between two messages."""

    device: str
    fingerprint: str
    session: SavedSession
    connection: str
    region_names: tuple[str, ...]  # of session.regions
    rings: tuple[RingRecord, ...]
    channel: str = ""
    inflight: InflightRecord | None = None  # None: the session has just begun
    mtu: int | None = None
    #: what the driver wrote into the configuration space, by offset
    config_writes: Mapping[int, bytes] = field(default_factory=dict)
    #: the configuration space as the front end may know it
    config: bytes = b""
    #: place and length of the last answer in the state file; its position tells how much of that went out
    answer: tuple[int, int] = (0, 0)

    def encode(self) -> bytes:
        values = asdict(self)
        values["session"] = self.session.to_values()
        values["config_writes"] = {str(offset): data.hex() for offset, data in self.config_writes.items()}
        values["config"] = self.config.hex()
        return json.dumps(values, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """StateError for what :meth:`encode` cannot have made."""
        try:
            values: dict[str, Any] = json.loads(data)
            inflight = values["inflight"]
            values["session"] = SavedSession.from_values(values["session"])
            values["region_names"] = tuple(values["region_names"])
            values["rings"] = tuple(RingRecord(**ring) for ring in values["rings"])
            values["inflight"] = InflightRecord(**inflight) if inflight is not None else None
            values["config_writes"] = {int(at): bytes.fromhex(hexed) for at, hexed in values["config_writes"].items()}
            values["config"] = bytes.fromhex(values["config"])
            at, length = map(int, values["answer"])
            values["answer"] = at, length
            made = cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StateError(f"its content makes no sense: {error}") from error
        if len(made.region_names) != len(made.session.regions) or len(made.rings) != len(made.session.vrings):
            raise StateError("its content makes no sense: it has more descriptors than uses for them, or fewer")
        return made

    @property
    def names(self) -> set[str]:
        """Every entry of the store that the session cannot do without."""
        named = {self.connection, *self.region_names}
        for ring in self.rings:
            named |= {ring.kick, ring.call, ring.err}
        if self.inflight is not None:
            named.add(self.inflight.name)
        return named - {""}


def fingerprint(spec: DeviceSpec) -> str:
    """Equal for configurations that are the same device to a guest: its type, and the options that were set."""
    defaults = {option.key: option.default for option in load(spec.type).options}
    chosen = {key: repr(value) for key, value in sorted(spec.options.items()) if value != defaults.get(key)}
    return json.dumps([spec.type, chosen])
