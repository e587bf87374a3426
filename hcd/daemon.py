"""The daemon: one trio run that owns every session, the metrics server and the signals.

Start, in this order: lanes, devices (opened), listening sockets, metrics, then serving. Whatever fails
before serving is the operator's to fix and ends the daemon (ConfigError); what fails later ends one
connection. The end is the same backwards, begun by SIGTERM, by SIGINT, or by the only connection of ``hcd
device --fd``.
"""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial

import trio

from hcd import plugins, sockets
from hcd.config import Address, DaemonConfig, DeviceSpec
from hcd.dataplane.stats import HotText
from hcd.device import Device, DeviceBase, DoorbellDevice
from hcd.doorbell import Registry
from hcd.doorbell_host import DoorbellHost
from hcd.errors import ConfigError, HcdError, PluginError
from hcd.host import DeviceHost, HostBase
from hcd.lanes import Lanes, open_lanes
from hcd.metrics import cold, server
from hcd.transports import kvm, vhost_user

__all__ = ["run"]

#: how long (seconds) the reactor's handlers wait for another Python thread to hand over the GIL
SWITCH_INTERVAL = 0.0005
#: a session that failed unexpectedly is set up again after this pause (seconds)
RESTART_PAUSE = 1.0
#: on top of drain_timeout, what closing one device may take (seconds)
CLOSE_TIMEOUT = 2.0

_log = logging.getLogger("hcd.daemon")


@dataclass(slots=True)
class _Served:
    """A device and the socket that it is served on."""

    host: HostBase
    socket: socket.socket
    connected: bool = False  # the socket is a connection already


@dataclass(slots=True)
class _Daemon:
    """What one run holds."""

    config: DaemonConfig
    registry: Registry = field(default_factory=Registry)
    hot: HotText = field(default_factory=HotText)
    hosts: list[HostBase] = field(default_factory=list)
    failure: HcdError | None = None  # why it could not start


