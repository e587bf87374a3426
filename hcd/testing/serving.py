"""A device served in this process, by the code that serves it in the daemon.

A thread runs trio with the lanes, the device's host and the accept loop on a socket in a temporary directory. The test
stays synchronous: it connects to that socket like any front end.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, overload

import trio
from hcd_protocols.doorbell import Item

from hcd import options as opt
from hcd import plugins
from hcd.config import DeviceSpec
from hcd.dataplane.stats import HotText
from hcd.demo.hcd_process import Metrics
from hcd.device import Device, DeviceBase, DoorbellDevice
from hcd.doorbell import Registry
from hcd.doorbell_host import DoorbellHost
from hcd.frontend.client import DEVICE_FEATURES
from hcd.host import DeviceHost, HostBase
from hcd.lanes import Lanes, open_lanes
from hcd.metrics import cold
from hcd.sockets import KINDS
from hcd.testing.driver import Driver
from hcd.testing.vmm import Vmm
from hcd.transports import kvm, vhost_user

__all__ = ["DoorbellSource", "Served", "ServedDevice", "ServedDoorbells", "Source", "make_device", "serve"]

T = TypeVar("T")

#: what can be served: a device, a class or function that makes one, or the name of an installed type
Source = Device | Callable[..., Device] | str
DoorbellSource = DoorbellDevice | Callable[..., DoorbellDevice]

#: how long (seconds) starting and stopping may take
PATIENCE = 20.0


@overload
def serve(
    device: Source,
    options: Mapping[str, Any] | None = None,
    *,
    name: str = "dev",
    drain_timeout: float = 1.0,
    poll_us: float = 32,
) -> ServedDevice: ...
@overload
def serve(
    device: DoorbellSource,
    options: Mapping[str, Any] | None = None,
    *,
    name: str = "dev",
    drain_timeout: float = 1.0,
    poll_us: float = 32,
) -> ServedDoorbells: ...
def serve(
    device: Source | DoorbellSource,
    options: Mapping[str, Any] | None = None,
    *,
    name: str = "dev",
    drain_timeout: float = 1.0,
    poll_us: float = 32,
) -> ServedDevice | ServedDoorbells:
    """Serve ``device`` for as long as the ``with`` block lasts.

    ``device`` is an instance that was not opened, a class (made with ``options``, the others at their defaults), or the
    name of an installed type. Whatever the device raises in ``open`` is raised at the beginning of the block.
    """
    made = make_device(device, options, name)
    if isinstance(made, DoorbellDevice):
        return ServedDoorbells(made, name=name, drain_timeout=drain_timeout, poll_us=poll_us)
    return ServedDevice(made, name=name, drain_timeout=drain_timeout, poll_us=poll_us)


def make_device(
    source: Source | DoorbellSource, options: Mapping[str, Any] | None = None, name: str = "dev"
) -> Device | DoorbellDevice:
    """The device that ``source`` means. ValueError for options that it does not declare or that it does not take."""
    if isinstance(source, Device | DoorbellDevice):
        if options:
            raise ValueError("options are for devices that are still to be made")
        return source
    found = plugins.load(source) if isinstance(source, str) else source
    if isinstance(found, type) and issubclass(found, Device | DoorbellDevice):
        return found(name, checked_options(found, options or {}))
    if options:
        raise ValueError("options are for device types; this is a function that makes a device")
    made = found()
    if not isinstance(made, Device | DoorbellDevice):
        raise TypeError(f"{source!r} made {made!r}, not a device")
    return made


def checked_options(cls: type[DeviceBase], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` as a configuration file would give it, with the defaults of what is not there."""
    values = opt.defaults(cls.options)
    for key, value in given.items():
        option = opt.find(cls.options, key)
        if option is None:
            raise ValueError(f'{cls.__name__} has no option "{key}"')
        values[option.key] = opt.from_toml(option, value)
    return values


