"""Requests of every in-tree device: any bytes, any lengths, cut into descriptors in any way.

``DEVICES`` has a line for each device; a new one is fuzzed by adding its line. A *case* is one request: a template,
mutated, cut up by hostile.c and offered on a ring, sound otherwise or not. The device runs in this thread on a lane
made of a list, so a seed gives the same run again, but for files whose I/O has threads.

What holds: a device's ``process`` raises nothing but GuestError and DeviceError; its log complains, and does not report
faults of its own; each request goes back once, with no more bytes than there is room for; when its queues are stopped
nothing is left in flight.
"""

from __future__ import annotations

import logging
import os
import random
import select
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hcd import plugins
from hcd.dataplane.bell import Bell
from hcd.dataplane.stats import DoorbellStats, QueueStats
from hcd.dataplane.virtqueue import Limit, Request, Virtqueue
from hcd.device import Device, DeviceError, DoorbellDevice, GuestError
from hcd.testing.serving import checked_options
from tests.fuzz.guest import Arena, library

__all__ = ["DEVICES", "DeviceFuzz", "Line"]

INDIRECT_DESC, EVENT_IDX, VERSION_1, RING_PACKED, IN_ORDER = (1 << bit for bit in (28, 29, 32, 34, 35))
NET_MRG_RXBUF = 1 << 15

#: bytes, and how many at their beginning are mostly left as they are
Template = tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class Line:
    """One device to be fuzzed. "{dir}" in an option is a directory that holds ``disk``, a file of 1 MiB."""

    type: str
    options: Mapping[str, Any] = field(default_factory=dict)
    templates: Sequence[Template] = ((b"", 0),)
    features: Sequence[int] = (0,)
    #: devices of the same options that are there too, and get requests too
    twins: int = 0


def _blk() -> list[Template]:
    """virtio 1.3, 5.2.6."""
    def head(kind: int, sector: int) -> bytes:
        return struct.pack("<IIQ", kind, 0, sector)

    segments = [struct.pack("<QII", 8 * n, 8, n & 1) for n in range(16)]
    requests = [(head(kind, sector), 4) for kind in (0, 4, 8, 99) for sector in (0, 7, 2047, 2048, 1 << 55)]
    requests += [(head(1, sector) + bytes(size), 16) for sector in (0, 2040, 2047) for size in (512, 4096, 511)]
    requests += [(head(kind, 0) + b"".join(segments[:n]), 16) for kind in (11, 13) for n in (1, 4, 16)]
    return requests


def _scsi() -> list[Template]:
    """virtio 1.3, 5.6.6, and the commands of SPC-4 and SBC-3."""

    def head(cdb: bytes, unit: int = 0) -> bytes:
        return struct.pack("<8sQBBB", bytes([1, 0, 0x40, unit, 0, 0, 0, 0]), 7, 0, 0, 0) + cdb.ljust(32, b"\0")

    asking = (0x00, 0x03, 0x12, 0x1A, 0x1B, 0x25, 0x5A, 0x5E, 0xA0)
    templates: list[Template] = [(head(bytes([opcode])), 20) for opcode in asking]
    templates += [(head(bytes(service)), 21) for service in ((0x9E, 0x10), (0xA3, 0x0C))]
    for opcode in (0x08, 0x0A, 0x28, 0x2A, 0x2F, 0x35, 0x41, 0x88, 0x8A, 0x8F, 0x91, 0x93, 0xA8, 0xAA):
        cdb = bytes([opcode]) + bytes(3) + bytes([1, 1] if opcode < 0x20 else [0, 0, 0, 0, 1])
        templates.append((head(cdb, opcode & 1) + b"d" * 512, 20))
    unmap = struct.pack(">HHI", 22, 16, 0) + struct.pack(">QII", 8, 8, 0)
    templates.append((head(bytes([0x42, 0, 0, 0, 0, 0, 0, 0, len(unmap)]), 1) + unmap, 20))
    templates.append((head(bytes([0x15, 0x10, 0, 0, 24])) + bytes([0, 0, 0, 0, 8, 18, 4]) + bytes(17), 20))
    templates.append((struct.pack("<II8sQ", 0, 5, bytes([1, 0, 0x40, 0, 0, 0, 0, 0]), 1), 8))
    templates.append((struct.pack("<I8sI", 1, bytes([1, 0, 0x40, 0, 0, 0, 0, 0]), 2), 4))
    return templates


