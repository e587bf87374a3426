"""What both lanes owe those who have something run on them."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from hcd.dataplane.bell import Bell
from hcd.dataplane.stats import DoorbellStats
from hcd.lanes import QueueLane, TrioLane, open_lanes


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


async def test_nothing_is_called_back_once_it_is_cancelled() -> None:
    """Also when its task was woken already: whoever cancels a watch may close its fd, and the number is used again."""
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
    try:
        async with open_lanes() as lanes:
            for _ in range(50):  # trio runs tasks that are woken together in any order
                await one_cancels_the_others(lanes.trio, *fds)
    finally:
        for fd in fds:
            os.close(fd)


async def one_cancels_the_others(lane: TrioLane, watched: int, belled: int, cancelling: int) -> None:
    called: list[str] = []
    bell = Bell("b", belled, DoorbellStats())
    bell.handler = handler(called)
    others = [
        lane.watch(watched, lambda: called.append("watch")),
        lane.call_later(0, lambda: called.append("timer")),
        lane.watch_bell(bell),
    ]
    over = trio.Event()

    def cancel() -> None:
        for one in [*others, canceller]:
            one.cancel()
        called.clear()
        over.set()

    canceller = lane.watch(cancelling, cancel)
    for fd in (watched, belled, cancelling):
        os.eventfd_write(fd, 1)
    await over.wait()
    await trio.testing.wait_all_tasks_blocked()
    assert called == []
    for fd in (watched, cancelling):
        os.eventfd_read(fd)
    bell.take()


def handler(called: list[str]) -> Callable[[Bell, int], Awaitable[None]]:
    async def rung(bell: Bell, count: int) -> None:
        called.append("bell")

    return rung


async def test_a_watch_of_what_cannot_be_watched_is_refused_on_both_lanes() -> None:
    """A closed descriptor, and one that is watched already. The lane is everybody's, and goes on."""
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    async with open_lanes() as lanes:
        token = trio.lowlevel.current_trio_token()
        for lane in (lanes.reactor, lanes.trio):
            heard = trio.Event()

            def rung(heard: trio.Event = heard) -> None:
                os.eventfd_read(fd)
                token.run_sync_soon(heard.set)

            watch = await lane.run(lambda lane=lane, rung=rung: lane.watch(fd, rung))  # type: ignore[misc]
            for bad in (fd, 999_999):
                with pytest.raises(OSError, match=f"cannot wait on fd {bad}"):
                    await lane.run(lambda lane=lane, bad=bad: lane.watch(bad, print))  # type: ignore[misc]
            os.eventfd_write(fd, 1)
            with trio.fail_after(20):
                await heard.wait()
            await lane.run(watch.cancel)
    os.close(fd)


async def test_a_descriptor_that_is_closed_while_it_is_watched_is_nobodys_in_trio() -> None:
    """Its number may be the next descriptor's, which is watched by itself then; the old handle does nothing to it."""
    async with open_lanes() as lanes:
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        heard: list[str] = []
        old = lanes.trio.watch(fd, lambda: heard.append("old"))
        os.close(fd)
        again = os.eventfd(0, os.EFD_NONBLOCK)
        assert again == fd, "the lowest number that is free"
        called = trio.Event()

        def rung() -> None:
            os.eventfd_read(again)
            heard.append("new")
            called.set()

        new = lanes.trio.watch(again, rung)
        old.cancel()
        os.eventfd_write(again, 1)
        with trio.fail_after(20):
            await called.wait()
        assert heard == ["new"]
        new.cancel()
        os.close(again)