def run(config: DaemonConfig, *, inherited: socket.socket | None = None, exit_on_disconnect: bool = False) -> None:
    """Serve ``config`` until SIGTERM or SIGINT.

    ``inherited`` (with exactly one device) is a listening or connected socket to serve it on instead of
    making one; a connected one is served once. ``exit_on_disconnect``: end when the first front end has
    gone. Raises ConfigError when something cannot be opened.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    trio.run(_main, config, inherited, exit_on_disconnect)


async def _main(config: DaemonConfig, inherited: socket.socket | None, exit_on_disconnect: bool) -> None:
    daemon = _Daemon(config)
    async with trio.open_nursery() as watcher:
        with trio.CancelScope() as serving:
            await watcher.start(_end_on_signal, serving)
            async with AsyncExitStack() as stack:
                await _serve_all(daemon, stack, inherited, exit_on_disconnect)
        watcher.cancel_scope.cancel()
    if daemon.failure is not None:
        raise daemon.failure


async def _end_on_signal(
    serving: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Cancel ``serving`` at the first signal. A second one finds no handler and ends the process."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            _log.info("%s: ending", signal.Signals(number).name)
            break
    serving.cancel()


async def _serve_all(
    daemon: _Daemon, stack: AsyncExitStack, inherited: socket.socket | None, exit_on_disconnect: bool
) -> None:
    lanes = await stack.enter_async_context(open_lanes(poll_us=daemon.config.poll_us))
    try:
        for spec in daemon.config.devices:
            await _open_device(daemon, stack, lanes, spec)
        served = [_bind(stack, host, inherited) for host in daemon.hosts]
        listeners = await _bind_metrics(stack, daemon.config.metrics)
    except HcdError as exc:
        daemon.failure = exc  # not raised here: it would leave the nurseries above as a group
        return
    gc.collect()
    gc.freeze()  # what exists now stays: no collection needs to walk it again
    _log.info("ready: %s", ", ".join(host.spec.name for host in daemon.hosts))
    async with trio.open_nursery() as nursery:
        if listeners:
            render = cold.Renderer(daemon.hot, cold.cold_registry(daemon.hosts, daemon.registry))
            nursery.start_soon(_keep_up, "metrics", lambda: server.serve(listeners, render))
        async with trio.open_nursery() as sessions:
            for one in served:
                sessions.start_soon(_serve_one, one, exit_on_disconnect)
        nursery.cancel_scope.cancel()


async def _open_device(daemon: _Daemon, stack: AsyncExitStack, lanes: Lanes, spec: DeviceSpec) -> None:
    drain_timeout = daemon.config.drain_timeout
    try:
        device = plugins.create(spec.type, spec.name, spec.options)
        host = _make_host(daemon, spec, device, lanes)
        await host.open()
    except (ConfigError, OSError) as exc:
        raise ConfigError(f'device "{spec.name}" ({spec.type}): {exc}') from exc
    except PluginError:
        raise
    except Exception as exc:
        _log.exception("%s: opening failed", spec.name)
        raise PluginError(f'device "{spec.name}" ({spec.type}): open() raised {type(exc).__name__}') from exc
    stack.push_async_callback(_close_device, host, drain_timeout + CLOSE_TIMEOUT)
    daemon.hosts.append(host)


def _make_host(daemon: _Daemon, spec: DeviceSpec, device: DeviceBase, lanes: Lanes) -> HostBase:
    registry, hot, timeout = daemon.registry, daemon.hot, daemon.config.drain_timeout
    if isinstance(device, DoorbellDevice):
        return DoorbellHost(spec, device, lanes=lanes, registry=registry, hot=hot, drain_timeout=timeout)
    assert isinstance(device, Device)  # plugins.load lets nothing else through
    return DeviceHost(spec, device, lanes=lanes, registry=registry, hot=hot, drain_timeout=timeout)


async def _close_device(host: HostBase, timeout: float) -> None:
    """Close even while being cancelled, but not for ever."""
    with trio.move_on_after(timeout, shield=True) as scope:
        try:
            await host.close()
        except Exception:
            _log.exception("%s: closing failed", host.spec.name)
    if scope.cancelled_caught:
        _log.error("%s: did not close within %g s", host.spec.name, timeout)


def _bind(stack: AsyncExitStack, host: HostBase, inherited: socket.socket | None) -> _Served:
    if inherited is not None:
        stack.callback(inherited.close)
        return _Served(host, inherited, connected=not sockets.is_listening(inherited))
    listener = sockets.UnixListener(host.spec.socket, sockets.KINDS[host.transport])
    stack.callback(listener.close)
    return _Served(host, listener.socket)


async def _bind_metrics(stack: AsyncExitStack, address: Address | None) -> list[trio.SocketListener]:
    if address is None:
        return []
    if address.path:
        made = sockets.UnixListener(address.path)
        stack.callback(made.close)
        listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(made.socket))]
    else:
        try:
            listeners = await trio.open_tcp_listeners(address.port, host=address.host)
        except (OSError, UnicodeError) as exc:  # UnicodeError: a host name that cannot be one
            reason = getattr(exc, "strerror", None) or exc
            raise ConfigError(f"cannot serve metrics on {address}: {reason}") from exc
        for listener in listeners:
            stack.push_async_callback(listener.aclose)
        address = Address(host=address.host, port=listeners[0].socket.getsockname()[1])
    _log.info("metrics at %s", address if address.path else f"http://{address}/metrics")
    return listeners


async def _serve_one(served: _Served, exit_on_disconnect: bool) -> None:
    host, sock = served.host, served.socket
    connected: Callable[[], Awaitable[None]]
    serve: Callable[[], Awaitable[None]]
    if isinstance(host, DoorbellHost):
        connected = partial(kvm.serve_connected, host, sock)
        serve = partial(kvm.serve, host, sock, exit_on_disconnect=exit_on_disconnect)
    else:
        assert isinstance(host, DeviceHost)
        connected = partial(vhost_user.serve_connected, host, sock)
        serve = partial(vhost_user.serve, host, sock, exit_on_disconnect=exit_on_disconnect)
    if served.connected:
        await connected()
    else:
        await _keep_up(host.spec.name, serve)


async def _keep_up(name: str, serve: Callable[[], Awaitable[None]]) -> None:
    """Run ``serve`` to its end. What it raises is a defect of hcd; it must not take other devices along."""
    while True:
        try:
            await serve()
            return
        except Exception:
            _log.exception("%s: serving failed; trying again in %g s", name, RESTART_PAUSE)
        await trio.sleep(RESTART_PAUSE)
