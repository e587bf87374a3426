"""What can be said of a device without serving it: its declaration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from hcd import instruments
from hcd import options as opt
from hcd.device import API_VERSION, Device, DeviceBase, DoorbellDevice, Option

__all__ = ["faults", "faults_when_open"]

#: bits that belong to device types (virtio 1.3, 2.2): 0 to 23, and from 50 on
DEVICE_BITS = (1 << 24) - 1 | ~((1 << 50) - 1) & (1 << 64) - 1
#: vhost-user.rst, "Virtio device config space": the largest payload
MAX_CONFIG = 256
#: the methods that hcd calls and does not await
PLAIN = (
    "open", "close", "connect", "disconnect", "start_queue", "stop_queue", "config", "write_config", "fail_request",
    "set_mtu", "announce", "describe",
)


def faults(cls: type[DeviceBase]) -> Iterator[str]:
    """What is wrong with the class."""
    if cls.api_version != API_VERSION:
        yield f"api_version is {cls.api_version}; this hcd has {API_VERSION}"
    handler = getattr(cls, cls.handler)
    if handler in (Device.process, DoorbellDevice.ring):
        yield f"{cls.handler}() is not defined"
    if inspect.isgeneratorfunction(handler) or inspect.isasyncgenfunction(handler):
        yield f"{cls.handler}() is a generator: nothing would run it"
    for name in PLAIN:
        if inspect.iscoroutinefunction(getattr(cls, name, None)):
            yield f"{name}() is async, which only {cls.handler}() may be: nothing would await it"
    if issubclass(cls, Device):
        yield from _virtio_faults(cls)
    for option in cls.options:
        yield from _option_faults(option)
    yield from instruments.faults(cls.metrics)


def _virtio_faults(cls: type[Device]) -> Iterator[str]:
    if not 0 < cls.virtio_id < 1 << 16:
        yield f"virtio_id is {cls.virtio_id}; expected the device's number in chapter 5 of the specification"
    if not cls.operations or len(set(cls.operations)) != len(cls.operations):
        yield f"operations are {cls.operations}; expected one name at least, each once"
    size = cls.max_queue_size
    if not 0 < size <= 32768 or size & (size - 1):
        yield f"max_queue_size is {size}; expected a power of two up to 32768"


def _option_faults(option: Option) -> Iterator[str]:
    if option.kind not in opt.KINDS:
        yield f'option "{option.name}" has the unknown kind "{option.kind}"'
    elif option.default is not None:
        try:
            opt.from_toml(option, option.default)
        except ValueError as error:
            yield f'the default of option "{option.name}" is not one of its own values: {error}'


def faults_when_open(device: Device | DoorbellDevice) -> Iterator[str]:
    """What is wrong with what the device says of itself after ``open``."""
    if isinstance(device, DoorbellDevice):
        names: tuple[str, ...] = ("doorbells", "interrupts", "memory_size", "memory_wanted")
    else:
        yield from _open_virtio_faults(device)
        names = ("num_queues", "features", "protocol_features")
    for name in names:
        if getattr(device, name) != getattr(device, name):
            yield f"{name} changes from one look to the next"


def _open_virtio_faults(device: Device) -> Iterator[str]:
    if device.features & ~DEVICE_BITS:
        yield f"features has bits {device.features & ~DEVICE_BITS:#x}, which belong to rings and transport"
    config = device.config()
    if not isinstance(config, bytes):
        yield f"config() returns {type(config).__name__}; expected bytes"
    elif len(config) > MAX_CONFIG:
        yield f"config() returns {len(config)} bytes; vhost-user carries {MAX_CONFIG} at most"
