"""Devices that hold everybody up are named and counted, whatever it is that takes so long, on both lanes."""

from __future__ import annotations

import logging
import os
import time

import pytest
import trio

from hcd.device import Device, Lane, Virtqueue
from hcd.slow import SLOW_NS, stepwise
from hcd.testing import find_faults, serve

LONG = 2.5 * SLOW_NS / 1e9


class Plain(Device):
    virtio_id = 63

    def process(self, queue: Virtqueue) -> None:
        for request in queue:
            if request.u8(0):
                time.sleep(LONG)
            request.complete()


class Async(Plain):
    async def process(self, queue: Virtqueue) -> None:
        for request in queue:
            request.hold()
            await trio.sleep(LONG)  # waiting is fine
            if request.u8(0):
                time.sleep(LONG)  # noqa: ASYNC251 - this is the mistake
            await trio.lowlevel.checkpoint()
            request.complete()


class Late(Device):
    """A timer's callback blocks."""

    virtio_id = 63

    def open(self, lane: Lane) -> None:
        self.lane = lane

    def process(self, queue: Virtqueue) -> None:
        for request in queue:
            if request.u8(0):
                request.hold()
                self.lane.call_later(0.001, lambda r=request: (time.sleep(LONG), r.complete()))  # type: ignore[misc]
            else:
                request.complete()


class AsyncLate(Late):
    async def process(self, queue: Virtqueue) -> None:
        super().process(queue)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (Plain, "the handler of queue 0"),
        (Async, "the handler of queue 0"),
        (Late, "a timer's callback"),
        (AsyncLate, "a timer's callback"),
    ],
)
def test_a_step_that_blocks_is_named_and_counted(
    kind: type[Device], what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Once for each in the metrics, once a minute in the log; one that only waits is not."""
    with serve(kind, name="slug") as served, served.driver() as driver:
        driver.ask(b"\0")
        assert served.metrics().total("hcd_slow_steps_total", device="slug") == 0
        driver.ask(b"\1")
        driver.ask(b"\1")
        served.run(lambda: None)  # the second step has ended, and is counted
        assert served.metrics().total("hcd_slow_steps_total", device="slug") == 2
        driver.stop_queue(0)
    lines = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 1
    assert lines[0].getMessage().startswith(f"slug: {what} took 1")


class Throws(Device):
    """A watch's callback raises."""

    virtio_id = 63

    def open(self, lane: Lane) -> None:
        self.lane = lane
        self.source, self.sink = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.heard = 0
        self.watch = lane.watch(self.source, self.arrived)

    def close(self) -> None:
        def end() -> None:
            self.watch.cancel()
            os.close(self.source)
            os.close(self.sink)

        self.lane.post(end)

    def arrived(self) -> None:
        os.read(self.source, 1)
        self.heard += 1
        raise ZeroDivisionError("who is there?")

    def process(self, queue: Virtqueue) -> None:
        for request in queue:
            request.complete()


class AsyncThrows(Throws):
    async def process(self, queue: Virtqueue) -> None:
        super().process(queue)


@pytest.mark.parametrize("kind", [Throws, AsyncThrows])
def test_a_callback_that_raises_is_the_devices_error(kind: type[Throws], caplog: pytest.LogCaptureFixture) -> None:
    """Counted, told with one traceback; the watch goes on."""
    with serve(kind, name="noisy") as served:
        device = served.device
        assert isinstance(device, Throws)
        for count in (1, 2):
            os.write(device.sink, b"x")
            while device.heard < count:
                time.sleep(0.001)
        served.run(lambda: None)
        assert served.metrics().total("hcd_handler_errors_total", device="noisy") == 2
    said = [record.getMessage() for record in caplog.records]
    assert f"{kind.__name__}: a watch's callback raised ZeroDivisionError: who is there?" in said
    assert sum("traceback of" in text for text in said) == 1


def test_the_conformance_check_finds_an_async_handler_that_blocks() -> None:
    class Blocks(Device):
        virtio_id = 63

        async def process(self, queue: Virtqueue) -> None:
            for request in queue:
                if request.readable_size == 1000:
                    time.sleep(0.25)  # noqa: ASYNC251 - this is the mistake
                request.complete()

    assert {finding.rule for finding in find_faults(Blocks)} == {"blocking"}


async def test_steps_pass_results_errors_and_cancellation_on() -> None:
    """The handler under it behaves as if it were awaited itself."""
    slow: list[int] = []

    async def answer() -> int:
        await trio.lowlevel.checkpoint()
        return 42

    assert await stepwise(answer(), slow.append) == 42

    async def fails() -> None:
        await trio.lowlevel.checkpoint()
        raise LookupError("no")

    with pytest.raises(LookupError):
        await stepwise(fails(), slow.append)

    ended = []

    async def waits() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append(True)

    with trio.move_on_after(0.01) as scope:
        await stepwise(waits(), slow.append)
    assert scope.cancelled_caught
    assert ended == [True]