class Served:
    """A device behind a socket. A context manager; made by :func:`serve`."""

    host: HostBase

    def __init__(self, device: DeviceBase, *, name: str, drain_timeout: float, poll_us: float) -> None:
        #: what went wrong in a method of the device that no guest is to blame for, and took a connection along
        self.crashes: list[BaseException] = []
        #: what held up everything else, and for how long (nanoseconds)
        self.slow_steps: list[tuple[str, int]] = []
        #: called when the device is closed and the lanes still go on
        self.after_close: Callable[[], Awaitable[None]] | None = None
        self._kind = KINDS[device.transport]
        self._drain_timeout = drain_timeout
        self._poll_us = poll_us
        self._directory = ""
        self._spec = DeviceSpec(name=name, type=type(device).__name__, socket="")
        self._registry = Registry()
        self._hot = HotText()
        self._started: Future[None] = Future()
        self._thread: threading.Thread | None = None
        self._token: trio.lowlevel.TrioToken
        self._stop: trio.Event

    # -- life

    def __enter__(self) -> Self:
        self._directory = tempfile.mkdtemp(prefix="hcd-")
        self._spec = replace(self._spec, socket=f"{self._directory}/socket")
        self._thread = threading.Thread(target=self._run, name="hcd-testing")
        self._thread.start()
        try:
            self._started.result(PATIENCE)
        except BaseException:
            self._join()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._token.run_sync_soon(lambda: self._stop.set())
        self._join()

    def _join(self) -> None:
        assert self._thread is not None
        self._thread.join(PATIENCE)
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._thread.is_alive():
            raise TimeoutError("the device could not be closed: a handler of it never returns")

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:
            if not self._started.done():
                self._started.set_exception(error)
            else:
                self.crashes += leaves(error)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        failure: Exception | None = None
        with socket.socket(socket.AF_UNIX, self._kind) as listener:
            listener.bind(self._spec.socket)
            listener.listen()
            async with open_lanes(self._poll_us) as lanes:
                lanes.slow.on_slow = self._note_slow_step
                self._make_host(lanes)
                try:
                    await self.host.open()
                except Exception as error:  # not raised here: the nursery of the lanes would wrap it
                    failure = error
                else:
                    await self._serve(listener)
                    await self.host.close()
                    if self.after_close is not None:
                        await self.after_close()
        if failure is not None:
            raise failure

    async def _serve(self, listener: socket.socket) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_serving, listener)
            self._started.set_result(None)
            await self._stop.wait()
            nursery.cancel_scope.cancel()

    async def _keep_serving(self, listener: socket.socket) -> None:
        while True:
            try:
                await self._accept(listener)
            except* Exception as group:
                self.crashes += leaves(group)
            await trio.lowlevel.checkpoint()

    def _make_host(self, lanes: Lanes) -> None:
        raise NotImplementedError

    async def _accept(self, listener: socket.socket) -> None:
        raise NotImplementedError

    def _note_slow_step(self, device: str, what: str, ns: int) -> None:
        self.slow_steps.append((what, ns))

    # -- for tests

    @property
    def path(self) -> Path:
        """The socket, for any front end."""
        return Path(self._spec.socket)

    def run(self, function: Callable[[], T]) -> T:
        """Call ``function`` on the device's lane and return what it returns: the only thread that may touch it."""
        done: Future[T] = Future()

        def job() -> None:
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

        self.host.lane.post(job)
        return done.result(PATIENCE)

    def wait_disconnected(self) -> None:
        """Return when the last session has been torn down: the device was told ``disconnect``."""

        deadline = time.monotonic() + PATIENCE
        while self.host.connected or self.host.session is not None:
            if time.monotonic() > deadline:
                raise TimeoutError("the session does not end")
            time.sleep(0.0005)

    def metrics(self) -> Metrics:
        """What /metrics of a daemon with this device would say now."""
        render = cold.Renderer(self._hot, self._registry)
        return Metrics(b"".join(render()).decode())


class ServedDevice(Served):
    """A virtio device, for front ends."""

    host: DeviceHost

    def __init__(self, device: Device, *, name: str, drain_timeout: float, poll_us: float) -> None:
        super().__init__(device, name=name, drain_timeout=drain_timeout, poll_us=poll_us)
        self.device = device

    def _make_host(self, lanes: Lanes) -> None:
        self.host = DeviceHost(
            self._spec, self.device,
            lanes=lanes, registry=self._registry, hot=self._hot, drain_timeout=self._drain_timeout,
        )

    async def _accept(self, listener: socket.socket) -> None:
        await vhost_user.serve(self.host, listener)

    def driver(
        self,
        *,
        queues: int | None = None,
        size: int = 64,
        packed: bool = False,
        event_idx: bool = True,
        in_order: bool = False,
        version_1: bool = True,
        device: int = DEVICE_FEATURES,
        memory_size: int = 16 << 20,
        timeout: float = 20.0,
    ) -> Driver:
        """A driver that is connected and has started ``queues`` (all) queues of ``size`` entries. Close it."""
        return Driver.open(
            self.path,
            queues=self.device.num_queues if queues is None else queues,
            size=size,
            packed=packed,
            event_idx=event_idx,
            in_order=in_order,
            version_1=version_1,
            device=device,
            memory_size=memory_size,
            timeout=timeout,
        )


class ServedDoorbells(Served):
    """A doorbell device, for VMMs."""

    host: DoorbellHost

    def __init__(self, device: DoorbellDevice, *, name: str, drain_timeout: float, poll_us: float) -> None:
        super().__init__(device, name=name, drain_timeout=drain_timeout, poll_us=poll_us)
        self.device = device

    def _make_host(self, lanes: Lanes) -> None:
        self.host = DoorbellHost(
            self._spec, self.device,
            lanes=lanes, registry=self._registry, hot=self._hot, drain_timeout=self._drain_timeout,
        )

    async def _accept(self, listener: socket.socket) -> None:
        await kvm.serve(self.host, listener)

    def vmm(self, *, register: Callable[[Item], int] = lambda item: 0, timeout: float = 20.0) -> Vmm:
        """A VMM that is attached. Close it. ``register``: which errno each item fails with, 0: none."""
        return Vmm(self.path, register=register, timeout=timeout)


def leaves(error: BaseException) -> Sequence[BaseException]:
    """The exceptions in a group of groups."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]