def _net() -> list[Template]:
    """virtio 1.3, 5.1.6: a header of 12 bytes, then a frame."""
    frames = []
    for source, target in ((1, 2), (2, 1), (3, 255), (1, 1)):
        ethernet = bytes([0x52, 0x54, 0, 0, 0, target] if target != 255 else [255] * 6) + b"\x52\x54\0\0\0"
        for kind in (b"\x08\x00\x45" + bytes(50), b"\x86\xdd" + bytes(60), b"\x08\x06" + bytes(28)):
            frames.append((bytes(12) + ethernet + bytes([source]) + kind, 12))
            frames.append((bytes(12) + ethernet + bytes([source]) + kind + bytes(1400), 12))
    frames.append((bytes(12) + b"\xff" * 6 + bytes(65544), 26))
    return frames


def _vsock() -> list[Template]:
    """virtio 1.3, 5.10.6: streams of even ports of the guest, messages of odd ones."""
    def packet(op: int, port: int, payload: bytes = b"", flags: int = 0, credit: int = 1 << 16) -> Template:
        head = struct.pack("<QQIIIHHIII", 3, 2, port, 1024 + port % 2, len(payload), 1 + port % 2, op, flags, credit, 0)
        return head + payload, 44

    packets = [packet(op, port) for op in range(9) for port in (5000, 5001)]
    packets += [packet(5, port, bytes(size), flags=port % 2) for size in (1, 100, 4096, 65536) for port in (5000, 5001)]
    return [*packets, packet(4, 5000, flags=3), packet(6, 5000, credit=0), packet(1, 5002, credit=0xFFFF_FFFF)]


def _console() -> list[Template]:
    """virtio 1.3, 5.3.6.2, and bytes to be shown."""
    said = [(port, event, value) for port in (0, 1, 2) for event in range(9) for value in (0, 1)]
    control = [(struct.pack("<IHH", *one), 4) for one in said]
    return [*control, (b"hello\r\n", 0), (bytes(range(256)) * 20, 0)]


def _scsi() -> list[Template]:
    """virtio 1.3, 5.6.6: LUN, id, three bytes, a CDB of 32; what goes out behind it. And control requests (5.6.6.2)."""
    def command(cdb: bytes, unit: int = 0, data: bytes = b"") -> Template:
        lun = bytes([1, 0, 0x40, unit, 0, 0, 0, 0])
        return struct.pack("<8sQBBB", lun, 7, 0, 0, 0) + cdb.ljust(32, b"\0") + data, 19

    def transfer(op: int, block: int, count: int) -> bytes:
        wide = 0x88 <= op <= 0x93
        return struct.pack(">BBQI", op, 0, block, count) if wide else struct.pack(">BBIBH", op, 0, block, 0, count)

    reads = [command(transfer(op, 0, 8)) for op in (0x28, 0x88, 0x2F, 0x8F, 0x35, 0x91)]
    writes = [command(transfer(op, 8, 2), data=bytes(1024)) for op in (0x2A, 0x8A, 0x41, 0x93)]
    far = [command(transfer(op, block, 0xFFFF)) for op in (0x28, 0x88) for block in (0, 2040, 0xFFFF_FFFF)]
    unmap = struct.pack(">HH4xQI4x", 22, 16, 0, 8)
    told = [bytes([op, 0, 0, 0, 96, 0]) for op in (0, 3, 8, 0x0A, 0x12, 0x1A, 0x1B, 0x15)]
    told += [bytes([0x12, 1, page, 0, 255, 0]) for page in (0, 0x80, 0x83, 0xB0, 0xB1, 0xB2)]
    told += [bytes([0x1A, 0, page, 0, 255]) for page in (0x3F, 8, 10)] + [bytes([0x5A, 0, 0x3F, 0, 0, 0, 0, 1, 0])]
    told += [b"\x25", b"\x9e\x10" + bytes(11) + b"\x20", bytes([0xA0, *bytes(8), 96]), b"\xa3\x0c" + bytes(7) + b"\xff"]
    asked = [command(cdb, unit) for cdb in told for unit in (0, 1, 7)]
    control = [(struct.pack("<II8sQ", 0, what, bytes([1, 0, 0x40, 0, 0, 0, 0, 0]), 7), 8) for what in range(8)]
    return [*reads, *writes, *far, command(b"\x42" + bytes(6) + b"\0\x18", data=unmap), *asked, *control]


