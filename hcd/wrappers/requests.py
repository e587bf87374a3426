"""Wrappers of requests: between a queue and its virtio device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from hcd.dataplane.virtqueue import Request, Virtqueue
from hcd.device import Device
from hcd.wrappers.base import Log, StackBase, Timers, Wrapper, WrapSpec

__all__ = ["RequestStack", "RequestWrapper"]


class RequestWrapper(Wrapper):
    """One wrapper on one virtio device."""

    def __init__(self, device: Device, option: Mapping[str, Any], log: Log) -> None:
        super().__init__(device, option, log)
        self.device = device

    def taken(self, request: Request) -> bool:
        """``request`` was taken from its ring. False: the device never sees it, because it is completed here."""
        return True

    def done(self, request: Request, written: int) -> float:
        """``request`` was completed. Returns for how long (seconds) the driver must not know; 0: not at all."""
        return 0.0


class RequestStack(StackBase[RequestWrapper]):
    """Queues that are attached already have to be attached again after :meth:`add` and :meth:`remove`."""

    def __init__(self, specs: Sequence[WrapSpec], device: Device, lane: Timers, log: Log) -> None:
        super().__init__(RequestWrapper, specs, device, lane, log)

    def attach(self, queue: Virtqueue) -> None:
        """See what ``queue`` takes and completes from now on. Without wrappers it costs nothing."""
        queue.on_take = self._taken if self._wrappers else None
        queue.on_settle = self._done if self._wrappers else None

    def _taken(self, request: Request) -> bool:
        for wrapper in self._wrappers:
            try:
                if not wrapper.taken(request):
                    return False
            except BaseException:  # a wrapper must not be worse than the faults that it makes
                self._log.exception("a wrapper failed")
        return True

    def _done(self, request: Request, written: int) -> bool:
        return self._tell(self._wrappers, request, written)

    def _tell(self, wrappers: tuple[RequestWrapper, ...], request: Request, written: int) -> bool:
        """Tell ``wrappers``, the innermost first; False when one of them takes its time."""
        for index in range(len(wrappers) - 1, -1, -1):
            try:
                delay = wrappers[index].done(request, written)
            except BaseException:
                self._log.exception("a wrapper failed")
                delay = 0.0
            if delay > 0:
                self._lane.call_later(delay, partial(self._go_on, wrappers[:index], request, written))
                return False
        return True

    def _go_on(self, wrappers: tuple[RequestWrapper, ...], request: Request, written: int) -> None:
        if self._tell(wrappers, request, written):
            request.queue.settle_held(request)
