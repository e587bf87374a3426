"""One virtqueue of a front end: the driver's ring plus the eventfds that join it to the back end.

Kicks are counted as they are written, so a test knows exactly how often it rang. Calls are counted by the
eventfd's value, which adds up what was signalled since the last look.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

from hcd.frontend.errors import BackendError
from hcd.frontend.ring import Buffers, DriverRing, Used

__all__ = ["Queue"]

EVENTFD_FLAGS = os.EFD_CLOEXEC | os.EFD_NONBLOCK


class Queue:
    """A ring with its kick, call and err eventfds. ``Frontend.start_queue`` makes it; one thread uses it.

    ``watch_fd`` is polled for a hang-up while waiting (the connection's socket), -1 for none.
    """

    def __init__(self, index: int, ring: DriverRing, *, first_kick: int = 0) -> None:
        self.index = index
        self.ring = ring
        #: what the kick eventfd holds when it is handed over; QEMU hands over 1, others 0
        self.first_kick = first_kick
        self.kick_fd = os.eventfd(first_kick, EVENTFD_FLAGS)
        self.call_fd = os.eventfd(0, EVENTFD_FLAGS)
        self.err_fd = os.eventfd(0, EVENTFD_FLAGS)
        self.watch_fd = -1
        #: how often this end rang; ``first_kick`` not counted
        self.kicks = 0
        #: how often the device called, as far as it has been looked at
        self.calls = 0
        self._kept: list[Used] = []

    def close(self) -> None:
        """Close the eventfds. The ring's memory stays taken: the device may still look at it."""
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            if fd >= 0:
                os.close(fd)
        self.kick_fd = self.call_fd = self.err_fd = -1

    # -- to the device

    def submit(self, readable: Buffers, writable: Buffers, indirect: bool = False) -> int:
        """Add one chain, publish it and ring if the device wants that. Returns the chain's token."""
        token = self.ring.add(readable, writable, indirect)
        self.publish()
        return token

    def publish(self) -> bool:
        """Publish what was added and ring if the device wants that; returns whether it rang."""
        self.ring.publish()
        wanted = self.ring.kick_needed()
        if wanted:
            self.kick()
        return wanted

    def kick(self) -> None:
        """Ring, wanted or not."""
        os.eventfd_write(self.kick_fd, 1)
        self.kicks += 1

    # -- from the device

    def used(self) -> list[Used]:
        """What the device has finished since the last look; does not wait."""
        kept, self._kept = self._kept, []
        return kept + self.ring.used()

    def wait(self, timeout: float = 20.0) -> list[Used]:
        """Sleep on the call eventfd until at least one chain is used, and take out all that are.

        BackendError when ``timeout`` (seconds) runs out, the back end hangs up, or it reports a broken ring.
        """
        deadline = time.monotonic() + timeout
        while True:
            used = self.used()
            if used:
                return used
            if self.ring.enable_interrupts():
                continue
            self._sleep(deadline)

    def wait_for(self, token: int, timeout: float = 20.0) -> int:
        """Wait for one chain and return what the device wrote; others that finish stay for ``used``."""
        deadline = time.monotonic() + timeout
        others: list[Used] = []
        try:
            while True:
                for done in self.wait(max(0.0, deadline - time.monotonic())):
                    if done.token == token:
                        written = done.written
                        token = -1
                    else:
                        others.append(done)
                if token == -1:
                    return written
        finally:
            self._kept = others + self._kept

    def spin(self, timeout: float = 20.0) -> list[Used]:
        """As ``wait``, but by looking at the ring all the time. Whether interrupts are on is left as it is."""
        deadline = time.monotonic() + timeout
        while not (used := self.used()):
            if time.monotonic() > deadline:
                raise self._too_late()
            time.sleep(0)  # the device may need this core
        return used

    def poll(self, done: Callable[[], bool], timeout: float = 20.0) -> None:
        """Sleep between calls of the device until ``done()``. For rings that are driven raw."""
        deadline = time.monotonic() + timeout
        while not done():
            self._sleep(deadline)

    def _sleep(self, deadline: float) -> None:
        poller = select.poll()
        poller.register(self.call_fd, select.POLLIN)
        poller.register(self.err_fd, select.POLLIN)
        if self.watch_fd >= 0:
            poller.register(self.watch_fd, select.POLLRDHUP)
        remaining = max(0.0, deadline - time.monotonic())
        ready = dict(poller.poll(remaining * 1000))
        if self.call_fd in ready:
            self.read_calls()
            return
        if self.err_fd in ready:
            raise BackendError(f"queue {self.index}: the back end reports a broken ring")
        if ready:
            raise BackendError(f"queue {self.index}: the back end hung up")
        raise self._too_late()

    def _too_late(self) -> BackendError:
        return BackendError(f"queue {self.index}: nothing used in time, {self.ring.outstanding} chains out")

    def read_calls(self) -> int:
        """Take the pending calls out of the eventfd without waiting; returns how many there were."""
        try:
            count = os.eventfd_read(self.call_fd)
        except BlockingIOError:
            return 0
        self.calls += count
        return count

    def read_errors(self) -> int:
        """Take the pending counts out of the err eventfd; returns how many there were."""
        try:
            return os.eventfd_read(self.err_fd)
        except BlockingIOError:
            return 0
