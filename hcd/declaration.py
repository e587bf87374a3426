"""What a device says of itself, before and after it is opened: what hcd refuses, and what the conformance check finds.

Refused is what cannot work: it would show later, and as something else. The check wants more.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from hcd import instruments
from hcd import options as opt
from hcd.device import API_VERSION, Device, DeviceBase, DoorbellDevice, Option

__all__ = [
    "MAX_CONFIG", "NOT_INITIALISED", "RESERVED", "config_fault", "faults", "faults_when_open", "initialised",
    "unusable", "unusable_when_open",
]

#: bits that belong to device types (virtio 1.3, 2.2): 0 to 23, and from 50 on
DEVICE_BITS = (1 << 24) - 1 | ~((1 << 50) - 1) & (1 << 64) - 1
#: vhost-user.rst, "Virtio device config space": the largest payload
MAX_CONFIG = 256
#: what the data plane counts by
MAX_OPERATIONS = 16
MAX_QUEUES = 256
#: options that ``hcd device`` has for every type; a type cannot declare them again
RESERVED = frozenset(
    (
        *("help", "socket-path", "fd", "name", "path", "bus", "qmp", "metrics", "log-level", "control"),
        *("poll-us", "drain-timeout", "exit-on-disconnect", "print-capabilities", "version", "wrap"),
    )
)
#: the methods that hcd calls and does not await
PLAIN = (
    "open", "close", "connect", "disconnect", "start_queue", "stop_queue", "config", "write_config", "fail_request",
    "set_mtu", "announce", "storage_size", "resize", "describe",
)

_OPTION = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", re.ASCII | re.IGNORECASE)


# -- the class


def unusable(cls: type[DeviceBase]) -> Iterator[str]:
    """Why no device can be made of the class."""
    if cls.api_version != API_VERSION:
        yield f"is written for device API {cls.api_version!r}; this hcd has {API_VERSION}"
        return
    if own := [name for name in ("handler", "transport", "is_async") if not _inherits(cls, name)]:
        yield f"declares {' and '.join(own)}, which is for hcd to say"
        return
    if not isinstance(cls.description, str):
        yield f"description is {cls.description!r}; expected a text"
    handler = getattr(cls, cls.handler)
    if handler in (Device.process, DoorbellDevice.ring) or not callable(handler):
        yield f"does not define {cls.handler}()"
    elif inspect.isgeneratorfunction(handler) or inspect.isasyncgenfunction(handler):
        yield f"{cls.handler}() has a yield in it, which makes it a generator: nothing would run it"
    for name in PLAIN:
        if inspect.iscoroutinefunction(getattr(cls, name, None)):
            yield f"{name}() is async, which only {cls.handler}() may be: nothing would await it"
    if issubclass(cls, Device):
        yield from _device_faults(cls)
    for option in _items(cls.options):
        yield from _option_faults(option)
    names = [option.key for option in _items(cls.options) if isinstance(option, Option)]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f'declares option "{name}" twice'
    yield from instruments.faults(_items(cls.metrics))


def _inherits(cls: type[DeviceBase], name: str) -> bool:
    """Whether ``name`` is as the base class has it, also where several classes come together."""
    base = Device if issubclass(cls, Device) else DoorbellDevice
    return inspect.getattr_static(cls, name) is inspect.getattr_static(base, name)


def _device_faults(cls: type[Device]) -> Iterator[str]:
    if not _is_number(cls.virtio_id) or not 0 <= cls.virtio_id < 1 << 16:
        yield f"virtio_id is {cls.virtio_id!r}; expected the device's number in chapter 5 of the specification"
    if not isinstance(cls.vhost_user_type, str):
        yield f"vhost_user_type is {cls.vhost_user_type!r}; expected a text"
    features = cls.vhost_user_features
    if not isinstance(features, tuple | list) or not all(isinstance(feature, str) for feature in features):
        yield f"vhost_user_features are {features!r}; expected a tuple of names"
    names = cls.operations
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        yield f"operations are {names!r}; expected a tuple of names"
    elif not 1 <= len(names) <= MAX_OPERATIONS or len(set(names)) != len(names):
        yield f"operations has {len(names)} names ({len(set(names))} different); expected 1 to {MAX_OPERATIONS}"
    size = cls.max_queue_size
    if not _is_number(size) or not 0 < size <= 32768 or size & (size - 1):
        yield f"max_queue_size is {size!r}; expected a power of two up to 32768"


def _option_faults(option: object) -> Iterator[str]:
    if not isinstance(option, Option):
        yield f"declares {option!r} as an option; expected a hcd.device.Option"
    elif option.kind not in opt.KINDS:
        yield f'option "{option.name}" has the unknown kind "{option.kind}"'
    elif not _OPTION.fullmatch(option.name):
        yield f'option "{option.name}" has a name that nobody can give; expected words joined by "-"'
    elif option.key.replace("_", "-") in RESERVED:
        yield f'option "{option.name}" is one of hcd\'s own'


def _items(declared: object) -> tuple[object, ...]:
    """A declaration that should be a tuple; anything else is its own only item, and found wrong as that."""
    return tuple(declared) if isinstance(declared, tuple | list) else (declared,)


def faults(cls: type[DeviceBase]) -> Iterator[str]:
    """What is wrong with the class."""
    yield from unusable(cls)
    if issubclass(cls, Device) and cls.virtio_id == 0:
        yield "virtio_id is 0; expected the device's number in chapter 5 of the specification"
    for option in cls.options:
        if option.default is not None and option.kind in opt.KINDS:
            try:
                opt.from_toml(option, option.default)
            except ValueError as error:
                yield f'the default of option "{option.name}" is not one of its own values: {error}'


# -- the device, once it is open

NOT_INITIALISED = "its __init__() does not call super().__init__(name, options)"


def initialised(device: DeviceBase) -> bool:
    """Whether the base class had its part in making the device. Else /metrics would fail for all devices."""
    return isinstance(getattr(device, "instruments", None), instruments.Instruments)


def unusable_when_open(device: Device) -> Iterator[str]:
    """Why nobody can be served."""
    count = device.num_queues
    if not _is_number(count) or not 1 <= count <= MAX_QUEUES:
        yield f"num_queues is {count!r}; expected 1 to {MAX_QUEUES}"
    features = device.features
    if not _is_number(features) or features & ~DEVICE_BITS:
        odd = f"{features & ~DEVICE_BITS:#x}" if _is_number(features) and features >= 0 else repr(features)
        yield f"features has bits {odd}; 0 to 23 and 50 to 63 are the device's, others belong to rings and transport"
    protocol = device.protocol_features
    if not _is_number(protocol) or not 0 <= protocol < 1 << 64:
        yield f"protocol_features is {protocol!r}; expected vhost-user's bits"


def config_fault(config: object, size: int | None = None) -> str:
    """What is wrong with what ``config()`` returned; ``size`` is what it had before. "" if nothing is."""
    if not isinstance(config, bytes):
        return f"it returned {type(config).__name__}; expected bytes"
    if len(config) > MAX_CONFIG:
        return f"it returned {len(config)} bytes; vhost-user carries {MAX_CONFIG} at most"
    if size is not None and len(config) != size:
        return f"it returned {len(config)} bytes, before that {size}: its size must not change"
    return ""


def faults_when_open(device: Device | DoorbellDevice) -> Iterator[str]:
    """What is wrong with what the device says of itself after ``open``."""
    if not initialised(device):
        yield NOT_INITIALISED
    if isinstance(device, DoorbellDevice):
        names: tuple[str, ...] = ("doorbells", "interrupts", "memory_size", "memory_wanted")
    else:
        yield from unusable_when_open(device)
        if fault := config_fault(device.config()):
            yield f"config(): {fault}"
        names = ("num_queues", "features", "protocol_features")
    for name in names:
        if getattr(device, name) != getattr(device, name):
            yield f"{name} changes from one look to the next"


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
