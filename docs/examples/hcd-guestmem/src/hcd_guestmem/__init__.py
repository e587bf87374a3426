"""Device type "guestmem" of hcd: what a guest says of its own memory, for Prometheus.

It is a memory balloon (virtio 1.3, 5.5) that never asks for a page: of its queues only the one for statistics is used.
Linux gives a buffer with figures to that queue when its driver starts. The device keeps the buffer; each time that it
gives it back, the driver fills it anew.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

from hcd.device import Counter, Device, GuestError, Handle, Lane, Metric, Option, Request, Virtqueue

__all__ = ["GuestMemory"]

INFLATE, DEFLATE, STATISTICS = range(3)
#: feature bit (5.5.3)
STATS_VQ = 1 << 1
#: num_pages (wanted by the device: never any), actual (5.5.4)
CONFIG = struct.Struct("<II")
#: tag, value (5.5.6.3); a guest may send more than we know, but not for ever
ENTRY = struct.Struct("<HQ")
MAX_ENTRIES = 64

BYTES = {4: "free", 5: "total", 6: "available", 7: "caches"}
SWAPPED = {0: "in", 1: "out"}
FAULTS = {2: "major", 3: "minor"}


class GuestMemory(Device):
    """Asks the guest every ``interval`` seconds."""

    virtio_id = 5
    description = "what a guest says of its memory, as metrics"
    operations = ("statistics", "pages")
    options = (Option("interval", "float", "seconds between two questions", default=10.0, minimum=0, maximum=3600),)
    metrics = (
        Metric("guestmem_bytes", "gauge", "Memory of the guest, by its own words.", {"kind": tuple(BYTES.values())}),
        Metric(
            "guestmem_swapped_bytes_total", "counter", "Bytes that it moved from and to swap space.",
            {"direction": tuple(SWAPPED.values())},
        ),
        Metric("guestmem_faults_total", "counter", "Page faults.", {"kind": tuple(FAULTS.values())}),
        Metric("guestmem_reports_total", "counter", "Answers of the guest."),
    )

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        self.bytes = {tag: self.gauge("guestmem_bytes", kind=kind) for tag, kind in BYTES.items()}
        self.totals: dict[int, Counter] = {
            tag: self.counter("guestmem_swapped_bytes_total", direction=direction)
            for tag, direction in SWAPPED.items()
        } | {tag: self.counter("guestmem_faults_total", kind=kind) for tag, kind in FAULTS.items()}
        self.reports = self.counter("guestmem_reports_total")
        self.last: dict[int, int] = {}  # totals of the guest that runs now
        self.held: Request | None = None
        self.timer: Handle | None = None
        self.lane: Lane

    @property
    def num_queues(self) -> int:
        return 3

    @property
    def features(self) -> int:
        return STATS_VQ

    def config(self) -> bytes:
        return CONFIG.pack(0, 0)

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver says how many pages it gave; it was asked for none."""

    def open(self, lane: Lane) -> None:
        self.lane = lane

    def disconnect(self) -> None:
        self.last.clear()

    def stop_queue(self, queue: Virtqueue) -> None:
        if queue.index == STATISTICS:
            self.ask()

    def process(self, queue: Virtqueue) -> None:
        for request in queue:
            if queue.index == STATISTICS:
                self.take(request)
            else:
                request.op = 1
                request.complete(0)

    def take(self, request: Request) -> None:
        """Read a report, and keep its buffer until it is time to ask again."""
        for tag, value in entries(request):
            if tag in self.bytes:
                self.bytes[tag].set(value)
            elif tag in self.totals:
                before = self.last.get(tag, 0)
                self.totals[tag].inc(value - before if value >= before else value)  # less than before: it was reset
                self.last[tag] = value
        self.reports.inc()
        self.ask()  # a driver has one buffer here; what comes beside it goes back
        request.hold()
        self.held = request
        self.timer = self.lane.call_later(self.option["interval"], self.ask)

    def ask(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        request, self.held = self.held, None
        if request is not None:
            request.complete(0)


def entries(request: Request) -> Iterator[tuple[int, int]]:
    size = request.readable_size
    if size % ENTRY.size or size > MAX_ENTRIES * ENTRY.size:
        raise GuestError(f"a report of {size} bytes; expected {MAX_ENTRIES} entries of {ENTRY.size} at most")
    yield from ENTRY.iter_unpack(request.read())
