"""The daemon: one trio run that owns every session, the metrics server and the signals.

Start, in this order: lanes, inherited sockets, devices (opened), listening sockets, metrics, then serving. Whatever
fails before serving is the operator's to fix and ends the daemon (ConfigError); what fails later ends one
connection. The end is the same backwards, begun by SIGTERM, by SIGINT, or by the only connection of ``hcd
device --fd``. SIGHUP reads the configuration again (:mod:`hcd.reload`).
"""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from types import FrameType

import trio

from hcd import activation, sockets, stuck, systemd, watch
from hcd.activation import Activation
from hcd.config import Address, DaemonConfig
from hcd.control import settings
from hcd.control.calls import Calls, Probe
from hcd.control.server import serve as serve_control
from hcd.deadline import Deadline
from hcd.errors import ConfigError, HcdError
from hcd.handover import fdstore
from hcd.handover.fdstore import FdStore
from hcd.handover.recovery import recover
from hcd.lanes import Lanes, open_lanes
from hcd.metrics import cold, server
from hcd.reload import Reloader
from hcd.supervisor import Supervisor, end_timeout, keep_up
from hcd.systemd import Inherited, Notifier

__all__ = ["run"]

#: how long (seconds) the reactor's handlers wait for another Python thread to hand over the GIL
SWITCH_INTERVAL = 0.0005
#: how long (seconds) one device may take to open before the service manager gives up
OPEN_TIMEOUT = 60.0
#: on top of what closing the devices may take (seconds)
STOP_TIMEOUT = 5.0

_log = logging.getLogger("hcd.daemon")

Load = Callable[[], DaemonConfig]


@dataclass(slots=True)
class _Daemon:
    """What one run holds."""

    config: DaemonConfig
    inherited: socket.socket | None = None
    exit_on_disconnect: bool = False
    load: Load | None = None
    notifier: Notifier = field(default_factory=Notifier)
    watchdog: float | None = None
    started: float = field(default_factory=time.time)
    failure: HcdError | None = None  # why it could not start
    beside: Callable[[], Awaitable[None]] | None = None  # what it ends with
    supervisor: Supervisor | None = None
    deadline: Deadline = field(init=False)

    def __post_init__(self) -> None:
        self.deadline = Deadline(self.stop_timeout)

    def stop_timeout(self) -> float:
        """Of what is served now: ``config`` is what it began with."""
        if self.supervisor is not None:
            return STOP_TIMEOUT + self.supervisor.end_timeout
        return STOP_TIMEOUT + end_timeout(self.config.drain_timeout, len(self.config.devices))


def run(
    config: DaemonConfig,
    *,
    inherited: socket.socket | None = None,
    exit_on_disconnect: bool = False,
    load: Load | None = None,
    beside: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Serve ``config`` until SIGTERM or SIGINT.

    ``inherited`` (with exactly one device) is a listening or connected socket to serve it on instead of
    making one; a connected one is served once. ``exit_on_disconnect``: end when the first front end has
    gone. ``load`` reads the configuration again, for SIGHUP; without it SIGHUP is not handled.
    ``beside`` runs once everything is served; the daemon ends with it. Raises ConfigError when something cannot be
    opened.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    daemon = _Daemon(config, inherited, exit_on_disconnect, load, Notifier.take(), systemd.take_watchdog())
    daemon.beside = beside
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN) if load is not None else None
    try:
        trio.run(_main, daemon)
    finally:
        daemon.deadline.cancel()
        if before is not None:
            signal.signal(signal.SIGHUP, before)
        daemon.notifier.close()


async def _main(daemon: _Daemon) -> None:
    async with trio.open_nursery() as watcher:
        with trio.CancelScope() as serving:
            await watcher.start(_end_on_signal, daemon, serving)
            async with AsyncExitStack() as stack:
                await _serve_all(daemon, stack)
        watcher.cancel_scope.cancel()
    if daemon.failure is not None:
        raise daemon.failure


