"""The devices that the experiment measures: one that only counts, and one that answers each ring by its interrupt.

Both have a doorbell of every kind, so that a kernel without one says so in a row of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = ["configuration"]

_DEVICES: Mapping[str, tuple[str, Mapping[str, str | int]]] = {
    "count": (
        "nullio",
        {
            "ports": "0x510/4",
            "gpas": "0xd0000000/4=7",
            "any-gpas": "0xd0001000",
            "connections": "0x20",
            "xen-ports": "7",
        },
    ),
    "answer": (
        "echo",
        {
            "ports": "0x520/4",
            "gpas": "0xd0002000/4=7",
            "any-gpas": "0xd0003000",
            "connections": "0x21",
            "xen-ports": "8",
            "stamps": True,
            "memory-at": 0xA0000000,
        },
    ),
}


def configuration(directory: Path) -> tuple[str, list[Path]]:
    """The ``[[device]]`` tables, and their sockets in ``directory``."""
    text, sockets = "", []
    for name, (kind, options) in _DEVICES.items():
        sockets.append(directory / f"{name}.sock")
        text += f'[[device]]\nname = "{name}"\ntype = "{kind}"\nsocket = "{sockets[-1]}"\n[device.options]\n'
        text += "".join(f"{key} = {_toml(value)}\n" for key, value in options.items())
    return text, sockets


def _toml(value: str | int) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)
