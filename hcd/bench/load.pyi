"""The compiled load loop of ``hcd bench``."""

from collections.abc import Sequence

from hcd.frontend.queue import Queue

READ: int
WRITE_ALL: int
MIX: int

class BlkLoad:
    def __init__(
        self,
        queues: Sequence[Queue],
        depth: int,
        size: int,
        span: int,
        rw: int,
        polls: bool,
        verifies: bool,
        seed: int = 1,
    ) -> None: ...
    def run(self, seconds: float) -> None: ...
    def sweep(self, rw: int) -> None: ...
    def forget(self) -> None: ...
    def quantile(self, q: float) -> float: ...
    def longest_gap(self) -> float: ...
    def counts(self) -> dict[str, int]: ...
