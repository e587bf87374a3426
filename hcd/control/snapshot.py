"""The shape of a snapshot: what every view shows, and what ``hcd status --json`` prints.

Times are seconds, points in time are seconds since 1970, sizes are bytes. Counters count from the start of the daemon,
or from when a device was added. None stands for what is not known, or does not apply. Keys may be added within one
version of the protocol; none is taken away or changes its meaning.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, TypeVar

__all__ = [
    "DeviceState",
    "DoorbellState",
    "Errors",
    "LastReload",
    "PeerState",
    "QueueState",
    "Snapshot",
    "Times",
    "from_json",
    "to_json",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Times:
    """A histogram. ``p50`` and ``p99`` are None while it is empty.

    ``buckets`` are the counts at or below 2**10, 2**11, ... 2**30 nanoseconds, then all.
    """

    count: int = 0
    sum: float = 0.0
    p50: float | None = None
    p99: float | None = None
    buckets: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PeerState:
    """Who is connected. ``command`` is "" where the kernel hides it."""

    pid: int | None
    command: str
    since: float
    features: list[str]
    protocol_features: list[str]
    can_notify: bool


@dataclass(frozen=True, slots=True)
class QueueState:
    """One virtqueue. ``state``: none, stopped, disabled, running, draining or broken; ``broken`` says why.

    ``oldest``: the age of the oldest request in flight. ``throttled``: how long limits have held the queue back.
    """

    index: int
    state: str
    broken: str
    format: str | None
    size: int | None
    inflight: int
    oldest: float
    requests: dict[str, list[int]]  # by operation: ok, error, unsupported
    found_by_ring: int
    found_by_poll: int
    bytes_from_guest: int
    bytes_to_guest: int
    interrupts: int
    interrupts_suppressed: int
    drops: int
    throttled: float
    guest_errors: int
    handler_errors: int
    latency: Times

    @property
    def done(self) -> int:
        """Requests that were completed, however."""
        return sum(sum(counts) for counts in self.requests.values())

    @property
    def failed(self) -> int:
        return sum(sum(counts[1:]) for counts in self.requests.values())


@dataclass(frozen=True, slots=True)
class DoorbellState:
    """One doorbell on one path. ``current``: rings are counted here now; else they were, before the path was known.

    ``registered``: whether the VMM took it; None where that is not for hcd to know.
    """

    name: str
    path: str
    current: bool
    source: str
    kind: str
    transport: str
    address: str
    registered: bool | None
    rings: int
    wakeups: int
    dispatch: Times
    response: Times
    ring: Times


@dataclass(frozen=True, slots=True)
class Errors:
    """By whose fault: the front end's, the guest's, the device type's."""

    protocol: int
    guest: int
    handler: int


@dataclass(frozen=True, slots=True)
class DeviceState:
    """One device. ``lane``: reactor or trio. ``capacity``: of a disk, bytes. ``limits``: those that are set.

    ``stuck_after``: a request that is in flight for so long is stuck; 0: however long, it is not.
    """

    name: str
    type: str
    transport: str
    lane: str
    socket: str
    peer: PeerState | None
    path_conflict: bool
    errors: Errors
    capacity: int | None
    limits: dict[str, int]
    stuck_after: float
    queues: list[QueueState]
    doorbells: list[DoorbellState]


@dataclass(frozen=True, slots=True)
class LastReload:
    """``text``: what changed, or why it was refused."""

    at: float
    ok: bool
    text: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole daemon. ``answers``: whether the thread that serves the rings does."""

    hcd: str
    pid: int
    now: float
    started: float
    config: str
    answers: bool
    reload: LastReload | None
    unserved: list[str]  # devices of the configuration that could not be opened again
    devices: list[DeviceState]

    @property
    def uptime(self) -> float:
        return self.now - self.started


def to_json(snapshot: Snapshot) -> dict[str, Any]:
    return dataclasses.asdict(snapshot)


def from_json(data: Mapping[str, Any]) -> Snapshot:
    """ValueError when it is not the shape of a snapshot. Unknown keys, of a later hcd, are ignored."""
    try:
        return _build(Snapshot, data)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a snapshot of this version: {type(error).__name__}: {error}") from None


def _build(cls: type[T], data: Mapping[str, Any]) -> T:
    hints = typing.get_type_hints(cls)
    assert dataclasses.is_dataclass(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    return cls(**{name: _value(hints[name], data[name]) for name in names})


def _value(hint: Any, value: Any) -> Any:
    if isinstance(hint, UnionType):
        if value is None:
            return None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value)
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return [_value(item, each) for each in value]
    return value
