"""The rules of the conformance check: each plays one scene on a connection of its own and raises Broken."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from hcd_protocols.vhost_user import ProtocolFeature

from hcd.frontend.client import DEVICE_FEATURES
from hcd.frontend.errors import BackendError
from hcd.frontend.ring import Used
from hcd.testing.driver import Driver
from hcd.testing.exchanges import SHAPES, Exchange, Shape, exchanges_for, probes
from hcd.testing.scene import Broken, MisfitError, Scene, reconnect
from hcd.testing.serving import ServedDevice

__all__ = ["IN_ORDER_LAYOUTS", "LAYOUTS", "ONCE", "RULES", "Layout", "Run"]

#: how long (seconds) a probe may take before it counts as held by the device
PATIENCE = 0.1
#: the same on a queue that was seen to hold requests
SHORT_PATIENCE = 0.01
#: what the room for answers is filled with, to see what the device leaves alone
FILLS = (0xA5, 0x5A, 0x3C, 0xC3)


@dataclass(frozen=True, slots=True)
class Layout:
    """A kind of ring."""

    name: str
    packed: bool = False
    event_idx: bool = True
    in_order: bool = False
    version_1: bool = True


LAYOUTS = (
    Layout("split"),
    Layout("packed", packed=True),
    Layout("split without event index", event_idx=False),
    Layout("packed without event index", packed=True, event_idx=False),
    Layout("split of a legacy driver", version_1=False, event_idx=False),
)
#: for devices that offer it
IN_ORDER_LAYOUTS = (Layout("split in order", in_order=True), Layout("packed in order", packed=True, in_order=True))


@dataclass(slots=True)
class Sent:
    """A request on its way."""

    exchange: Exchange
    token: int
    readable: list[tuple[int, int]]
    writable: list[tuple[int, int]]


class Run(Scene):
    """A virtio device, the layout, and the driver that plays the scene."""

    def __init__(
        self,
        served: ServedDevice,
        layout: Layout,
        exchanges: Sequence[Exchange],
        timeout: float,
        holding: set[int],
    ) -> None:
        super().__init__(served, exchanges, timeout)
        self.device = served.device
        self.layout = layout
        self.probes = probes(served.device)
        self.driver: Driver
        #: queues that were seen to hold requests until they stop
        self.holding = holding

    # -- connections

    def connect(self, *, queues: int | None = None, size: int = 64, device: int = DEVICE_FEATURES) -> Driver:
        self.close()
        layout = self.layout
        self.driver = self.served.driver(
            queues=queues, size=min(size, self.device.max_queue_size), packed=layout.packed,
            event_idx=layout.event_idx, in_order=layout.in_order, version_1=layout.version_1, device=device,
            timeout=self.timeout,
        )
        self._open.append(self.driver)
        return self.driver

    # -- requests

    def send(self, exchange: Exchange, shape: Shape = SHAPES[0], fill: int = 0, *, publish: bool = True) -> Sent:
        driver = self.driver
        try:
            readable = driver.place(exchange.data, shape.pieces)
            writable = driver.make_room(exchange.room, shape.pieces, fill)
        except MemoryError as error:
            raise MisfitError(f"{exchange}: {error}") from None
        queue = driver.queues[exchange.queue]
        token = queue.ring.add(readable, writable, shape.indirect)
        if publish:
            queue.publish()
        return Sent(exchange, token, readable, writable)

    def finish(self, sent: Sent, used: Used) -> bytes:
        """The answer to ``sent``, checked against what is known of it."""
        room = sent.exchange.room
        if used.written > room:
            raise Broken(f"{sent.exchange}: the device says that it wrote {used.written}", "written")
        answer = self.driver.gather(sent.writable)[: used.written]
        self.driver.free(sent.readable + sent.writable)
        expected = sent.exchange.answer
        if expected is not None and answer != expected:
            raise Broken(f"{sent.exchange}, {self.step}: the answer is {_cut(answer)}; expected {_cut(expected)}")
        return answer

    def must_work(self, exchange: Exchange, shape: Shape = SHAPES[0], fill: int = 0) -> bytes:
        """An exchange of the author's: answered while the queue runs."""
        sent = self.send(exchange, shape, fill)
        try:
            (used,) = self.driver.queues[exchange.queue].wait(self.timeout)
        except BackendError as error:
            raise Broken(f"{exchange}, {self.step}: no answer while the queue runs ({error})", "answer") from None
        return self.finish(sent, used)

    def may_wait(self, queue: int, sent: Sequence[Sent]) -> dict[int, Used]:
        """What comes back of probes soon; the device may hold the others until the queue stops."""
        deadline = time.monotonic() + (SHORT_PATIENCE if queue in self.holding else PATIENCE)
        done: dict[int, Used] = {}
        while len(done) < len(sent):
            try:
                done |= {used.token: used for used in self.driver.queues[queue].wait(deadline - time.monotonic())}
            except BackendError:
                if time.monotonic() < deadline:
                    raise
                self.holding.add(queue)
                break
        return done

    def work_once(self) -> None:
        """Every queue that a driver has started serves what the author gave for it."""
        for exchange in self.exchanges:
            if exchange.queue in self.driver.queues:
                self.must_work(exchange)

    def stop(self, queue: int) -> int:
        """GET_VRING_BASE: what the device had taken must be back afterwards. Returns the base."""
        began = time.monotonic()
        base = self.driver.stop_queue(queue)
        ring = self.driver.queues[queue].ring
        taken, finished = (base & 0xFFFF, base >> 16) if self.layout.packed else (base, ring.rewind())
        if taken != finished:
            raise Broken(f"queue {queue} stopped after {time.monotonic() - began:.1f} s with requests that the device "
                         "had taken and not given back", "stop")
        return base

    def stop_all(self) -> None:
        for queue in self.driver.queues:
            self.stop(queue)


