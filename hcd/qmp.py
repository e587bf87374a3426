"""Asking QEMU over which path a device's doorbells ring.

vhost-user names neither the bus nor the address of a device, so hcd asks on a QMP socket: which chardev is
connected to hcd's listening socket, which device uses that chardev, on which bus does it sit.

- ``query-chardev`` does not help: the "filename" of a connected client chardev is "unix:" without a path.
  The QOM objects under /chardevs have it, as property "addr" (a SocketAddress).
- vhost-user-* devices name their chardev in property "chardev". virtio-net-* names a netdev, and only the
  human monitor tells which chardev that uses: "n0: index=0,type=vhost-user,vhost-user0 to LABEL", a line
  per queue pair.
- Where the doorbells are is a question of its own (:mod:`hcd.qmp_places`).
- The type of the parent bus says which transport it is; the negotiated VERSION_1 (virtio 1.3 6) whether the
  driver is a legacy one; "modern-pio-notify" whether a modern one rings by port.

QEMU serves one QMP client at a time, from its main loop, which may just be waiting for hcd: so ask beside
serving, with a limit of time, and hang up at once. Whatever happens here, the device goes on without an
answer.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass

import trio
from hcd_protocols.virtio.features import RingFeature

from hcd import qmp_places
from hcd.doorbell import Path
from hcd.log import RateLimited
from hcd.qmp_client import QmpClient, QmpError, QmpRefused, connect
from hcd.qom import children, devices, get

__all__ = [
    "DeviceFacts",
    "PathAnswer",
    "ask",
    "chardev_of",
    "find_path",
    "is_at",
    "netdev_chardevs",
    "path_of",
]

TIMEOUT = 10.0

_NETDEV = re.compile(r"^[\s\\]*(?P<id>\S+): .*\bvhost-user\d+ to (?P<label>.+?)\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What QEMU says of the device that is connected to one of hcd's sockets."""

    qom_path: str
    type: str
    bus_type: str
    arch: str
    modern_pio_notify: bool | None  # None: not a virtio-pci device
    where: qmp_places.Whereabouts = qmp_places.NOWHERE


@dataclass(frozen=True, slots=True)
class PathAnswer:
    """QEMU's answer. ``kind`` is for hcd_doorbell_info, ``device`` names QEMU's device in log lines.

    ``place``: where the doorbells are; None: not known.
    """

    path: Path
    kind: str
    device: str
    place: qmp_places.Place | None = None

    def conflict(self, declared: Path | None) -> str:
        """What to tell the operator whose declared path is another one; "" when there is nothing to tell."""
        if declared is None or declared is self.path:
            return ""
        found = f"{self.device}, which rings over {self.path} ({self.kind})"
        return f'path "{declared}" is declared, but QEMU has {found}'


async def find_path(
    qmp_socket: str,
    listening_path: str,
    *,
    features: int,
    timeout: float = TIMEOUT,
    log: RateLimited | None = None,
) -> PathAnswer | None:
    """The path of the device that QEMU connected to ``listening_path``.

    ``features`` are those that the driver acknowledged. None, with a warning in ``log``, when QEMU cannot
    be asked or does not know. Raises nothing; ends within ``timeout`` seconds.
    """
    log = log or RateLimited(logging.getLogger("hcd.qmp"))
    reason = f"no answer within {timeout:g} s; it serves one client at a time, so hcd needs one of its own"
    try:
        with trio.move_on_after(timeout):
            facts = await ask(qmp_socket, listening_path)
            answer = path_of(facts, features)
            if answer is not None:
                return answer
            reason = f"{facts.type} on a bus of type {facts.bus_type} is of a kind that hcd does not know"
    except (QmpError, QmpRefused) as exc:
        reason = str(exc)
    log.warning("the path", "the path stays unknown: QMP at %s: %s", qmp_socket, reason)
    return None


