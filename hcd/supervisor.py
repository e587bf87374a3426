"""The devices of one daemon: opened, served, closed, and exchanged for others while the rest goes on.

Theory of operation. A device's life has two halves that begin and end apart: its *host* is opened and closed, and a
task *serves* it on a listening socket. A new configuration is compared with what runs. Devices whose table is the same
are not touched. Everything of the new ones that can fail is done before anything of the old ones ends: options,
sockets, opening. Only a device that takes another's place (the same name, or the same socket) has to wait for
that one to let go of its image or its interface; if it does not open then, the old one is opened again.

Listening sockets are found by their path, and stay while any device is served there: a front end that connects
during the change waits in the backlog.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import trio

from hcd import plugins, sockets
from hcd.activation import Activation
from hcd.config import DaemonConfig, DeviceSpec
from hcd.dataplane.stats import HotText
from hcd.device import Device, DeviceBase, DoorbellDevice
from hcd.doorbell import Registry
from hcd.doorbell_host import DoorbellHost
from hcd.errors import ConfigError, HcdError, PluginError, shown
from hcd.handover.fdstore import FdStore
from hcd.handover.recovery import Handed
from hcd.host import DeviceHost, HostBase
from hcd.lanes import Lanes
from hcd.transports import kvm, vhost_user

__all__ = ["Plan", "Supervisor", "end_timeout", "keep_up", "make_plan"]

#: a session that failed unexpectedly is set up again after this pause (seconds)
RESTART_PAUSE = 1.0
#: on top of drain_timeout, what closing one device may take (seconds)
CLOSE_TIMEOUT = 2.0
#: on top of draining, what leaving sessions to the next process may take (seconds)
LEAVE_TIMEOUT = 2.0

_log = logging.getLogger("hcd.daemon")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a new list of devices changes."""

    kept: tuple[DeviceSpec, ...]
    added: tuple[DeviceSpec, ...]
    removed: tuple[DeviceSpec, ...]
    changed: tuple[tuple[DeviceSpec, DeviceSpec], ...]  # before, after
    adjusted: tuple[DeviceSpec, ...] = ()  # stay as they are, but for limits and the like

    def __str__(self) -> str:
        parts = [f"{len(self.kept)} unchanged"]
        for what, specs in (
            ("added", self.added),
            ("changed", [new for _, new in self.changed]),
            ("adjusted", self.adjusted),
            ("removed", self.removed),
        ):
            if specs:
                parts.append(f"{what} {', '.join(spec.name for spec in specs)}")
        return "; ".join(parts)


def make_plan(before: Sequence[DeviceSpec], after: Sequence[DeviceSpec]) -> Plan:
    """Compare two lists of devices. A new name on an old socket takes the place of the device that had it."""
    old = {spec.name: spec for spec in before}
    names = {spec.name for spec in after}
    by_path = {_key(spec.socket): spec for spec in before if spec.name not in names and spec.socket}
    kept, added, changed, adjusted = [], [], [], []
    for spec in after:
        if old.get(spec.name) == spec:
            kept.append(spec)
        elif spec.name in old and old[spec.name].differs_only_in_effect(spec):
            adjusted.append(spec)
        elif (place := old.get(spec.name) or by_path.pop(_key(spec.socket), None)) is not None:
            changed.append((place, spec))
        else:
            added.append(spec)
    replaced = {place.name for place, _ in changed}
    removed = [spec for spec in before if spec.name not in names and spec.name not in replaced]
    return Plan(tuple(kept), tuple(added), tuple(removed), tuple(changed), tuple(adjusted))


@dataclass(slots=True, eq=False)
class _Listener:
    """A socket on which devices are served; ``close`` ends what is ours of it."""

    sock: socket.socket
    close: Callable[[], None]
    kind: int = socket.SOCK_STREAM
    connected: bool = False  # it is a connection already


