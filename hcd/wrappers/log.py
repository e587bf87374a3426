"""``log``: a line for every request or batch of rings and one for its end, decoded by the device, without payload."""

from __future__ import annotations

from hcd.wrappers.narrate import RequestNarrator, RingNarrator

__all__ = ["RequestLog", "RingLog"]


class RequestLog(RequestNarrator):
    """For finding faults: a line costs more than a request. ``hcd trace`` does it without a restart."""

    description = "log every request and its end, decoded, payload elided"

    def begun(self, queue: int, number: int, text: str) -> None:
        self.log.info("queue %d #%d: %s", queue, number, text)

    def ended(self, queue: int, number: int, op: str, status: str, written: int, took: float) -> None:
        self.log.info("queue %d #%d: %s %s, wrote %d, %.0f us", queue, number, op, status, written, took * 1e6)


class RingLog(RingNarrator):
    description = "log every ring, what became of it, and every interrupt"

    def begun(self, doorbell: str, number: int, text: str) -> None:
        self.log.info("doorbell %s #%d: %s", doorbell, number, text)

    def ended(self, doorbell: str, number: int, outcome: str, took: float) -> None:
        self.log.info("doorbell %s #%d: %s, %.0f us", doorbell, number, outcome, took * 1e6)

    def signalled(self, interrupt: str, outcome: str, answers: str) -> None:
        self.log.info("interrupt %s: %s%s", interrupt, outcome, answers and f", answers doorbell {answers}")
