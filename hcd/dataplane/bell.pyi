"""Raw doorbells: eventfds that a guest rings, without a ring in memory behind them; and interrupts back."""

from collections.abc import Callable
from typing import Any

from hcd.dataplane.stats import DoorbellStats, InterruptStats

#: whether this machine has a time-stamp counter that guests stamp rings with
HAS_TSC: bool

def tsc() -> int: ...  # the time-stamp counter now; 0 where there is none

class Bell:
    """One doorbell that is being served. Its lane's thread alone touches it. The fd stays the caller's."""

    def __init__(self, name: str, fd: int, stats: DoorbellStats) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def fd(self) -> int: ...
    handler: Callable[[Bell, int], Any] | None
    on_error: Callable[[Bell, Exception], None] | None
    tag: Any
    def set_stamp(self, memory: Any, offset: int) -> None: ...  # a writable or read-only buffer; u64, 8-aligned
    def set_clock(self, tsc_khz: int, tsc_offset: int) -> None: ...  # khz 0: unknown, stamps are not looked at
    def release(self) -> None: ...  # let go of the memory
    def take(self) -> int: ...  # rings since the last call, counted; 0 without any
    def enter(self) -> None: ...  # the handler is entered now

class Interrupt:
    """One interrupt of the guest. The fd stays the caller's; -1: nobody is attached."""

    def __init__(self, name: str, stats: InterruptStats) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def fd(self) -> int: ...
    @property
    def stats(self) -> InterruptStats: ...
    on_signal: Callable[[Interrupt, Bell | None, str], None] | None  # outcome: sent, pending or absent
    def set_fd(self, fd: int) -> None: ...
    def signal(self, answers: Bell | None = None) -> bool: ...