#: Every in-tree device; tests/fuzz/test_fuzz.py checks that none is missing.
DEVICES: Sequence[Line] = (
    Line("blk", {"ram": 1 << 20, "num-queues": 2}, _blk(), (0, 1 << 9, 1 << 9 | 1 << 13 | 1 << 14)),
    Line("blk", {"blk-file": "{dir}/disk", "num-queues": 2}, _blk(), (1 << 9 | 1 << 13 | 1 << 14, 0)),
    Line("blk", {"blk-file": "{dir}/disk", "read-only": True}, _blk(), (1 << 9,)),
    Line("scsi", {"disk": ["ram:1M", "0:1={dir}/disk"], "num-queues": 1}, _scsi(), (1 << 1 | 1 << 2, 0)),
    Line("scsi", {"disk": ["{dir}/disk,read-only,block-size=4096"]}, _scsi(), (0,)),
    Line("rng"),
    Line("rng", {"max-bytes": 1000, "period": 1}),
    Line("net", {"queue-pairs": 2}, _net(), (0, NET_MRG_RXBUF), twins=1),
    Line("net", {"mrg-rxbuf": False, "mtu": 1500}, _net(), twins=2),
    Line("vsock", {"uds-path": "{dir}/vsock", "max-connections": 8, "buffer": 4096}, _vsock(), (1,)),
    Line("console", {"port": ["pty"]}, _console(), (0, 1)),
    Line("console", {"port": ["pty", "a=file:/dev/null", "b=listen:{dir}/port"]}, _console(), (2, 3, 7)),
    Line("scsi", {"disk": ["0:0=ram:1M", "0:1={dir}/disk"]}, _scsi(), (0, 6)),
    Line("scsi", {"disk": ["0:0={dir}/disk,read-only"], "num-queues": 2}, _scsi(), (0, 2)),
    Line("nullio", {"ports": "0x510,0x514/2=7"}),
    Line("echo", {"gpas": "0xfe000000,0xfe000008", "stamps": True}),
)


