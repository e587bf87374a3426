"""Sessions over real sockets: hcd's front end on one side, lanes, back end and transport on the other."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
import trio.testing

from hcd.backend import Backend
from hcd.config import DeviceSpec
from hcd.dataplane.stats import HotText
from hcd.device import Device, DeviceError, GuestError, Request, Virtqueue
from hcd.doorbell import Path as RingPath
from hcd.doorbell import Registry
from hcd.errors import PluginError
from hcd.frontend.client import Frontend
from hcd.frontend.errors import BackendError
from hcd.frontend.memory import MemorySlot, SharedMemory
from hcd.host import DeviceHost
from hcd.lanes import AsyncVirtqueue, open_lanes
from hcd.transports import vhost_user

T = TypeVar("T")


class Echo(Device):
    """Answers each request with its own readable bytes; "fail" and "raise" do what they say, "keep" waits."""

    virtio_id = 42
    operations = ("echo",)

    def __init__(self, name: str, options: dict[str, Any], queues: int = 1) -> None:
        super().__init__(name, options)
        self._queues = queues
        self.kept: list[Request] = []
        self.release_on_stop = True

    @property
    def num_queues(self) -> int:
        return self._queues

    def config(self) -> bytes:
        return b"configuration"

    def process(self, queue: Virtqueue) -> Any:
        for request in queue:
            self.handle(request)

    def handle(self, request: Request) -> None:
        data = request.read()
        if data == b"fail":
            raise DeviceError("asked to fail")
        if data == b"raise":
            raise ZeroDivisionError("asked to raise")
        if data == b"keep":
            request.hold()
            self.kept.append(request)
            return
        if data == b"forget":
            return
        if data == b"slow":
            time.sleep(0.06)
        request.write(data)
        request.complete()

    def stop_queue(self, queue: Virtqueue) -> None:
        if self.release_on_stop:
            for request in self.kept:
                request.complete(0)
            self.kept.clear()


class AsyncEcho(Echo):
    """The same in trio."""

    async def process(self, queue: Virtqueue) -> None:
        for request in queue:
            await trio.lowlevel.checkpoint()
            self.handle(request)


LANES = [Echo, AsyncEcho]


class Served:
    """A device that is served, and what the test needs of it."""

    def __init__(self, host: DeviceHost, path: str, hot: HotText) -> None:
        self.host = host
        self.path = path
        self.hot = hot
        self.device: Any = host.device

    async def in_thread(self, function: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(function)


@asynccontextmanager
async def served(
    device: Device, tmp_path: Path, *, drain_timeout: float = 5.0, poll_us: float = 32, **spec: Any
) -> AsyncIterator[Served]:
    path = str(tmp_path / "s")
    hot = HotText()
    async with open_lanes(poll_us) as lanes:
        host = DeviceHost(
            DeviceSpec(name="dev", type="echo", socket=path, **spec),
            device,
            lanes=lanes,
            registry=Registry(),
            hot=hot,
            drain_timeout=drain_timeout,
        )
        await host.open()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vhost_user.serve, host, listener)
            yield Served(host, path, hot)
            nursery.cancel_scope.cancel()
        await host.close()
    listener.close()


def put(front: Frontend, data: bytes) -> int:
    """``data`` somewhere in guest memory."""
    gpa = front.memory.alloc(len(data))
    front.memory.write(gpa, data)
    return gpa


def echo(front: Frontend, data: bytes, index: int = 0, room: int = 64) -> bytes:
    """One request and its answer."""
    queue = front.queues[index]
    source = put(front, data)
    target = front.memory.alloc(room)
    queue.submit([(source, len(data))], [(target, room)])
    ((_, written),) = queue.wait()
    return front.memory.read(target, written)


@pytest.fixture(autouse=True)
def _no_leaks(no_leaks: None) -> None:
    """No test leaves anything behind."""


@pytest.mark.parametrize("kind", LANES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("event_idx", [False, True])
async def test_echo(kind: type[Echo], packed: bool, event_idx: bool, tmp_path: Path) -> None:
    """Many requests come back right, over both ring formats, with and without EVENT_IDX, on both lanes."""
    async with served(kind("dev", {}), tmp_path) as s:
        def drive() -> int:
            with Frontend.open(s.path, size=16, packed=packed, event_idx=event_idx) as front:
                for i in range(200):
                    assert echo(front, f"message {i}".encode()) == f"message {i}".encode()
                front.stop_queue(0)  # counts what is left in the eventfd
                return front.queues[0].kicks

        kicks = await s.in_thread(drive)
        (stats,), (bell,) = s.host.queue_stats, s.host.doorbells
        assert stats.requests(0, 0) == 200
        assert stats.found_by_ring + stats.found_by_poll == 200
        assert bell.by_path[RingPath.UNKNOWN].rings == kicks > 0


async def test_a_handler_that_waits_for_its_queue_begins_a_turn_each_time(tmp_path: Path) -> None:
    """It never returns, and may take as much as comes in the course of time."""

    class Waits(Echo):
        async def process(self, queue: Virtqueue) -> None:
            assert isinstance(queue, AsyncVirtqueue)
            while True:
                for request in queue:
                    self.handle(request)
                await queue.wait()

    async with served(Waits("dev", {}), tmp_path) as s:
        def drive() -> int:
            with Frontend.open(s.path, size=256) as front:
                source = put(front, b"x")
                for _ in range(150):
                    front.queues[0].ring.add([(source, 1)], [])
                front.queues[0].publish()
                done = 0
                while done < 150:
                    done += len(front.queues[0].wait())
                assert echo(front, b"one more") == b"one more"
                front.stop_queue(0)
                return front.queues[0].kicks

        kicks = await s.in_thread(drive)
        (stats,), (bell,) = s.host.queue_stats, s.host.doorbells
        assert stats.found_by_ring + stats.found_by_poll == 151
        assert bell.by_path[RingPath.UNKNOWN].rings == kicks > 0


@pytest.mark.parametrize("first_kick", [0, 1])
async def test_spurious_first_kick(first_kick: int, tmp_path: Path) -> None:
    """QEMU hands over eventfds that count 1; others 0. Rings are counted exactly in both cases."""
    async with served(Echo("dev", {}), tmp_path, poll_us=0) as s:
        def drive() -> int:
            with Frontend.open(s.path, first_kick=first_kick) as front:
                for _ in range(7):
                    echo(front, b"x")
                    front.queues[0].kick()
                front.stop_queue(0)
                return front.queues[0].kicks

        kicks = await s.in_thread(drive)
        assert s.host.doorbells[0].by_path[RingPath.UNKNOWN].rings == kicks >= 7


async def test_errors_of_handlers(tmp_path: Path) -> None:
    """A request whose handler fails is completed as failed; the next one is served."""
    async with served(Echo("dev", {}), tmp_path) as s:
        def drive() -> None:
            with Frontend.open(s.path) as front:
                assert echo(front, b"fail") == b""
                assert echo(front, b"raise") == b""
                assert echo(front, b"fine") == b"fine"

        await s.in_thread(drive)
        stats = s.host.queue_stats[0]
        assert stats.handler_errors == 1
        assert (stats.requests(0, 0), stats.requests(0, 1)) == (1, 2)


@pytest.mark.parametrize("kind", LANES)
async def test_get_vring_base_drains(kind: type[Echo], tmp_path: Path) -> None:
    """GET_VRING_BASE answers when the requests in flight are done, and the base counts them."""
    async with served(kind("dev", {}), tmp_path) as s:
        def drive() -> int:
            with Frontend.open(s.path) as front:
                queue = front.queues[0]
                queue.submit([(put(front, b"keep"), 4)], [(front.memory.alloc(8), 8)])
                assert echo_after(front) == b"next"
                base = front.stop_queue(0)
                assert queue.used()
                return base

        def echo_after(front: Frontend) -> bytes:
            queue = front.queues[0]
            target = front.memory.alloc(8)
            queue.submit([(put(front, b"next"), 4)], [(target, 8)])
            ((_, written),) = queue.wait()
            return front.memory.read(target, written)

        assert await s.in_thread(drive) == 2


async def test_drain_timeout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A request that never completes holds GET_VRING_BASE up for drain_timeout only; other queues go on."""
    device = Echo("dev", {}, queues=2)
    device.release_on_stop = False
    async with served(device, tmp_path, drain_timeout=0.1) as s:
        def drive() -> None:
            with Frontend.open(s.path, queues=2) as front:
                front.queues[0].submit([(put(front, b"keep"), 4)], [(front.memory.alloc(8), 8)])
                assert echo(front, b"other", index=1) == b"other"
                assert front.stop_queue(0) == 1
                assert echo(front, b"still", index=1) == b"still"

        await s.in_thread(drive)
        await s.host.lane.run(lambda: device.kept.pop().complete(0))
        assert "1 requests did not end" in caplog.text


