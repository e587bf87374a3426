"""What a daemon tells the service manager while it runs: how many are connected, and that it makes progress."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from hcd.host import HostBase
from hcd.lanes import ReactorLane
from hcd.supervisor import Supervisor
from hcd.systemd import Notifier

__all__ = ["describe", "keep_watchdog", "report_status"]

#: at most one status in this time (seconds), however often front ends come and go
STATUS_PAUSE = 0.2
#: how many names a status has room for
_MAX_NAMES = 8


def describe(hosts: Sequence[HostBase]) -> str:
    """One line: "3 devices, 1 connected: disk0"."""
    connected = [host.spec.name for host in hosts if host.connected]
    text = f"{len(hosts)} device{'s' if len(hosts) != 1 else ''}, {len(connected)} connected"
    if not connected:
        return text
    more = [f"and {len(connected) - _MAX_NAMES} more"] if len(connected) > _MAX_NAMES else []
    return f"{text}: {', '.join(connected[:_MAX_NAMES] + more)}"


async def report_status(notifier: Notifier, supervisor: Supervisor) -> None:
    """Send a status whenever it has changed, until cancelled."""
    token = trio.lowlevel.current_trio_token()
    changed = trio.Event()

    def wake() -> None:
        changed.set()

    supervisor.on_change = lambda: token.run_sync_soon(wake, idempotent=True)
    told = describe(supervisor.hosts)
    while True:
        await changed.wait()
        changed = trio.Event()
        text = describe(supervisor.hosts)
        if text != told:
            notifier.status(text)
            told = text
        await trio.sleep(STATUS_PAUSE)


async def keep_watchdog(notifier: Notifier, lane: ReactorLane, period: float) -> None:
    """Twice in each ``period`` (seconds), say that both loops go round. A loop that is stuck is not pinged for.

    This task is the progress of trio. That of the reactor: what was posted to it came back, and its loop has begun
    another round since.
    """
    while True:
        before = lane.reactor.beats
        await _round_trip(lane)
        while lane.reactor.beats == before:  # it was taken in the round that was under way
            await _round_trip(lane)
        notifier.watchdog()
        await trio.sleep(period / 2)


async def _round_trip(lane: ReactorLane) -> None:
    back = trio.Event()
    token = trio.lowlevel.current_trio_token()
    lane.post(lambda: token.run_sync_soon(back.set))
    await back.wait()
