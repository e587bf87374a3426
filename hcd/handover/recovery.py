"""What an earlier process left behind, and which of its sessions can be gone on with.

A session is given up, and its front end sees the connection close, when its state cannot be trusted or used: the
process died in the middle of a message, the state was written by another version, the manager did not keep a
descriptor, the front end went away meanwhile, or the device is configured no longer, or as another one.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import trio

from hcd.handover.fdstore import FdStore
from hcd.handover.keeper import Keeper
from hcd.handover.record import VERSION, Record, fingerprint
from hcd.handover.statefile import StateError, StateFile
from hcd.host import DeviceHost, HostBase
from hcd.sockets import close_all
from hcd.systemd import Inherited
from hcd.transports.accept import hung_up

__all__ = ["Handed", "recover"]

_log = logging.getLogger("hcd.handover")


@dataclass(slots=True, eq=False)
class Handed:
    """A session from an earlier process. Its descriptors have one owner: this object, until they are taken."""

    record: Record
    keeper: Keeper
    fds: dict[str, list[int]] = field(default_factory=dict)
    #: set when it is gone on with, or given up
    settled: trio.Event = field(default_factory=trio.Event)

    def connection(self) -> socket.socket:
        return socket.socket(fileno=self.take(self.record.connection))

    def take(self, name: str) -> int:
        """The caller's from now on; -1 for no name, or one that is gone."""
        return self.fds[name].pop() if self.fds.get(name) else -1

    def settle(self) -> None:
        """It is gone on with, or given up. What nobody took is closed."""
        for name in list(self.fds):
            close_all(self.fds.pop(name))
        self.settled.set()

    def close(self) -> None:
        """Nobody goes on with it."""
        self.settle()
        self.keeper.end()


def recover(store: FdStore, inherited: Iterable[Inherited], hosts: Iterable[HostBase]) -> dict[str, Handed]:
    """The sessions that can be gone on with, by their devices; everything else is removed from ``store``.

    ``inherited`` are the descriptors of the store; they become its own.
    """
    given = {one.name: one.fd for one in inherited}
    store.inherit(Inherited(fd, name) for name, fd in given.items())
    by_name = {host.spec.name: host for host in hosts}
    handed: dict[str, Handed] = {}
    for name, fd in given.items():
        if name.endswith("/state"):
            _recover_one(store, name, fd, given, by_name, handed)
    store.sweep()
    return handed


def _recover_one(
    store: FdStore,
    name: str,
    fd: int,
    given: Mapping[str, int],
    hosts: Mapping[str, HostBase],
    handed: dict[str, Handed],
) -> None:
    device = name.split("/")[2] if name.count("/") >= 3 else name
    copy = os.dup(fd)
    try:
        file = StateFile.open(copy, VERSION)
    except (StateError, OSError) as error:
        os.close(copy)
        _give_up(device, hosts.get(device), error)
        return
    try:
        record = Record.decode(file.read())
        device = record.device
        _check(record, file, given, hosts.get(device))
        if device in handed:
            raise StateError("there is a second one of the same device")
    except StateError as error:
        file.close()
        _give_up(device, hosts.get(device), error)
        return
    keeper = Keeper.resume(store, record, file, name)
    handed[device] = Handed(record, keeper, _copies(record, given))


def _check(record: Record, file: StateFile, given: Mapping[str, int], host: HostBase | None) -> None:
    """StateError says why the session cannot be gone on with."""
    if host is None:
        raise StateError("the device is not configured any more")
    if not isinstance(host, DeviceHost) or fingerprint(host.spec) != record.fingerprint:
        raise StateError("the device is configured otherwise now")
    if record.connection not in given or hung_up(given[record.connection]):
        raise StateError("its front end has gone away meanwhile")
    at, length = record.answer
    if length and not 0 <= file.sent_since(at) <= length:
        raise StateError("nothing tells whether its front end was answered")
    if file.busy:
        raise StateError("the earlier process died while it handled a message")
    missing = sorted(record.names - given.keys())
    if missing:
        raise StateError(f"the service manager did not keep {missing[0]} (and {len(missing) - 1} more); see "
                         "FileDescriptorStoreMax= of the unit")


def _copies(record: Record, given: Mapping[str, int]) -> dict[str, list[int]]:
    """A descriptor for each use, because one file may have several."""
    used = [record.connection, record.channel, *record.region_names]
    for ring in record.rings:
        used += [ring.kick, ring.call, ring.err]
    if record.inflight is not None:
        used.append(record.inflight.name)
    copies: dict[str, list[int]] = {}
    for name in used:
        if name in given:
            copies.setdefault(name, []).append(os.dup(given[name]))
    return copies


def _give_up(device: str, host: HostBase | None, why: Exception) -> None:
    _log.warning("%s: the session of an earlier process ends: %s", device, why)
    if host is not None:
        host.stats.handovers_failed += 1
