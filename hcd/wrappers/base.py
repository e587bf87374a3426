"""What a wrapper is: the part that does not depend on the kind of device."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from hcd.device import DeviceBase, Handle, Option

__all__ = ["Log", "StackBase", "Timers", "WrapSpec", "Wrapper"]

Log = logging.Logger | logging.LoggerAdapter[Any]


class Timers(Protocol):
    """What wrappers need of a lane."""

    def call_later(self, seconds: float, callback: Any) -> Handle: ...


class Wrapper:
    """One wrapper on one device. ``option`` holds every declared key, checked."""

    description: ClassVar[str] = ""
    options: ClassVar[tuple[Option, ...]] = ()

    def __init__(self, device: Any, option: Mapping[str, Any], log: Log) -> None:
        self.option = option
        self.log = log

    @classmethod
    def check(cls, option: Mapping[str, Any]) -> None:
        """ValueError where the options do not fit together."""


@dataclass(frozen=True, slots=True)
class WrapSpec:
    """A wrapper in a configuration; ``options`` holds every key that it declares."""

    wrapper: type[Wrapper]
    options: Mapping[str, Any] = field(default_factory=dict)


W = TypeVar("W", bound=Wrapper)


class StackBase(Generic[W]):
    """The wrappers of one device, outermost first. Everything here is for the lane's thread."""

    def __init__(self, kind: type[W], specs: Sequence[WrapSpec], device: DeviceBase, lane: Timers, log: Log) -> None:
        self._wrappers: tuple[W, ...] = tuple(_make(kind, spec, device, log) for spec in specs)
        self._lane = lane
        self._log = log

    def add(self, wrapper: W) -> None:
        """Have ``wrapper`` outermost. It may see the end of what it did not see begin."""
        self._wrappers = (wrapper, *self._wrappers)

    def remove(self, wrapper: W) -> None:
        self._wrappers = tuple(one for one in self._wrappers if one is not wrapper)


def _make(kind: type[W], spec: WrapSpec, device: DeviceBase, log: Log) -> W:
    made = spec.wrapper(device, spec.options, log)
    assert isinstance(made, kind), "hcd.wrappers.parse gives a device wrappers of its own kind"
    return made