# -- the rules


def negotiation(run: Run) -> None:
    """Any subset of the device's features will do, also one after the other (virtio 1.3, 3.1.1)."""
    offered = run.device.features & DEVICE_FEATURES
    single = [1 << bit for bit in range(24) if offered >> bit & 1]
    for features in (0, *single, offered):
        run.step = f"with device features {features:#x}"
        driver = run.connect(device=features)
        run.stop_all()
        driver.set_features(driver.features & ~offered)
        driver.set_features(driver.features | offered)
    run.step = "after the features were acknowledged twice"
    run.connect()
    run.work_once()


def config(run: Run) -> None:
    """The configuration space is as long as it was, reads alike in parts, and takes or refuses writes (2.5)."""
    driver = run.connect()
    size = len(run.device.config())
    if not size or not driver.has(ProtocolFeature.CONFIG):
        return
    run.step = "reading the configuration space"
    whole = driver.config(0, size)
    if len(whole) != size:
        raise Broken(f"config() returned {len(whole)} bytes, before that {size}")
    for offset in range(size):
        driver.config(offset, size - offset)
        if len(driver.config(offset, 1)) != 1:
            raise Broken(f"byte {offset} of the configuration space is missing")
    for value in (0xFF, 0):
        for offset in range(size):
            run.step = f"writing {value:#x} to byte {offset} of the configuration space"
            _write_config(run, offset, bytes([value]))
    run.step = "writing the configuration space as it was"
    for offset in range(size):
        _write_config(run, offset, whole[offset : offset + 1])
    _write_config(run, 0, whole)
    run.step = "after writes to the configuration space"
    run.work_once()


def _write_config(run: Run, offset: int, data: bytes) -> None:
    """A device may refuse a write, but not end the connection, nor have another size after it."""
    driver, host = run.driver, run.served.host
    size = len(host.device.config())
    try:
        driver.write_config(offset, data)
    except BackendError:
        driver.sync()
    if not run.served.run(lambda: host.read_config(size)):
        raise Broken(f"{run.step}: config() does not return its {size} bytes any more; it must not change its size")


def framing(run: Run) -> None:
    """A request means the same however it is cut into descriptors (virtio 1.3, 2.7.4)."""
    run.connect()
    for exchange in run.exchanges:
        for shape in SHAPES:
            run.step = shape.name
            run.must_work(exchange, shape)


def garbage(run: Run) -> None:
    """Requests without a meaning are completed, or held until the queue stops; they harm nobody."""
    run.connect()
    for queue in range(run.device.num_queues):
        for shape in SHAPES:
            run.step = f"requests without a meaning, {shape.name}"
            for probe in exchanges_for(run.probes, queue):
                run.may_wait(queue, [run.send(probe, shape)])
                if queue in run.holding:
                    break
    run.step = "after requests without a meaning"
    if not run.holding:
        run.work_once()
    run.step = "stopping queues after requests without a meaning"
    run.stop_all()


def written(run: Run) -> None:
    """The device writes at least as many bytes as it says, from the first one on (virtio 1.3, 2.7.8.2)."""
    run.connect()
    for exchange in run.exchanges:
        if not exchange.room:
            continue
        run.step = "looking for bytes that were not written"
        answers = [run.must_work(exchange, fill=fill) for fill in FILLS]
        for at in range(min(map(len, answers))):
            if all(answer[at] == fill for answer, fill in zip(answers, FILLS, strict=True)):
                said = f"the device says that it wrote {len(answers[0])} bytes"
                raise Broken(f"{exchange}: {said} and left byte {at} alone")


