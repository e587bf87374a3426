"""Device types, found through entry points of the group "hcd.devices".

Only a type that is asked for by name is imported: one broken plug-in that nobody uses harms nobody.

Looking through every installed distribution takes a millisecond or more of the interpreter's time, which a reactor that
serves rings beside it waits for. So what was found is kept until a directory of Python's path changes, as it does when
something is installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from hcd import declaration
from hcd import options as opt
from hcd.device import Device, DeviceBase, DoorbellDevice
from hcd.errors import ConfigError, PluginError, shown

__all__ = ["GROUP", "create", "distribution", "load", "names", "origin"]

GROUP = "hcd.devices"

def names() -> list[str]:
    """Every installed type, sorted. Nothing is imported."""
    return sorted({entry.name for entry in _entries()})


def origin(name: str) -> str:
    """The distribution that type ``name`` comes from, with its version."""
    return _origin(_entry(name))


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"


def distribution(name: str) -> tuple[str, str]:
    """Name and version of the distribution that type ``name`` comes from; "" for what is not known."""
    dist = _entry(name).dist
    return (dist.name, dist.version) if dist else ("", "")


def load(name: str) -> type[DeviceBase]:
    """The class of type ``name``.

    ConfigError when no such type is installed; PluginError, naming the distribution, when it cannot be used.
    """
    entry = _entry(name)
    try:
        found = entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # whatever a module raises while it is imported is the plug-in's fault
        raise _refused(entry, f"cannot be imported from {entry.value}: {shown(exc)}") from exc
    if not (isinstance(found, type) and issubclass(found, Device | DoorbellDevice)):
        raise _refused(entry, f"{entry.value} is not a subclass of hcd.device.Device or DoorbellDevice")
    try:
        faults = list(declaration.unusable(found))
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # it may say anything of itself
        raise _refused(entry, f"what {entry.value} declares cannot be read: {shown(exc)}") from exc
    if faults:
        raise _refused(entry, "; ".join(faults))
    return found


def create(type_name: str, name: str, options: Mapping[str, Any]) -> DeviceBase:
    """A device of ``type_name``. ConfigError: it refuses its options. PluginError: it is defective."""
    cls = load(type_name)
    try:
        made = cls(name, options)
    except (ConfigError, KeyboardInterrupt):
        raise
    except BaseException as exc:
        raise _refused(_entry(type_name), f"cannot be made: {shown(exc)}") from exc
    if not declaration.initialised(made):
        raise _refused(_entry(type_name), declaration.NOT_INITIALISED)
    return made


def _entries() -> tuple[EntryPoint, ...]:
    return _installed(tuple((path, _changed(path)) for path in sys.path))


@lru_cache(maxsize=1)
def _installed(path: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    """Every entry of the group on ``path``: that of Python, with the time at which each directory changed last."""
    return tuple(entry_points(group=GROUP))


def _changed(directory: str) -> int:
    try:
        return os.stat(directory or ".").st_mtime_ns
    except OSError:
        return 0


def _entry(name: str) -> EntryPoint:
    entries = [entry for entry in _entries() if entry.name == name]
    if not entries:  # it may be that we looked while it was being installed
        _installed.cache_clear()
        entries = [entry for entry in _entries() if entry.name == name]
    if not entries:
        known = names()
        hint = opt.did_you_mean(name, known)
        raise ConfigError(f'no device type "{name}"; installed: {", ".join(known) or "none"}{hint}')
    if len({entry.value for entry in entries}) > 1:
        raise PluginError(f'device type "{name}" is claimed by {" and ".join(map(_origin, entries))}')
    return entries[0]


def _refused(entry: EntryPoint, text: str) -> PluginError:
    return PluginError(f'device type "{entry.name}" of {_origin(entry)}: {text}')
