"""Code of devices that held everybody else up: who it was, in the log and as a count.

Both lanes are one thread each. Whatever a device does there between two moments at which others may run is a *step*:
a turn of a plain handler, what an async handler does between two awaits, a callback of a timer or a watched file. A
step of more than 50 ms is noted here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine, Generator
from types import coroutine
from typing import Any

from hcd.dataplane.bell import Bell
from hcd.dataplane.stats import DeviceStats
from hcd.dataplane.virtqueue import Virtqueue
from hcd.log import RateLimited

__all__ = ["SLOW_NS", "SlowSteps", "name_of", "stepwise"]

#: a longer step (nanoseconds) is noted
SLOW_NS = 50_000_000

_log = logging.getLogger("hcd.lanes")


class SlowSteps:
    """The slow steps of all devices of one daemon. Lanes note them, on their threads."""

    def __init__(self) -> None:
        #: where they are counted, by the device's name
        self.devices: dict[str, DeviceStats] = {}
        #: called for each: device, what it was, and its nanoseconds
        self.on_slow: Callable[[str, str, int], None] | None = None
        self._rare = RateLimited(_log, limit=1)

    def note(self, device: str, what: str, ns: int) -> None:
        if (stats := self.devices.get(device)) is not None:
            stats.slow_steps += 1
        self._rare.warning(
            f"slow handlers of {device}",
            "%s: %s took %.0f ms; every device of this process waited that long", device, what, ns / 1e6,
        )
        if self.on_slow is not None:
            self.on_slow(device, what, ns)

    def note_turn(self, source: Virtqueue | Bell, ns: int) -> None:
        """A turn of the handler for ``source``."""
        self.note(str(source.tag), f"the handler of {name_of(source)}", ns)

    def timed(self, device: str, what: str, callback: Callable[[], object]) -> None:
        """Run ``callback``; note it when it is slow."""
        began = time.monotonic_ns()
        try:
            callback()
        finally:
            if (took := time.monotonic_ns() - began) > SLOW_NS:
                self.note(device, what, took)


def name_of(source: Virtqueue | Bell) -> str:
    return f"queue {source.index}" if isinstance(source, Virtqueue) else f"doorbell {source.name}"


@coroutine
def stepwise(work: Coroutine[Any, Any, Any], slow: Callable[[int], None]) -> Generator[Any, Any, Any]:
    """Await ``work``; ``slow`` is called with the nanoseconds of each step that was too long."""
    resume: Callable[[Any], Any] = work.send
    value: Any = None
    while True:
        began = time.monotonic_ns()
        try:
            trap = resume(value)
        except StopIteration as done:
            return done.value
        finally:
            if (took := time.monotonic_ns() - began) > SLOW_NS:
                slow(took)
        try:
            value = yield trap
            resume = work.send
        except GeneratorExit:
            work.close()
            raise
        except BaseException as error:  # trio cancels, or tells of a failure, by raising here
            resume, value = work.throw, error
