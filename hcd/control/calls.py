"""What a daemon does for a call on its control socket."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from typing import Any

import trio

from hcd.control.collect import collect_devices
from hcd.control.protocol import Call, CallError
from hcd.control.snapshot import LastReload, Snapshot
from hcd.control.trace import DEFAULT_RATE, MAX_RATE, Feed, trace
from hcd.errors import DeviceError, shown
from hcd.host import DeviceHost, HostBase
from hcd.lanes import ReactorLane
from hcd.reload import Reloader
from hcd.supervisor import Supervisor
from hcd.version import VERSION

__all__ = ["Calls", "Probe"]

#: how long (seconds) the thread that serves the rings may take to answer before a snapshot says that it does not
PROBE_PATIENCE = 1.0


class Probe:
    """Whether the reactor still goes round. One question is under way at most, however long it hangs."""

    def __init__(self, lane: ReactorLane) -> None:
        self._lane = lane
        self._token = trio.lowlevel.current_trio_token()
        self._back: trio.Event | None = None

    async def answers(self) -> bool:
        """Waits up to PROBE_PATIENCE."""
        if self._back is None or self._back.is_set():
            back = self._back = trio.Event()
            self._lane.post(lambda: self._token.run_sync_soon(back.set))
        with trio.move_on_after(PROBE_PATIENCE):
            await self._back.wait()
        return self._back.is_set()


class Calls:
    """``started`` as time.time(). ``config`` is the file that the daemon was started with, "" for none."""

    def __init__(
        self,
        supervisor: Supervisor,
        probe: Probe,
        *,
        started: float,
        config: str = "",
        reloader: Reloader | None = None,
    ) -> None:
        self._supervisor = supervisor
        self._probe = probe
        self._started = started
        self._config = config
        self._reloader = reloader
        self._commands: Mapping[str, Callable[..., Any]] = {
            "snapshot": self._snapshot,
            "reload": self._reload,
            "resize": self._resize,
        }

    async def answer(self, call: Call) -> Any:
        """The result, for :func:`hcd.control.protocol.encode`. CallError when there is none."""
        return await self._commands[call.name](**call.arguments)

    # -- the snapshot

    async def _snapshot(self) -> Snapshot:
        answers = await self._probe.answers()
        supervisor = self._supervisor
        return Snapshot(
            hcd=VERSION,
            pid=os.getpid(),
            now=time.time(),
            started=self._started,
            config=self._config,
            answers=answers,
            reload=self._last_reload(),
            unserved=self._unserved(),
            devices=collect_devices(supervisor.hosts, supervisor.registry),
        )

    def _last_reload(self) -> LastReload | None:
        if self._reloader is None or self._reloader.last is None:
            return None
        last = self._reloader.last
        return LastReload(last.at, last.ok, last.text)

    def _unserved(self) -> list[str]:
        if self._reloader is None:
            return []
        served = {host.spec.name for host in self._supervisor.hosts}
        return [spec.name for spec in self._reloader.config.devices if spec.name not in served]

    # -- commands

    async def _reload(self) -> dict[str, Any]:
        if self._reloader is None:
            raise CallError("refused", "this daemon has no configuration file: it was started by hcd device")
        outcome = await self._reloader.reload()
        if not outcome.ok:
            raise CallError("refused", outcome.text)
        return asdict(outcome)

    async def _resize(self, device: str, size: int | None = None) -> dict[str, Any]:
        host = self._host(device)
        if not isinstance(host, DeviceHost):
            raise CallError("refused", f'"{device}" ({host.spec.type}) has no storage that can grow')
        if size is not None and not 0 < size < 1 << 62:
            raise CallError("request", f"{size} bytes are no size")
        if not await self._probe.answers():
            raise CallError("failed", "the thread that serves the rings does not answer: see hcd status")
        before = host.storage_size()
        after = await self._on_device(host, lambda: _bytes(host.device.resize(size)))
        session = host.session
        told = session is not None and session.can_notify and after != before
        if told:
            host.log.info("has %d bytes now, %s before; the front end is told", after, before)
            await self._on_device(host, host.device.notify_config_change)
        elif after != before:
            host.log.info("has %d bytes now, %s before", after, before)
        return {"device": device, "before": before, "after": after, "told": told, "connected": host.connected}

    async def _on_device(self, host: DeviceHost, call: Callable[[], Any]) -> Any:
        try:
            return await host.lane.run(call)
        except DeviceError as error:
            raise CallError("refused", f"{host.spec.name}: {error}") from None
        except Exception as error:
            host.device_failed("what hcd resize asked for", error)
            raise CallError("failed", f"{host.spec.name}: {shown(error)}") from None

    def _host(self, device: str) -> HostBase:
        names = [host.spec.name for host in self._supervisor.hosts]
        if device not in names:
            raise CallError("unknown", f'there is no device "{device}"; expected one of {", ".join(names)}')
        return self._supervisor.hosts[names.index(device)]

    # -- live

    def trace(self, call: Call) -> AbstractAsyncContextManager[Feed]:
        """What a device says and does, while the block lasts. CallError."""
        host = self._host(call.arguments["device"])
        rate = call.arguments.get("rate", DEFAULT_RATE)
        if not 1 <= rate <= MAX_RATE:
            raise CallError("request", f"rate: expected 1 to {MAX_RATE} requests a second")
        return trace(host, rate)


def _bytes(size: object) -> int:
    """What a device's resize() returned. TypeError unless it is a size."""
    if not isinstance(size, int) or size < 0:
        raise TypeError(f"resize() returned {size!r}; expected the new size in bytes")
    return size
