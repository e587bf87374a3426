"""Doorbells by option: what the two test devices have in common.

Doorbells are named for their path and their place in the list: ``pio0``, ``mmio0``, ``any0``, ``hyperv0`` ...
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hcd.device import ConfigError, DoorbellDecl, DoorbellDevice, Option, Path

__all__ = ["BellDevice"]

#: bytes of shared memory that one doorbell has: its stamp, and room for what a device answers there
SLOT = 16
PAGE = 4096

#: option: path, kind, width where the option gives none, prefix of names
_LISTS: Mapping[str, tuple[Path, str, int, str]] = {
    "ports": (Path.PIO, "", 4, "pio"),
    "gpas": (Path.MMIO, "", 4, "mmio"),
    "any-gpas": (Path.MMIO, "", 0, "any"),
    "connections": (Path.HYPERCALL, "hyperv", 0, "hyperv"),
    "xen-ports": (Path.HYPERCALL, "xen", 0, "xen"),
}
#: not 010, which may be 8 or 10
_NUMBER = r"0x[0-9a-fA-F]{1,16}|0|[1-9][0-9]{0,19}"
_ENTRY = re.compile(rf"({_NUMBER})(?:/([0-9]))?(?:=({_NUMBER}))?")


class BellDevice(DoorbellDevice):
    """A device whose doorbells are given as options."""

    options = (
        Option("ports", "str", 'I/O ports, as "0x510/2=7,0x514": address/width=datamatch; width 4 unless given'),
        Option("gpas", "str", "guest-physical addresses, written alike; width 4 unless given"),
        Option("any-gpas", "str", "guest-physical addresses of doorbells of any width"),
        Option("connections", "str", "Hyper-V connection ids, separated by commas"),
        Option("xen-ports", "str", "Xen event channel ports, separated by commas"),
        Option("stamps", "bool", "share memory where the guest stamps its rings", False),
        Option("memory-at", "int", "guest-physical address to ask for, for that memory", 0, minimum=0),
    )

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        self._stamps = bool(self.option.get("stamps"))
        found = [one for key, how in _LISTS.items() for one in _parse(key, self._given(key), *how)]
        if not found:
            raise ConfigError(f"no doorbells: give at least one of {', '.join(_LISTS)}")
        self._doorbells = tuple(self._placed(index, one) for index, one in enumerate(found))

    def _given(self, option: str) -> str:
        return self.option.get(option.replace("-", "_")) or ""

    def _placed(self, index: int, one: DoorbellDecl) -> DoorbellDecl:
        stamp = SLOT * index if self._stamps else None
        return DoorbellDecl(one.name, one.path, one.address, one.width, one.datamatch, one.kind, stamp)

    @property
    def doorbells(self) -> Sequence[DoorbellDecl]:
        return self._doorbells

    @property
    def memory_size(self) -> int:
        return -(-SLOT * len(self._doorbells) // PAGE) * PAGE if self._stamps else 0

    @property
    def memory_wanted(self) -> int:
        return int(self.option.get("memory_at", 0))


def _parse(key: str, text: str, path: Path, kind: str, width: int, prefix: str) -> list[DoorbellDecl]:
    found = []
    for index, part in enumerate(filter(None, re.split(r"[,\s]+", text))):
        match = _ENTRY.fullmatch(part)
        if match is None:
            raise ConfigError(f'{key}: "{part}" is not ADDRESS[/WIDTH][=DATAMATCH]')
        address, given, datamatch = match[1], match[2], match[3]
        found.append(
            DoorbellDecl(
                f"{prefix}{index}",
                path,
                int(address, 0),
                int(given) if given else width,
                int(datamatch, 0) if datamatch else None,
                kind,
            )
        )
    return found
