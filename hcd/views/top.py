"""``hcd top``: what each device did between two snapshots, the busiest first.

LOAD is the number of requests in flight on average: the time that all of them took, by the time that passed (Little's
law). P99 is of the requests of the interval, read off the exported buckets, so it is exact to a factor of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hcd.control.snapshot import DeviceState, Snapshot
from hcd.views.problems import find_problems
from hcd.views.text import align, bytes_, count, cut, duration, printable, rate, time_ago

__all__ = ["COLUMNS", "Activity", "activities", "top"]

COLUMNS = ("DEVICE", "PATH", "REQ/S", "RINGS/S", "READ/S", "WRITE/S", "INFL", "LOAD", "P99", "ERR")
WIDTH = 80
_NAME, _PATH = 15, 7
_RIGHT = COLUMNS[2:]
#: upper bounds of the exported buckets, seconds
_BOUNDS = tuple((1 << k) / 1e9 for k in range(10, 31))


@dataclass(frozen=True, slots=True)
class Activity:
    """One device in one interval, by the second. ``errors``: requests that failed in it, not by the second."""

    name: str
    path: str
    requests: float
    rings: float
    to_guest: float
    from_guest: float
    inflight: int
    load: float
    p99: float | None
    errors: int


def activities(before: Snapshot | None, now: Snapshot) -> list[Activity]:
    """The busiest first: by load, then by requests and rings, then by name. Without ``before``: since the start."""
    old = {device.name: device for device in before.devices} if _comparable(before, now) and before else {}
    since = before.now if before is not None and old else now.started
    seconds = max(now.now - since, 1e-6)
    found = [_activity(old.get(device.name), device, seconds) for device in now.devices]
    return sorted(found, key=lambda one: (-one.load, -one.requests, -one.rings, one.name))


def _comparable(before: Snapshot | None, now: Snapshot) -> bool:
    """Whether both are of one life of the daemon."""
    return before is not None and (before.pid, before.started) == (now.pid, now.started)


def _activity(before: DeviceState | None, now: DeviceState, seconds: float) -> Activity:
    old, new = _totals(before), _totals(now)
    if any(was > is_ for was, is_ in zip(old.counts, new.counts, strict=True)):
        old = _totals(None)  # another device of the same name: removed and added again
    requests, failed, rings, to_guest, from_guest = (b - a for a, b in zip(old.counts, new.counts, strict=True))
    buckets = [b - a for a, b in zip(old.buckets, new.buckets, strict=True)] if old.buckets else new.buckets
    return Activity(
        name=now.name,
        path=",".join(dict.fromkeys(bell.path for bell in now.doorbells if bell.current)),
        requests=requests / seconds,
        rings=rings / seconds,
        to_guest=to_guest / seconds,
        from_guest=from_guest / seconds,
        inflight=sum(queue.inflight for queue in now.queues),
        load=(new.busy - old.busy) / seconds,
        p99=_quantile(buckets, 0.99),
        errors=failed,
    )


@dataclass(frozen=True, slots=True)
class _Totals:
    counts: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)  # requests, failed, rings, to guest, from guest
    busy: float = 0.0
    buckets: Sequence[int] = ()


def _totals(device: DeviceState | None) -> _Totals:
    if device is None:
        return _Totals()
    queues = device.queues
    full = [queue.latency.buckets for queue in queues if queue.latency.buckets]
    return _Totals(
        (
            sum(queue.done for queue in queues),
            sum(queue.failed for queue in queues),
            sum(bell.rings for bell in device.doorbells),
            sum(queue.bytes_to_guest for queue in queues),
            sum(queue.bytes_from_guest for queue in queues),
        ),
        sum(queue.latency.sum for queue in queues),
        [sum(column) for column in zip(*full, strict=True)],
    )


def _quantile(cumulative: Sequence[int], q: float) -> float | None:
    """The upper bound of the bucket that holds it; the last bound for what lies behind."""
    if not cumulative or not cumulative[-1]:
        return None
    wanted = q * cumulative[-1]
    return next((bound for bound, seen in zip(_BOUNDS, cumulative, strict=False) if seen >= wanted), _BOUNDS[-1])


# -- the text


def top(before: Snapshot | None, now: Snapshot, lines: int | None = None) -> list[str]:
    """One frame, 80 columns wide; ``lines`` is how many there is room for."""
    rows = [_row(one) for one in activities(before, now)]
    interval = f"last {now.now - before.now:.1f} s" if before is not None else "since the start"
    connected = sum(device.peer is not None for device in now.devices)
    head = f"hcd {now.hcd}, pid {now.pid}, up {time_ago(now.uptime)}; {connected} of {len(rows)} connected; {interval}"
    frame = [head, *(f"! {problem}" for problem in find_problems(now)), "", *_table(rows)]
    if lines is not None and len(frame) > lines:
        hidden = len(frame) - lines + 1
        frame = [*frame[: lines - 1], f"... and {hidden} more"]
    return [cut(printable(line), WIDTH) for line in frame]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    table = align(COLUMNS, rows, _RIGHT)
    return table if max(map(len, table)) <= WIDTH else align(COLUMNS, rows, _RIGHT, gap=" ")


def _row(one: Activity) -> Sequence[str]:
    return (
        cut(one.name, _NAME),
        cut(one.path, _PATH),
        rate(one.requests),
        rate(one.rings),
        _volume(one.to_guest),
        _volume(one.from_guest),
        count(one.inflight),
        rate(one.load) if one.load >= 0.05 else "-",
        duration(one.p99),
        count(one.errors) if one.errors else "-",
    )


def _volume(value: float) -> str:
    return bytes_(value) if value >= 1 else "-"
