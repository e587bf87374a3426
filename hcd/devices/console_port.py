"""One port of a console device: two queues of the guest, one end on the host, and the flow between them.

Theory of operation.

* Guest to host: a request goes out as far as the end takes it. The first one that does not go out whole is held, and
  the transmit queue gets no turns (it is passive) until the end takes more: the guest waits, nothing is buffered.
  While nobody is connected, what the guest sends is dropped, as on a serial line without a terminal.
* A queue that stops gives its held request back. What was left in it, up to TAIL bytes, goes out before anything else.
* Host to guest: input is read straight into a buffer of the guest, while there is one and while the guest has the
  port open. Otherwise the end is not read, and whoever writes to it waits.
"""

from __future__ import annotations

import logging

from hcd.device import GuestError, Request, Virtqueue
from hcd.devices.console_ends import End

__all__ = ["OPERATIONS", "OP_CONTROL", "OP_DROPPED", "OP_RX", "OP_TX", "Port"]

OPERATIONS = ("tx", "rx", "control", "dropped")
OP_TX, OP_RX, OP_CONTROL, OP_DROPPED = range(4)
#: bytes of a half-sent request that outlive its queue
TAIL = 64 << 10
#: buffers that are filled in one turn
MOST = 32

Log = logging.LoggerAdapter[logging.Logger]


class Port:
    """Port ``number`` with the host's ``end``. A port without a ``name`` is a console."""

    def __init__(self, number: int, name: str, end: End, log: Log, *, drop: bool) -> None:
        self.number = number
        self.name = name
        self.end = end
        self.log = log
        #: whether the guest reads; where there are no control queues to tell: always
        self.guest_open = False
        self._drop = drop
        self._rx: Virtqueue | None = None
        self._tx: Virtqueue | None = None
        self._starved = False
        self._held: Request | None = None
        self._tail = b""
        end.on_readable = self._receive
        end.on_writable = self._resume

    @property
    def is_console(self) -> bool:
        return not self.name

    def open_by_guest(self, is_open: bool) -> None:
        self.guest_open = is_open
        self._update()

    def connection_changed(self) -> None:
        """The end was connected or lost its other side."""
        if not self.end.connected:
            self._tail = b""
            if self._held is not None:
                self._resume()
        self._update()

    # -- queues

    def start_receiving(self, queue: Virtqueue) -> None:
        queue.passive = True
        self._rx = queue
        self._starved = False
        self._update()

    def stop_receiving(self) -> None:
        self._rx = None
        self._update()

    def refilled(self, queue: Virtqueue) -> None:
        """The guest has added buffers."""
        queue.passive = True
        self._starved = False
        self._update()

    def start_sending(self, queue: Virtqueue) -> None:
        self._tx = queue

    def stop_sending(self) -> None:
        self._tx = None
        if (request := self._held) is not None:
            self._held = None
            self._tail = request.read(TAIL)
            request.complete(0)

    # -- guest to host

    def transmit(self, queue: Virtqueue) -> None:
        if self._held is not None:
            queue.passive = True
            return
        for request in queue:
            request.op = OP_TX
            if not self._pass_on(request):
                request.hold()
                self._held = request
                queue.passive = True
                return

    def _pass_on(self, request: Request) -> bool:
        """Send what is left of ``request``; whether it is done with. GuestError: its memory went away."""
        if self._send(request):
            request.complete(0)
            return True
        if not self.end.connected or self._drop:
            request.op = OP_DROPPED
            request.complete(0)
            return True
        return False

    def _send(self, request: Request) -> bool:
        if not self.end.connected:
            return False
        if self._tail:
            self._tail = self._tail[self.end.send_bytes(self._tail) :]
        return not self._tail and self.end.send(request)

    def _resume(self) -> None:
        """The end takes output again, or will not take any more."""
        if self._held is None:
            if self._tail:
                self._tail = self._tail[self.end.send_bytes(self._tail) :]
            return
        request = self._held
        try:
            if not self._pass_on(request):
                return
        except GuestError as error:
            self._fail(request, error)
        self._held = None
        if self._tx is not None:
            self._tx.passive = False
            self._tx.schedule()

    def emergency(self, byte: int) -> None:
        """Put one character out, whatever else goes on (5.3.6.1: a guest that has no queues yet, or no more)."""
        if self.end.connected:
            self.end.send_bytes(bytes([byte]))

    # -- host to guest

    def _receive(self) -> None:
        queue = self._rx
        for _ in range(MOST):
            if queue is None or not self.end.has_input():
                return
            request = queue.pop()
            if request is None:
                if queue.enable_kicks():  # one came just before the guest was asked to ring
                    continue
                self._starved = True
                self._update()
                return
            self._fill(queue, request)

    def _fill(self, queue: Virtqueue, request: Request) -> None:
        request.op = OP_RX
        try:
            if request.writable and not self.end.receive(request):
                queue.unpop(request)
            else:
                request.complete()
        except GuestError as error:
            self._fail(request, error)

    def _fail(self, request: Request, error: GuestError) -> None:
        self.log.warning("port %d: %s", self.number, error)
        request.status = 1
        request.complete(0)

    def _update(self) -> None:
        running = self._rx is not None and self.guest_open
        self.end.want_input(running and not self._starved, running)
