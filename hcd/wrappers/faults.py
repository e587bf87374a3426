"""Which of many things fail or take long: by probability or by pattern."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import Any

from hcd.device import Option

__all__ = ["DELAY", "FAIL", "PASS", "Faults"]

PASS, FAIL, DELAY = ".", "x", "d"


class Faults:
    """``option`` has the values of :meth:`options`."""

    def __init__(self, option: Mapping[str, Any]) -> None:
        self._option = option
        self._pattern: Iterator[str] | None = cycle(option["pattern"]) if option["pattern"] is not None else None
        self._random = random.Random(option["seed"])
        #: for how long (seconds) what is delayed is delayed
        self.delay = float(option["delay_ms"]) / 1000

    @staticmethod
    def options(one: str, many: str) -> tuple[Option, ...]:
        """``one``: what fails, as "a request"; ``many``: "requests"."""
        return (
            Option("probability", "float", f"how many of the {many} fail, 0 to 1", 0.0, minimum=0, maximum=1),
            Option("delay-probability", "float", "how many of the others are delayed", 0.0, minimum=0, maximum=1),
            Option("pattern", "str", f'instead: a letter {one}, over and over: "." passes, "x" fails, "d" is delayed'),
            Option("delay-ms", "int", "for how long", 100, minimum=1, maximum=3_600_000),
            Option("seed", "int", "the same faults in every run"),
        )

    @staticmethod
    def check(option: Mapping[str, Any]) -> None:
        """ValueError where the options do not fit together."""
        pattern, chance = option["pattern"], option["probability"] or option["delay_probability"]
        if pattern is None and not chance:
            raise ValueError("expected probability, delay-probability or pattern: nothing would ever happen")
        if pattern is not None and chance:
            raise ValueError("expected a pattern or probabilities, not both")
        if pattern is not None and (not pattern or set(pattern) - {PASS, FAIL, DELAY}):
            raise ValueError(f'expected a pattern of ".", "x" and "d", found "{pattern}"')

    def next(self) -> str:
        """What becomes of the next one: PASS, FAIL or DELAY."""
        if self._pattern is not None:
            return next(self._pattern)
        if self._random.random() < self._option["probability"]:
            return FAIL
        return DELAY if self._random.random() < self._option["delay_probability"] else PASS
