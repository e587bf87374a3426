"""The configuration: a TOML file into frozen dataclasses, with every problem reported, not only the first.

::

    [daemon]
    metrics = "127.0.0.1:9847"      # or "[::1]:9847", or "unix:/run/hcd/metrics.sock"; absent: not served
    poll_us = 32                    # how long the reactor polls rings before it sleeps; 0: never
    drain_timeout = 5.0             # seconds that a stopping queue waits for requests in flight
    stuck_after = 30.0              # seconds after which a request in flight counts as stuck; 0: never

    [control]                       # optional: see hcd.control.settings
    path = "/run/hcd/control.sock"

    [[device]]
    name = "disk0"
    type = "blk"
    socket = "/run/hcd/disk0.sock"
    path = "auto"                   # or pio, mmio, hypercall, direct: the declared path of its doorbells
    bus = "pci"                     # optional: pci, mmio, ccw; what the front end plugs the device into
    qmp = "/run/vm/qmp.sock"        # optional: where QEMU can be asked for the path
    wrap = ["log"]                  # optional: run it under these (hcd.wrappers), the first one outermost
    stuck_after = 10.0              # optional: another one for this device
    [device.limits]                 # optional; see hcd.limits
    requests_per_second = 5000
    bytes_per_second = "100M"
    [device.options]
    blk-file = "/var/lib/vm/disk0.raw"
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hcd import options as opt
from hcd import plugins, wrappers
from hcd.control.settings import ControlSpec, parse_mode
from hcd.device import Device, DeviceBase, DoorbellDevice, Option
from hcd.doorbell import Path
from hcd.errors import ConfigError, PluginError
from hcd.limits import NO_LIMITS, Limits
from hcd.limits import parse as parse_limits

__all__ = [
    "BUSES",
    "DECLARABLE",
    "Address",
    "ConfigProblems",
    "DaemonConfig",
    "DeviceSpec",
    "load",
    "parse",
    "parse_address",
    "parse_path",
]

#: paths that an operator may declare; "auto" leaves it to QMP and negotiation
DECLARABLE = (Path.PIO, Path.MMIO, Path.HYPERCALL, Path.DIRECT)
BUSES = ("pci", "mmio", "ccw")
DEFAULT_POLL_US = 32
DEFAULT_DRAIN_TIMEOUT = 5.0
DEFAULT_STUCK_AFTER = 30.0
#: the longest time that can be configured, in seconds
_HOUR = 3600

#: sun_path holds 108 bytes, the last one a NUL
_SUN_PATH_MAX = 107
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,62}", re.ASCII)
_DAEMON_KEYS = ("metrics", "poll_us", "drain_timeout", "stuck_after")
_CONTROL_KEYS = ("path", "mode", "owner", "group")
_DEVICE_KEYS = ("name", "type", "socket", "path", "bus", "qmp", "wrap", "stuck_after", "limits", "options")


@dataclass(frozen=True, slots=True)
class Address:
    """Where /metrics is served: a unix socket when ``path`` is set, else host and port (0: any free one)."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One configured device. ``path`` None is "auto"; ``options`` holds every key that the type declares."""

    name: str
    type: str
    socket: str
    path: Path | None = None
    bus: str | None = None
    qmp: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    wrap: tuple[wrappers.WrapSpec, ...] = ()
    limits: Limits = NO_LIMITS
    stuck_after: float = DEFAULT_STUCK_AFTER

    def differs_only_in_effect(self, other: DeviceSpec) -> bool:
        """Whether ``other`` is the same but for what can be changed while a front end is connected."""
        return replace(self, limits=other.limits, stuck_after=other.stuck_after) == other


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """A whole configuration; ``poll_us`` in microseconds, ``drain_timeout`` in seconds."""

    devices: tuple[DeviceSpec, ...]
    metrics: Address | None = None
    poll_us: int = DEFAULT_POLL_US
    drain_timeout: float = DEFAULT_DRAIN_TIMEOUT
    control: ControlSpec | None = None  # None: no control socket
    file: str = field(default="", compare=False)  # where it was read from


