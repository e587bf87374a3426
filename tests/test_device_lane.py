"""What devices leave on their lane, from ``open`` on: timers, watched files, calls from other threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest

from hcd.device import Device, Handle, Lane, Virtqueue
from hcd.testing import serve


class Clock(Device):
    """Starts everything while it is opened, on whatever thread that is."""

    virtio_id = 63

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        self.happened: dict[str, int] = {}  # what, and on which thread
        self.all = threading.Event()
        self.never: Handle

    def open(self, lane: Lane) -> None:
        self.lane = lane
        self.source, self.sink = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        time.sleep(0.05)  # the lane has gone to sleep
        lane.call_later(0.01, lambda: self.note("timer"))
        self.never = lane.call_later(0.01, lambda: self.note("cancelled timer"))
        self.never.cancel()
        self.watch = lane.watch(self.source, self.arrived)
        threading.Thread(target=lambda: lane.post(lambda: self.note("call"))).start()

    def arrived(self) -> None:
        os.read(self.source, 1)
        self.note("file")

    def note(self, what: str) -> None:
        self.happened[what] = threading.get_ident()
        if {"timer", "file", "call"} <= self.happened.keys():
            self.all.set()

    def close(self) -> None:
        def end() -> None:
            self.watch.cancel()
            os.close(self.source)
            os.close(self.sink)

        self.lane.post(end)

    def process(self, queue: Virtqueue) -> Any:
        for request in queue:
            self.note("request")
            request.complete()


class AsyncClock(Clock):
    async def process(self, queue: Virtqueue) -> None:
        super().process(queue)


@pytest.mark.parametrize("kind", [Clock, AsyncClock])
def test_timers_and_files_of_open_come_on_the_lanes_thread(kind: type[Clock], no_leaks: None) -> None:
    """Although nothing else wakes it; those that were cancelled do not come."""
    with serve(kind) as served, served.driver() as driver:
        device = served.device
        assert isinstance(device, Clock)
        os.write(device.sink, b"x")
        assert device.all.wait(10)
        driver.ask(b"x")
        assert device.happened.keys() == {"timer", "file", "call", "request"}
        assert len(set(device.happened.values())) == 1
