"""What the service manager keeps for the next process: one entry for each open file.

systemd drops a descriptor whose open file it keeps already, under whatever name (it asks kcmp(2)). QEMU sends the one
memfd of a guest for several regions and for every device of that guest, and the same call eventfd again and again. So
entries go by file, not by use: the second use of a file is one more user of its entry, and the entry is removed from
the store when the last user has gone.

systemd also drops what hangs up or fails when polled, unless FDPOLL=0 is sent along. That is wanted for connections. An
eventfd "fails" once its counter is full, which a guest can bring about, so the others are stored with FDPOLL=0.

Nothing tells a service that the store was full. Its size is in $FDSTORE from systemd 254 on; the units of hcd set it
for older ones too. A descriptor that was dropped all the same is missed when a session is taken up again.

For trio's thread only.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

import trio

from hcd.systemd import Environment, Inherited, Notifier

__all__ = ["PREFIX", "Entry", "FdStore", "StoreError", "identity", "take_limit"]

#: begins the name of every descriptor that hcd stores; no device's name, and so no socket's, has a "/"
PREFIX = "hcd/"
#: how long (seconds) the manager may take to confirm what it was sent
CONFIRM_TIMEOUT = 5.0

_log = logging.getLogger("hcd.handover")

Identity = tuple[object, ...]


class StoreError(Exception):
    """The manager does not keep what it was asked to keep."""


@dataclass(slots=True, eq=False)
class Entry:
    """One open file in the store; ``fd`` is our descriptor of it where an earlier process stored it, else -1."""

    name: str
    key: Identity
    fd: int = -1
    users: int = 0


class FdStore:
    """The manager's store as this process knows it. ``limit``: how many descriptors it holds, None: unknown."""

    def __init__(self, notifier: Notifier, limit: int | None = None) -> None:
        self._notifier = notifier
        self.limit = limit
        self._by_key: dict[Identity, Entry] = {}
        self._by_name: dict[str, Entry] = {}
        self._serial = 0
        self._unconfirmed = False
        #: whether the manager is known to answer; without that nothing is stored
        self.usable = bool(notifier) and bool(limit)

    def __len__(self) -> int:
        """How many descriptors the manager was asked to keep."""
        return len(self._by_name)

    # -- beginning

    def inherit(self, inherited: Iterable[Inherited]) -> None:
        """Take over what an earlier process stored. What nobody has used by :meth:`sweep` is removed."""
        for one in inherited:
            entry = Entry(one.name, identity(one.fd), one.fd)
            self.usable = True
            if one.name in self._by_name or entry.key in self._by_key:
                os.close(one.fd)  # no process of hcd stores a name or a file twice
                continue
            self._by_name[one.name] = self._by_key[entry.key] = entry
            self._serial = max(self._serial, _serial_of(one.name))

    async def probe(self) -> None:
        """Find out whether there is a manager that keeps descriptors, unless that is known."""
        if not self._notifier or self.usable or self.limit == 0:
            return
        try:
            await self._confirm()
        except StoreError as error:
            _log.info("%s; sessions will not outlive this process", error)
        else:
            self.usable = True

    def sweep(self) -> None:
        """Everything that is still wanted has been used: forget the rest, and close our descriptors of all."""
        for entry in list(self._by_name.values()):
            if entry.fd >= 0:
                os.close(entry.fd)
                entry.fd = -1
            if not entry.users:
                self._forget(entry)

    # -- entries

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def put(self, fd: int, device: str, role: str, *, poll: bool = False) -> Entry:
        """Keep the open file of ``fd``; the caller is a user of it until :meth:`drop`.

        ``device`` and ``role`` are for people who look at the store. ``poll``: it may go when the peer hangs up.
        StoreError when the store is full, or the manager cannot be reached.
        """
        try:
            key = identity(fd)
        except OSError as error:  # no descriptor left to look it up with
            raise StoreError(f"it cannot be told apart from others: {error.strerror}") from None
        entry = self._by_key.get(key)
        if entry is None:
            if self.limit is not None and len(self._by_name) >= self.limit:
                raise StoreError(f"the service manager keeps {self.limit} descriptors and no more; see "
                                 "FileDescriptorStoreMax= of the unit")
            self._serial += 1
            name = f"{PREFIX}{self._serial}/{device.replace(':', '_')}/{role}"
            if not self._notifier.store(name, fd, poll=poll):
                raise StoreError("the service manager cannot be reached")
            self._unconfirmed = True
            entry = self._by_name[name] = self._by_key[key] = Entry(name, key)
        entry.users += 1
        return entry

    def use(self, name: str) -> Entry | None:
        """The entry that an earlier process stored as ``name``, with one more user; None if it is not there."""
        entry = self._by_name.get(name)
        if entry is not None:
            entry.users += 1
        return entry

    def drop(self, entry: Entry) -> None:
        """One user of ``entry`` less."""
        entry.users -= 1
        if not entry.users:
            self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        self._by_name.pop(entry.name, None)
        self._by_key.pop(entry.key, None)
        if entry.fd >= 0:
            os.close(entry.fd)
            entry.fd = -1
        self._notifier.unstore(entry.name)

    async def settle(self) -> None:
        """Return once the manager has what was put. StoreError if it does not say so."""
        if self._unconfirmed:
            await self._confirm()
            self._unconfirmed = False

    async def _confirm(self) -> None:
        """The manager closes the descriptor of a barrier when it has come that far (sd_notify(3), BARRIER=1)."""
        try:
            reached = self._notifier.barrier()
        except OSError as error:
            raise StoreError(f"the service manager cannot be asked: {error.strerror}") from None
        try:
            with trio.move_on_after(CONFIRM_TIMEOUT):
                await trio.lowlevel.wait_readable(reached)
                return
        finally:
            os.close(reached)
        raise StoreError(f"the service manager confirmed nothing within {CONFIRM_TIMEOUT:g} s")


def identity(fd: int) -> Identity:
    """Equal for all descriptors of one open file; others that are equal do as well: the same file, opened alike."""
    status = os.fstat(fd)
    if stat.S_IFMT(status.st_mode):
        return (status.st_dev, status.st_ino, fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE)
    number = _eventfd_id(fd)  # anonymous inodes are shared by all eventfds
    return (object(),) if number is None else ("eventfd", number)


def _eventfd_id(fd: int) -> int | None:
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
        for line in info:
            if line.startswith("eventfd-id:"):
                return int(line.split()[1])
    return None


def _serial_of(name: str) -> int:
    serial = name.removeprefix(PREFIX).partition("/")[0]
    return int(serial) if serial.isascii() and serial.isdigit() else 0


def take_limit(environment: Environment = os.environ) -> int | None:
    """How many descriptors the manager keeps for this service, where it says so."""
    text = environment.pop("FDSTORE", "")
    return int(text) if text.isascii() and text.isdigit() else None
