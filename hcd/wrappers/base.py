"""What a wrapper is, and several of them on one device."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol

from hcd.dataplane.virtqueue import Request, Virtqueue
from hcd.device import Device, Option

__all__ = ["Log", "Stack", "WrapSpec", "Wrapper"]

Log = logging.Logger | logging.LoggerAdapter[Any]


class Timers(Protocol):
    """What wrappers need of a lane."""

    def call_later(self, seconds: float, callback: Any) -> Any: ...


class Wrapper:
    """One wrapper on one device. ``option`` holds every declared key, checked."""

    description: ClassVar[str] = ""
    options: ClassVar[tuple[Option, ...]] = ()

    def __init__(self, device: Device, option: Mapping[str, Any], log: Log) -> None:
        self.device = device
        self.option = option
        self.log = log

    @classmethod
    def check(cls, option: Mapping[str, Any]) -> None:
        """ValueError where the options do not fit together."""

    def taken(self, request: Request) -> bool:
        """``request`` was taken from its ring. False: the device never sees it, because it is completed here."""
        return True

    def done(self, request: Request, written: int) -> float:
        """``request`` was completed. Returns for how long (seconds) the driver must not know; 0: not at all."""
        return 0.0


@dataclass(frozen=True, slots=True)
class WrapSpec:
    """A wrapper in a configuration; ``options`` holds every key that it declares."""

    wrapper: type[Wrapper]
    options: Mapping[str, Any] = field(default_factory=dict)


class Stack:
    """The wrappers of one device, outermost first. Everything here is for the lane's thread."""

    def __init__(self, specs: Sequence[WrapSpec], device: Device, lane: Timers, log: Log) -> None:
        self._wrappers: tuple[Wrapper, ...] = tuple(spec.wrapper(device, spec.options, log) for spec in specs)
        self._lane = lane
        self._log = log

    def attach(self, queue: Virtqueue) -> None:
        """See what ``queue`` takes and completes from now on. Without wrappers it costs nothing."""
        queue.on_take = self._taken if self._wrappers else None
        queue.on_settle = self._done if self._wrappers else None

    def add(self, wrapper: Wrapper) -> None:
        """Have ``wrapper`` outermost. It may see the end of a request that it did not see begin.

        Queues that are attached already have to be attached again; so after :meth:`remove`.
        """
        self._wrappers = (wrapper, *self._wrappers)

    def remove(self, wrapper: Wrapper) -> None:
        self._wrappers = tuple(one for one in self._wrappers if one is not wrapper)

    def _taken(self, request: Request) -> bool:
        for wrapper in self._wrappers:
            try:
                if not wrapper.taken(request):
                    return False
            except Exception:  # a wrapper must not be worse than the faults that it makes
                self._log.exception("a wrapper failed")
        return True

    def _done(self, request: Request, written: int) -> bool:
        return self._tell(self._wrappers, request, written)

    def _tell(self, wrappers: tuple[Wrapper, ...], request: Request, written: int) -> bool:
        """Tell ``wrappers``, the innermost first; False when one of them takes its time."""
        for index in range(len(wrappers) - 1, -1, -1):
            try:
                delay = wrappers[index].done(request, written)
            except Exception:
                self._log.exception("a wrapper failed")
                delay = 0.0
            if delay > 0:
                self._lane.call_later(delay, partial(self._go_on, wrappers[:index], request, written))
                return False
        return True

    def _go_on(self, wrappers: tuple[Wrapper, ...], request: Request, written: int) -> None:
        if self._tell(wrappers, request, written):
            request.queue.settle_held(request)
