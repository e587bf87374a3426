"""QEMU's arguments for configured devices.

A list of words: the memory that hcd can see, then for each device its chardev (and netdev) and the device. Values are
written as QEMU's option parser reads them: a comma in a value is doubled.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from hcd.qemu.devices import Version
from hcd.qemu.plugs import Plug
from hcd.qemu.version import reconnect

__all__ = ["MEMORY", "device_arguments", "machine_arguments", "monitor_arguments", "option", "qemu_id"]

#: id of the shared memory
MEMORY = "hcd-memory"


def option(head: str, **values: str) -> str:
    """``head,key=value,...`` ("_" in a key stays; commas in values are doubled)."""
    return ",".join([head, *(f"{key}={value.replace(',', ',,')}" for key, value in values.items())])


def machine_arguments(plugs: Sequence[Plug], memory: int, machine: str | None) -> list[str]:
    """Guest memory that is shared (``memory`` bytes, whole MiB), and the machine where devices need a certain one."""
    backend = option("memory-backend-memfd", id=MEMORY, size=f"{memory >> 20}M", share="on")
    return ["-m", f"{memory >> 20}M", "-object", backend, "-machine", _machine(plugs, machine)]


def _machine(plugs: Sequence[Plug], machine: str | None) -> str:
    buses = {plug.bus for plug in plugs}
    if machine is None and "mmio" in buses:
        machine = "microvm" + (",pcie=on" if "pci" in buses else "")
    backend = f"memory-backend={MEMORY}"
    return f"{machine},{backend}" if machine else backend


def monitor_arguments(plugs: Sequence[Plug]) -> list[str]:
    """QMP sockets on which hcd asks for the path of doorbells, where the configuration names them."""
    words: list[str] = []
    for path in dict.fromkeys(plug.spec.qmp for plug in plugs if plug.spec.qmp is not None):
        words += ["-qmp", option(f"unix:{os.path.abspath(path)}".replace(",", ",,"), server="on", wait="off")]
    return words


def device_arguments(plug: Plug, version: Version) -> list[str]:
    """The connection to hcd, and the device on it."""
    ident = qemu_id(plug.spec.name)
    socket = option("socket", id=f"{ident}-socket", path=os.path.abspath(plug.spec.socket))
    if plug.reconnects:
        socket += f",{reconnect(version)}"
    words = ["-chardev", socket]
    if plug.front.netdev:
        pairs = plug.device.num_queues // 2
        peer = option("vhost-user", id=f"{ident}-peer", chardev=f"{ident}-socket", queues=str(pairs))
        words += ["-netdev", peer]
        end = {"netdev": f"{ident}-peer"}
    else:
        end = {"chardev": f"{ident}-socket"}
    return [*words, "-device", option(plug.driver, id=ident, **end, **plug.properties)]


def qemu_id(name: str) -> str:
    """``name`` as an id of QEMU: a letter first, and none of the characters that ids must not have."""
    text = "".join(c if c.isalnum() or c in "-._" else "_" for c in name)
    return text if text[0].isalpha() else f"hcd-{text}"
