"""Wrappers by name, and their options as configurations and command lines write them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hcd import options as opt
from hcd.device import Device, DeviceBase, DoorbellDevice, Option
from hcd.wrappers.base import Wrapper, WrapSpec
from hcd.wrappers.error import RequestErrors, RingErrors
from hcd.wrappers.log import RequestLog, RingLog

__all__ = ["WRAPPERS", "parse", "parse_text"]

#: by kind of device
WRAPPERS: Mapping[type[DeviceBase], Mapping[str, type[Wrapper]]] = {
    Device: {"error": RequestErrors, "log": RequestLog},
    DoorbellDevice: {"error": RingErrors, "log": RingLog},
}


def parse(value: object, device: type[DeviceBase] = Device) -> tuple[WrapSpec, ...]:
    """Wrappers of ``device``, from a TOML list of names and of tables with one name as their key.

    ValueError says what is wrong.
    """
    if not isinstance(value, list):
        raise ValueError(f'expected a list such as ["log"], found {opt.shown(value)}')
    return tuple(_parse_one(item, device) for item in value)


def _parse_one(item: object, device: type[DeviceBase]) -> WrapSpec:
    if isinstance(item, str):
        return _make(item, {}, opt.from_toml, device)
    if isinstance(item, dict) and len(item) == 1:
        ((name, given),) = item.items()
        if isinstance(given, dict):
            return _make(name, given, opt.from_toml, device)
    raise ValueError(f"expected a wrapper's name or {{ name = {{ option = value }} }}, found {opt.shown(item)}")


def parse_text(text: str, device: type[DeviceBase] = Device) -> WrapSpec:
    """A wrapper from the command line: ``log``, or ``error:probability=0.1,delay-ms=20``."""
    name, _, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",")] if rest else []
    return _make(name, {key: value for key, _, value in pairs}, opt.from_text, device)


def _make(
    name: str, given: Mapping[str, Any], read: Callable[[Option, Any], Any], device: type[DeviceBase]
) -> WrapSpec:
    known = next(wrappers for kind, wrappers in WRAPPERS.items() if issubclass(device, kind))
    wrapper = known.get(name)
    if wrapper is None:
        raise ValueError(f'no wrapper "{name}"; expected {_listed(known)}{opt.did_you_mean(name, known)}')
    values = opt.defaults(wrapper.options)
    names = [option.name for option in wrapper.options]
    for key, value in given.items():
        option = opt.find(wrapper.options, key)
        if option is None:
            expected = f"expected {_listed(names)}" if names else "it has none"
            of = " of a doorbell device" if issubclass(device, DoorbellDevice) else ""
            raise ValueError(
                f'"{key}" is not an option of wrapper "{name}"{of}; {expected}{opt.did_you_mean(key, names)}'
            )
        try:
            values[option.key] = read(option, value)
        except ValueError as error:
            raise ValueError(f"{name} {option.name}: {error}") from None
    try:
        wrapper.check(values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return WrapSpec(wrapper, values)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
