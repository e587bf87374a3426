"""Entropy for guests (virtio 1.3, 5.4): random bytes of the host's kernel.

A limit, where one is set, holds for the device as a whole, over connections: ``max-bytes`` in each ``period``. A
request gets what is left of the period, at least one byte; one that finds nothing left waits for the next, in order.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from hcd_protocols.virtio.ids import DeviceId
from hcd_protocols.virtio.rng import NUM_QUEUES

from hcd.device import Device, Handle, Lane, Option, Request, Virtqueue

__all__ = ["Entropy"]

#: bytes of one answer: a driver that wants more asks again, and nobody waits for it
CHUNK = 64 << 10


class Entropy(Device):
    """Fills requests with getrandom(2)."""

    virtio_id = DeviceId.ENTROPY
    description = "entropy from the host's getrandom"
    operations = ("draw",)
    vhost_user_type = "rng"
    options = (
        Option("max-bytes", "size", "bytes that the guest gets in each period; without it no limit", minimum=1),
        Option("period", "int", "the period of max-bytes in milliseconds", 1000, minimum=1, maximum=86_400_000),
    )

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        self._limit: int | None = self.option["max_bytes"]
        self._period: float = self.option["period"] / 1000
        self._left = 0
        self._ends = 0.0  # of the current period, time.monotonic()
        self._waiting: deque[Request] = deque()
        self._timer: Handle | None = None
        self._lane: Lane

    @property
    def num_queues(self) -> int:
        return NUM_QUEUES

    def open(self, lane: Lane) -> None:
        self._lane = lane

    def process(self, queue: Virtqueue) -> None:
        for request in queue:
            if not request.writable:
                request.status = 1
                request.complete(0)
            elif self._limit is None:
                _fill(request, CHUNK)
            elif self._waiting or not self._allowance():
                request.hold()
                self._waiting.append(request)
                self._await_next_period()
            else:
                self._left -= _fill(request, self._left)

    def stop_queue(self, queue: Virtqueue) -> None:
        """Requests that wait get the one byte that a device owes them (5.4.6.2)."""
        while self._waiting:
            _fill(self._waiting.popleft(), 1)
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _allowance(self) -> int:
        """Bytes that may be given out now."""
        assert self._limit is not None
        now = time.monotonic()
        if now >= self._ends:
            self._left = self._limit
            self._ends = now + self._period
        return self._left

    def _await_next_period(self) -> None:
        if self._timer is None:
            self._timer = self._lane.call_later(max(0.0, self._ends - time.monotonic()), self._period_began)

    def _period_began(self) -> None:
        self._timer = None
        while self._waiting and self._allowance():
            self._left -= _fill(self._waiting.popleft(), self._left)
        if self._waiting:
            self._await_next_period()


def _fill(request: Request, most: int) -> int:
    """Complete ``request`` with up to ``most`` random bytes; returns how many."""
    count = min(request.writable, most, CHUNK)
    request.write(os.urandom(count))
    request.complete(count)
    return count
