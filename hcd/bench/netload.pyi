"""The compiled load loop of ``hcd bench net``."""

from collections.abc import Sequence

from hcd.frontend.queue import Queue

class NetLoad:
    def __init__(
        self,
        flows: Sequence[tuple[Queue, Queue | None, bytes, bytes]],
        depth: int,
        size: int,
        header: int,
        polls: bool,
        verifies: bool,
    ) -> None: ...
    def run(self, seconds: float, flows: int | None = None) -> None: ...
    def send_some(self, flow: int, count: int) -> None: ...
    def forget(self) -> None: ...
    def quantile(self, q: float) -> float: ...
    def counts(self, i: int) -> dict[str, int]: ...
