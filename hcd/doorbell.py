"""Doorbells: where a guest rings, over which path, and how hcd knows the path.

A path is never guessed: an eventfd carries neither an address nor a bus. Each doorbell has a *source* that says
how its path is known; without one the path is ``unknown``. Counters belong to one (device, queue, path): a doorbell
whose path turns out to be another one counts on under the other label, and what was counted before stays where it was.
While an answer is still awaited (QEMU is being asked), rings are counted aside and go to the path that is found.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from hcd.dataplane.stats import DoorbellStats
from hcd.instruments import Instruments

__all__ = ["Doorbell", "Path", "PathSource", "Registry"]


class Path(enum.StrEnum):
    """How a ring leaves the guest."""

    PIO = "pio"
    MMIO = "mmio"
    HYPERCALL = "hypercall"
    DIRECT = "direct"
    PAGE = "page"
    UNKNOWN = "unknown"


class PathSource(enum.StrEnum):
    """How hcd knows the path."""

    REGISTERED = "registered"
    DECLARED = "declared"
    QMP = "qmp"
    NEGOTIATED = "negotiated"
    NONE = "none"


@dataclass(slots=True, eq=False)
class Doorbell:
    """One doorbell of one device, and its counters by path.

    ``stats`` is what the data plane counts into now. It changes with the path; whoever hands it to a queue asks
    again when ``on_change`` tells.
    """

    device: str
    queue: str
    transport: str
    kind: str = "virtqueue"
    address: str = ""
    path: Path = Path.UNKNOWN
    source: PathSource = PathSource.NONE
    by_path: dict[Path, DoorbellStats] = field(default_factory=dict)
    pending: bool = False
    #: see :meth:`set_registered`
    registered: bool | None = None
    stats: DoorbellStats = field(default_factory=DoorbellStats)
    on_change: Callable[[Doorbell], None] | None = None
    #: called when what is told of it has changed
    on_told: Callable[[], None] | None = None

    def set_address(self, address: str) -> None:
        """Where it is, as logs and metrics show it; "" when that is not known."""
        self.address = address
        self._tell()

    def set_registered(self, registered: bool | None) -> None:
        """Whether the VMM registered it; None: nobody is attached, or it is not for hcd to know."""
        self.registered = registered
        self._tell()

    def await_path(self) -> None:
        """Somebody is being asked for the path: count aside until :meth:`set_path`."""
        if self.pending:
            return
        self.pending = True
        self._switch(DoorbellStats())

    def set_path(self, path: Path, source: PathSource, *, kind: str | None = None) -> bool:
        """The path is known now; returns whether anything changed."""
        if kind is not None:
            self.kind = kind
            self._tell()
        if not self.pending and path is self.path and source is self.source and path in self.by_path:
            return False
        aside = self.stats if self.pending else None
        self.pending = False
        self.path, self.source = path, source
        self._tell()
        target = self.by_path.setdefault(path, DoorbellStats())
        self._switch(target)
        if aside is not None:
            target.merge(aside)
        return True

    def _tell(self) -> None:
        if self.on_told is not None:
            self.on_told()

    def _switch(self, stats: DoorbellStats) -> None:
        self.stats = stats
        if self.on_change is not None:
            self.on_change(self)


class Registry:
    """What the process has to tell of: every doorbell, in the order of their registration, and the metrics that devices
    declared themselves. Any thread."""

    def __init__(self) -> None:
        #: another object whenever something about the doorbells has changed; to be read before them
        self.version = object()
        self._doorbells: list[Doorbell] = []
        self._instruments: dict[str, Instruments] = {}
        self._lock = threading.Lock()

    def add(self, doorbell: Doorbell) -> None:
        with self._lock:
            self._doorbells.append(doorbell)
        doorbell.on_told = self._changed
        self._changed()

    def add_instruments(self, device: str, instruments: Instruments) -> None:
        """Tell of the device's own metrics, if it has any."""
        if instruments:
            with self._lock:
                self._instruments[device] = instruments

    def remove_device(self, device: str) -> None:
        with self._lock:
            self._doorbells = [d for d in self._doorbells if d.device != device]
            self._instruments.pop(device, None)
        self._changed()

    def instruments(self) -> list[tuple[str, Instruments]]:
        """Those of every device that declared metrics, with its name."""
        with self._lock:
            return list(self._instruments.items())

    def _changed(self) -> None:
        self.version = object()

    def __iter__(self) -> Iterator[Doorbell]:
        with self._lock:
            return iter(list(self._doorbells))

    def __len__(self) -> int:
        return len(self._doorbells)