class _Handle:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class SyncLane:
    """A lane without a loop: what was asked for happens in ``go_round``."""

    def __init__(self) -> None:
        self.shared: dict[str, Any] = {}
        self.closing = False
        self.scheduled: list[Virtqueue] = []
        self._now = 0.0
        self._watches: list[tuple[int, _Handle]] = []
        self._timers: list[tuple[float, _Handle]] = []
        self._posts: list[Callable[[], None]] = []
        self._dirty: list[Virtqueue] = []

    def watch(self, fd: int, callback: Callable[[], None]) -> _Handle:
        handle = _Handle(callback)
        self._watches.append((fd, handle))
        return handle

    def call_later(self, seconds: float, callback: Callable[[], None]) -> _Handle:
        handle = _Handle(callback)
        self._timers.append((self._now + seconds, handle))
        return handle

    def post(self, callback: Callable[[], None]) -> None:
        if self.closing:  # nobody goes round any more, and close() may wait for it
            callback()
        else:
            self._posts.append(callback)

    def flush_later(self, queue: Virtqueue) -> None:
        self._dirty.append(queue)

    def completions(self, queue: Virtqueue) -> None:
        self._posts.append(queue.take_remote)

    def schedule(self, queue: Virtqueue) -> None:
        self.scheduled.append(queue)

    def go_round(self, seconds: float = 0.01, *, wait_ms: int = 0) -> None:
        """``seconds`` go by on this lane's clock: serve what is ready, due or posted, and publish completions."""
        self._now += seconds
        self._serve_files(wait_ms)
        due = [handle for at, handle in self._timers if at <= self._now]
        self._timers = [(at, handle) for at, handle in self._timers if at > self._now]
        posts, self._posts = self._posts, []
        for callback in posts:
            callback()
        for handle in due:
            if handle.callback is not None:
                handle.callback()
        dirty, self._dirty = self._dirty, []
        for queue in dirty:
            queue.flush()

    def _serve_files(self, wait_ms: int) -> None:
        self._watches = [(fd, handle) for fd, handle in self._watches if handle.callback is not None]
        poll = select.poll()
        for fd, _ in self._watches:
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(wait_ms)} if self._watches else set()
        for fd, handle in list(self._watches):
            if fd in ready and handle.callback is not None:
                handle.callback()


