"""What both lanes owe those who have something run on them."""

from __future__ import annotations

import gc
import weakref

import pytest
import trio

from hcd.lanes import QueueLane, open_lanes


class Held:
    """Something that must not outlive its last use: a session, guest memory."""


@pytest.mark.parametrize("name", ["reactor", "trio"])
def test_an_error_that_came_back_holds_nothing(name: str) -> None:
    """Without the garbage collector, which an idle daemon never runs: what the caller held is mapped memory."""

    async def fails(lane: QueueLane) -> weakref.ref[Held]:
        held = Held()

        def job() -> None:
            raise ValueError(str(held)[:0])

        try:
            await lane.run(job)
        except ValueError:
            return weakref.ref(held)
        raise AssertionError("no error came back")

    async def main() -> Held | None:
        async with open_lanes() as lanes:
            lane = getattr(lanes, name)
            held = await fails(lane)
            await lane.run(lambda: None)  # the reactor's thread has come back from the job by now
            return held()

    gc.collect()
    gc.disable()
    try:
        assert trio.run(main) is None
    finally:
        gc.enable()
