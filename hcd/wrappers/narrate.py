"""What happens to requests and rings, told one by one: the common part of the wrapper ``log`` and of ``hcd trace``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from hcd.dataplane.bell import Bell
from hcd.dataplane.virtqueue import Request
from hcd.device import Device, DoorbellDevice
from hcd.errors import shown
from hcd.wrappers.base import Log
from hcd.wrappers.requests import RequestWrapper
from hcd.wrappers.rings import Batch, RingWrapper

__all__ = ["RequestNarrator", "RingNarrator"]

STATUSES = ("ok", "error", "unsupported")


class RequestNarrator(RequestWrapper):
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
        except BaseException as error:  # the guest's header may be anything, and so may the plug-in
            return f"{Device.describe(self.device, request)} ({shown(error)})"


class RingNarrator(RingWrapper):
    """Tells of each batch of rings and of its end, and of each interrupt. Numbers batches as they come."""

    def __init__(self, device: DoorbellDevice, option: Mapping[str, Any], log: Log) -> None:
        super().__init__(device, option, log)
        self._count = 0
        self._running: dict[Batch, tuple[int, float]] = {}

    def wants(self) -> bool:
        """Whether what comes next is told of; else as for requests."""
        return True

    def begun(self, doorbell: str, number: int, text: str) -> None:
        """``text`` is the device's, without payload."""
        raise NotImplementedError

    def ended(self, doorbell: str, number: int, outcome: str, took: float) -> None:
        """``outcome``: handled, lost, or what the handler raised; ``took`` in seconds."""
        raise NotImplementedError

    def signalled(self, interrupt: str, outcome: str, answers: str) -> None:
        """``answers``: the doorbell whose rings are answered; "" where the device does not say."""
        raise NotImplementedError

    def rung(self, batch: Batch) -> float:
        self._count += 1
        if self.wants():
            self._running[batch] = (self._count, time.monotonic())
            self.begun(batch.bell.name, self._count, self._describe(batch))
        return 0.0

    def handled(self, batch: Batch, error: BaseException | None) -> None:
        number, began = self._running.pop(batch, (0, 0.0))
        if number:
            outcome = "lost" if batch.lost else "handled" if error is None else f"raised {type(error).__name__}"
            self.ended(batch.bell.name, number, outcome, time.monotonic() - began)

    def interrupted(self, name: str, answers: Bell | None, outcome: str) -> None:
        if self.wants():
            self.signalled(name, outcome, "" if answers is None else answers.name)

    def _describe(self, batch: Batch) -> str:
        try:
            text = self.device.describe(batch.bell, batch.count)
        except BaseException as error:  # the shared memory may hold anything, and so may the plug-in
            text = DoorbellDevice.describe(self.device, batch.bell, batch.count)
            text += f" ({shown(error)})"
        return text if batch.value is None else f"{text}, value {batch.value:#x}"
