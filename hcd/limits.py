"""What a device may take at most, as ``[device.limits]`` says it.

::

    [device.limits]
    requests_per_second = 5000     # on average
    requests_burst = 500           # at once; default: what a tenth of a second brings
    bytes_per_second = "100M"      # readable and written bytes of requests, headers included
    bytes_burst = "10M"

Token buckets of the data plane carry it out (dataplane/_limit.pxi), for all queues of the device together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hcd import options as opt

__all__ = ["NO_LIMITS", "Limits", "parse"]

#: seconds that a burst is worth where none is given
DEFAULT_BURST = 0.1
_RATES = {"requests_per_second": "requests_burst", "bytes_per_second": "bytes_burst"}
_KEYS = (*_RATES, *_RATES.values())
_MOST = 1 << 50


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates a second, and bursts; 0: no limit, and the default burst."""

    requests_per_second: int = 0
    requests_burst: int = 0
    bytes_per_second: int = 0
    bytes_burst: int = 0

    @property
    def given(self) -> bool:
        return bool(self.requests_per_second or self.bytes_per_second)

    def arguments(self) -> tuple[float, float, float, float]:
        """For :meth:`hcd.dataplane.virtqueue.Limit.set`."""
        requests, size = self.requests_per_second, self.bytes_per_second
        return (
            requests,
            self.requests_burst or requests * DEFAULT_BURST,
            size,
            self.bytes_burst or size * DEFAULT_BURST,
        )

    def __str__(self) -> str:
        said = [f"{self.requests_per_second} requests/s"] * bool(self.requests_per_second)
        said += [f"{self.bytes_per_second} bytes/s"] * bool(self.bytes_per_second)
        return " and ".join(said) or "no limit"


NO_LIMITS = Limits()


def parse(found: object) -> tuple[Limits, list[tuple[str, str]]]:
    """Limits from a parsed TOML table, and what is wrong with it: (key, text), key "" for the table itself."""
    if not isinstance(found, Mapping):
        return NO_LIMITS, [("", f"expected a table, found {opt.shown(found)}")]
    problems = [
        (key, f"is not a known key; expected {', '.join(_KEYS)}{opt.did_you_mean(key, _KEYS)}")
        for key in found
        if key not in _KEYS
    ]
    values: dict[str, int] = {}
    for key in _KEYS:
        if key in found:
            try:
                values[key] = _value(key, found[key])
            except ValueError as exc:
                problems.append((key, str(exc)))
    for rate, burst in _RATES.items():
        if burst in found and rate not in found:
            problems.append((burst, f"needs {rate}"))
    return Limits(**values), problems


def _value(key: str, value: Any) -> int:
    size = key.startswith("bytes")
    number: Any = value
    if size and isinstance(value, str):
        try:
            number = opt.parse_size(value)
        except ValueError:
            number = None
    if isinstance(number, bool) or not isinstance(number, int) or not 0 < number <= _MOST:
        noun = 'a size such as 1000000, "64M" or "1G"' if size else "a whole number"
        raise ValueError(f"expected {noun} above 0, found {opt.shown(value)}")
    return number
