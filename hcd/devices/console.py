"""Console device (virtio 1.3, 5.3): a guest's consoles and channels, on pseudo-terminals, unix sockets and files.

Here are the options, the features, the configuration space, and which queue belongs to what. A port's data flow is in
:mod:`hcd.devices.console_port`, its end on the host in :mod:`hcd.devices.console_ends`, and what device and driver tell
each other about ports in :mod:`hcd.devices.console_control`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hcd_protocols.virtio.console import (
    CONTROL_RX,
    CONTROL_TX,
    EMERGENCY_OFFSET,
    EMERGENCY_SIZE,
    ConsoleConfig,
    port_of_queue,
    queues_of_port,
)
from hcd_protocols.virtio.features import ConsoleFeature
from hcd_protocols.virtio.ids import DeviceId

from hcd.device import ConfigError, Device, DeviceError, Lane, Option, Request, Virtqueue
from hcd.devices import console_control
from hcd.devices.console_control import Control
from hcd.devices.console_ends import End
from hcd.devices.console_file import FileEnd
from hcd.devices.console_port import OPERATIONS, Port
from hcd.devices.console_pty import PtyEnd
from hcd.devices.console_sockets import ConnectEnd, ListenEnd

__all__ = ["Console"]

MAX_PORTS = 31
ENDS: Mapping[str, type[End]] = {"pty": PtyEnd, "listen": ListenEnd, "connect": ConnectEnd, "file": FileEnd}
PORT = re.compile(r"(?:(?P<name>[^=:/]+)=)?(?P<kind>[a-z]+)(?::(?P<path>.+))?")
SHAPE = "[NAME=]pty[:LINK], [NAME=]listen:SOCKET, [NAME=]connect:SOCKET or [NAME=]file:PATH"


class Console(Device):
    """``console``. A port without a name is a console (hvc0), one with a name a channel (/dev/virtio-ports/NAME)."""

    virtio_id = DeviceId.CONSOLE
    description = "consoles and channels on pseudo-terminals, unix sockets and files"
    vhost_user_type = "console"
    operations = OPERATIONS
    options = (
        Option("port", "list", f"{SHAPE}; again for more", default=("pty",)),
        Option(
            "slow-reader", "str", "what output of the guest that nobody reads fast enough does", "hold",
            choices=("hold", "drop"),
        ),
    )

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        self.ports = [self._make_port(number, text) for number, text in enumerate(self.option["port"])]
        self._check_ports()
        #: several ports, or names for them, need control queues
        self.multiport = len(self.ports) > 1 or not self.ports[0].is_console
        self.control = Control(self.ports, self.log)
        self._negotiated = False

    def _make_port(self, number: int, text: str) -> Port:
        match = PORT.fullmatch(text)
        if match is None or match["kind"] not in ENDS or (match["path"] is None and match["kind"] != "pty"):
            raise ConfigError(f'port "{text}": expected {SHAPE}')
        end = ENDS[match["kind"]](match["path"] or "", self.log)
        port = Port(number, match["name"] or "", end, self.log, drop=self.option["slow_reader"] == "drop")
        end.on_change = lambda: self._connection_changed(port)
        end.on_size = lambda: self._size_changed(port)
        return port

    def _check_ports(self) -> None:
        if not 1 <= len(self.ports) <= MAX_PORTS:
            raise ConfigError(f"{len(self.ports)} ports; expected 1 to {MAX_PORTS}")
        names = [port.name for port in self.ports if port.name]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f'two ports have the name "{doubled.pop()}"')

    # -- what it is

    @property
    def num_queues(self) -> int:
        return queues_of_port(len(self.ports) - 1)[1] + 1 if len(self.ports) > 1 else 4 if self.multiport else 2

    @property
    def features(self) -> int:
        features = ConsoleFeature.EMERG_WRITE
        if any(isinstance(port.end, PtyEnd) and port.is_console for port in self.ports):
            features |= ConsoleFeature.SIZE
        if self.multiport:
            features |= ConsoleFeature.MULTIPORT
        return int(features)

    def config(self) -> bytes:
        cols, rows = self.ports[0].end.size if self.ports[0].is_console else (0, 0)
        return ConsoleConfig(cols=cols, rows=rows, max_nr_ports=len(self.ports)).to_bytes()

    def write_config(self, offset: int, data: bytes) -> None:
        if offset != EMERGENCY_OFFSET or not 1 <= len(data) <= EMERGENCY_SIZE:
            raise DeviceError(f"{len(data)} bytes at {offset} of the configuration space cannot be written; only the "
                              f"emergency register at {EMERGENCY_OFFSET} can")
        self.ports[0].emergency(data[0])

    # -- its life

    def open(self, lane: Lane) -> None:
        opened: list[Port] = []
        try:
            for port in self.ports:
                port.end.open(lane)
                opened.append(port)
        except BaseException:
            for port in opened:
                port.end.close()
            raise

    def close(self) -> None:
        for port in self.ports:
            port.end.close()

    def connect(self, features: int) -> None:
        self._negotiated = bool(features & ConsoleFeature.MULTIPORT) and self.multiport
        self.control.sized = bool(features & ConsoleFeature.SIZE)
        for port in self.ports:
            port.end.watch_size(True)
            if not self._negotiated:
                port.open_by_guest(True)

    def disconnect(self) -> None:
        self.control.reset()
        for port in self.ports:
            port.end.watch_size(False)

    def start_queue(self, queue: Virtqueue) -> None:
        if queue.index == CONTROL_RX:
            self.control.start(queue)
        elif queue.index == CONTROL_TX:
            if self._negotiated and queue.resumed:
                self.control.resume()
        else:
            port = self.ports[port_of_queue(queue.index)]
            port.start_sending(queue) if queue.index % 2 else port.start_receiving(queue)

    def stop_queue(self, queue: Virtqueue) -> None:
        if queue.index == CONTROL_RX:
            self.control.stop()
        elif queue.index != CONTROL_TX:
            port = self.ports[port_of_queue(queue.index)]
            port.stop_sending() if queue.index % 2 else port.stop_receiving()

    # -- requests

    def process(self, queue: Virtqueue) -> None:
        if queue.index == CONTROL_TX:
            for request in queue:
                self.control.take(request)
        elif queue.index == CONTROL_RX:
            self.control.refilled(queue)
        else:
            port = self.ports[port_of_queue(queue.index)]
            port.transmit(queue) if queue.index % 2 else port.refilled(queue)

    def describe(self, request: Request) -> str:
        index = request.queue.index
        if index == CONTROL_TX:
            return console_control.describe(request)
        if index == CONTROL_RX:
            return f"room for a control message of {request.writable_size} bytes"
        number = port_of_queue(index)
        if index % 2:
            return f"{request.readable_size} bytes from port {number}"
        return f"room for {request.writable_size} bytes to port {number}"

    # -- the host's side changes

    def _connection_changed(self, port: Port) -> None:
        port.connection_changed()
        if self._negotiated:
            self.control.tell_connection(port)
            self.control.flush()

    def _size_changed(self, port: Port) -> None:
        if self._negotiated:
            self.control.tell_size(port)
            self.control.flush()
        if port.number == 0 and port.is_console:
            self.notify_config_change()
