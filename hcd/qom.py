"""QEMU's objects (QOM) by QMP: their properties, their children, the devices that were plugged in.

QEMU is not trusted to have what a version of it had: what is missing is None or nothing, never an exception.
"""

from __future__ import annotations

import re
from typing import Any

from hcd.qmp_client import QmpClient, QmpRefused

__all__ = ["PERIPHERALS", "children", "devices", "get"]

#: where devices of the command line and of device_add stand: by their id, and those without one
PERIPHERALS = ("/machine/peripheral", "/machine/peripheral-anon")
_CHILD = re.compile(r"child<(.+)>")


async def get(qmp: QmpClient, path: str, property_: str) -> Any:
    """A QOM property; None where the object has no such property."""
    try:
        return await qmp.execute("qom-get", path=path, property=property_)
    except QmpRefused:
        return None


async def children(qmp: QmpClient, path: str) -> list[tuple[str, str]]:
    """(path, type) of what stands under ``path``; nothing where there is no such object."""
    try:
        listed = await qmp.execute("qom-list", path=path)
    except QmpRefused:
        return []
    return [
        (f"{path}/{item.get('name')}", match[1])
        for item in (listed if isinstance(listed, list) else [])
        if isinstance(item, dict) and (match := _CHILD.fullmatch(str(item.get("type"))))
    ]


async def devices(qmp: QmpClient) -> list[tuple[str, str]]:
    """(path, type) of every device that was plugged in by the user."""
    return [child for container in PERIPHERALS for child in await children(qmp, container)]