async def _end_on_signal(
    daemon: _Daemon, serving: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Cancel ``serving`` at the first signal. A second one finds no handler and ends the process."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        for one in (signal.SIGTERM, signal.SIGINT):
            _hasten(daemon, one)
        task_status.started()
        async for number in signals:
            _log.info("%s: ending", signal.Signals(number).name)
            break
    _say_stopping(daemon)
    if daemon.supervisor is not None:
        await daemon.supervisor.leave()
    serving.cancel()


async def _serve_all(daemon: _Daemon, stack: AsyncExitStack) -> None:
    if daemon.load is not None:
        hangups = stack.enter_context(trio.open_signal_receiver(signal.SIGHUP))
    lanes = await stack.enter_async_context(open_lanes(poll_us=daemon.config.poll_us))
    try:
        inherited = systemd.take_listen_fds()
        stored = [one for one in inherited if one.name.startswith(fdstore.PREFIX)]
        # Modules and the configuration stay: no collection needs to walk them again. Devices come and go.
        gc.collect()
        gc.freeze()
        given = activation.adopt(daemon.config, [one for one in inherited if one not in stored])
        stack.callback(given.close)
        supervisor = await _open_devices(daemon, stack, lanes, given, stored)
        listeners = await _bind_metrics(stack, daemon.config.metrics, given)
        control = _bind_control(stack, daemon.config)
    except HcdError as exc:
        daemon.failure = exc  # not raised here: it would leave the nurseries above as a group
        daemon.notifier.status(f"cannot start: {exc}")
        return
    _log.info("ready: %s", ", ".join(host.spec.name for host in supervisor.hosts))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.report_status, daemon.notifier, supervisor)
        nursery.start_soon(keep_up, "stuck requests", partial(stuck.watch, supervisor))
        if daemon.watchdog is not None:
            nursery.start_soon(watch.keep_watchdog, daemon.notifier, lanes.reactor, daemon.watchdog)
        if listeners:
            render = cold.Renderer(supervisor.hot, supervisor.registry)
            nursery.start_soon(keep_up, "metrics", lambda: server.serve(listeners, render))
        async with trio.open_nursery() as sessions:
            for host in supervisor.hosts:
                supervisor.start(host, sessions)
            reloader = None
            if daemon.load is not None:
                reloader = Reloader(daemon.config, daemon.load, supervisor, daemon.notifier, sessions)
            if control is not None:
                calls = Calls(supervisor, Probe(lanes.reactor), started=daemon.started, config=daemon.config.file,
                              reloader=reloader)
                nursery.start_soon(keep_up, "control", partial(serve_control, control, calls.answer, calls.trace))
            await supervisor.taken_over()
            daemon.notifier.ready(watch.describe(supervisor.hosts))
            if daemon.beside is not None:
                await daemon.beside()
                sessions.cancel_scope.cancel()
            if reloader is not None:
                await reloader.on_signal(hangups)
        _say_stopping(daemon)
        nursery.cancel_scope.cancel()


async def _open_devices(
    daemon: _Daemon, stack: AsyncExitStack, lanes: Lanes, given: Activation, stored: Sequence[Inherited]
) -> Supervisor:
    """Every device of the configuration, open, each with its socket and with its session from an earlier process."""
    config = daemon.config
    supervisor = Supervisor(lanes, given, config.drain_timeout)
    supervisor.store = FdStore(daemon.notifier, fdstore.take_limit())
    supervisor.exit_on_disconnect = daemon.exit_on_disconnect
    stack.push_async_callback(supervisor.close_all)
    if daemon.inherited is not None:
        supervisor.inherit(config.devices[0], daemon.inherited)
    for spec in config.devices:
        daemon.notifier.extend_timeout(OPEN_TIMEOUT)
        await supervisor.open(spec)
    for spec in config.devices:
        supervisor.listen(spec)
    supervisor.hand_over(recover(supervisor.store, stored, supervisor.hosts))
    await supervisor.store.probe()
    daemon.supervisor = supervisor
    return supervisor


async def _bind_metrics(
    stack: AsyncExitStack, address: Address | None, given: Activation
) -> list[socket.socket]:
    if given.metrics:
        return list(given.metrics)
    if address is None:
        return []
    if address.path:
        made = sockets.UnixListener(address.path)
        stack.callback(made.close)
        listeners = [made.socket]
    else:
        try:
            opened = await trio.open_tcp_listeners(address.port, host=address.host)
        except (OSError, UnicodeError) as exc:  # UnicodeError: a host name that cannot be one
            reason = getattr(exc, "strerror", None) or exc
            raise ConfigError(f"cannot serve metrics on {address}: {reason}") from exc
        listeners = [stack.enter_context(socket.socket(fileno=one.socket.detach())) for one in opened]
        address = Address(host=address.host, port=listeners[0].getsockname()[1])
    _log.info("metrics at %s", address if address.path else f"http://{address}/metrics")
    return listeners


def _bind_control(stack: AsyncExitStack, config: DaemonConfig) -> socket.socket | None:
    """The control socket. That the default place cannot be had is no reason not to serve the devices."""
    spec = config.control
    path = "" if spec is None else settings.default_path() if spec.path is None else spec.path
    if spec is None or not path:
        return None
    try:
        made = settings.bind(spec, path)
    except ConfigError as exc:
        if spec.path is not None:
            raise
        _log.warning("no control socket: %s; [control] path chooses another place", exc)
        return None
    stack.callback(made.close)
    _log.info("control socket at %s", path)
    return made.socket


def _hasten(daemon: _Daemon, number: signal.Signals) -> None:
    """Have the signal end the process even where trio, which is to hear of it, hangs in a device."""
    tell = signal.getsignal(number)
    assert callable(tell)

    def handle(caught: int, frame: FrameType | None) -> None:
        if daemon.deadline.running:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(caught)
        daemon.deadline.start()
        tell(caught, frame)

    signal.signal(number, handle)


def _say_stopping(daemon: _Daemon) -> None:
    daemon.deadline.start()
    daemon.notifier.stopping()
    daemon.notifier.extend_timeout(daemon.stop_timeout())