class ConfigProblems(ConfigError):
    """Everything that is wrong with one configuration, a line each: "file: table key: what"."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def load(file: str, find_type: Callable[[str], type[DeviceBase]] = plugins.load) -> DaemonConfig:
    """Read and check ``file``; imports the types that it uses. ConfigProblems names every problem."""
    try:
        with open(file, "rb") as stream:
            document = tomllib.load(stream)
    except OSError as exc:
        raise ConfigProblems([f"{file}: cannot be read: {exc.strerror}"]) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigProblems([f"{file}: is not valid TOML: {exc}"]) from exc
    except RecursionError as exc:
        raise ConfigProblems([f"{file}: is nested too deeply"]) from exc
    return parse(document, file, find_type)


def parse(
    document: Mapping[str, Any], file: str, find_type: Callable[[str], type[DeviceBase]] = plugins.load
) -> DaemonConfig:
    """Check a parsed TOML document. ``file`` stands in the messages."""
    return _Reader(file, find_type).read(document)


def parse_address(text: str) -> Address:
    """An :class:`Address` from "HOST:PORT", "[V6]:PORT" or "unix:PATH". ValueError says what was expected."""
    if text.startswith("unix:"):
        return Address(path=_unix_path(text[5:]))
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%a-z]+)\]|([^\[\]:/\s]+)):([0-9]{1,5})", text, re.ASCII)
    if match is None or int(match[3]) > 65535:
        raise ValueError(f'expected "HOST:PORT", "[IPv6]:PORT" or "unix:PATH", found "{text}"')
    return Address(host=match[1] or match[2], port=int(match[3]))


def parse_path(text: str) -> Path | None:
    """A declared path; None for "auto". ValueError otherwise."""
    if text == "auto":
        return None
    if text not in DECLARABLE:
        raise ValueError(f'expected "auto" or one of {", ".join(DECLARABLE)}, found "{text}"')
    return Path(text)


def check_name(text: str) -> str:
    """A device's name: it is a label of metrics and stands in log lines."""
    if not _NAME.fullmatch(text):
        raise ValueError(f'expected letters, digits and any of "_.:-" (63 at most), found "{text[:80]}"')
    return text


def check_socket(text: str) -> str:
    """The path of a unix socket."""
    return _unix_path(text)


def check_bus(text: str) -> str:
    if text not in BUSES:
        raise ValueError(f'expected one of {", ".join(BUSES)}, found "{text}"')
    return text


def check_qmp(text: str) -> str:
    """The path of a QMP socket; QEMU's own spelling "unix:PATH" is understood too."""
    return _unix_path(text.removeprefix("unix:"))


def _unix_path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError(f'expected the path of a unix socket, found "{text}"')
    size = len(os.fsencode(text))
    if size > _SUN_PATH_MAX:
        raise ValueError(f"expected a socket path of at most {_SUN_PATH_MAX} bytes, found one of {size}")
    return text


