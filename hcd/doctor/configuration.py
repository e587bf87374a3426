"""The configuration: what ``hcd check`` says of it, and the files that its devices name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hcd import config, plugins
from hcd.config import DaemonConfig, DeviceSpec
from hcd.device import DeviceBase
from hcd.doctor.access import READ, WRITE, Account, denial, describe
from hcd.doctor.findings import Finding, error, warning
from hcd.errors import ConfigError, PluginError

__all__ = ["Loaded", "check_files", "read"]


@dataclass(slots=True)
class Loaded:
    """A configuration as far as it could be read. ``devices`` are those whose options are right."""

    file: str
    config: DaemonConfig | None = None
    devices: dict[str, DeviceBase] = field(default_factory=dict)

    @property
    def specs(self) -> tuple[DeviceSpec, ...]:
        return self.config.devices if self.config is not None else ()


def read(file: str) -> tuple[Loaded, list[Finding]]:
    """Read ``file``; every problem is a finding."""
    loaded = Loaded(file)
    try:
        loaded.config = config.load(file)
    except ConfigError as exc:
        return loaded, [_problem(line) for line in str(exc).splitlines()]
    findings = []
    for spec in loaded.specs:
        try:
            loaded.devices[spec.name] = plugins.create(spec.type, spec.name, spec.options)
        except (ConfigError, PluginError) as exc:
            findings.append(_problem(f'{file}: [[device]] "{spec.name}" options: {exc}'))
    return loaded, findings


def _problem(line: str) -> Finding:
    return error("config", line, todo="correct it; hcd check FILE says whether it is right now")


def check_files(loaded: Loaded, daemon: Account | None) -> Iterator[Finding]:
    """Files that options name: images and the like. ``daemon`` is the account that opens them, where it is known."""
    for spec in loaded.specs:
        for option in plugins.load(spec.type).options:
            name = spec.options.get(option.key)
            if option.kind == "path" and isinstance(name, str):
                read_only = bool(spec.options.get("read_only"))
                yield from _check_file(f'"{spec.name}" {option.name}', Path(name), read_only, daemon)


def _check_file(what: str, path: Path, read_only: bool, daemon: Account | None) -> Iterator[Finding]:
    if not os.path.lexists(path):
        yield error("file-missing", f"{what}: {path} does not exist",
                    todo="make it, or correct the path in the configuration")
        return
    who = daemon or Account("you", os.getuid(), frozenset({os.getgid(), *os.getgroups()}))
    if why := denial(path, who, READ if read_only else READ | WRITE):
        find = warning if daemon is None else error
        yield find("file-denied", f"{what}: {path} cannot be opened by {who.name}", f"{why}; {describe(path)}",
                   "chown it to the account of the service, or use drop-ins/images.conf")
