"""A configured device of this process: the device itself, its lane, its doorbells and what is counted.

A host outlives connections. Sessions (transports) come and go on it, one at a time; counters go on. Here is the host of
virtio devices, that of doorbell devices is in :mod:`hcd.doorbell_host`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ParamSpec, Protocol

import trio
from hcd_protocols.virtio.features import RingFeature

from hcd.config import DeviceSpec
from hcd.dataplane.stats import DeviceStats, HotText, QueueStats
from hcd.dataplane.virtqueue import Limit, Virtqueue
from hcd.declaration import NOT_INITIALISED, config_fault, initialised, unusable_when_open
from hcd.device import Device, DeviceBase
from hcd.device_lane import DeviceLane
from hcd.doorbell import Doorbell, Path, PathSource, Registry
from hcd.errors import PluginError, contained, shown
from hcd.handover.fdstore import FdStore
from hcd.lanes import Lanes, QueueLane
from hcd.log import RateLimited
from hcd.qmp_places import Place
from hcd.wrappers import RequestStack, RequestWrapper

__all__ = ["DeviceHost", "HostBase", "LeavingSession", "Observer", "Peer", "RingState", "SessionView"]

P = ParamSpec("P")

#: paths that follow from the bus alone, when the operator names it
_BUS_PATHS: Mapping[str, tuple[Path, str]] = {
    "mmio": (Path.MMIO, "virtio-mmio"),
    "ccw": (Path.HYPERCALL, "ccw"),
}


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is connected: a front end, or a VMM. ``since`` as time.time(); what the kernel does not say is None or ""."""

    pid: int | None
    command: str
    since: float


@dataclass(frozen=True, slots=True)
class RingState:
    """One ring as its front end left it. ``size`` in entries, 0 before it is known."""

    index: int
    size: int
    packed: bool
    started: bool
    enabled: bool
    draining: bool
    broken: str


class SessionView(Protocol):
    """What may be told of the connection of a peer. Read from trio while the lane goes on."""

    @property
    def peer(self) -> Peer: ...
    @property
    def features(self) -> int: ...
    @property
    def protocol_features(self) -> int: ...
    @property
    def can_notify(self) -> bool:
        """Whether the peer can be told that the configuration space changed."""

    def rings(self) -> Sequence[RingState]: ...
    def queues(self) -> Sequence[Virtqueue]: ...


class LeavingSession(Protocol):
    """A session that the next process can go on with."""

    @property
    def over(self) -> trio.Event:
        """Set when everything of the session is released."""

    def leave(self) -> None:
        """Come to an end between two messages, and keep the connection."""


class Observer(Protocol):
    """Hears what passes between a session and its peer, in trio, from trio."""

    def message(self, direction: str, data: bytes, fds: int) -> None:
        """A whole message: "in" from the peer, "out" to it, "back" on the back channel; ``fds`` came along."""

    def connection(self, what: str) -> None:
        """``what``: connected, disconnected."""