class _Complaints(logging.Handler):
    """Tracebacks in a log are faults of the device, whoever caught them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.faults: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.faults.append(logging.Formatter().format(record))


class _Queue:
    """One queue of a device with the hostile driver on it."""

    def __init__(self, played: Played, index: int, arena: Arena) -> None:
        self.index = index
        self.arena = arena
        self.errors: list[Exception] = []
        device = played.device
        self.virtqueue = queue = Virtqueue(index, DoorbellStats(), QueueStats(device.operations), device.max_queue_size)
        queue.device = device
        queue.scheduler = played.lane
        queue.on_error = played.on_error
        queue.on_take = played.describe
        queue.set_memory(arena.table)

    def start(self, features: int, size: int, chance: random.Random) -> None:
        arena, h = self.arena, self.arena.hostile
        packed = bool(features & RING_PACKED)
        arena.lay_out(
            size=size, packed=packed, event_idx=bool(features & EVENT_IDX), indirect=bool(features & INDIRECT_DESC),
            swap=False,
        )
        h.random, h.chaos, h.room_most = chance.getrandbits(64) | 1, chance.choice((0, 0, 0, 3)), 70_000
        base = 0x80008000 if packed else 0
        library().hostile_reset(arena.at, base)
        user = arena.memory.user_addr
        self.virtqueue.start(features, size, user(h.desc), user(h.driver), user(h.device), base)
        self.virtqueue.set_enabled(True)


class Played:
    """One device, opened, with all its queues."""

    def __init__(self, line: Line, device: Device, lane: SyncLane, templates: Sequence[Template]) -> None:
        assert not device.is_async(), f"{line.type}: only plain devices run on a lane without a loop"
        self.device = device
        self.lane = lane
        self.faults: list[Exception] = []
        device.open(lane)
        lane.go_round()
        self.queues = [_Queue(self, index, Arena()) for index in range(device.num_queues)]
        for queue in self.queues:
            queue.arena.templates(list(templates))

    def on_error(self, queue: Virtqueue, error: Exception) -> None:
        """As the back end does: the request that the handler was at fails."""
        if not isinstance(error, GuestError | DeviceError):
            self.faults.append(error)
        request = queue.unfinished()
        if request is not None:
            request.status = 1
            self.device.fail_request(request, 1)
            if not request.completed:
                request.complete(0)

    def describe(self, request: Request) -> bool:
        """What the wrapper ``log`` does with each request before the device sees it."""
        with suppress(GuestError):
            assert self.device.describe(request).isprintable()
        return True

    def configure(self, chance: random.Random) -> None:
        """What a front end may ask of a device beside requests; the connection has checked the bounds."""
        size = len(self.device.config())
        offset = chance.randrange(size) if size else 0
        data = chance.randbytes(chance.randrange(size - offset) + 1 if size else 0)
        for ask in (
            lambda: self.device.write_config(offset, data),
            lambda: self.device.set_mtu(chance.choice((0, 67, 68, 1500, 65535, chance.getrandbits(16)))),
            lambda: self.device.announce(chance.randbytes(6)),
        ):
            with suppress(DeviceError):
                ask()
        assert len(self.device.config()) == size

    def limit(self, chance: random.Random) -> None:
        """A limit for all queues of this connection, or none."""
        limit = Limit() if chance.random() < 0.2 else None
        if limit is not None:
            limit.set(chance.choice((0, 10, 1e6)), chance.choice((0, 5)), chance.choice((0, 1e3, 1e9)))
        for queue in self.queues:
            queue.virtqueue.set_limit(limit)

    def start(self, features: int, size: int, chance: random.Random) -> None:
        self.limit(chance)
        self.device.connect(features)
        for queue in self.queues:
            queue.start(features, size, chance)
            self.device.start_queue(queue.virtqueue)

    def turn(self, queue: _Queue, count: int) -> int:
        """``count`` requests more; returns how many were taken."""
        virtqueue = queue.virtqueue
        if count:
            library().hostile_fill(queue.arena.at, count)
        virtqueue.disable_kicks()
        virtqueue.begin_turn(1, False, True)
        taken = virtqueue.stats.found_by_poll
        try:
            self.device.process(virtqueue)
        except Exception as error:
            self.on_error(virtqueue, error)
        virtqueue.end_turn()
        virtqueue.enable_kicks()
        return virtqueue.stats.found_by_poll - taken

    def serve_scheduled(self) -> None:
        """Turns that the device asked for."""
        scheduled, self.lane.scheduled = self.lane.scheduled, []
        for queue in self.queues:
            if queue.virtqueue in scheduled:
                self.turn(queue, 0)

    def stop(self) -> None:
        for queue in self.queues:
            queue.virtqueue.halt()
            self.device.stop_queue(queue.virtqueue)
        deadline = time.monotonic() + 30
        while any(queue.virtqueue.inflight for queue in self.queues):
            self.lane.go_round(1.0, wait_ms=10)
            for queue in self.queues:
                for request in queue.virtqueue.lost():
                    raise AssertionError(f"{request} was never completed")
            assert time.monotonic() < deadline, "requests stay in flight after their queues were stopped"
        for queue in self.queues:
            queue.virtqueue.stop()
        self.device.disconnect()

    def close(self) -> None:
        self.lane.closing = True
        self.device.close()
        for queue in self.queues:
            queue.arena.close()


class _Rings:
    """A doorbell device: rings of any count, and shared memory that the guest writes to."""

    def __init__(self, device: DoorbellDevice, lane: SyncLane) -> None:
        self.device = device
        device.open(lane)
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.bells = [Bell(one.name, self._fd, DoorbellStats()) for one in device.doorbells]
        device.lines = {one.name: _Line() for one in device.interrupts}  # type: ignore[dict-item]

    def play(self, chance: random.Random) -> int:
        device = self.device
        memory = bytearray(device.memory_size)
        device.memory = memoryview(memory) if memory else None
        device.connect()
        for _ in range(20):
            if memory:
                memory[:32] = chance.randbytes(32)
            count = chance.choice((1, 2, 1 << 32, (1 << 64) - 2, chance.getrandbits(63)))
            device.ring(chance.choice(self.bells), count)
        device.disconnect()
        device.memory = None
        return 20

    def close(self) -> None:
        self.device.close()
        os.close(self._fd)


class _Line:
    def signal(self, answers: Bell | None = None) -> bool:
        return True


class DeviceFuzz:
    """The target ``devices``: each step is a connection to one of them."""

    name = "devices"

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.cases = 0
        self.by_device: dict[str, int] = {}
        self._directory = tempfile.TemporaryDirectory(prefix="fuzz-")
        (Path(self._directory.name) / "disk").write_bytes(os.urandom(1 << 20))
        self._listeners = [self._listen(1024, socket.SOCK_STREAM), self._listen(1025, socket.SOCK_SEQPACKET)]
        self._complaints = _Complaints()
        self._log = logging.getLogger("hcd")
        self._log.addHandler(self._complaints)
        self._log.propagate = False
        self._open: tuple[int, list[Played | _Rings]] | None = None

    def close(self) -> None:
        self._close_devices()
        for listener in self._listeners:
            listener.close()
        self._log.removeHandler(self._complaints)
        self._log.propagate = True
        self._directory.cleanup()

    def _listen(self, port: int, kind: socket.SocketKind) -> socket.socket:
        """What a guest's sockets reach; nobody ever accepts or reads."""
        listener = socket.socket(socket.AF_UNIX, kind)
        listener.bind(f"{self._directory.name}/vsock_{port}")
        listener.listen(1)
        return listener

    def describe(self) -> str:
        return "requests taken: " + ", ".join(f"{name} {count}" for name, count in self.by_device.items())

    def run_one(self, number: int) -> None:
        """Devices take turns of 200 connections; within such a turn they keep what they learned."""
        chance = random.Random(f"{self.seed}/{number}")
        which = number // 200 % len(DEVICES)
        if self._open is None or self._open[0] != which:
            self._close_devices()
            self._open = which, self._open_devices(DEVICES[which])
        taken = 0
        line = DEVICES[which]
        played = self._open[1]
        rings = [one for one in played if isinstance(one, _Rings)]
        taken = sum(one.play(chance) for one in rings)
        self.cases += taken
        devices = [one for one in played if isinstance(one, Played)]
        if devices:
            taken = self._connection(line, devices, chance)
        self.by_device[line.type] = self.by_device.get(line.type, 0) + taken
        assert not self._complaints.faults, self._complaints.faults[0]

    def _connection(self, line: Line, devices: list[Played], chance: random.Random) -> int:
        features = VERSION_1 | chance.choice(line.features) | EVENT_IDX * chance.getrandbits(1) | INDIRECT_DESC
        features |= RING_PACKED * chance.getrandbits(1)
        features |= IN_ORDER * (devices[0].device.in_order and chance.getrandbits(1))
        size = chance.choice((4, 16, 64, 128, 256))
        for one in devices:
            one.start(features, size, chance)
        taken = 0
        for _ in range(chance.randrange(1, 12)):
            one = chance.choice(devices)
            count = chance.choice((0, 1, 2, 8, 16))
            self.cases += count
            taken += one.turn(chance.choice(one.queues), count)
            one.lane.go_round(chance.choice((0.001, 0.01, 0.01, 2.0, 20.0)))
            one.serve_scheduled()
            if chance.getrandbits(3) == 0:
                one.configure(chance)
            if one.faults:
                raise one.faults[0]
        for one in devices:
            one.stop()
            if one.faults:
                raise one.faults[0]
        return taken

    def _open_devices(self, line: Line) -> list[Played | _Rings]:
        found = plugins.load(line.type)
        given = {key: self._placed(value) for key, value in line.options.items()}
        lane = SyncLane()
        made: list[Played | _Rings] = []
        for n in range(1 + line.twins):
            if issubclass(found, Device):
                device = found(f"{line.type}{n}", checked_options(found, given))
                made.append(Played(line, device, lane, line.templates))
            else:
                assert issubclass(found, DoorbellDevice)
                bells = found(line.type, {key.replace("-", "_"): value for key, value in given.items()})
                made.append(_Rings(bells, lane))
        return made

    def _placed(self, value: Any) -> Any:
        """An option with the directory's name in it."""
        if isinstance(value, list):
            return [self._placed(one) for one in value]
        return value.format(dir=self._directory.name) if isinstance(value, str) else value

    def _close_devices(self) -> None:
        if self._open is not None:
            for one in self._open[1]:
                one.close()
        self._open = None
