"""What a rule of the conformance check is played in, whatever kind of device it is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hcd.demo.hcd_process import Resources
from hcd.testing.driver import Driver
from hcd.testing.serving import Served
from hcd.testing.settle import settled_growth
from hcd.testing.vmm import Vmm

__all__ = ["Broken", "MisfitError", "Scene", "reconnect"]

#: connections in a row
RECONNECTS = 5


class Broken(Exception):
    """A rule is broken; ``rule`` where it is another one than the scene's."""

    def __init__(self, text: str, rule: str = "") -> None:
        super().__init__(text)
        self.rule = rule


class MisfitError(ValueError):
    """An exchange is about something that the device, or the driver, does not have: the test is to blame."""


class Scene:
    """The served device, and the connection of whoever plays with it."""

    def __init__(self, served: Served, exchanges: Sequence[Any], timeout: float) -> None:
        self.served: Any = served
        self.exchanges = exchanges
        self.timeout = timeout
        #: what is being done, for messages
        self.step = "connecting"
        self._open: list[Driver | Vmm] = []

    def connect(self) -> object:
        """A new connection, after the last one was let go."""
        raise NotImplementedError

    def close(self) -> None:
        """Hang up."""
        while self._open:
            self._open.pop().close()

    def work_once(self) -> None:
        """What the author gave is served."""
        raise NotImplementedError


def reconnect(scene: Scene) -> None:
    """Connections leave nothing behind."""
    scene.connect()
    scene.close()
    scene.served.wait_disconnected()
    before = Resources()
    for number in range(RECONNECTS):
        scene.connect()
        scene.step = f"on connection {number + 2}"
        scene.work_once()
        scene.close()
        scene.served.wait_disconnected()
    if growth := settled_growth(before, Resources):
        raise Broken(f"after {RECONNECTS} connections this process holds more: {growth}", "leaks")