def path_of(facts: DeviceFacts, features: int) -> PathAnswer | None:
    """The path that follows from QEMU's facts and the negotiated features; None: a transport unknown here."""
    device = f"{facts.type} ({facts.qom_path})"

    def answer(path: Path, kind: str) -> PathAnswer:
        return PathAnswer(path, kind, device, facts.where.of(kind))

    if facts.bus_type == "virtual-css-bus":
        return answer(Path.HYPERCALL, "ccw")
    if facts.bus_type == "virtio-mmio-bus":
        return answer(Path.MMIO, "virtio-mmio")
    if facts.modern_pio_notify is None:
        return None
    if features & RingFeature.VERSION_1 and not facts.modern_pio_notify:
        return answer(Path.MMIO, "modern")
    kind = "modern-pio" if features & RingFeature.VERSION_1 else "legacy"
    if facts.arch in ("x86_64", "i386"):
        return answer(Path.PIO, kind)
    # Elsewhere there are no ports: PCI's are a window of memory, and QEMU does not tell where it is.
    return PathAnswer(Path.MMIO, kind, device)


async def ask(qmp_socket: str, listening_path: str) -> DeviceFacts:
    """Find the device at ``listening_path``. QmpError or QmpRefused say why not; no time limit."""
    async with connect(qmp_socket) as qmp:
        labels = await _chardevs_at(qmp, listening_path)
        if not labels:
            raise QmpError(f"QEMU has no chardev that is connected to {listening_path}")
        found = [
            await _facts(qmp, path, type_)
            for path, type_ in await devices(qmp)
            if await chardev_of(qmp, path) in labels
        ]
    if not found:
        raise QmpError(f"no device of QEMU uses chardev {', '.join(sorted(labels))}")
    if len({(f.bus_type, f.modern_pio_notify) for f in found}) > 1:
        both = " and ".join(f.qom_path for f in found)
        raise QmpError(f"{both} are all connected to {listening_path}, and ring over different paths")
    return found[0]


# -- the questions


async def _chardevs_at(qmp: QmpClient, listening_path: str) -> set[str]:
    """Labels of the chardevs whose far end is ``listening_path``."""
    directory = qmp.peer_directory()
    labels = set()
    for path, type_ in await children(qmp, "/chardevs"):
        if type_ == "chardev-socket" and is_at(await get(qmp, path, "addr"), listening_path, directory):
            labels.add(path.rpartition("/")[2])
    return labels


def is_at(address: object, listening_path: str, directory: str) -> bool:
    """Whether a SocketAddress of QEMU, whose relative paths start in ``directory``, means our socket."""
    if not isinstance(address, dict) or address.get("type") != "unix":
        return False
    path = address.get("path")
    if not isinstance(path, str) or not path:
        return False
    if address.get("abstract"):
        return f"@{path}" == listening_path
    try:
        return _same_file(path, os.path.realpath(listening_path), directory)
    except ValueError:  # NUL or a lone surrogate: no path that a socket could have
        return False


def _same_file(path: str, ours: str, directory: str) -> bool:
    theirs = os.path.join(directory, path)
    if os.path.isabs(path) or (directory and os.path.lexists(theirs)):
        return os.path.realpath(theirs) == ours
    # "-daemonize" goes to / after the sockets were opened: where a relative path started is gone
    return ours.endswith("/" + os.path.normpath(path))


async def chardev_of(qmp: QmpClient, path: str) -> str | None:
    """The label of the chardev that a device uses, directly or through its netdev."""
    label = await get(qmp, path, "chardev")
    if label is None and (netdev := await get(qmp, path, "netdev")):
        text = await qmp.execute("human-monitor-command", **{"command-line": "info network"})
        label = netdev_chardevs(str(text)).get(str(netdev))
    return str(label) if label else None


def netdev_chardevs(info_network: str) -> dict[str, str]:
    """Chardev label by netdev id, from ``info network``, where n queue pairs make n lines."""
    return {match["id"]: match["label"] for match in _NETDEV.finditer(info_network)}


async def _facts(qmp: QmpClient, path: str, type_: str) -> DeviceFacts:
    bus = await get(qmp, path, "parent_bus")
    bus_type = await get(qmp, bus, "type") if isinstance(bus, str) else None
    notify = await get(qmp, path, "modern-pio-notify")
    target = await qmp.execute("query-target")
    arch = target.get("arch") if isinstance(target, dict) else None
    where = qmp_places.NOWHERE
    if isinstance(bus, str):
        where = await qmp_places.find(qmp, path, bus, str(bus_type))
    return DeviceFacts(
        qom_path=path,
        type=type_,
        bus_type=str(bus_type or "unknown"),
        arch=str(arch or "unknown"),
        modern_pio_notify=notify if isinstance(notify, bool) else None,
        where=where,
    )
