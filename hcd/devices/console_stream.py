"""An end of a console port with a descriptor whose other side comes and goes.

Theory of operation.

* The lane waits for readability alone. So each connection has an epoll instance of its own, which is readable when
  any of the events that matter now is there: input (only while the guest has room for it), room for output (only
  while output waits), and the other side hanging up (always).
* Whoever hangs up may leave bytes behind. They are read first where the guest listens and is merely slow; where
  nobody listens in the guest they are dropped, or the next one could never connect.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import struct
import termios

from hcd.device import Handle, Request
from hcd.devices.console_ends import End, Log

__all__ = ["StreamEnd"]

#: bytes that one turn moves at most: a guest may send a request of gigabytes, and others wait
BURST = 256 << 10
HUNG_UP = select.EPOLLHUP | select.EPOLLRDHUP | select.EPOLLERR


class StreamEnd(End):
    """An end with a descriptor that comes and goes with connections."""

    fd = -1

    def __init__(self, path: str, log: Log) -> None:
        super().__init__(path, log)
        self._epoll: select.epoll | None = None
        self._watch: Handle | None = None
        self._wanted = self._patient = self._blocked = self._leaving = False

    def close(self) -> None:
        self.lane.post(self._end)

    def _end(self) -> None:
        """Release everything, on the lane's thread."""
        self._detach()
        self._close_fd()

    def _close_fd(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # -- connections

    def _attach(self, fd: int, epoll: select.epoll) -> None:
        """``fd`` (ours, non-blocking) is connected from here on; ``epoll`` is a new one."""
        self.fd, self._epoll = fd, epoll
        self._blocked = self._leaving = False
        epoll.register(fd, self._events())
        self._watch = self.lane.watch(self._epoll.fileno(), self._happened)
        self.connected = True
        self.on_change()

    def _detach(self) -> None:
        """The connection is over; ``fd`` stays open."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
        self.connected = False

    def _lost(self) -> None:
        if self.connected:
            self._detach()
            self._after_loss()
            self.on_change()

    def _after_loss(self) -> None:
        """Close the descriptor or keep it, and see to the next connection."""
        raise NotImplementedError

    # -- events

    def _events(self) -> int:
        events = 0 if self._leaving else select.EPOLLRDHUP
        return events | select.EPOLLIN * self._wanted | select.EPOLLOUT * self._blocked

    def _update(self) -> None:
        if self._epoll is None:
            return
        # HUP cannot be masked: who left bytes behind is not looked at until the guest wants them.
        with contextlib.suppress(FileNotFoundError):
            if self._leaving and not self._wanted:
                self._epoll.unregister(self.fd)
            else:
                self._epoll.modify(self.fd, self._events())
            return
        if not (self._leaving and not self._wanted):
            self._epoll.register(self.fd, self._events())

    def want_input(self, wanted: bool, patient: bool) -> None:
        if (wanted, patient) != (self._wanted, self._patient):
            self._wanted, self._patient = wanted, patient
            self._update()
            if self._leaving and not patient:
                self._lost()

    def _happened(self) -> None:
        if self._epoll is None:
            return
        events = dict(self._epoll.poll(0)).get(self.fd, 0)
        if events & select.EPOLLOUT:
            self._blocked = False
            self._update()
            self.on_writable()
        if events & (select.EPOLLIN | HUNG_UP) and self._wanted:
            self.on_readable()
        if events & HUNG_UP and self.connected:
            self._hung_up()

    def _hung_up(self) -> None:
        if not self.has_input() or not self._patient:
            self._lost()
        elif not self._leaving:
            self._leaving = True
            self._update()

    # -- data

    def has_input(self) -> bool:
        if self.fd < 0 or not self.connected:
            return False
        try:
            return bool(struct.unpack("i", fcntl.ioctl(self.fd, termios.FIONREAD, bytes(4)))[0])
        except OSError:
            return False

    def receive(self, request: Request) -> int:
        try:
            return request.preadv(self.fd, -1)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._failed(error)
            return 0

    def send(self, request: Request) -> bool:
        left = BURST
        try:
            while request.readable and left > 0:
                left -= request.pwritev(self.fd, -1, left)
        except BlockingIOError:
            pass
        except OSError as error:
            self._failed(error)
            return False
        if request.readable:
            self._block()
        return not request.readable

    def send_bytes(self, data: bytes) -> int:
        try:
            sent = os.write(self.fd, data) if self.connected else 0
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._failed(error)
            return 0
        if sent < len(data):
            self._block()
        return sent

    def _block(self) -> None:
        self._blocked = True
        self._update()

    def _failed(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EIO):
            self.log.warning("%s: %s", self.path, error.strerror)
        self._lost()
