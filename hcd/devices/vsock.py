"""Socket device (virtio 1.3, 5.10): streams and messages between programs of a guest and unix sockets of the host.

A program of the host that connects to ``uds-path`` and says ``CONNECT 1234`` reaches what listens on port 1234 in the
guest. A program of the guest that connects to CID 2, port 1234, reaches what listens on ``uds-path``_1234. Sockets of
type SOCK_SEQPACKET carry messages: the guest reaches those that listen on the same paths, and is reached through
``seqpacket-path``.

Connections outlive a pause of the guest, whose queues stop and go on. They end when the guest is reset, which shows
in rings that begin from the beginning, and when the front end goes away. A driver that goes on with its rings on a
new connection is told by an event that its ends are dead too, where the front end hands the event queue over (QEMU
keeps it; there the guest learns it from the answer to its next packet).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from hcd_protocols.virtio.features import VsockFeature
from hcd_protocols.virtio.ids import DeviceId
from hcd_protocols.virtio.vsock import (
    CONFIG,
    EVENT,
    EVENT_QUEUE,
    MAX_CID,
    MIN_CID,
    NUM_QUEUES,
    RX_QUEUE,
    TX_QUEUE,
    Event,
    Op,
)

from hcd.device import ConfigError, Counter, Device, Gauge, Lane, Metric, Option, Request, Virtqueue
from hcd.devices.vsock_host import MAX_SUFFIX, Door, reach
from hcd.devices.vsock_table import Table

__all__ = ["Vsock"]

#: bytes of the longest path of a unix socket
_MAX_PATH = 107
_SIDES = ("guest", "host")


class Vsock(Device):
    """Queue 0 carries packets to the guest, queue 1 those of the guest, queue 2 events."""

    virtio_id = DeviceId.VSOCK
    description = "sockets between guest and host, over unix sockets of the host"
    operations = ("packet",)
    vhost_user_type = "vsock"
    options = (
        Option("uds-path", "path", "the unix socket; PATH_PORT is what the guest reaches on the host (required)"),
        Option("seqpacket-path", "path", "uds-path for SOCK_SEQPACKET; without it the host opens no such connections"),
        Option("guest-cid", "int", "the guest's context id", 3, minimum=MIN_CID, maximum=MAX_CID),
        Option("max-connections", "int", "connections at a time", 1023, minimum=1, maximum=65536),
        Option("buffer", "size", "bytes that a connection keeps of the guest at most", 64 << 10, minimum=4096,
               maximum=16 << 20),
    )
    metrics = (
        Metric("vsock_connections", "gauge", "Connections that are open, or about to be."),
        Metric("vsock_accepted_total", "counter", "Connections that came about, by who asked.", {"by": _SIDES}),
        Metric("vsock_refused_total", "counter", "Connections that did not, by who asked.", {"by": _SIDES}),
        Metric("vsock_payload_bytes_total", "counter", "Bytes of the connections, by who gets them.", {"to": _SIDES}),
    )

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        self._path: str = self.option["uds_path"] or ""
        if not self._path:
            raise ConfigError('option "uds-path" is missing: the unix socket through which the host reaches the guest')
        if len(os.fsencode(self._path)) > _MAX_PATH - MAX_SUFFIX:
            raise ConfigError(f'option "uds-path": with "_PORT" behind it, {self._path} is longer than the '
                              f"{_MAX_PATH} bytes that a unix socket's path may have")
        self._cid: int = self.option["guest_cid"]
        self._counts = _Counts(self)
        self._table = Table(
            self._cid, limit=self.option["max_connections"], buffer=self.option["buffer"],
            reach=lambda port, kind: reach(self._path, port, kind), counts=self._counts,
        )
        self._lane: Lane
        self._doors: list[Door] = []
        self._events: Virtqueue | None = None
        self._started: set[int] = set()  # queues that ran since the front end came
        self._anew: set[int] = set()  # those that were started again, from their beginning
        self._reset_due = False

    # -- what it is

    @property
    def num_queues(self) -> int:
        return NUM_QUEUES

    @property
    def features(self) -> int:
        return int(VsockFeature.STREAM | VsockFeature.SEQPACKET)

    def config(self) -> bytes:
        return CONFIG.pack(self._cid)

    # -- its life

    def open(self, lane: Lane) -> None:
        self._lane = lane
        self._doors = [Door(self._path, socket.SOCK_STREAM, self._table.enter)]
        if path := self.option["seqpacket_path"]:
            try:
                self._doors.append(Door(path, socket.SOCK_SEQPACKET, self._table.enter))
            except BaseException:
                self._doors.pop().close()
                raise
        lane.post(self._start)

    def _start(self) -> None:
        self._table.start(self._lane)
        for door in self._doors:
            door.start(self._lane, self._table.poller)

    def close(self) -> None:
        self._lane.post(self._end)

    def _end(self) -> None:
        for door in self._doors:
            door.close()
        self._table.close()

    def disconnect(self) -> None:
        self._table.reset()
        self._started.clear()
        self._anew.clear()
        self._reset_due = False

    def start_queue(self, queue: Virtqueue) -> None:
        self._recognize(queue)
        if queue.index == RX_QUEUE:
            self._table.start_receiving(queue)
        elif queue.index == EVENT_QUEUE:
            queue.passive = True
            self._events = queue
        self._tell_reset()

    def _recognize(self, queue: Virtqueue) -> None:
        """Is it a driver that knows of connections of which we don't, or the other way round?"""
        new = not queue.resumed
        if queue.index not in self._started:
            self._started.add(queue.index)
            self._reset_due |= not new
        elif not new:
            self._anew.discard(queue.index)
        else:
            self._anew.add(queue.index)
            if {RX_QUEUE, TX_QUEUE} <= self._anew:  # one that stands still by chance is no sign
                self._anew.clear()
                self._table.reset()

    def stop_queue(self, queue: Virtqueue) -> None:
        if queue.index == RX_QUEUE:
            self._table.stop_receiving()
        elif queue.index == TX_QUEUE:
            self._table.stop_transmitting()
        else:
            self._events = None

    def process(self, queue: Virtqueue) -> None:
        if queue.index == RX_QUEUE:
            self._table.pump()
        elif queue.index == TX_QUEUE:
            self._table.transmit(queue)
        else:
            self._tell_reset()

    def _tell_reset(self) -> None:
        if not self._reset_due or self._events is None:
            return
        request = self._events.pop()
        if request is None:
            self._events.enable_kicks()
            return
        self._reset_due = False
        request.write(EVENT.pack(Event.TRANSPORT_RESET))
        request.complete()

    def describe(self, request: Request) -> str:
        if request.queue.index != TX_QUEUE:
            return super().describe(request)
        number = request.u16(30)  # offsets of 5.10.6: the payload behind it may be as long as the driver likes
        op = Op(number).name.lower() if number in Op._value2member_map_ else f"op {number}"
        source, cid, target, size = request.u32(16), request.u64(8), request.u32(20), request.u32(24)
        return f"{op} from port {source} to {cid}:{target}, {size} bytes"


class _Counts:
    """The device's own metrics."""

    def __init__(self, device: Vsock) -> None:
        self.open: Gauge = device.gauge("vsock_connections")
        self.to_guest: Counter = device.counter("vsock_payload_bytes_total", to="guest")
        self.to_host: Counter = device.counter("vsock_payload_bytes_total", to="host")
        self._accepted = {by: device.counter("vsock_accepted_total", by=by) for by in _SIDES}
        self._refused = {by: device.counter("vsock_refused_total", by=by) for by in _SIDES}

    def accepted(self, by: str) -> None:
        self._accepted[by].inc()

    def refused(self, by: str) -> None:
        self._refused[by].inc()
