"""What a process holds, once that has come to rest."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

from hcd.demo.hcd_process import Resources

__all__ = ["settled_growth"]


def settled_growth(before: Resources, now: Callable[[], Resources], seconds: float = 2) -> str:
    """What has grown since ``before`` and does not go away by itself, in words; "" for nothing.

    A thread that ends takes a moment, and some objects wait for the garbage collector.
    """
    deadline = time.monotonic() + seconds
    while True:
        growth = now().growth_since(before)
        if not growth or time.monotonic() > deadline:
            return growth
        gc.collect()
        time.sleep(0.01)
