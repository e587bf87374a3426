"""Wrappers of rings: between raw doorbells and their device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hcd.dataplane.bell import Bell
from hcd.device import DoorbellDevice
from hcd.wrappers.base import Log, Wrapper

__all__ = ["LOST", "Batch", "InjectedFault", "RingWrapper"]

#: what :meth:`RingWrapper.rung` returns for rings of which the device never hears
LOST = math.inf


class InjectedFault(Exception):
    """Raised by a wrapper where the device would have raised something."""


@dataclass(slots=True, eq=False)
class Batch:
    """The rings of one doorbell that are handed over at once. ``value``: what was written, where one alone rings."""

    bell: Bell
    count: int
    value: int | None
    #: the wrappers that see it, outermost first, and how many of them did already
    wrappers: tuple[RingWrapper, ...]
    seen: int = 0
    lost: bool = False
    #: the rings of the same doorbell that came while it waited
    more: int = 0


class RingWrapper(Wrapper):
    """One wrapper on one doorbell device."""

    def __init__(self, device: DoorbellDevice, option: Mapping[str, Any], log: Log) -> None:
        super().__init__(device, option, log)
        self.device = device

    def rung(self, batch: Batch) -> float:
        """A doorbell was rung. Returns for how long (seconds) the device must not know; 0: not at all; LOST: for ever.

        InjectedFault: its handler fails.
        """
        return 0.0

    def handled(self, batch: Batch, error: BaseException | None) -> None:
        """The device has handled the rings that :meth:`rung` saw, or raised ``error``; or they were lost."""

    def interrupted(self, name: str, answers: Bell | None, outcome: str) -> None:
        """The device signalled an interrupt, as an answer to ``answers``. ``outcome``: sent, pending or absent."""
