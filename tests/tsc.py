"""The time-stamp counter of this machine, for guests that are made up."""

from __future__ import annotations

import time
from collections.abc import Callable

from hcd.dataplane import bell


def measure_tsc() -> tuple[int, Callable[[], int]]:
    """The rate of this machine's TSC in kHz, and a function that estimates its value now."""
    begin, began = bell.tsc(), time.monotonic_ns()
    while time.monotonic_ns() - began < 20_000_000:
        pass
    khz = (bell.tsc() - begin) * 1_000_000 // (time.monotonic_ns() - began)
    return khz, bell.tsc
