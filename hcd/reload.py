"""Another configuration for a running daemon: by SIGHUP, or over the control socket. One at a time."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import trio

from hcd import watch
from hcd.config import DaemonConfig
from hcd.errors import HcdError
from hcd.supervisor import Plan, Supervisor
from hcd.systemd import Notifier

__all__ = ["FIXED", "Outcome", "Reloader"]

#: what only a restart changes
FIXED = (("[daemon] metrics", "metrics"), ("[control]", "control"))

_log = logging.getLogger("hcd.daemon")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the last one went. ``text``: what changed, or why it was refused. ``notes``: what takes a restart."""

    at: float
    ok: bool
    text: str
    notes: tuple[str, ...] = ()


class Reloader:
    """Reads the configuration with ``load`` (in a thread: it may import plug-ins) and puts it into effect."""

    def __init__(
        self,
        config: DaemonConfig,
        load: Callable[[], DaemonConfig],
        supervisor: Supervisor,
        notifier: Notifier,
        sessions: trio.Nursery,
    ) -> None:
        self.config = self._started_with = config
        self.last: Outcome | None = None
        self._load = load
        self._supervisor = supervisor
        self._notifier = notifier
        self._sessions = sessions
        self._one_at_a_time = trio.Lock()

    async def on_signal(self, hangups: AsyncIterator[int]) -> None:
        async for _ in hangups:
            await self.reload()

    async def reload(self) -> Outcome:
        """Returns how it went; raises nothing. Only the end of the daemon cancels it."""
        async with self._one_at_a_time:
            self._notifier.reloading()
            self.last = outcome = await self._try()
            # Devices that are gone: their parts refer to each other. What was there before the first device is frozen
            # (hcd.daemon), so this walks the devices alone; it holds up the handlers meanwhile.
            gc.collect()
            self._notifier.ready(watch.describe(self._supervisor.hosts))
        return outcome

    async def _try(self) -> Outcome:
        try:
            plan, notes = await self._apply()
        except HcdError as exc:
            for line in str(exc).splitlines():
                _log.error("not reloaded, all is as before: %s", line)
            return Outcome(time.time(), False, str(exc))
        except Exception as exc:
            _log.exception("not reloaded: a defect")
            return Outcome(time.time(), False, f"a defect of hcd: {type(exc).__name__}: {exc}")
        for note in notes:
            _log.warning("%s", note)
        _log.info("reloaded: %s", plan)
        return Outcome(time.time(), True, str(plan), tuple(notes))

    async def _apply(self) -> tuple[Plan, list[str]]:
        config = await trio.to_thread.run_sync(self._load)
        plan = await self._supervisor.apply(config, self._sessions)
        notes = [
            f"{name} has changed; that takes effect at the next restart"
            for name, key in FIXED
            if getattr(config, key) != getattr(self._started_with, key)
        ]
        self.config = config
        return plan, notes
