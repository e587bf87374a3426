"""Where the frames of a network device go: the other end of the guest's cable.

A link is made by its device, opened and closed on the main thread, and used on the lane's thread alone otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from hcd.dataplane.switch import QueuePort, Switch
from hcd.device import Lane, Virtqueue

__all__ = ["HubLink", "Link"]

_HUBS = "hcd.devices.net: hubs by name"


class Link:
    """Base of the links. ``port`` is the guest's end; ``changed`` is to be called when ``up`` changes."""

    #: whether frames get anywhere; what the guest sees as the status of its link
    up = True

    def __init__(
        self, port: QueuePort, log: logging.LoggerAdapter[logging.Logger], changed: Callable[[], None]
    ) -> None:
        self.port = port
        self.log = log
        self.changed = changed

    def open(self, lane: Lane, pairs: int) -> None:
        """Open what is needed for ``pairs`` queue pairs. ConfigError when that fails."""

    def close(self) -> None:
        """Release it. Every queue is stopped."""

    def start_receiving(self, queue: Virtqueue) -> None:
        """Receive queue ``queue`` runs: frames for the guest may go into it."""
        self.port.start(queue.index, queue)

    def stop_receiving(self, queue: Virtqueue) -> None:
        self.port.stop(queue)

    def stop_sending(self, queue: Virtqueue) -> None:
        """Transmit queue ``queue`` stops."""

    def transmit(self, queue: Virtqueue) -> None:
        """Take the frames of this turn out of transmit queue ``queue``."""
        self.port.drain(queue)

    def refilled(self, queue: Virtqueue) -> None:
        """The guest added buffers to receive queue ``queue``, which had asked for that."""

    def announce(self, frame: bytes) -> None:
        """Send ``frame`` as if it came from the guest."""
        self.port.inject(frame)


class HubLink(Link):
    """A port of the switch ``hub``, which all devices of the lane share that name it."""

    def __init__(self, hub: str, *common: Any) -> None:
        super().__init__(*common)
        self._hub = hub
        self._hubs: dict[str, Switch] = {}

    def open(self, lane: Lane, pairs: int) -> None:
        self._hubs = lane.shared.setdefault(_HUBS, {})
        self._hubs.setdefault(self._hub, Switch(self._hub)).add(self.port)

    def close(self) -> None:
        switch = self._hubs.get(self._hub)
        if switch is not None:
            switch.remove(self.port)
            if not switch.ports:
                del self._hubs[self._hub]