@dataclass(slots=True, eq=False)
class _Task:
    """The task that serves a device."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    over: trio.Event = field(default_factory=trio.Event)


class Supervisor:
    """Every device of one daemon. ``hosts`` are those that are open; ``on_change`` is called in trio or on a lane."""

    def __init__(self, lanes: Lanes, activation: Activation, drain_timeout: float) -> None:
        self.registry = Registry()
        self.hot = HotText()
        self.hosts: list[HostBase] = []
        self.drain_timeout = drain_timeout
        self.exit_on_disconnect = False
        self.on_change: Callable[[], None] = lambda: None
        self._lanes = lanes
        self._activation = activation
        self._listeners: dict[str, _Listener] = {}
        #: what the service manager keeps for the next process
        self.store: FdStore | None = None
        self._handed: Sequence[Handed] = ()
        self._not_served: dict[str, Handed] = {}
        self._tasks: dict[HostBase, _Task] = {}

    def hand_over(self, handed: dict[str, Handed]) -> None:
        """Sessions of an earlier process, by their devices, which are open: to be gone on with when they are served."""
        self._handed, self._not_served = tuple(handed.values()), handed

    # -- devices

    async def open(self, spec: DeviceSpec) -> HostBase:
        """Open the device. ConfigError or PluginError, which name it, if that fails; nothing is left then."""
        name = f'device "{spec.name}" ({spec.type})'
        try:
            host = self._make_host(spec, plugins.create(spec.type, spec.name, spec.options))
        except ConfigError as exc:
            raise ConfigError(f"{name}: {exc}") from exc
        try:
            await host.open()
        except (ConfigError, OSError) as exc:
            raise ConfigError(f"{name}: {exc}") from exc
        except PluginError as exc:
            raise PluginError(f"{name}, of {plugins.origin(spec.type)}: {exc}") from exc
        except Exception as exc:
            _log.exception("%s: opening failed", spec.name)
            raise PluginError(f"{name}, of {plugins.origin(spec.type)}: open() raised {shown(exc)}") from exc
        host.on_connection = self._changed
        host.store = self.store
        self.hosts.append(host)
        return host

    def _make_host(self, spec: DeviceSpec, device: DeviceBase) -> HostBase:
        lanes, registry, hot, timeout = self._lanes, self.registry, self.hot, self.drain_timeout
        if isinstance(device, DoorbellDevice):
            return DoorbellHost(spec, device, lanes=lanes, registry=registry, hot=hot, drain_timeout=timeout)
        assert isinstance(device, Device)  # plugins.load lets nothing else through
        return DeviceHost(spec, device, lanes=lanes, registry=registry, hot=hot, drain_timeout=timeout)

    async def close(self, host: HostBase) -> None:
        """Close even while being cancelled, but not for ever."""
        self.hosts.remove(host)
        timeout = self.drain_timeout + CLOSE_TIMEOUT
        with trio.move_on_after(timeout, shield=True) as scope:
            try:
                await host.close()
            except Exception:
                _log.exception("%s: closing failed", host.spec.name)
        if scope.cancelled_caught:
            _log.error("%s: did not close within %g s", host.spec.name, timeout)

    async def close_all(self) -> None:
        """Close devices in the reverse of the order in which they were opened, then their sockets."""
        for host in self.hosts[::-1]:
            await self.close(host)
        for listener in self._listeners.values():
            listener.close()
        self._listeners.clear()

    def _changed(self) -> None:
        self.on_change()

    # -- sockets

    def inherit(self, spec: DeviceSpec, sock: socket.socket) -> None:
        """Serve ``spec`` on ``sock``, listening or connected, whatever it is bound to."""
        connected = not sockets.is_listening(sock)
        self._listeners[_key(spec.socket)] = _Listener(sock, sock.close, sock.type, connected)

    def listen(self, spec: DeviceSpec) -> None:
        """Have a socket for ``spec``. ConfigError when it cannot be had."""
        kind = sockets.KINDS[plugins.load(spec.type).transport]
        listener = self._listeners.get(_key(spec.socket))
        if listener is None:
            self._listeners[_key(spec.socket)] = self._bind(spec, kind)
        elif listener.kind != kind:
            raise ConfigError(
                f'device "{spec.name}": {spec.socket} is in use, and type {spec.type} needs another kind of socket'
            )

    def _bind(self, spec: DeviceSpec, kind: socket.SocketKind) -> _Listener:
        given = self._activation.of(spec)
        if given is not None:
            return _Listener(given, lambda: None, given.type)  # it is the manager's, for as long as we live
        own = sockets.UnixListener(spec.socket, kind)
        return _Listener(own.socket, own.close, kind)

    def _unlisten(self) -> None:
        """Close the sockets on which no device is served any more."""
        used = {_key(host.spec.socket) for host in self.hosts}
        for key in self._listeners.keys() - used:
            self._listeners.pop(key).close()

    # -- tasks

    def start(self, host: HostBase, nursery: trio.Nursery) -> None:
        """Serve ``host``; :meth:`listen` has got it a socket."""
        task = self._tasks[host] = _Task()
        nursery.start_soon(self._serve, host, self._listeners[_key(host.spec.socket)], task)

    async def _serve(self, host: HostBase, listener: _Listener, task: _Task) -> None:
        try:
            with task.scope:
                await self._serve_on(host, listener)
        finally:
            self._tasks.pop(host, None)
            task.over.set()

    async def _serve_on(self, host: HostBase, listener: _Listener) -> None:
        sock, once = listener.sock, self.exit_on_disconnect
        connected: Callable[[], Awaitable[None]]
        serve: Callable[[], Awaitable[None]]
        if isinstance(host, DoorbellHost):
            connected = partial(kvm.serve_connected, host, sock)
            serve = partial(kvm.serve, host, sock, exit_on_disconnect=once)
        else:
            assert isinstance(host, DeviceHost)
            connected = partial(vhost_user.serve_connected, host, sock)
            serve = partial(vhost_user.serve, host, sock, exit_on_disconnect=once, handed=self._not_served)
        if listener.connected:
            await connected()
        else:
            await keep_up(host.spec.name, serve)

    async def taken_over(self) -> None:
        """Return when every session of an earlier process is gone on with, or given up."""
        for handed in self._handed:
            await handed.settled.wait()
        self._handed = ()

    @property
    def end_timeout(self) -> float:
        """What the end of all may take (seconds), :meth:`leave` first."""
        leaving = self._leave_timeout if any(host.kept is not None for host in self.hosts) else 0.0
        return leaving + end_timeout(self.drain_timeout, len(self.hosts))

    @property
    def _leave_timeout(self) -> float:
        """The message that is being handled may wait for requests, and so does the end."""
        return LEAVE_TIMEOUT + 2 * self.drain_timeout

    async def leave(self) -> None:
        """Accept nobody any more; sessions that are kept come to an end without their front ends."""
        with trio.move_on_after(self._leave_timeout):
            async with trio.open_nursery() as nursery:
                for host in self.hosts:
                    nursery.start_soon(host.leave)

    async def _end(self, host: HostBase) -> None:
        """End the session of ``host``, then close it."""
        if (task := self._tasks.get(host)) is not None:
            task.scope.cancel()
            await task.over.wait()
        await self.close(host)

    # -- another configuration

    async def apply(self, config: DaemonConfig, nursery: trio.Nursery) -> Plan:
        """Have the devices of ``config`` instead; new ones are served in ``nursery``.

        HcdError: it cannot be had, and all is as before, except that devices which were to be changed may have lost
        their front end. What is told apart is the table in the configuration, not what it refers to.
        """
        self._activation.check(config, strict=False)
        plan = make_plan([host.spec for host in self.hosts], config.devices)
        made: list[HostBase] = []
        gone: list[DeviceSpec] = []
        try:
            for spec in (*plan.added, *(new for _, new in plan.changed)):
                self._try_options(spec)
                self.listen(spec)
            for old, new in (*((None, spec) for spec in plan.added), *plan.changed):
                if old is not None:
                    await self._end(self._host(old))
                    gone.append(old)
                made.append(await self.open(new))
        except HcdError:
            await self._undo(made, gone, nursery)
            raise
        async with trio.open_nursery() as ending:
            for spec in plan.removed:
                ending.start_soon(self._end, self._host(spec))
        for spec in plan.adjusted:
            self._host(spec).adjust(spec)
        self.drain_timeout = config.drain_timeout
        reactor = self._lanes.reactor.reactor
        reactor.post(lambda: reactor.set_poll_us(config.poll_us))  # nobody waits: it may hang in a handler
        for host in self.hosts:
            host.drain_timeout = config.drain_timeout
        self._unlisten()
        for host in made:
            self.start(host, nursery)
        self.on_change()
        return plan

    def _try_options(self, spec: DeviceSpec) -> None:
        """ConfigError if the type refuses them; nothing is opened."""
        try:
            plugins.create(spec.type, spec.name, spec.options)
        except ConfigError as exc:
            raise ConfigError(f'device "{spec.name}" ({spec.type}): {exc}') from exc

    async def _undo(self, made: list[HostBase], gone: list[DeviceSpec], nursery: trio.Nursery) -> None:
        for host in reversed(made):
            await self.close(host)
        for spec in gone:
            try:
                self.start(await self.open(spec), nursery)
                _log.warning("%s: is served as before; a front end has had to connect again", spec.name)
            except HcdError as exc:
                _log.error("it cannot be opened again and is served no more: %s", exc)
        self._unlisten()
        self.on_change()

    def _host(self, spec: DeviceSpec) -> HostBase:
        return next(host for host in self.hosts if host.spec.name == spec.name)


def end_timeout(drain: float, devices: int) -> float:
    """What their end may take: sessions drain beside each other, devices are closed one after the other (seconds)."""
    return drain + (drain + CLOSE_TIMEOUT) * devices


async def keep_up(name: str, serve: Callable[[], Awaitable[None]]) -> None:
    """Run ``serve`` to its end. What it raises is a defect of hcd; it must not take other devices along."""
    while True:
        try:
            await serve()
            return
        except Exception:
            _log.exception("%s: serving failed; trying again in %g s", name, RESTART_PAUSE)
        await trio.sleep(RESTART_PAUSE)


def _key(path: str) -> str:
    """Listening sockets go by it."""
    return os.path.abspath(path) if path else ""
