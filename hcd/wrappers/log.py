"""``log``: a line for every request and one for its end, decoded by the device, without what is in it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from hcd.dataplane.virtqueue import Request
from hcd.device import Device
from hcd.wrappers.base import Log, Wrapper

__all__ = ["LogWrapper"]

STATUSES = ("ok", "error", "unsupported")


class LogWrapper(Wrapper):
    """Numbers requests in the order in which they are taken. For finding faults: a line costs more than a request."""

    description = "log every request and its end, decoded, payload elided"

    def __init__(self, device: Device, option: Mapping[str, Any], log: Log) -> None:
        super().__init__(device, option, log)
        self._count = 0
        # by id(): a reference would keep hcd from seeing that a handler forgot the request
        self._running: dict[int, tuple[int, float]] = {}

    def taken(self, request: Request) -> bool:
        self._count += 1
        self._running[id(request)] = (self._count, time.monotonic())
        self.log.info("queue %d #%d: %s", request.queue.index, self._count, self._describe(request))
        return True

    def done(self, request: Request, written: int) -> float:
        number, began = self._running.pop(id(request), (0, 0.0))
        if number:
            took = (time.monotonic() - began) * 1e6
            status = STATUSES[request.status]
            op = self.device.operations[request.op]
            where = f"queue {request.queue.index} #{number}"
            self.log.info("%s: %s %s, wrote %d, %.0f us", where, op, status, written, took)
        return 0.0

    def _describe(self, request: Request) -> str:
        try:
            return self.device.describe(request)
        except Exception as error:  # the guest's header may be anything, and so may the plug-in
            return f"{Device.describe(self.device, request)} ({type(error).__name__}: {error})"
