"""A device written for device API 1, with most of what that has. Not to be changed: see test_api_stability.py."""

from __future__ import annotations

import os
import struct
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

from hcd.device import (
    API_VERSION,
    ConfigError,
    Counter,
    Device,
    DeviceError,
    Gauge,
    GuestError,
    Handle,
    Histogram,
    Lane,
    Metric,
    Option,
    Request,
    Virtqueue,
)

SELL, SLOW, THREAD = range(3)


class Vending(Device):
    """Queue 0 takes orders: a u16 of milliseconds, then what is to be said back in capitals. Queue 1 gets news."""

    api_version = 1
    virtio_id = 63
    description = "sells capitals"
    operations = ("sell", "slow", "thread")
    max_queue_size = 256
    vhost_user_type = ""
    options = (
        Option("greeting", "str", "first news", default="open", choices=("open", "hello")),
        Option("price", "int", "of one", 3, minimum=0, maximum=9),
        Option("rate", "float", "of something", 0.5),
        Option("stock", "size", "bytes in store", 1 << 20),
        Option("closed", "bool", "sell nothing", False),
        Option("ledger", "path", "a file"),
    )
    metrics = (
        Metric("vending_sales_total", "counter", "Sales.", labels={"how": ("now", "later")}),
        Metric("vending_stock_bytes", "gauge", "Bytes left in store."),
        Metric("vending_size_bytes", "histogram", "Sizes of orders.", buckets=(1, 10, 100)),
    )
    layout = struct.Struct("<HH")

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        if self.option["price"] == 7:
            raise ConfigError("seven is not a price")
        self.price: int = self.option["price"]
        self.lane: Lane
        self.news: Virtqueue | None = None
        self.untold: deque[bytes] = deque([str(self.option["greeting"]).encode()], maxlen=4)
        self.waiting: dict[Request, Handle] = {}
        self.sales: dict[str, Counter] = {how: self.counter("vending_sales_total", how=how) for how in ("now", "later")}
        self.stock: Gauge = self.gauge("vending_stock_bytes")
        self.stock.set(self.option["stock"])
        self.sizes: Histogram = self.histogram("vending_size_bytes")

    @property
    def num_queues(self) -> int:
        return 2

    @property
    def features(self) -> int:
        return 1 << 3

    def config(self) -> bytes:
        return self.layout.pack(self.price, API_VERSION)

    def write_config(self, offset: int, data: bytes) -> None:
        if (offset, len(data)) != (0, 2) or data[1] or data[0] > 9:
            raise DeviceError("only a price can be written")
        self.price = data[0]
        self.notify_config_change()

    def open(self, lane: Lane) -> None:
        self.lane = lane
        self.source, self.sink = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.watch = lane.watch(self.source, self.heard)
        lane.shared.setdefault("vending machines", []).append(self.name)
        self.log.info("opens at a price of %d", self.price)

    def close(self) -> None:
        def end() -> None:
            self.watch.cancel()
            os.close(self.source)

        self.lane.shared["vending machines"].remove(self.name)
        self.lane.post(end)
        os.close(self.sink)

    def connect(self, features: int) -> None:
        self.polite = bool(features & 1 << 3)

    def disconnect(self) -> None:
        self.news = None

    def start_queue(self, queue: Virtqueue) -> None:
        if queue.index == 1:
            queue.passive = True
            self.news = queue
            self.tell()

    def stop_queue(self, queue: Virtqueue) -> None:
        if queue.index == 1:
            self.news = None
        for request in [held for held in self.waiting if held.queue is queue]:
            self.waiting.pop(request).cancel()
            self.sell(request, "later")

    def process(self, queue: Virtqueue) -> Any:
        if queue.index == 1:
            self.tell()
            return
        for request in queue:
            self.serve(request)

    def serve(self, request: Request) -> None:
        if self.option["closed"]:
            raise DeviceError("closed", 1)
        milliseconds = request.u16(0)
        if milliseconds > 1000:
            raise GuestError("nobody waits so long")
        self.sizes.observe(request.readable_size)
        if milliseconds == 0:
            self.sell(request, "now")
        elif milliseconds == 1000:
            request.op = THREAD
            request.hold()
            threading.Thread(target=self.sell, args=(request, "later")).start()
        else:
            request.op = SLOW
            request.hold()
            self.waiting[request] = self.lane.call_later(milliseconds / 1000, lambda: self.ripe(request))

    def ripe(self, request: Request) -> None:
        del self.waiting[request]
        self.sell(request, "later")

    def sell(self, request: Request, how: str) -> None:
        request.skip(2)
        data = request.read(request.writable).upper()
        request.write(data)
        self.sales[how].inc()
        self.stock.dec(len(data))
        request.complete()

    def fail_request(self, request: Request, status: int) -> None:
        request.complete(0)

    def describe(self, request: Request) -> str:
        return f"order of {request.readable_size} bytes, room for {request.writable_size}"

    def heard(self) -> None:
        self.untold.append(os.read(self.source, 64))
        self.tell()

    def tell(self) -> None:
        while self.news is not None and self.untold:
            request = self.news.pop()
            if request is None:
                if self.news.enable_kicks():
                    continue
                return
            request.write(self.untold.popleft())
            request.complete()
