"""What the experiment found: rows, their statistics, the figures of 2009, and the file that keeps the last result."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "EXIT",
    "FORMAT",
    "HISTORY",
    "RING",
    "TRIP",
    "Count",
    "Historic",
    "Measure",
    "Report",
    "Row",
    "load_saved",
    "quantile",
    "save",
    "saved_candidates",
]

FORMAT = 1

#: what a row measures
EXIT, RING, TRIP = "exit", "ring", "trip"
Measure = str


@dataclass(frozen=True, slots=True)
class Historic:
    """A figure that was posted in 2009, in seconds for one ring, and how it was come by."""

    path: str
    kind: str
    seconds: float
    origin: str


#: Linux commit d34e6b175e61 ("KVM: add ioeventfd support", 2009-07-07). It names no hardware.
HISTORY = (
    Historic("pio", "fixed", 2.72e-6, "measured"),
    Historic("mmio", "datamatch", 5.00e-6, "measured"),
    Historic("hypercall", "generic", 2.37e-6, "extrapolated: pio - 0.35 us"),
    Historic("mmio", "vmm", 9.09e-6, "measured"),
    Historic("pio", "vmm", 6.53e-6, "extrapolated: mmio - 2.56 us"),
)


@dataclass(slots=True)
class Row:
    """One measure of one path. Times in seconds; ``why`` says why there are none.

    ``ratio`` is p50 over that of the same measure by port. ``spread``: slowest over fastest median of the rounds.
    """

    measure: Measure
    path: str
    kind: str
    doorbell: str = ""
    why: str = ""
    rings: int = 0
    per_second: float = 0.0
    mean: float = 0.0
    quantiles: dict[str, float] = field(default_factory=dict)
    ratio: float = 0.0
    spread: float = 1.0
    note: str = ""

    @property
    def p50(self) -> float:
        return self.quantiles.get("0.5", 0.0)

    @property
    def p99(self) -> float:
        return self.quantiles.get("0.99", 0.0)


QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0)


def quantile(ordered: Sequence[int], q: float) -> int:
    """The value below or at which a share of ``q`` lies; ``ordered`` is sorted and not empty."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


@dataclass(frozen=True, slots=True)
class Count:
    """Rings of one doorbell: sent by the guest, and counted by hcd."""

    device: str
    doorbell: str
    path: str
    sent: int
    counted: int

    @property
    def equal(self) -> bool:
        return self.sent == self.counted


@dataclass(slots=True)
class Report:
    """One experiment. ``machine`` are facts by name, ``warnings`` are reasons to draw no conclusions."""

    taken: str
    machine: dict[str, str]
    warnings: list[str]
    rows: list[Row]
    counts: list[Count]
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        document = {"format": FORMAT, **asdict(self), "figures_of_2009": [asdict(one) for one in HISTORY]}
        return json.dumps(document, indent=1) + "\n"


# -- the last result


def saved_candidates(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Where a result may be kept, the place to write to first: $XDG_STATE_HOME if set, else the system's for root."""
    state = environment.get("XDG_STATE_HOME")
    if state:
        return [Path(state) / "hcd/lab.json"]
    system = Path("/var/lib/hcd/lab.json")
    own = Path(os.path.expanduser("~/.local/state/hcd/lab.json"))
    return [system] if os.geteuid() == 0 else [own, system]


def save(report: Report, places: Iterable[Path] | None = None) -> Path:
    """Keep ``report`` as the last result; returns where. OSError when it cannot be written."""
    path = next(iter(places or saved_candidates()))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place and then renamed: a daemon may read at any time.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".lab", delete=False) as file:
        file.write(report.to_json())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


def load_saved(places: Iterable[Path] | None = None) -> dict[tuple[str, str], float]:
    """Round trips in seconds by (path, kind) from the last result; empty without one, or when it is not ours."""
    for path in places or saved_candidates():
        try:
            document = json.loads(path.read_text())
            if document["format"] != FORMAT:
                continue
            return {
                (str(row["path"]), str(row["kind"])): float(row["quantiles"]["0.5"])
                for row in document["rows"]
                if row["measure"] == TRIP and not row["why"]
            }
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}