async def test_giving_a_request_up_costs_no_other_queue_its_memory(tmp_path: Path) -> None:
    """QEMU disables all of them before it stops one after the other. What was given up is taken away after them."""
    device = Echo("dev", {}, queues=2)
    device.release_on_stop = False
    async with served(device, tmp_path, drain_timeout=0.1) as s:
        run = s.host.lane.run

        def refused(request: Request) -> bool:
            source = os.memfd_create("source")
            try:
                os.ftruncate(source, 8)
                request.preadv(source, 0)
            except GuestError:
                return True
            finally:
                os.close(source)
            return False

        def answer(request: Request) -> None:
            assert not refused(request)
            request.write_at(0, b"answered")
            request.complete()

        def drive() -> None:
            with Frontend.open(s.path, queues=2) as front:
                targets = [front.memory.alloc(8) for _ in range(2)]
                for index, target in enumerate(targets):
                    front.queues[index].submit([(put(front, b"keep"), 4)], [(target, 8)])
                    assert echo(front, b"next", index=index) == b"next"
                for index in range(2):
                    front.enable_queue(index, on=False)
                front.sync()
                assert front.stop_queue(0) == 2
                stuck, other = sorted(device.kept, key=lambda request: request.queue.index)
                trio.from_thread.run(run, lambda: answer(other))
                assert front.stop_queue(1) == 2
                assert front.memory.read(targets[1], 8) == b"answered"
                assert trio.from_thread.run(run, lambda: refused(stuck))
                trio.from_thread.run(run, stuck.complete)
                device.kept.clear()

        await s.in_thread(drive)


