"""Devices with one mistake each, for the conformance check to find; and the device that they were made from.

Each class says in ``BREAKS`` which rule its mistake breaks.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import trio

from hcd.device import Device, DeviceError, GuestError, Handle, Lane, Option, Request, Virtqueue


class Shout(Device):
    """Answers in capitals. Nothing is wrong with it."""

    BREAKS: ClassVar[str] = ""

    virtio_id = 63
    description = "answers in capitals"
    operations = ("shout",)

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        self.volume = 5

    def config(self) -> bytes:
        return struct.pack("<HH", self.volume, 9)

    def write_config(self, offset: int, data: bytes) -> None:
        if (offset, len(data)) != (0, 2):
            raise DeviceError("only the volume can be written")
        self.volume = int.from_bytes(data, "little")

    def process(self, queue: Virtqueue) -> Any:
        for request in queue:
            self.answer(request)

    def answer(self, request: Request) -> None:
        request.write(request.read().upper())
        request.complete()


class AsyncShout(Shout):
    """The same in trio; it may take its time."""

    async def process(self, queue: Virtqueue) -> None:
        for request in queue:
            request.hold()
            await trio.lowlevel.checkpoint()
            self.answer(request)


class LaterShout(Shout):
    """Answers by a timer, newest first, and gives back what waits when the queue stops: out of order, and legal."""

    lane: Lane
    timer: Handle | None = None

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        self.waiting: list[Request] = []

    def open(self, lane: Lane) -> None:
        self.lane = lane

    def process(self, queue: Virtqueue) -> None:
        for request in queue:
            request.hold()
            self.waiting.append(request)
        if self.waiting and self.timer is None:
            self.timer = self.lane.call_later(0.001, self.answer_all)

    def answer_all(self) -> None:
        self.timer = None
        while self.waiting:
            self.answer(self.waiting.pop())

    def stop_queue(self, queue: Virtqueue) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.answer_all()


# -- requests


class Forgetful(Shout):
    """Drops every fourth request."""

    BREAKS = "complete"
    count = 0

    def answer(self, request: Request) -> None:
        self.count += 1
        if self.count % 4:
            super().answer(request)


class Twice(Shout):
    """Completes what is completed already."""

    BREAKS = "handler"

    def answer(self, request: Request) -> None:
        super().answer(request)
        request.complete()


class Sleepy(Shout):
    """Answers a request when the next one comes: the last one waits for ever."""

    BREAKS = "answer"

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        self.kept: Request | None = None

    def answer(self, request: Request) -> None:
        request.hold()
        if self.kept is not None:
            super().answer(self.kept)
        self.kept = request

    def stop_queue(self, queue: Virtqueue) -> None:
        if self.kept is not None:
            super().answer(self.kept)
            self.kept = None


class Boaster(Shout):
    """Says that it filled the whole room, and did not: the driver reads what was there before."""

    BREAKS = "written"

    def answer(self, request: Request) -> None:
        room = request.writable
        request.write(request.read().upper())
        request.complete(room)


class Overflowing(Shout):
    """Says that it wrote more than there is room for."""

    BREAKS = "handler"

    def answer(self, request: Request) -> None:
        data = request.read().upper()
        request.write(data)
        request.complete(len(data))


class Framed(Shout):
    """Takes the first descriptor for the whole request."""

    BREAKS = "framing"

    def answer(self, request: Request) -> None:
        views = request.readable_views()
        request.write(bytes(views[0]).upper() if views else b"")
        request.complete()


class Mixed(Shout):
    """Keeps one answer for all requests in flight."""

    BREAKS = "burst"

    def process(self, queue: Virtqueue) -> None:
        requests = list(queue)
        for request in requests:
            answer = request.read().upper()
        for request in requests:
            request.write(answer)
            request.complete()


class Trusting(Shout):
    """Believes that every request has a header."""

    BREAKS = "handler"

    def answer(self, request: Request) -> None:
        data = request.read()
        struct.unpack_from("<I", data)
        request.write(data.upper())
        request.complete()


class Careful(Shout):
    """The same, done right: a request without its header is the guest's mistake."""

    def answer(self, request: Request) -> None:
        if request.readable_size < 4:
            raise GuestError("a request has at least 4 bytes")
        super().answer(request)


class SplitOnly(Shout):
    """Works with the rings of its author's guest."""

    BREAKS = "handler"

    def process(self, queue: Virtqueue) -> None:
        assert not queue.features >> 34 & 1, "no packed rings please"
        super().process(queue)


