"""Requests that have been in flight for too long: a metric, and a line in the log when it begins and when it ends.

Nothing is counted for each request: the data plane keeps the time of the oldest one of a queue anyway, and here it
is looked at a few times in each ``stuck_after``. How many are stuck is counted by the lane, if that goes on; while a
handler blocks the lane it is at least one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from hcd.host import DeviceHost, HostBase
from hcd.supervisor import Supervisor

__all__ = ["StuckRequests", "watch"]

#: looks in each stuck_after, and the bounds of the time between two (seconds)
LOOKS = 4
SHORTEST, LONGEST = 0.05, 5.0
NS = 1_000_000_000


@dataclass(slots=True)
class StuckRequests:
    """What is stuck now: when each queue's trouble was first seen, as the age of its oldest request then and last."""

    _ages: dict[tuple[HostBase, int], float] = field(default_factory=dict)

    def look(self, hosts: Sequence[HostBase]) -> None:
        """Compare every queue's oldest request with what its device allows."""
        for gone in [key for key in self._ages if key[0] not in hosts]:
            del self._ages[gone]
        for host in hosts:
            if isinstance(host, DeviceHost):
                for index, stats in enumerate(host.queue_stats):
                    self._look_at(host, index, stats.oldest_ns() / NS)

    def _look_at(self, host: DeviceHost, index: int, age: float) -> None:
        limit = host.spec.stuck_after
        key = host, index
        if limit and age > limit:
            if key not in self._ages:
                host.rare_log.warning(
                    (index, "stuck"), "queue %d: a request has been in flight for %.1f s, longer than stuck_after "
                    "(%g s)", index, age, limit,
                )
            self._ages[key] = age
            host.set_stuck(index, max(1, host.stuck_in(index)))
            _count(host, index, limit)
        elif key in self._ages:
            lasted = self._ages.pop(key)
            host.set_stuck(index, 0)
            host.rare_log.log(
                logging.INFO, (index, "not stuck"), "queue %d: no request is stuck any more; one was in flight for "
                "%.1f s at least", index, lasted,
            )


def _count(host: DeviceHost, index: int, limit: float) -> None:
    """Have the lane count, without waiting for it."""
    queues = host.session.queues() if host.session is not None else ()

    def count() -> None:
        if host.stuck_in(index):
            host.set_stuck(index, max(1, queues[index].older_than(int(limit * NS))))

    if queues:
        host.lane.post(count)


async def watch(supervisor: Supervisor) -> None:
    """Look again and again, until cancelled."""
    stuck = StuckRequests()
    while True:
        stuck.look(supervisor.hosts)
        limits = [host.spec.stuck_after for host in supervisor.hosts if host.spec.stuck_after]
        await trio.sleep(min(LONGEST, max(SHORTEST, min(limits, default=math.inf) / LOOKS)))
