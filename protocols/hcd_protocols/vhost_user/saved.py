"""What a connection remembers, as values that another process can go on from.

A connection between two messages is its :class:`~hcd_protocols.vhost_user.state.SessionState` and nothing else: no
half of a message, no answer that is due. ``SavedSession`` holds that state; ``to_values`` and ``from_values`` turn
it into plain numbers, lists and dicts (for JSON, say) and back. File descriptors are not part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from hcd_protocols.vhost_user import events
from hcd_protocols.vhost_user.state import SessionState, VringState

__all__ = ["SavedSession", "SavedVring"]

_U64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SavedVring:
    """One ring; ``addr`` is flags, desc, used, avail, log as in SET_VRING_ADDR, None before that came."""

    num: int
    base: int
    addr: tuple[int, int, int, int, int] | None
    kicked: bool
    enabled: bool
    big_endian: bool

    @property
    def started(self) -> bool:
        return self.kicked and self.num > 0 and self.addr is not None


@dataclass(frozen=True, slots=True)
class SavedSession:
    """The state of one connection between two messages."""

    features: int
    protocol_features: int
    status: int
    negotiating: bool
    vrings: tuple[SavedVring, ...]
    regions: tuple[events.MemoryRegion, ...]

    @classmethod
    def of(cls, state: SessionState) -> Self:
        return cls(
            features=state.features,
            protocol_features=state.protocol_features,
            status=state.status,
            negotiating=state.negotiating,
            vrings=tuple(_save_ring(ring) for ring in state.vrings),
            regions=state.regions,
        )

    def restore(self, state: SessionState) -> None:
        """Make ``state``, which is new, this one. ValueError where it goes beyond what ``state`` offers."""
        limits = state.limits
        if len(self.vrings) != limits.num_queues:
            raise ValueError(f"it has {len(self.vrings)} queues, the device has {limits.num_queues} now")
        state.check_negotiated(self.features, self.protocol_features)
        if len(self.regions) > limits.max_mem_slots:
            raise ValueError(f"it has {len(self.regions)} memory regions, expected up to {limits.max_mem_slots}")
        for index, saved in enumerate(self.vrings):
            if saved.num > limits.max_queue_size:
                raise ValueError(f"ring {index} has {saved.num} entries, expected up to {limits.max_queue_size}")
        state.features, state.protocol_features = self.features, self.protocol_features
        state.status, state.negotiating, state.regions = self.status, self.negotiating, self.regions
        for index, (saved, ring) in enumerate(zip(self.vrings, state.vrings, strict=True)):
            _restore_ring(index, saved, ring)

    def to_values(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """ValueError for what :meth:`to_values` cannot have made."""
        try:
            return cls(
                features=_number(values["features"]),
                protocol_features=_number(values["protocol_features"]),
                status=_number(values["status"]),
                negotiating=bool(values["negotiating"]),
                vrings=tuple(_ring_from(ring) for ring in values["vrings"]),
                regions=tuple(_region_from(region) for region in values["regions"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no saved session: {type(error).__name__}: {error}") from error


def _save_ring(ring: VringState) -> SavedVring:
    addr = ring.addr
    where = None if addr is None else (addr.flags, addr.desc, addr.used, addr.avail, addr.log)
    return SavedVring(ring.num, ring.base, where, ring.kicked, ring.enabled, ring.big_endian)


def _restore_ring(index: int, saved: SavedVring, ring: VringState) -> None:
    ring.num, ring.base, ring.kicked = saved.num, saved.base, saved.kicked
    ring.enabled, ring.big_endian = saved.enabled, saved.big_endian
    ring.addr = None if saved.addr is None else events.SetVringAddr(index, *saved.addr)


def _ring_from(values: Mapping[str, Any]) -> SavedVring:
    addr = values["addr"]
    if addr is not None:
        flags, desc, used, avail, log = map(_number, addr)
        addr = (flags, desc, used, avail, log)
    return SavedVring(
        num=_number(values["num"]),
        base=_number(values["base"]),
        addr=addr,
        kicked=bool(values["kicked"]),
        enabled=bool(values["enabled"]),
        big_endian=bool(values["big_endian"]),
    )


def _region_from(values: Mapping[str, Any]) -> events.MemoryRegion:
    return events.MemoryRegion(*(_number(values[key]) for key in ("guest_addr", "size", "user_addr", "mmap_offset")))


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _U64:
        raise ValueError(f"expected a number of 64 bits, found {value!r}")
    return value