class FirstQueueOnly(Shout):
    """Has two queues and looks at one."""

    BREAKS = "answer"

    @property
    def num_queues(self) -> int:
        return 2

    def process(self, queue: Virtqueue) -> None:
        if queue.index == 0:
            super().process(queue)
        else:
            queue.passive = True


class Blocking(Shout):
    """Waits in the reactor."""

    BREAKS = "blocking"

    def answer(self, request: Request) -> None:
        if request.readable_size == 1000:
            time.sleep(0.25)
        super().answer(request)


# -- life


class Clinging(LaterShout):
    """Keeps what it holds when its queue stops."""

    BREAKS = "stop"

    def process(self, queue: Virtqueue) -> None:
        for request in queue:
            request.hold()
            self.waiting.append(request)
        self.timer = self.lane.call_later(60, self.answer_all)

    def stop_queue(self, queue: Virtqueue) -> None:
        pass


class LeakyConnect(Shout):
    """Opens a file for every connection."""

    BREAKS = "leaks"

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        self.fds: list[int] = []

    def connect(self, features: int) -> None:
        self.fds.append(os.open("/dev/null", os.O_RDONLY))

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


class LeakyClose(Shout):
    """Leaves a thread behind."""

    BREAKS = "leaks"

    def open(self, lane: Lane) -> None:
        threading.Thread(target=threading.Event().wait, daemon=True).start()  # one that ends would hide another


class OneLife(Shout):
    """Releases in disconnect what open took."""

    BREAKS = "handler"

    def open(self, lane: Lane) -> None:
        self.table: bytes | None = bytes(range(256)).upper()

    def answer(self, request: Request) -> None:
        assert self.table is not None
        request.write(request.read().translate(self.table))
        request.complete()

    def disconnect(self) -> None:
        self.table = None


class ConnectsOnce(Shout):
    """Is surprised by a driver that acknowledges features again."""

    BREAKS = "life"
    connected = False

    def connect(self, features: int) -> None:
        if self.connected:
            raise RuntimeError("connected already")
        self.connected = True

    def disconnect(self) -> None:
        self.connected = False


class StartsOnce(Shout):
    """Sets a queue up the first time that it starts."""

    BREAKS = "answer"

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        self.queue: Virtqueue | None = None

    def start_queue(self, queue: Virtqueue) -> None:
        self.queue = self.queue or queue

    def process(self, queue: Virtqueue) -> None:
        if queue is self.queue:
            super().process(queue)
        else:
            queue.passive = True


# -- configuration space and declaration


class ConfigRaises(Shout):
    """Looks its configuration registers up in a table that not every offset is in."""

    BREAKS = "life"

    def write_config(self, offset: int, data: bytes) -> None:
        self.volume = {0: 2}[offset]


class ConfigGrows(Shout):
    """Has a configuration space whose size depends on what is in it."""

    BREAKS = "config"

    def config(self) -> bytes:
        return super().config() + b"!" * (self.volume == 0)

    def write_config(self, offset: int, data: bytes) -> None:
        self.volume = 0


class NotInitialised(Shout):
    """Forgets its base class."""

    BREAKS = "declaration"

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.volume = 5


class ConfigShrinks(Shout):
    """Loses what lies behind a write, until somebody writes that too."""

    BREAKS = "config"

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        self.registers = bytearray(4)

    def config(self) -> bytes:
        return bytes(self.registers)

    def write_config(self, offset: int, data: bytes) -> None:
        self.registers[offset:] = data


class ConfigIsText(Shout):
    """Returns text."""

    BREAKS = "declaration"

    def config(self) -> Any:
        return "volume=5"


class AsyncOpen(Shout):
    """Has an ``open`` that nobody awaits."""

    BREAKS = "declaration"

    async def open(self, lane: Lane) -> None:  # type: ignore[override]
        await trio.lowlevel.checkpoint()


class RingFeatures(Shout):
    """Offers what is hcd's to offer: EVENT_IDX."""

    BREAKS = "declaration"

    @property
    def features(self) -> int:
        return 1 << 29


class OddDefault(Shout):
    """Declares an option whose default would be refused."""

    BREAKS = "declaration"
    options = (Option("volume", "int", "how loud", default=0, minimum=1),)


GOOD = (Shout, AsyncShout, LaterShout, Careful)
FAULTY = (
    Forgetful, Twice, Sleepy, Boaster, Overflowing, Framed, Mixed, Trusting, SplitOnly, FirstQueueOnly, Blocking,
    Clinging, LeakyConnect, LeakyClose, OneLife, ConnectsOnce, StartsOnce, ConfigRaises, ConfigGrows, ConfigShrinks,
    ConfigIsText, NotInitialised, AsyncOpen, RingFeatures, OddDefault,
)