def burst(run: Run) -> None:
    """Many requests at once, more than the ring holds: each gets its own answer, once, whatever the order."""
    for queue in range(run.device.num_queues):
        exchanges = exchanges_for(run.exchanges, queue)
        if not exchanges:
            continue
        driver = run.connect(size=16)
        run.step = "many requests in flight"
        waiting: dict[int, Sent] = {}
        todo = list(islice(cycle(exchanges), 100))
        ring = driver.queues[queue]
        while todo or waiting:
            while todo and len(waiting) < 8 and ring.ring.free >= 4:
                sent = run.send(todo.pop(), publish=False)
                waiting[sent.token] = sent
            ring.publish()
            try:
                used = ring.wait(run.timeout)
            except BackendError as error:
                raise Broken(f"with {len(waiting)} requests in flight: {error}", "answer") from None
            for done in used:
                run.finish(waiting.pop(done.token), done)
        run.stop_all()


def stop_while_busy(run: Run) -> None:
    """A queue stops although requests are in flight, gives all of them back, and goes on from there."""
    driver = run.connect(size=16)
    for queue in range(run.device.num_queues):
        run.step = f"stopping queue {queue} while it is busy"
        requests = (exchanges_for(run.exchanges, queue) or exchanges_for(run.probes, queue))[:2]
        sent = [run.send(request, publish=False) for request in islice(cycle(requests), 8)]
        driver.queues[queue].publish()
        base = run.stop(queue)
        run.step = f"going on with queue {queue} after it was stopped while busy"
        driver.hand_over(driver.queues[queue], base)
        if exchanges_for(run.exchanges, queue):
            _collect(run, queue, sent)
        else:
            run.may_wait(queue, sent)
        run.stop(queue)


def _collect(run: Run, queue: int, sent: Sequence[Sent]) -> None:
    waiting = {one.token: one for one in sent}
    while waiting:
        try:
            used = run.driver.queues[queue].wait(run.timeout)
        except BackendError as error:
            raise Broken(f"{run.step}: {len(waiting)} requests get no answer ({error})", "answer") from None
        for done in used:
            run.finish(waiting.pop(done.token), done)


def restart(run: Run) -> None:
    """Queues stop and start one by one, also disabled and enabled, without a word to the others."""
    driver = run.connect()
    for queue in range(run.device.num_queues):
        run.step = f"while queue {queue} is stopped"
        base = run.stop(queue)
        for exchange in run.exchanges:
            if exchange.queue != queue and not _related(exchange.queue, queue):
                run.must_work(exchange)
        run.step = f"after queue {queue} was started again"
        driver.hand_over(driver.queues[queue], base)
        run.work_once()
        run.step = f"after queue {queue} was disabled and enabled"
        driver.enable_queue(queue, False)
        driver.enable_queue(queue, True)
        run.work_once()


def _related(one: int, other: int) -> bool:
    """Queues of a pair may need each other."""
    return one // 2 == other // 2


def reset(run: Run) -> None:
    """After a reset of the device everything works as after the first start (virtio 1.3, 2.4)."""
    for _ in range(2):
        driver = run.connect()
        run.work_once()
        run.stop_all()
        run.step = "after a reset"
        driver.link.tell(driver.link.connection.reset_device)
        for queue in list(driver.queues):
            driver.queues.pop(queue).close()
            driver.start_queue(queue, min(64, run.device.max_queue_size))
        run.work_once()


def hang_up(run: Run) -> None:
    """A front end dies with requests in flight; the next one finds the device as the first did."""
    for _ in range(2):
        run.connect(size=16)
        run.step = "hanging up while requests are in flight"
        for queue in range(run.device.num_queues):
            requests = (exchanges_for(run.exchanges, queue) or exchanges_for(run.probes, queue))[:2]
            for request in islice(cycle(requests), 4):
                run.send(request, publish=False)
            run.driver.queues[queue].publish()
        run.connect()
        run.step = "on the connection after one that ended while requests were in flight"
        run.work_once()


RULES: dict[str, Callable[[Run], None]] = {
    "negotiation": negotiation,
    "config": config,
    "framing": framing,
    "garbage": garbage,
    "written": written,
    "burst": burst,
    "stop": stop_while_busy,
    "restart": restart,
    "reset": reset,
    "hang-up": hang_up,
    "reconnect": reconnect,
}
#: rules that have nothing to do with rings: the first layout will do
ONCE = frozenset({"config", "negotiation", "reconnect"})


def _cut(data: bytes) -> str:
    return f"{data[:24]!r}{f'... ({len(data)} bytes)' if len(data) > 24 else ''}"
