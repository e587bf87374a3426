"""What happens to requests, told one by one: the common part of the wrapper ``log`` and of ``hcd trace``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from hcd.dataplane.virtqueue import Request
from hcd.device import Device
from hcd.wrappers.base import Log, Wrapper

__all__ = ["Narrator"]

STATUSES = ("ok", "error", "unsupported")


class Narrator(Wrapper):
    """Tells of each request and of its end. Numbers requests in the order in which they are taken."""

    def __init__(self, device: Device, option: Mapping[str, Any], log: Log) -> None:
        super().__init__(device, option, log)
        self._count = 0
        # by id(): a reference would keep hcd from seeing that a handler forgot the request
        self._running: dict[int, tuple[int, float]] = {}

    def wants(self) -> bool:
        """Whether the next request is told of. One that is not is numbered all the same; its end is not told either."""
        return True

    def begun(self, queue: int, number: int, text: str) -> None:
        """A request was taken; ``text`` is the device's, without payload."""
        raise NotImplementedError

    def ended(self, queue: int, number: int, op: str, status: str, written: int, took: float) -> None:
        """``took`` in seconds."""
        raise NotImplementedError

    def taken(self, request: Request) -> bool:
        self._count += 1
        if self.wants():
            self._running[id(request)] = (self._count, time.monotonic())
            self.begun(request.queue.index, self._count, self._describe(request))
        else:
            self._running.pop(id(request), None)
        return True

    def done(self, request: Request, written: int) -> float:
        number, began = self._running.pop(id(request), (0, 0.0))
        if number:
            took = time.monotonic() - began
            op, status = self.device.operations[request.op], STATUSES[request.status]
            self.ended(request.queue.index, number, op, status, written, took)
        return 0.0

    def _describe(self, request: Request) -> str:
        try:
            return self.device.describe(request)
        except Exception as error:  # the guest's header may be anything, and so may the plug-in
            return f"{Device.describe(self.device, request)} ({type(error).__name__}: {error})"