class HostBase:
    """What the hosts of all kinds of devices have in common. ``drain_timeout`` in seconds."""

    def __init__(
        self,
        spec: DeviceSpec,
        device: DeviceBase,
        *,
        lanes: Lanes,
        registry: Registry,
        hot: HotText,
        drain_timeout: float = 5.0,
    ) -> None:
        self.spec = spec
        self.lane: QueueLane = lanes.of(device)
        self.drain_timeout = drain_timeout
        self.log = logging.LoggerAdapter(logging.getLogger("hcd.session"), {"device": spec.name})
        self.rare_log = RateLimited(self.log)
        #: called whenever a peer has come or gone, on the thread where that is noticed
        self.on_connection: Callable[[], None] | None = None
        #: what is counted of the device as a whole
        self.stats = DeviceStats()
        #: the connection that is served now
        self.session: SessionView | None = None
        self.observers: list[Observer] = []
        #: what the service manager keeps for the next process; None: nothing
        self.store: FdStore | None = None
        self._kept: LeavingSession | None = None
        #: the process ends, and leaves what is kept to the next one
        self.leaving = False
        self._accepting = trio.CancelScope()
        self.transport = device.transport
        self._device = device
        self._slow = lanes.slow
        self._device_lane = DeviceLane(self.lane, spec.name, lanes.slow, self.device_failed)
        self._traced: set[type[BaseException]] = set()
        self._registry = registry
        self._hot = hot

    @property
    def is_async(self) -> bool:
        """Whether the device lives on trio's lane."""
        return self._device.is_async()

    @property
    def connected(self) -> bool:
        """Whether a peer is connected."""
        return bool(self.stats.connected)

    @connected.setter
    def connected(self, connected: bool) -> None:
        self.stats.connected = connected
        if self.on_connection is not None:
            self.on_connection()

    @property
    def kept(self) -> LeavingSession | None:
        """The session that the service manager keeps, while there is one."""
        return self._kept

    @kept.setter
    def kept(self, session: LeavingSession | None) -> None:
        self._kept = session
        self.stats.handover_ready = session is not None

    async def open(self) -> None:
        """Open the device and make its counters known. ConfigError when it cannot be opened."""
        raise NotImplementedError

    def adjust(self, spec: DeviceSpec) -> None:
        """Go on as ``spec``, which differs only in what can be changed while a peer is connected. Returns at once, also
        while the lane hangs."""
        self.spec = spec

    def _export(self) -> None:
        """What is counted of the device is told from now on, until it is closed."""
        if not initialised(self._device):
            raise PluginError(f"{type(self._device).__name__}: {NOT_INITIALISED}")
        self._hot.add_device(self.spec.name, self.stats)
        self._registry.add_instruments(self.spec.name, self._device.instruments)
        self._slow.devices[self.spec.name] = self.stats

    async def _open_device(self) -> None:
        """A plain device may take its time in ``open``, for a lock say: not at the cost of trio's side."""
        try:
            if self._device.is_async():
                self._device.open(self._device_lane)
            else:
                # Abandoned where the daemon is told to end: what never returns must not keep it.
                await trio.to_thread.run_sync(self._device.open, self._device_lane, abandon_on_cancel=True)
        except trio.Cancelled:
            raise
        except BaseException as error:
            raise contained(error) from error.__cause__

    async def close(self) -> None:
        """Take the device's series away and release what it holds."""
        self._registry.remove_device(self.spec.name)
        self._hot.remove_device(self.spec.name)
        self._slow.devices.pop(self.spec.name, None)
        try:
            self._device.close()
        except BaseException as error:
            raise contained(error) from error.__cause__

    def accept_scope(self) -> trio.CancelScope:
        """What peers are accepted in; :meth:`leave` cancels it."""
        self._accepting = trio.CancelScope()
        return self._accepting

    async def leave(self) -> None:
        """Accept nobody any more, and leave the session that is kept to the next process."""
        self.leaving = True
        self._accepting.cancel()
        if (session := self.kept) is not None:
            session.leave()
            await session.over.wait()

    def observe(self, direction: str, data: bytes, fds: int = 0) -> None:
        """A message passed; see :class:`Observer`."""
        for observer in self.observers:
            observer.message(direction, data, fds)

    def tell_observers(self, what: str) -> None:
        """A peer has come or goes; see :class:`Observer`."""
        for observer in self.observers:
            observer.connection(what)

    def device_failed(self, what: str, error: Exception) -> None:
        """``what`` (a method of the device) raised ``error``, which is nobody's fault but its own."""
        self.stats.add_handler_errors()
        self.rare_log.error((what, type(error).__name__), "%s: %s raised %s", type(self._device).__name__, what,
                            shown(error))
        self.trace_once(error)

    def call_device(self, method: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call a method of the device. What it raises must not take the session along."""
        try:
            method(*args, **kwargs)
        except BaseException as error:
            self.device_failed(f"{getattr(method, '__name__', 'a method')}()", contained(error))

    def trace_once(self, error: BaseException) -> None:
        """Log the traceback of ``error`` the first time that its type comes up on this host."""
        if type(error) not in self._traced:
            self._traced.add(type(error))
            self.log.error("traceback of the first %s:", type(error).__name__, exc_info=error)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.spec.name} ({self.spec.type})>"


class DeviceHost(HostBase):
    """One virtio device of the process."""

    def __init__(
        self,
        spec: DeviceSpec,
        device: Device,
        *,
        lanes: Lanes,
        registry: Registry,
        hot: HotText,
        drain_timeout: float = 5.0,
    ) -> None:
        super().__init__(spec, device, lanes=lanes, registry=registry, hot=hot, drain_timeout=drain_timeout)
        self.device = device
        self.doorbells: list[Doorbell] = []
        self.queue_stats: list[QueueStats] = []
        self._stuck: dict[int, int] = {}
        #: shared by the queues of every session
        self.limit = Limit()
        self.limit.set(*spec.limits.arguments())
        self.wrapping = RequestStack(spec.wrap, device, self.lane, self.log)

    def stuck_in(self, queue: int) -> int:
        """How many requests of ``queue`` are in flight for longer than ``spec.stuck_after`` (:mod:`hcd.stuck`)."""
        return self._stuck.get(queue, 0)

    def set_stuck(self, queue: int, count: int) -> None:
        self._stuck[queue] = count
        self.stats.stuck_requests = sum(self._stuck.values())

    @property
    def drops(self) -> int:
        return sum(stats.drops for stats in self.queue_stats)

    def storage_size(self) -> int | None:
        """Bytes of storage, if the device has any. Any thread."""
        try:
            size = self.device.storage_size()
            if size is not None and not (isinstance(size, int) and size >= 0):
                raise TypeError(f"{size!r} is no number of bytes")
            return size
        except BaseException as error:  # a plug-in's; what is told of it must not depend on that
            self.device_failed("storage_size()", contained(error))
            return None

    # -- life

    def adjust(self, spec: DeviceSpec) -> None:
        super().adjust(spec)
        self.lane.post(lambda: self.limit.set(*spec.limits.arguments()))

    async def open(self) -> None:
        await self._open_device()
        try:
            self._check_device()
            self._export()
            for index in range(self.device.num_queues):
                self._add_queue(str(index))
        except BaseException:
            await self.close()
            raise
        self._settle_without_asking()

    def _check_device(self) -> None:
        """PluginError where nobody could be served."""
        try:
            faults = list(unusable_when_open(self.device))
        except BaseException as error:
            raise PluginError(f"{type(self.device).__name__}, asked what it is: {shown(error)}") from error
        if faults:
            raise PluginError(f"{type(self.device).__name__}: {'; '.join(faults)}")

    # -- its configuration space

    def config_size(self) -> int:
        """Bytes of the configuration space that front ends are offered; 0: none, or none that makes sense."""
        device = self.device
        if type(device).serves_config is not Device.serves_config and not device.serves_config:
            return 0
        return len(self.read_config(None))

    def read_config(self, size: int | None) -> bytes:
        """All of it, if it has ``size`` bytes or that is not known yet; empty, and counted, if it is no good."""
        try:
            config = self.device.config()
            if fault := config_fault(config, size):
                raise ValueError(fault)
        except BaseException as error:
            self.device_failed("config()", contained(error))
            return b""
        return config

    def _add_queue(self, queue: str) -> None:
        stats = QueueStats(self.device.operations, self.stats)
        self.queue_stats.append(stats)
        self._hot.add_queue(self.spec.name, queue, stats)
        doorbell = Doorbell(device=self.spec.name, queue=queue, transport="vhost-user")
        self.doorbells.append(doorbell)
        self._registry.add(doorbell)

    # -- wrappers for a while: on the lane's thread

    def add_wrapper(self, wrapper: RequestWrapper) -> None:
        self.wrapping.add(wrapper)
        self._wrap_again()

    def remove_wrapper(self, wrapper: RequestWrapper) -> None:
        self.wrapping.remove(wrapper)
        self._wrap_again()

    def _wrap_again(self) -> None:
        for queue in () if self.session is None else self.session.queues():
            self.wrapping.attach(queue)

    # -- paths: on the lane's thread, or before the first session

    @property
    def asks_qemu(self) -> bool:
        """Whether the path is to be asked for by QMP once a driver is there."""
        return self.spec.qmp is not None

    def _settle_without_asking(self) -> None:
        spec = self.spec
        if spec.path is not None:
            self.set_path(spec.path, PathSource.DECLARED)
        elif spec.bus is not None and spec.bus in _BUS_PATHS:
            path, kind = _BUS_PATHS[spec.bus]
            self.set_path(path, PathSource.DECLARED, kind)
        elif spec.bus is None and not self.asks_qemu:
            self.set_path(Path.UNKNOWN, PathSource.NONE)

    @property
    def path_is_open(self) -> bool:
        """Whether the path depends on what a connection brings."""
        return self.spec.path is None and self.spec.bus not in _BUS_PATHS and (
            self.asks_qemu or self.spec.bus == "pci"
        )

    def negotiated(self, features: int) -> None:
        """A driver acknowledged ``features``: set the path from them, or count aside until QEMU answers."""
        if not self.path_is_open:
            return
        if self.asks_qemu:
            for doorbell in self.doorbells:
                doorbell.await_path()
            return
        self.set_negotiated_path(features)

    def set_negotiated_path(self, features: int) -> None:
        """On PCI a driver without VERSION_1 is a legacy one, which can only ring by port."""
        if self.spec.bus != "pci":
            self.set_path(Path.UNKNOWN, PathSource.NONE)
        elif features & RingFeature.VERSION_1:
            self.set_path(Path.MMIO, PathSource.NEGOTIATED, "modern")
        else:
            self.set_path(Path.PIO, PathSource.NEGOTIATED, "legacy")

    def set_place(self, place: Place | None) -> None:
        """Where the doorbells are; None: not known."""
        for queue, doorbell in enumerate(self.doorbells):
            doorbell.set_address(place.of(queue) if place else "")

    def set_path(self, path: Path, source: PathSource, kind: str | None = None, place: Place | None = None) -> None:
        """Every doorbell of the device rings over ``path``, at ``place`` if that is known."""
        self.set_place(place)
        for doorbell in self.doorbells:
            known = path in doorbell.by_path
            doorbell.set_path(path, source, kind=kind)
            if not known:
                self._hot.add_doorbell(self.spec.name, doorbell.queue, path.value, doorbell.by_path[path])
