"""The control queues of a console device with several ports (virtio 1.3, 5.3.6.2).

Messages for the guest wait for its buffers in ``_outbox``, at most one for each port and event: a later one replaces
what an earlier one said. So neither a guest that asks without end nor a client that comes and goes makes it grow.

A driver says DEVICE_READY before anything else. Where the queue on which it does so was in use before this device saw
it, it was said to another process, which served the guest before this one: the ports are there already, which of them
are open is not known, so all of them count as open, and only what may have changed since is told.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hcd_protocols.virtio.console import CONTROL, RESIZE, ControlEvent

from hcd.device import GuestError, Request, Virtqueue
from hcd.devices.console_port import OP_CONTROL, Port

__all__ = ["Control", "describe"]

READY, ADD, PORT_READY = ControlEvent.DEVICE_READY, ControlEvent.DEVICE_ADD, ControlEvent.PORT_READY
CONSOLE_PORT, PORT_RESIZE = ControlEvent.CONSOLE_PORT, ControlEvent.RESIZE
PORT_OPEN, PORT_NAME = ControlEvent.PORT_OPEN, ControlEvent.PORT_NAME

Log = logging.LoggerAdapter[logging.Logger]


class Control:
    """What the device and the driver of ``ports`` tell each other. ``sized``: the driver knows RESIZE."""

    def __init__(self, ports: Sequence[Port], log: Log) -> None:
        self.ports = ports
        self.sized = False
        self.log = log
        self._rx: Virtqueue | None = None
        self._outbox: dict[tuple[int, ControlEvent], bytes] = {}
        self._ready = False  # the driver is known to be there
        self._known: set[int] = set()  # ports that it knows
        self._told: dict[int, bool] = {}  # whether they are connected, as it was told last

    def reset(self) -> None:
        """There is another driver, or none."""
        self._outbox.clear()
        self._known.clear()
        self._told.clear()
        self._ready = False
        for port in self.ports:
            port.open_by_guest(False)

    def resume(self) -> None:
        """The driver was there before this device, unless it has spoken already."""
        if self._ready:
            return
        self._ready = True
        self._known = {port.number for port in self.ports}
        for port in self.ports:
            port.open_by_guest(True)
            self.tell_size(port)
            self.tell_connection(port)
        self.flush()

    # -- from the guest

    def take(self, request: Request) -> None:
        """A message of the driver. GuestError when it makes no sense."""
        request.op = OP_CONTROL
        number, event, value = request.u32(0), request.u16(4), request.u16(6)
        if event == READY:
            self._driver_ready(value)
        elif number >= len(self.ports):
            raise GuestError(f"a control message for port {number}; there are {len(self.ports)}")
        elif event == PORT_READY:
            self._port_ready(self.ports[number], value)
        elif event == PORT_OPEN:
            self.ports[number].open_by_guest(bool(value))
        else:
            raise GuestError(f"a control message with event {event}, which no driver sends")
        request.complete(0)
        self.flush()

    def _driver_ready(self, value: int) -> None:
        self.reset()
        if not value:
            self.log.warning("the driver says that it cannot drive the device")
            return
        self._ready = True
        for port in self.ports:
            self._put(port, ADD, 1)

    def _port_ready(self, port: Port, value: int) -> None:
        if not value:
            self.log.warning("the driver says that it cannot have port %d", port.number)
            return
        self._known.add(port.number)
        self._told.pop(port.number, None)
        if port.is_console:
            self._put(port, CONSOLE_PORT, 1)
            self.tell_size(port)
        else:
            self._put(port, PORT_NAME, 1, port.name.encode())
        self.tell_connection(port)

    # -- to the guest

    def tell_connection(self, port: Port) -> None:
        """Whether somebody on the host has the port open. A console is always there: its output may be dropped."""
        connected = port.end.connected or port.is_console
        if port.number in self._known and self._told.get(port.number) != connected:
            self._told[port.number] = connected
            self._put(port, PORT_OPEN, int(connected))

    def tell_size(self, port: Port) -> None:
        cols, rows = port.end.size
        if self.sized and port.is_console and port.number in self._known and cols and rows:
            self._put(port, PORT_RESIZE, 1, RESIZE.pack(rows, cols))

    def _put(self, port: Port, event: ControlEvent, value: int, more: bytes = b"") -> None:
        self._outbox[port.number, event] = CONTROL.pack(port.number, event, value) + more

    def start(self, queue: Virtqueue) -> None:
        self._rx = queue
        self.refilled(queue)

    def stop(self) -> None:
        self._rx = None

    def refilled(self, queue: Virtqueue) -> None:
        queue.passive = True
        self.flush()

    def flush(self) -> None:
        """Give the guest what it has buffers for."""
        queue = self._rx
        while self._outbox and queue is not None:
            request = queue.pop()
            if request is None:
                if queue.enable_kicks():  # one came just before the guest was asked to ring
                    continue
                return
            request.op = OP_CONTROL
            key = next(iter(self._outbox))
            message = self._outbox.pop(key)
            if request.writable < len(message):
                self.log.warning("a message of %d bytes is lost: the driver's buffer has %d", len(message),
                                 request.writable)
                request.status = 1
                request.complete(0)
            else:
                request.write(message)
                request.complete()


def describe(request: Request) -> str:
    """A message of the driver, for the log."""
    number, event, value = request.u32(0), request.u16(4), request.u16(6)
    name = ControlEvent(event).name if event in set(ControlEvent) else f"event {event}"
    return f"control {name} port {number} value {value}"
