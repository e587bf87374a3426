"""``error``: requests that fail or take long, by probability or by pattern, without the device's doing."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import Any

from hcd.dataplane.virtqueue import Request
from hcd.device import Device, Option
from hcd.wrappers.base import Log, Wrapper

__all__ = ["ErrorWrapper"]

PASS, FAIL, DELAY = ".", "x", "d"


class ErrorWrapper(Wrapper):
    """A request that fails never reaches the device; one that is delayed does, and the driver hears of it late."""

    description = "fail or delay requests"
    options = (
        Option("probability", "float", "how many of the requests fail, 0 to 1", 0.0, minimum=0, maximum=1),
        Option("delay-probability", "float", "how many of the others are delayed", 0.0, minimum=0, maximum=1),
        Option("pattern", "str", 'instead: a letter a request, over and over: "." passes, "x" fails, "d" is delayed'),
        Option("delay-ms", "int", "for how long", 100, minimum=1, maximum=3_600_000),
        Option("status", "int", "the device's status of a failed request", 1, minimum=0, maximum=255),
        Option("queue", "int", "only requests of this queue", minimum=0, maximum=255),
        Option("seed", "int", "the same faults in every run"),
    )

    @classmethod
    def check(cls, option: Mapping[str, Any]) -> None:
        pattern, chance = option["pattern"], option["probability"] or option["delay_probability"]
        if pattern is None and not chance:
            raise ValueError("expected probability, delay-probability or pattern: nothing would ever happen")
        if pattern is not None and chance:
            raise ValueError("expected a pattern or probabilities, not both")
        if pattern is not None and (not pattern or set(pattern) - {PASS, FAIL, DELAY}):
            raise ValueError(f'expected a pattern of ".", "x" and "d", found "{pattern}"')

    def __init__(self, device: Device, option: Mapping[str, Any], log: Log) -> None:
        super().__init__(device, option, log)
        self._pattern: Iterator[str] | None = cycle(option["pattern"]) if option["pattern"] is not None else None
        self._random = random.Random(option["seed"])
        self._delayed: set[int] = set()  # by id(), see LogWrapper

    def taken(self, request: Request) -> bool:
        self._delayed.discard(id(request))  # request objects are used again
        if self.option["queue"] not in (None, request.queue.index):
            return True
        action = self._next()
        if action == DELAY:
            self._delayed.add(id(request))
        elif action == FAIL:
            self._fail(request)
            return False
        return True

    def _next(self) -> str:
        if self._pattern is not None:
            return next(self._pattern)
        if self._random.random() < self.option["probability"]:
            return FAIL
        return DELAY if self._random.random() < self.option["delay_probability"] else PASS

    def _fail(self, request: Request) -> None:
        request.status = 1
        try:
            self.device.fail_request(request, self.option["status"])
        finally:
            if not request.completed:
                request.complete(0)

    def done(self, request: Request, written: int) -> float:
        if id(request) not in self._delayed:
            return 0.0
        self._delayed.discard(id(request))
        return float(self.option["delay_ms"]) / 1000
