"""What ``make bench`` measures: cases, and which back ends take part in each."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from hcd.errors import ConfigError

__all__ = ["CASES", "HCD", "RIVAL", "RIVALS", "Case", "choose"]

HCD, HCD_PACKED, HCD_DIRECT = "hcd", "hcd packed", "hcd direct"
RIVAL, THREADS, RIVAL_DIRECT = "qsd io_uring", "qsd threads", "qsd io_uring direct"
#: the first of a case is what the ratios are of, the second what they are to
RIVALS = (HCD, RIVAL, THREADS)


@dataclass(frozen=True, slots=True)
class Case:
    """One load. ``size`` in bytes, ``depth`` per queue; ``second``: by the front end in C."""

    name: str
    rw: str
    depth: int
    size: int = 4096
    queues: int = 1
    second: bool = False
    backends: tuple[str, ...] = RIVALS


def _cases() -> tuple[Case, ...]:
    one_queue = [Case(f"{rw}-4k-d{depth}", rw, depth) for rw in ("read", "write") for depth in (1, 8, 32, 64)]
    large = [Case(f"{rw}-64k-d16", rw, 16, 65536) for rw in ("read", "write")]
    packed = [
        Case(f"{rw}-4k-d32-packed", rw, 32, backends=(HCD_PACKED, RIVAL, HCD)) for rw in ("read", "write")
    ]
    queues = [Case(f"{rw}-4k-d32-q4", rw, 32, queues=4) for rw in ("read", "write")]
    direct = [
        Case(f"{rw}-4k-d{depth}-direct", rw, depth, backends=(HCD_DIRECT, RIVAL_DIRECT))
        for rw in ("read", "write")
        for depth in (1, 32)
    ]
    second = [
        Case(f"{rw}-4k-d{depth}-second", rw, depth, second=True, backends=(HCD, RIVAL))
        for rw, depth in (("read", 1), ("read", 32), ("read", 64), ("write", 32))
    ]
    return (*one_queue, *large, *packed, *queues, *direct, *second)


CASES = _cases()


def choose(patterns: str) -> list[Case]:
    """The cases that match one of the comma-separated shell patterns. ConfigError for a pattern without any."""
    chosen: list[Case] = []
    for pattern in filter(None, patterns.split(",")):
        found = [case for case in CASES if fnmatch.fnmatchcase(case.name, pattern)]
        if not found:
            raise ConfigError(f"no case is called {pattern}; there are {', '.join(case.name for case in CASES)}")
        chosen += [case for case in found if case not in chosen]
    return chosen
