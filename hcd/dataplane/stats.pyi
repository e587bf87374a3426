"""Counters and histograms of the data plane, and the text of the hot metric families."""

from collections.abc import Sequence

#: upper bounds of the exported buckets in nanoseconds: 2**10 ... 2**30
BOUNDS_NS: tuple[int, ...]

class Histogram:
    """Log-linear: four sub-buckets per power of two, nanoseconds. One writer, any reader."""

    @property
    def count(self) -> int: ...
    @property
    def sum_ns(self) -> int: ...
    def observe(self, ns: int) -> None: ...
    def quantile(self, q: float) -> float: ...  # nanoseconds; 0.0 while empty
    def cumulative(self) -> list[int]: ...  # counts at or below each of BOUNDS_NS, then all
    def merge(self, other: Histogram) -> None: ...

class DeviceStats:
    """Of one device as a whole: counters, and what is the matter with it now (1 or True where it is so)."""

    def __init__(self) -> None: ...
    connected: int
    handover_ready: int
    handovers_resumed: int
    handovers_failed: int
    protocol_errors: int
    guest_errors: int  # of all its queues too
    handler_errors: int  # of all its queues too
    slow_steps: int
    stuck_requests: int
    path_conflict: int
    def add_handler_errors(self, n: int = 1) -> None: ...  # from any thread

class DoorbellStats:
    """Of one doorbell on one path."""

    def __init__(self) -> None: ...
    @property
    def rings(self) -> int: ...
    @property
    def wakeups(self) -> int: ...
    def add_rings(self, rings: int) -> None: ...  # one wake-up by so many
    dispatch: Histogram  # woken to handler entry
    response: Histogram  # woken to interrupt signalled
    ring: Histogram  # guest's stamp to woken
    def merge(self, other: DoorbellStats) -> None: ...

class InterruptStats:
    """Of one interrupt of a doorbell device."""

    def __init__(self) -> None: ...
    sent: int
    pending: int  # the eventfd was full: one is due already
    absent: int  # nobody was attached

class QueueStats:
    """Of one queue of one device, for as long as the device exists."""

    def __init__(self, operations: Sequence[str], device: DeviceStats | None = None) -> None: ...
    operations: tuple[str, ...]
    device: DeviceStats  # the errors of a queue are the device's too
    found_by_ring: int
    found_by_poll: int
    bytes_from_guest: int
    bytes_to_guest: int
    interrupts_sent: int
    interrupts_suppressed: int
    interrupts_pending: int  # the call eventfd was full: one is pending already
    interrupts_absent: int  # there was no call fd
    drops: int
    guest_errors: int
    handler_errors: int
    inflight: int
    throttled_ns: int  # how long a limit held the queue back; goes on every second while it does
    def requests(self, op: int, status: int) -> int: ...  # status 0 ok, 1 error, 2 unsupported
    def latency(self, op: int) -> Histogram: ...
    def oldest_ns(self) -> int: ...  # age of the oldest request in flight, 0 without one

class HotText:
    """Renders the hot families in the Prometheus text format without the GIL; a scrape rewrites only what moved."""

    def __init__(self) -> None: ...
    def add_device(self, device: str, stats: DeviceStats) -> None: ...
    def add_doorbell(self, device: str, queue: str, path: str, stats: DoorbellStats) -> None: ...
    def add_queue(self, device: str, queue: str, stats: QueueStats) -> None: ...
    def add_interrupt(self, device: str, interrupt: str, stats: InterruptStats) -> None: ...
    def remove_device(self, device: str) -> None: ...
    def render(self) -> list[memoryview]: ...  # of each hot family: HELP, TYPE, its series; release them soon
