"""``error``: requests or rings that fail or take long, by probability or by pattern, without the device's doing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hcd.dataplane.virtqueue import Request
from hcd.device import Device, DoorbellDevice, Option
from hcd.wrappers.base import Log
from hcd.wrappers.faults import DELAY, FAIL, Faults
from hcd.wrappers.requests import RequestWrapper
from hcd.wrappers.rings import LOST, Batch, InjectedFault, RingWrapper

__all__ = ["RequestErrors", "RingErrors"]


class RequestErrors(RequestWrapper):
    """A request that fails never reaches the device; one that is delayed does, and the driver hears of it late."""

    description = "fail or delay requests"
    options = (
        *Faults.options("a request", "requests"),
        Option("status", "int", "the device's status of a failed request", 1, minimum=0, maximum=255),
        Option("queue", "int", "only requests of this queue", minimum=0, maximum=255),
    )
    check = Faults.check

    def __init__(self, device: Device, option: Mapping[str, Any], log: Log) -> None:
        super().__init__(device, option, log)
        self._faults = Faults(option)
        self._delayed: set[int] = set()  # by id(), see Narrator

    def taken(self, request: Request) -> bool:
        self._delayed.discard(id(request))  # request objects are used again
        if self.option["queue"] not in (None, request.queue.index):
            return True
        action = self._faults.next()
        if action == DELAY:
            self._delayed.add(id(request))
        elif action == FAIL:
            self._fail(request)
            return False
        return True

    def _fail(self, request: Request) -> None:
        request.status = 1
        try:
            self.device.fail_request(request, self.option["status"])
        finally:
            if not request.completed:
                request.complete(0)

    def done(self, request: Request, written: int) -> float:
        if id(request) not in self._delayed:
            return 0.0
        self._delayed.discard(id(request))
        return self._faults.delay


class RingErrors(RingWrapper):
    """What is rung at once has one fate: it is lost, or counts as a failure of the handler, or comes late."""

    description = "lose, fail or delay rings"
    options = (
        *Faults.options("a batch of rings", "rings"),
        Option("fault", "str", "rings that fail are lost, or the handler raises", "lose", choices=("lose", "raise")),
        Option("doorbell", "str", "only rings of this doorbell"),
    )
    check = Faults.check

    def __init__(self, device: DoorbellDevice, option: Mapping[str, Any], log: Log) -> None:
        super().__init__(device, option, log)
        self._faults = Faults(option)

    def rung(self, batch: Batch) -> float:
        if self.option["doorbell"] not in (None, batch.bell.name):
            return 0.0
        action = self._faults.next()
        if action == DELAY:
            return self._faults.delay
        if action != FAIL:
            return 0.0
        if self.option["fault"] == "raise":
            raise InjectedFault("the wrapper error was asked for it")
        return LOST
