"""A device's view of its lane: what it leaves there is run in its name.

Timers, watched files and posted calls of a device run between those of all others. What they raise is counted and
logged as the device's, and so is the time for which they held the others up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hcd.device import Handle
from hcd.errors import contained
from hcd.lanes import QueueLane
from hcd.slow import SlowSteps

__all__ = ["DeviceLane"]


class DeviceLane:
    """``lane`` for the device called ``name``. ``failed`` hears of what a callback raised."""

    def __init__(
        self, lane: QueueLane, name: str, slow: SlowSteps, failed: Callable[[str, Exception], None]
    ) -> None:
        self._lane = lane
        self._name = name
        self._slow = slow
        self._failed = failed
        self.shared: dict[str, Any] = lane.shared

    def watch(self, fd: int, callback: Callable[[], None]) -> Handle:
        return self._lane.watch(fd, self._guarded("a watch's callback", callback))

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Handle:
        if math.isnan(seconds):
            raise ValueError("call_later() wants seconds, not nan")
        return self._lane.call_later(max(0.0, seconds), self._guarded("a timer's callback", callback))

    def post(self, callback: Callable[[], None]) -> None:
        self._lane.post(self._guarded("a posted callback", callback))

    def _guarded(self, what: str, callback: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            try:
                self._slow.timed(self._name, what, callback)
            except BaseException as error:
                self._failed(what, contained(error))

        return run
