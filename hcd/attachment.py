"""What hcd and one VMM share of a doorbell device: eventfds, registered doorbells, interrupts, memory.

An attachment lives as long as the VMM's connection and belongs to the device's lane; :meth:`Attachment.adopt`,
:meth:`Attachment.make_fds` and :meth:`Attachment.close` belong to the session. It owns every descriptor that it made or
adopted until it closes it.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import mmap
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import trio
from hcd_protocols.doorbell import (
    Capability,
    Held,
    Item,
    Kind,
    MemoryItem,
    Outcome,
    Reference,
)

from hcd.backend import eventfd_count
from hcd.dataplane.bell import HAS_TSC, Bell
from hcd.doorbell_host import DoorbellHost, HostedDoorbell
from hcd.errors import ProtocolError
from hcd.lanes import BellHandle

__all__ = ["Attachment"]

#: two names stand for this number; people know the other one
_NAMES = {**errno.errorcode, errno.EOPNOTSUPP: "EOPNOTSUPP"}
_REASONS = {
    errno.EEXIST: "the machine has a doorbell there already",
    errno.ENOSPC: "the kernel has no room for more of them",
    errno.EMFILE: "the VMM has no file descriptors left",
    errno.EOPNOTSUPP: "the VMM cannot register this kind",
    errno.ENOSYS: "the VMM's kernel does not have this kind",
    errno.ENOTTY: "the VMM's kernel does not have this kind",
    errno.EINVAL: "the VMM's kernel does not take it",
    errno.EBUSY: "the eventfd is in use already",
    errno.EIO: "the VMM's process does not own the machine",
}


@dataclass(slots=True, eq=False)
class _Served:
    """A doorbell that the VMM has registered."""

    hosted: HostedDoorbell
    bell: Bell
    handle: BellHandle | None = None  # from the moment that rings are looked at


class Attachment:
    """What one VMM has of the device of ``host``. ``capabilities``: what the VMM said that it can register."""

    def __init__(self, host: DoorbellHost, capabilities: Capability) -> None:
        self.connected = False
        self._host = host
        self._capabilities = capabilities
        self._fds: dict[Reference, int] = {}
        self._expected: dict[Reference, HostedDoorbell] = {}
        self._answered: dict[Reference, HostedDoorbell] = {}  # whether the VMM could register them or not
        self._served: dict[Reference, _Served] = {}
        self._clock = (0, 0)
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None  # the device's, which may have put something else in its place

    # -- descriptors: the session's

    def adopt(self, held: Sequence[Held], items: Iterable[Item]) -> tuple[set[Reference], list[Reference]]:
        """Take over what the VMM holds of ``items``, and close the rest; returns what was taken and what was not.

        ProtocolError when a descriptor is not what it should be.
        """
        wanted = {item.reference: item for item in items}
        adopted, stale = set(), []
        left = [one.fd for one in reversed(held)]
        try:
            for one in held:
                reference = one.item.reference
                if wanted.get(reference) == one.item and _fits(one):
                    self._fds[reference] = left.pop()
                    adopted.add(reference)
                else:
                    os.close(left.pop())
                    stale.append(reference)
        finally:
            for fd in left:
                os.close(fd)
        return adopted, stale

    def make_fds(self, items: Iterable[Item], adopted: Collection[Reference] = ()) -> list[int | None]:
        """New descriptors for ``items``; None for those that were adopted. OSError when there are no more."""
        fds: list[int | None] = []
        for item in items:
            if item.reference in adopted:
                fds.append(None)
                continue
            made = self._fds[item.reference] = _make_memory(item) if isinstance(item, MemoryItem) else _make_eventfd()
            fds.append(made)
        return fds

    def close(self) -> None:
        """Close every descriptor; after :meth:`disconnect`."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    # -- the table: the lane's from here on

    def expect(self, doorbells: Iterable[HostedDoorbell]) -> None:
        """The VMM is going to answer for these."""
        self._expected.update((one.item.reference, one) for one in doorbells)

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        """The VMM registered items, or could not."""
        for outcome in outcomes:
            match outcome.reference.kind:
                case Kind.MEMORY:
                    self._settle_memory(outcome)
                case Kind.INTERRUPT:
                    self._settle_interrupt(outcome)
                case Kind.DOORBELL:
                    hosted = self._answered[outcome.reference] = self._expected.pop(outcome.reference)
                    self._settle_doorbell(outcome, hosted)

    def forget(self, references: Iterable[Reference]) -> None:
        """The VMM removed these."""
        for reference in references:
            if (hosted := self._answered.pop(reference, None)) is not None:
                hosted.doorbell.set_registered(None)
            if (served := self._served.pop(reference, None)) is not None:
                self._stop(served)
                os.close(self._fds.pop(reference))

    def _settle_doorbell(self, outcome: Outcome, hosted: HostedDoorbell) -> None:
        host, item, doorbell = self._host, hosted.item, hosted.doorbell
        doorbell.set_registered(outcome.error == 0)
        if outcome.error:
            host.rare_log.warning(f"doorbell {item.name}", "doorbell %s (%s %s) is not registered: %s%s", item.name,
                                  doorbell.path, item, _explain(outcome.error), self._lacking(doorbell.kind))
            os.close(self._fds.pop(outcome.reference))
            return
        host.log.debug("doorbell %s (%s %s) is registered", item.name, doorbell.path, item)
        bell = Bell(item.name, self._fds[outcome.reference], doorbell.stats)
        bell.on_error, bell.tag = host.handler_failed, host.spec.name
        if host.doorbells.get(item.name) is hosted:
            host.wrapping.attach(bell, item.datamatch)
        else:
            host.wrapping.ignore(bell)
        if item.stamp is not None and self._map is not None:
            bell.set_stamp(self._map, item.stamp)
            bell.set_clock(*self._clock)
        served = self._served[outcome.reference] = _Served(hosted, bell)
        if self.connected:
            served.handle = host.lane.watch_bell(bell)

    def _lacking(self, kind: str) -> str:
        needed = {"hyperv": Capability.HYPERV, "xen": Capability.XEN}.get(kind)
        if needed is None or needed in self._capabilities:
            return ""
        return f"; the VMM said from the beginning that its kernel has no {kind} doorbells"

    def _settle_interrupt(self, outcome: Outcome) -> None:
        for hosted in self._host.interrupts.values():
            if hosted.item.reference != outcome.reference:
                continue
            if outcome.error:
                self._host.rare_log.warning(f"interrupt {hosted.item.name}", "interrupt %s is not registered: %s",
                                            hosted.item.name, _explain(outcome.error))
            else:
                hosted.line.set_fd(self._fds[outcome.reference])

    def _settle_memory(self, outcome: Outcome) -> None:
        memory, device = self._host.memory, self._host.device
        if outcome.error:
            self._host.rare_log.warning(
                "shared memory", "the guest does not see the shared memory: %s", _explain(outcome.error)
            )
            return
        assert memory is not None
        self._map = mmap.mmap(self._fds[outcome.reference], memory.size)
        device.memory = self._view = memoryview(self._map)
        device.memory_address = outcome.value

    # -- rings

    def connect(self) -> None:
        """The whole table is answered: rings are looked at from now on, also those that wait already."""
        host = self._host
        self.connected = host.connected = True
        host.wrapping.begin()
        host.call_device(host.device.connect)
        for served in self._served.values():
            served.handle = host.lane.watch_bell(served.bell)

    def set_clock(self, tsc_khz: int, tsc_offset: int) -> None:
        """guest TSC = TSC + ``tsc_offset``; ``tsc_khz`` 0: not known."""
        if tsc_khz and not (HAS_TSC and _tsc_is_constant()):
            self._host.rare_log.log(logging.INFO, "rings without time",
                                    "rings are not timed: this machine has no constant time-stamp counter")
            tsc_khz = 0
        self._clock = (tsc_khz, tsc_offset)
        for served in self._served.values():
            served.bell.set_clock(*self._clock)

    @property
    def untimed(self) -> bool:
        """Whether doorbells have stamps that cannot be read for want of a clock."""
        return not self._clock[0] and any(one.hosted.item.stamp is not None for one in self._served.values())

    def summary(self) -> str:
        """What the VMM has registered, for the log."""
        host = self._host
        lines = sum(hosted.line.fd >= 0 for hosted in host.interrupts.values())
        return (
            f"{len(self._served)} of {len(host.doorbells)} doorbells and "
            f"{lines} of {len(host.interrupts)} interrupts registered"
        )

    # -- the end

    async def finish(self) -> None:
        """The VMM is gone: hand over what it rang before, and wait for the handlers, not for ever. In trio."""
        if not self.connected:
            return
        await self._host.lane.run(self._host.wrapping.end)
        async with trio.open_nursery() as nursery:
            for served in self._served.values():
                if served.handle is not None:
                    nursery.start_soon(self._finish, served.bell, served.handle)

    async def _finish(self, bell: Bell, handle: BellHandle) -> None:
        with trio.move_on_after(self._host.drain_timeout) as patience:
            await handle.finish()
        if patience.cancelled_caught:
            self._host.handler_unfinished(bell)

    def disconnect(self) -> None:
        """Look at no more rings, interrupt nobody, give the memory back."""
        host = self._host
        host.wrapping.end()
        for served in self._served.values():
            self._stop(served)
        self._served.clear()
        for hosted in self._answered.values():
            hosted.doorbell.set_registered(None)
        self._answered.clear()
        for interrupt in host.interrupts.values():
            interrupt.line.set_fd(-1)
        if self.connected:
            self.connected = host.connected = False
            host.call_device(host.device.disconnect)
        self._release_memory()

    def _release_memory(self) -> None:
        device = self._host.device
        device.memory, device.memory_address = None, 0
        if self._view is None or self._map is None:
            return
        try:
            self._view.release()
            self._map.close()
        except BufferError:
            self._host.keeps_memory()

    def _stop(self, served: _Served) -> None:
        if served.handle is not None:
            served.handle.cancel()
        self._host.wrapping.detach(served.bell)
        served.bell.release()


def _fits(held: Held) -> bool:
    """Whether a descriptor that a VMM held is what it says; makes it fit for use."""
    if isinstance(held.item, MemoryItem):
        try:
            seals = fcntl.fcntl(held.fd, fcntl.F_GET_SEALS)
        except OSError:
            return False
        return bool(seals & fcntl.F_SEAL_SHRINK) and os.fstat(held.fd).st_size >= held.item.size
    if eventfd_count(held.fd) is None:
        raise ProtocolError(f"the descriptor of {held.item.reference} is no eventfd")
    os.set_blocking(held.fd, False)
    return True


def _make_eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def _make_memory(item: MemoryItem) -> int:
    fd = os.memfd_create("hcd-doorbell", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, item.size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


@functools.cache
def _tsc_is_constant() -> bool:
    """Whether the kernel found that the TSC ticks at one rate, whatever the cores do."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as info:
        return any(line.startswith("flags") and " constant_tsc " in f"{line.rstrip()} " for line in info)


def _explain(error: int) -> str:
    name = _NAMES.get(error, f"errno {error}")
    return f"{name} ({_REASONS.get(error) or os.strerror(error)})"
