"""A configured doorbell device of this process: what it declared, as items of the protocol, and what is counted.

Ids are given in the order of the declarations, so after a restart with the same configuration they are the same, and
a VMM that held on to its eventfds finds its doorbells again. An id is never given twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hcd_protocols.doorbell import DoorbellItem, InterruptItem, MemoryItem, Place

from hcd.config import DeviceSpec
from hcd.dataplane.bell import Bell, Interrupt
from hcd.dataplane.stats import HotText, InterruptStats
from hcd.device import DoorbellDecl, DoorbellDevice
from hcd.doorbell import Doorbell, Path, PathSource, Registry
from hcd.errors import ConfigError, PluginError, shown
from hcd.host import HostBase
from hcd.lanes import Lanes
from hcd.wrappers.ring_stack import RingStack

__all__ = ["DoorbellHost", "HostedDoorbell", "HostedInterrupt"]

T = TypeVar("T")

_HYPERCALLS = {"hyperv": Place.HYPERV, "xen": Place.XEN}
_PLACES = {Path.PIO: Place.PIO, Path.MMIO: Place.MMIO}


@dataclass(slots=True, eq=False)
class HostedDoorbell:
    """One doorbell of the device: what the VMM is told, and what is counted."""

    item: DoorbellItem
    doorbell: Doorbell


@dataclass(slots=True, eq=False)
class HostedInterrupt:
    item: InterruptItem
    line: Interrupt


class DoorbellHost(HostBase):
    """One doorbell device of the process. What changes after :meth:`open` changes on the lane's thread."""

    def __init__(
        self,
        spec: DeviceSpec,
        device: DoorbellDevice,
        *,
        lanes: Lanes,
        registry: Registry,
        hot: HotText,
        drain_timeout: float = 5.0,
    ) -> None:
        super().__init__(spec, device, lanes=lanes, registry=registry, hot=hot, drain_timeout=drain_timeout)
        self.device = device
        self.doorbells: dict[str, HostedDoorbell] = {}
        self.interrupts: dict[str, HostedInterrupt] = {}
        self.memory: MemoryItem | None = None
        #: set by the session: the device changed its doorbells (added, removed)
        self.on_change: Callable[[Sequence[HostedDoorbell], Sequence[HostedDoorbell]], None] | None = None
        self.wrapping = RingStack(spec.wrap, device, self.lane, self.log)
        self._ids = itertools.count(1)
        self._known: dict[str, Doorbell] = {}  # also those that the device has no longer: their series stay

    async def open(self) -> None:
        self._refuse_declarations()
        device = self.device
        await self._open_device()
        try:
            self._export()
            self._read_declarations()
        except BaseException:
            await self.close()
            raise
        device.lines = {name: hosted.line for name, hosted in self.interrupts.items()}
        device.change = self._change
        self._check_wrappers()

    def _refuse_declarations(self) -> None:
        for key, value in (("path", self.spec.path), ("bus", self.spec.bus), ("qmp", self.spec.qmp)):
            if value is not None:
                raise ConfigError(f'"{key}" has no meaning here: the device says the path of each of its doorbells')

    def _check_wrappers(self) -> None:
        """A device may add doorbells later, so this is no error."""
        for name in [spec.options.get("doorbell") for spec in self.spec.wrap]:
            if name is not None and name not in self.doorbells:
                self.log.warning('the wrapper error is for doorbell "%s", which there is not; expected %s', name,
                                 ", ".join(self.doorbells))

    def _read_declarations(self) -> None:
        """PluginError or ConfigError where they cannot be."""
        device = self.device
        try:
            if device.memory_size:
                self.memory = _checked(MemoryItem, 1, device.memory_size, device.memory_wanted)
            for made in self._make(device.doorbells):
                self._add(made)
            for index, interrupt in enumerate(device.interrupts, 1):
                self._add_interrupt(_checked(InterruptItem, index, interrupt.name))
        except (ConfigError, PluginError):
            raise
        except BaseException as error:
            raise PluginError(f"{type(device).__name__}, asked what it is: {shown(error)}") from error

    def _add_interrupt(self, item: InterruptItem) -> None:
        if item.name in self.interrupts:
            raise PluginError(f'{type(self.device).__name__}: interrupt "{item.name}" twice')
        stats = InterruptStats()
        self._hot.add_interrupt(self.spec.name, item.name, stats)
        line = Interrupt(item.name, stats)
        self.interrupts[item.name] = HostedInterrupt(item, line)
        self.wrapping.watch(line)

    # -- doorbells

    def _make(self, declared: Sequence[DoorbellDecl]) -> list[HostedDoorbell]:
        """Check what the device declares, against what it has already too. Nothing is added yet."""
        places = {(hosted.item.place, str(hosted.item)): name for name, hosted in self.doorbells.items()}
        made: dict[str, HostedDoorbell] = {}
        for one in declared:
            item = self._item(one)
            if one.name in self.doorbells or one.name in made:
                raise PluginError(f'{type(self.device).__name__}: doorbell "{one.name}" twice')
            other = places.setdefault((item.place, str(item)), item.name)
            if other != item.name:
                raise ConfigError(f'doorbells "{other}" and "{item.name}" have the same place, {one.path} {item}')
            doorbell = self._known.get(one.name) or Doorbell(self.spec.name, one.name, "kvm")
            made[one.name] = HostedDoorbell(item, doorbell)
        return list(made.values())

    def _item(self, one: DoorbellDecl) -> DoorbellItem:
        place = _PLACES.get(one.path) or _HYPERCALLS.get(one.kind)
        if place is None:
            raise PluginError(
                f'{type(self.device).__name__}: doorbell "{one.name}" with path "{one.path}" and kind "{one.kind}"; '
                "expected pio, mmio, or hypercall of kind hyperv or xen"
            )
        if one.stamp is not None and (self.memory is None or one.stamp + 8 > self.memory.size):
            raise PluginError(f'{type(self.device).__name__}: the stamp of "{one.name}" is not in the shared memory')
        return _checked(
            DoorbellItem, next(self._ids), one.name, place, one.address, one.width, one.datamatch, one.stamp
        )

    def _add(self, made: HostedDoorbell) -> None:
        item, doorbell = made.item, made.doorbell
        self.doorbells[item.name] = made
        doorbell.set_address(str(item))
        known = _path(item.place) in doorbell.by_path
        doorbell.set_path(_path(item.place), PathSource.REGISTERED, kind=_kind(item))
        if not known:
            self._hot.add_doorbell(self.spec.name, item.name, doorbell.path.value, doorbell.stats)
        if item.name not in self._known:
            self._known[item.name] = doorbell
            self._registry.add(doorbell)

    def _change(self, added: Sequence[DoorbellDecl], removed: Sequence[str]) -> None:
        gone = [self.doorbells[name] for name in dict.fromkeys(removed)]
        made = self._make(added)
        for one in gone:
            del self.doorbells[one.item.name]
            self.wrapping.withdraw(one.item.name)
        for one in made:
            self._add(one)
        if (on_change := self.on_change) is not None:
            on_change(made, gone)

    # -- what goes wrong: said and counted, and the device goes on

    def handler_failed(self, bell: Bell, error: Exception) -> None:
        """``ring`` raised."""
        self.stats.add_handler_errors()
        self.rare_log.error(
            (bell.name, type(error).__name__),
            "doorbell %s: the handler of %s failed: %s",
            bell.name, type(self.device).__name__, shown(error),
        )
        self.trace_once(error)

    def handler_unfinished(self, bell: Bell) -> None:
        """The VMM is gone, and a handler does not end."""
        self.stats.add_handler_errors()
        self.rare_log.error(
            "handlers that do not end",
            "doorbell %s: the handler of %s did not end within %g s after the VMM had gone, and is cancelled",
            bell.name, type(self.device).__name__, self.drain_timeout,
        )

    def keeps_memory(self) -> None:
        """The device was told ``disconnect``, and has a view of the shared memory still."""
        self.stats.add_handler_errors()
        self.rare_log.error("views of memory", "%s keeps a view of the shared memory after disconnect()",
                            type(self.device).__name__)


def _checked(make: Callable[..., T], *fields: object) -> T:
    try:
        return make(*fields)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _path(place: Place) -> Path:
    return {Place.PIO: Path.PIO, Place.MMIO: Path.MMIO}.get(place, Path.HYPERCALL)


def _kind(item: DoorbellItem) -> str:
    """What ``hcd_doorbell_info`` says beside the path."""
    if item.place in (Place.HYPERV, Place.XEN):
        return item.place.name.lower()
    return "ioeventfd" if item.width else "any-length"