class _Reader:
    """Walks one document and collects problems; values that are wrong become None and the walk goes on."""

    def __init__(self, file: str, find_type: Callable[[str], type[DeviceBase]]) -> None:
        self.file = file
        self.find_type = find_type
        self.problems: list[str] = []
        self.stuck_after = DEFAULT_STUCK_AFTER  # of devices that say nothing

    def read(self, document: Mapping[str, Any]) -> DaemonConfig:
        self.unknown_keys("", document, ("daemon", "control", "device"))
        daemon = self.daemon(document.get("daemon", {}))
        control = self.control(document.get("control", {}))
        specs = self.devices(document.get("device", []))
        self.duplicates(specs, daemon.get("metrics"), control)
        if self.problems:
            raise ConfigProblems(self.problems)
        return DaemonConfig(devices=tuple(specs), control=control, file=self.file, **daemon)

    def problem(self, table: str, key: str, text: str) -> None:
        where = " ".join(part for part in (table, key) if part)
        self.problems.append(": ".join(part for part in (self.file, where, text) if part))

    def unknown_keys(self, table: str, found: Mapping[str, Any], known: tuple[str, ...]) -> None:
        for key in found:
            if key not in known:
                hint = opt.did_you_mean(key, known)
                self.problem(table, key, f"is not a known key; expected {', '.join(known)}{hint}")

    def text(
        self,
        table: str,
        found: Mapping[str, Any],
        key: str,
        check: Callable[[str], Any],
        required: bool = False,
    ) -> Any:
        """The string at ``key`` through ``check``; None where it is absent or wrong."""
        if key not in found:
            if required:
                self.problem(table, key, "is missing; expected a string")
            return None
        value = found[key]
        try:
            if not isinstance(value, str):
                raise ValueError(f"expected a string, found {opt.shown(value)}")
            return check(value)
        except ValueError as exc:
            self.problem(table, key, str(exc))
            return None

    def daemon(self, found: object) -> dict[str, Any]:
        table = "[daemon]"
        if not isinstance(found, dict):
            self.problem(table, "", f"expected a table, found {opt.shown(found)}")
            return {}
        self.unknown_keys(table, found, _DAEMON_KEYS)
        read: dict[str, Any] = {"metrics": self.text(table, found, "metrics", parse_address)}
        if "poll_us" in found:
            read["poll_us"] = self.number(table, found, "poll_us", int, 1_000_000)
        if "drain_timeout" in found:
            read["drain_timeout"] = self.number(table, found, "drain_timeout", float, _HOUR)
        if "stuck_after" in found:
            self.stuck_after = self.number(table, found, "stuck_after", float, _HOUR)
        return read

    def control(self, found: object) -> ControlSpec:
        table = "[control]"
        if not isinstance(found, dict):
            self.problem(table, "", f"expected a table, found {opt.shown(found)}")
            return ControlSpec()
        self.unknown_keys(table, found, _CONTROL_KEYS)
        return ControlSpec(
            path=self.text(table, found, "path", lambda text: text and _unix_path(text)),
            mode=self.text(table, found, "mode", parse_mode),
            owner=self.text(table, found, "owner", str),
            group=self.text(table, found, "group", str),
        )

    def number(self, table: str, found: Mapping[str, Any], key: str, kind: type, most: int) -> Any:
        value = found[key]
        accepted = (int, float) if kind is float else (int,)
        if isinstance(value, bool) or not isinstance(value, accepted) or not 0 <= value <= most:
            noun = "a number" if kind is float else "an integer"
            self.problem(table, key, f"expected {noun} from 0 to {most}, found {opt.shown(value)}")
            return None
        return kind(value)

    def devices(self, found: object) -> list[DeviceSpec]:
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            self.problem("[[device]]", "", "expected tables, each headed [[device]] in double brackets")
            return []
        if not found:
            self.problem("[[device]]", "", "is missing; expected at least one device")
        return [self.device(index, item) for index, item in enumerate(found, 1)]

    def device(self, index: int, found: dict[str, Any]) -> DeviceSpec:
        name = found.get("name")
        table = _table(index, name)
        self.unknown_keys(table, found, _DEVICE_KEYS)
        return DeviceSpec(
            name=self.text(table, found, "name", check_name, required=True),
            type=self.text(table, found, "type", str, required=True),
            socket=self.text(table, found, "socket", check_socket, required=True),
            path=self.text(table, found, "path", parse_path),
            bus=self.text(table, found, "bus", check_bus),
            qmp=self.text(table, found, "qmp", check_qmp),
            options=self.options(table, found.get("type"), found.get("options", {})),
            wrap=self.wrap(table, found),
            limits=self.limits(table, found),
            stuck_after=self.number(table, found, "stuck_after", float, _HOUR) if "stuck_after" in found
            else self.stuck_after,
        )

    def wrap(self, table: str, found: Mapping[str, Any]) -> tuple[wrappers.WrapSpec, ...]:
        if "wrap" not in found:
            return ()
        try:
            return wrappers.parse(found["wrap"], Device if self.is_virtio(found.get("type")) else DoorbellDevice)
        except ValueError as exc:
            self.problem(table, "wrap", str(exc))
            return ()

    def limits(self, table: str, found: Mapping[str, Any]) -> Limits:
        if "limits" not in found:
            return NO_LIMITS
        limits, problems = parse_limits(found["limits"])
        for key, text in problems:
            self.problem(table, f"limits.{key}" if key else "limits", text)
        if limits.given and not self.is_virtio(found.get("type")):
            self.problem(table, "limits", "only virtio devices can be limited")
        return limits

    def is_virtio(self, type_name: object) -> bool:
        try:
            return issubclass(self.find_type(str(type_name)), Device)
        except (ConfigError, PluginError):
            return True  # reported where the options are read

    def options(self, table: str, type_name: object, found: object) -> dict[str, Any]:
        if not isinstance(type_name, str):
            return {}
        try:
            declared = self.find_type(type_name).options
        except (ConfigError, PluginError) as exc:
            self.problem(table, "type", str(exc))
            return {}
        if not isinstance(found, dict):
            self.problem(table, "options", f"expected a table, found {opt.shown(found)}")
            return {}
        values = opt.defaults(declared)
        seen: set[str] = set()
        for key, value in found.items():
            try:
                option = _declared_option(type_name, declared, key)
                if option.key in seen:
                    raise ValueError('is given twice ("-" and "_" are the same here)')
                seen.add(option.key)
                values[option.key] = opt.from_toml(option, value)
            except ValueError as exc:
                self.problem(table, f"options.{key}", str(exc))
        return values

    def duplicates(self, specs: list[DeviceSpec], metrics: Address | None, control: ControlSpec) -> None:
        names: set[str] = set()
        owners: dict[str, str] = {}
        if metrics is not None and metrics.path:
            owners[os.path.abspath(metrics.path)] = "[daemon] metrics"
        if control.path:
            path = os.path.abspath(control.path)
            if path in owners:
                self.problem("[control]", "path", f"is used by {owners[path]} too")
            owners[path] = "[control] path"
        for index, spec in enumerate(specs, 1):
            table = _table(index, spec.name)
            if spec.name and spec.name in names:
                self.problem(table, "name", "is used by an earlier device too")
            names.add(spec.name)
            path = os.path.abspath(spec.socket) if spec.socket else ""
            if path in owners:
                self.problem(table, "socket", f"is used by {owners[path]} too")
            elif path:
                owners[path] = table


def _table(index: int, name: object) -> str:
    """How messages call the ``index``-th device."""
    return f'[[device]] "{name}"' if isinstance(name, str) and name else f"[[device]] number {index}"


def _declared_option(type_name: str, declared: tuple[Option, ...], key: str) -> Option:
    option = opt.find(declared, key)
    if option is None:
        names = [known.name for known in declared]
        expected = f"expected {', '.join(names)}" if names else "it has none"
        raise ValueError(f'is not an option of type "{type_name}"; {expected}{opt.did_you_mean(key, names)}')
    return option