async def test_a_handler_that_fails_when_it_is_cancelled_ends_nothing_but_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of a session cancels it, and nobody waits for it. Its lane is everybody's."""

    class Mourns(Echo):
        async def process(self, queue: Virtqueue) -> None:
            if (held := queue.pop()) is not None:
                try:
                    await trio.sleep_forever()
                finally:
                    held.complete()
                    raise ZeroDivisionError("cut off")

    async with served(Mourns("dev", {}), tmp_path, drain_timeout=0.1) as s:
        def drive() -> None:
            with Frontend.open(s.path) as front:
                front.queues[0].submit([(put(front, b"keep"), 4)], [])

        for _ in range(2):
            await s.in_thread(drive)
        while s.host.connected:
            await trio.testing.wait_all_tasks_blocked()
        assert "Mourns: process(), cancelled with its session, raised ZeroDivisionError: cut off" in caplog.text
        assert s.host.stats.handler_errors == 2


async def test_memory_is_unmapped_by_a_thread_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 70 ms for each GiB that was touched: no lane, and so no other device, waits for that."""
    release, seen = Backend.release_memory, []

    def release_memory(backend: Backend) -> None:
        assert backend.has_old_memory
        seen.append(threading.get_ident())
        release(backend)
        assert not backend.has_old_memory

    monkeypatch.setattr(Backend, "release_memory", release_memory)
    async with served(Echo("dev", {}), tmp_path) as s:
        lane = await s.host.lane.run(threading.get_ident)

        def drive() -> None:
            with Frontend.open(s.path) as front:
                assert echo(front, b"one") == b"one"
                front.share_memory()  # the same again: a second mapping takes the place of the first
                assert echo(front, b"two") == b"two"

        await s.in_thread(drive)
    assert len(seen) in (2, 3)  # each table; the end may come before the one that was replaced
    assert not {lane, threading.get_ident()} & set(seen)


async def test_memory_that_was_taken_out_before_the_end_is_taken_away_at_the_end(tmp_path: Path) -> None:
    """A request that outlives its session reaches no guest memory, not even what left the table long before."""
    device = Echo("dev", {})
    device.release_on_stop = False
    async with served(device, tmp_path, drain_timeout=0.1) as s:
        def drive() -> None:
            slots = [MemorySlot(gpa=number << 24, size=1 << 20) for number in range(2)]
            with SharedMemory(slots) as memory, Frontend(s.path, memory=memory) as front:
                front.negotiate()
                front.share_memory()
                queue = front.start_queue(0, region=0)
                answer = memory.regions[1].gpa
                queue.submit([(put(front, b"keep"), 4)], [(answer, 8)])
                assert echo(front, b"next") == b"next"
                memory.regions[:], left = memory.regions[:1], memory.regions[1]
                front.share_memory()
                memory.regions.append(left)

        await s.in_thread(drive)
        while s.host.connected:
            await trio.testing.wait_all_tasks_blocked()
        zeroes = os.memfd_create("zeroes")
        os.ftruncate(zeroes, 8)
        with pytest.raises(GuestError, match="went away"):
            device.kept[0].preadv(zeroes, 0)
        os.close(zeroes)
        await s.host.lane.run(lambda: device.kept.pop().complete(0))


async def test_a_session_for_which_hcd_has_no_descriptor_left_is_the_only_one_that_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(Echo("dev", {}), tmp_path) as s:
        def none_left(*args: int) -> int:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        def drive() -> None:
            with monkeypatch.context() as patch:
                patch.setattr("hcd.backend.os.eventfd", none_left)
                with Frontend(s.path) as front:
                    front.wait_hangup()
            with Frontend.open(s.path) as front:
                assert echo(front, b"next") == b"next"

        await s.in_thread(drive)
        assert "Too many open files" in caplog.text


async def test_a_device_that_turns_out_impossible_once_it_is_open_is_closed_again(tmp_path: Path) -> None:
    class NoQueues(Echo):
        open_now = False

        def open(self, lane: object) -> None:
            self.open_now = True

        def close(self) -> None:
            self.open_now = False

    device = NoQueues("dev", {}, queues=0)
    with pytest.RaisesGroup(pytest.RaisesExc(PluginError, match="num_queues is 0; expected 1 to 256")):
        async with served(device, tmp_path):
            pass
    assert not device.open_now


async def test_second_front_end_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One front end at a time; the first goes on; after it, another is served."""
    async with served(Echo("dev", {}), tmp_path) as s:
        def drive() -> None:
            with Frontend.open(s.path) as front:
                with pytest.raises((BackendError, OSError)):
                    Frontend.open(s.path).close()
                assert echo(front, b"first") == b"first"
            with Frontend.open(s.path) as front:
                assert echo(front, b"second") == b"second"

        await s.in_thread(drive)
        assert "a second front end was refused" in caplog.text


