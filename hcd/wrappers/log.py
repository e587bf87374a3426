"""``log``: a line for every request and one for its end, decoded by the device, without what is in it."""

from __future__ import annotations

from hcd.wrappers.narrate import Narrator

__all__ = ["LogWrapper"]


class LogWrapper(Narrator):
    """For finding faults: a line costs more than a request. ``hcd trace`` does it without a restart."""

    description = "log every request and its end, decoded, payload elided"

    def begun(self, queue: int, number: int, text: str) -> None:
        self.log.info("queue %d #%d: %s", queue, number, text)

    def ended(self, queue: int, number: int, op: str, status: str, written: int, took: float) -> None:
        self.log.info("queue %d #%d: %s %s, wrote %d, %.0f us", queue, number, op, status, written, took * 1e6)
