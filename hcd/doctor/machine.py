"""A running QEMU, asked over QMP: its memory, its chardevs, and the devices on them.

QEMU serves one client of a QMP socket at a time. Whoever finds it taken sees a connection that is accepted by the
kernel and never greeted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import trio

from hcd import qmp, qom
from hcd.device import Device, DeviceBase
from hcd.doctor.command_line import front_of, mismatch
from hcd.doctor.findings import Finding, error, note, warning
from hcd.qemu.devices import Version, front_end
from hcd.qmp_client import QmpClient, QmpError, QmpRefused, connect

__all__ = ["Chardev", "Machine", "Memory", "Silent", "check", "look"]

_TIMEOUT = 5.0
#: since this version plain memory-backend-ram has a descriptor to share
_RAM_HAS_FD: Version = (10, 0)


class Silent(Exception):
    """Somebody accepted the connection and does not greet as QMP does."""


@dataclass(frozen=True, slots=True)
class Memory:
    ident: str
    type: str
    share: bool


@dataclass(frozen=True, slots=True)
class Chardev:
    """A socket chardev: the path it connects to, and the device on it ("" for both: none)."""

    label: str
    path: str
    abstract: bool
    connected: bool | None
    driver: str = ""


@dataclass(slots=True)
class Machine:
    """What QEMU said. ``pid`` 0: not visible."""

    version: Version
    pid: int
    directory: str
    kvm: bool
    memory: list[Memory] = field(default_factory=list)
    chardevs: list[Chardev] = field(default_factory=list)


def look(path: str, timeout: float = _TIMEOUT) -> Machine:
    """Ask the QEMU at the QMP socket ``path``. QmpError: it cannot be asked; Silent: nobody greets."""

    async def asking() -> Machine:
        with trio.move_on_after(timeout):
            async with connect(path) as client:
                return await _look(client)
        raise Silent(f"no answer within {timeout:g} s")

    return trio.run(asking)


async def _look(client: QmpClient) -> Machine:
    said = await client.execute("query-version")
    version = said["qemu"]["major"], said["qemu"]["minor"]
    kvm = await client.execute("query-kvm")
    machine = Machine(version, client.peer_pid(), client.peer_directory(), bool(kvm.get("enabled")))
    for item in await client.execute("query-memdev"):
        ident = str(item.get("id"))
        kind = await qom.get(client, f"/objects/{ident}", "type")
        machine.memory.append(Memory(ident, str(kind or "unknown"), bool(item.get("share"))))
    drivers = {label: driver async for label, driver in _on_chardevs(client)}
    for found, kind in await qom.children(client, "/chardevs"):
        address = await qom.get(client, found, "addr") if kind == "chardev-socket" else None
        if isinstance(address, dict) and address.get("type") == "unix":
            machine.chardevs.append(await _chardev(client, found, address, drivers))
    return machine


async def _on_chardevs(client: QmpClient) -> Any:
    for path, kind in await qom.devices(client):
        if (label := await qmp.chardev_of(client, path)) is not None:
            yield label, kind


async def _chardev(client: QmpClient, found: str, address: dict[str, Any], drivers: Mapping[str, str]) -> Chardev:
    label = found.rpartition("/")[2]
    connected = await qom.get(client, found, "connected")
    return Chardev(
        label=label,
        path=str(address.get("path", "")),
        abstract=bool(address.get("abstract")),
        connected=connected if isinstance(connected, bool) else None,
        driver=drivers.get(label, ""),
    )


# -- judging


def check(machine: Machine, devices: Mapping[str, tuple[str, DeviceBase]]) -> Iterator[Finding]:
    """``devices``: name and device of the configuration by the path of the socket."""
    sockets = {path: name for path, (name, _) in devices.items()}
    ours = 0
    for chardev in machine.chardevs:
        found = next((path for path in devices if _is_at(machine, chardev, path)), None)
        if found is not None:
            ours += 1
            yield from _on_our_socket(machine, chardev, *devices[found])
        elif front_of(chardev.driver) is not None and chardev.driver and sockets:
            ours += 1
            yield mismatch(chardev.label, os.path.join(machine.directory, chardev.path), sockets)
    if sockets and not ours:
        yield error("qemu-no-device", "QEMU has no chardev that is connected to a configured device",
                    f"its unix sockets: {', '.join(c.path for c in machine.chardevs) or 'none'}",
                    "see hcd qemu-args CONFIG")
    yield from _memory(machine)


def _is_at(machine: Machine, chardev: Chardev, path: str) -> bool:
    address = {"type": "unix", "path": chardev.path, "abstract": chardev.abstract}
    return qmp.is_at(address, path, machine.directory)


def _on_our_socket(machine: Machine, chardev: Chardev, name: str, device: DeviceBase) -> Iterator[Finding]:
    if not chardev.driver:
        yield error("qemu-no-device", f"chardev {chardev.label} is connected to {name}, and no device of QEMU uses it",
                    todo=f"see hcd qemu-args CONFIG {name}")
        return
    expected = front_end(device.virtio_id) if isinstance(device, Device) else None
    if expected is not None and front_of(chardev.driver) is not expected:
        yield error("device-mismatch", f"{name} is another kind of device than {chardev.driver} of QEMU",
                    f"virtio id {int(getattr(device, 'virtio_id', 0))} wants {expected.names['pci']}",
                    f"see hcd qemu-args CONFIG {name}")
    if chardev.connected is False:
        yield error("not-connected", f"chardev {chardev.label} is not connected to {name}",
                    "QEMU lost the connection or never had it",
                    "start hcd; without reconnect the guest has to be started again")


def _memory(machine: Machine) -> Iterator[Finding]:
    todo = "-object memory-backend-memfd,id=ram,size=SIZE,share=on -machine memory-backend=ram"
    for memory in machine.memory:
        if not memory.share:
            yield error("memory-not-shared", f"guest memory {memory.ident} is not shared: hcd cannot see it",
                        f"{memory.type} {memory.ident}: share=off", todo)
        elif memory.type == "memory-backend-ram" and machine.version < _RAM_HAS_FD:
            yield error("memory-not-shared", f"guest memory {memory.ident} has no descriptor that could be shared",
                        f"it is of type {memory.type}", todo)


def unreachable(path: str, problem: Exception) -> Finding:
    """Why QEMU could not be asked at ``path``."""
    if isinstance(problem, Silent):
        return warning("qmp-busy", f"QMP at {path} takes the connection and does not answer", str(problem),
                       "another client (libvirt?) is connected; give hcd a QMP socket of its own: "
                       "-qmp unix:PATH,server=on,wait=off")
    if isinstance(problem, QmpRefused):
        return note("qmp-refused", f"QMP at {path}: {problem}")
    refused = "refused" in str(problem)
    return error("qmp-unreachable", f"QMP at {path}: {problem}",
                 "the file was left behind by a QEMU that is gone" if refused else "",
                 "start QEMU, or correct the key qmp of the device")


Problems = (QmpError, QmpRefused, Silent)