async def test_front_ends_that_never_read_fill_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each makes the kernel reset the connection."""
    async with served(Echo("dev", {}), tmp_path) as s:
        def drive() -> None:
            for _ in range(20):
                with socket.socket(socket.AF_UNIX) as front:
                    front.connect(s.path)
                    front.sendall(struct.pack("<III", 1, 1, 0))  # GET_FEATURES
                    assert select.select([front], [], [], 20)[0]

        await s.in_thread(drive)
        while s.host.connected:
            await trio.testing.wait_all_tasks_blocked()
    assert 1 <= caplog.text.count("connection to the front end failed: Connection reset by peer") <= 5


async def test_reconnects(tmp_path: Path) -> None:
    """Connections may come one after the other without a pause, and each is served."""
    async with served(Echo("dev", {}), tmp_path) as s:
        def drive() -> None:
            for i in range(30):
                with Frontend.open(s.path, packed=bool(i % 2)) as front:
                    assert echo(front, b"hello") == b"hello"

        await s.in_thread(drive)


async def test_memory_changes_while_rings_run(tmp_path: Path) -> None:
    """A new memory table does not disturb a running ring."""
    async with served(Echo("dev", {}), tmp_path) as s:
        def drive() -> None:
            with Frontend.open(s.path, protocol=(1 << 0) | (1 << 3) | (1 << 16)) as front:
                for _ in range(20):
                    assert echo(front, b"before") == b"before"
                    front.share_memory()

        await s.in_thread(drive)


async def test_config_is_read_at_any_offset(tmp_path: Path) -> None:
    """GET_CONFIG serves any part of the configuration space."""
    async with served(Echo("dev", {}), tmp_path) as s:
        def drive() -> bytes:
            with Frontend.open(s.path) as front:
                return front.config(3, 5)

        assert await s.in_thread(drive) == b"figur"


async def test_declared_and_negotiated_paths(tmp_path: Path) -> None:
    """A path is declared, or follows from the features where the bus is known to be PCI."""
    async with served(Echo("dev", {}), tmp_path, bus="pci") as s:
        def drive(version_1: bool) -> None:
            with Frontend.open(s.path, version_1=version_1) as front:
                echo(front, b"x")
                front.stop_queue(0)

        await s.in_thread(lambda: drive(True))
        await s.in_thread(lambda: drive(False))
        by_path = s.host.doorbells[0].by_path
        assert {path: stats.rings for path, stats in by_path.items()} == {RingPath.MMIO: 1, RingPath.PIO: 1}


async def test_forgotten_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A request that a handler lost is completed as failed when the ring stops, and said."""
    async with served(Echo("dev", {}), tmp_path) as s:
        def drive() -> int:
            with Frontend.open(s.path) as front:
                queue = front.queues[0]
                queue.submit([(put(front, b"forget"), 6)], [(front.memory.alloc(8), 8)])
                assert echo_next(front) == b"next"
                front.stop_queue(0)
                return len(queue.used())

        def echo_next(front: Frontend) -> bytes:
            return echo(front, b"next")

        assert await s.in_thread(drive) == 1
        assert s.host.queue_stats[0].handler_errors == 1
        assert "never completed" in caplog.text


async def test_truncated_memory_ends_the_session(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A front end that truncates what it shared loses its session; the process serves the next one."""
    async with served(Echo("dev", {}), tmp_path) as s:
        def drive() -> None:
            with SharedMemory.of_size(16 << 20, seal=False) as memory, Frontend.open(s.path, memory=memory) as front:
                assert echo(front, b"hello") == b"hello"
                os.ftruncate(memory.regions[0].fd, 0)
                front.queues[0].kick()
                front.wait_hangup()
            with Frontend.open(s.path) as front:
                assert echo(front, b"again") == b"again"

        await s.in_thread(drive)
        assert "truncated the memory" in caplog.text


async def test_a_slow_handler_is_named_once_a_minute(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A plain handler that takes long delays every device of the process: the log says which one it is."""
    async with served(Echo("dev", {}), tmp_path) as s:
        def drive() -> None:
            with Frontend.open(s.path) as front:
                for _ in range(3):
                    assert echo(front, b"slow") == b"slow"

        await s.in_thread(drive)
        assert caplog.text.count("dev: the handler of queue 0 took") == 1
