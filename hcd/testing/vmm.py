"""A VMM without a virtual machine: attaches to a doorbell device, rings by writing eventfds, waits for interrupts.

::

    with serve(Lamp) as served, served.vmm() as vmm:
        vmm.ring("switch")
        vmm.wait_interrupt("done")
"""

from __future__ import annotations

import array
import mmap
import os
import select
import socket
from collections.abc import Callable, Sequence

from hcd_protocols.doorbell import (
    MAX_ITEMS,
    MAX_MESSAGE,
    Added,
    Capability,
    DoorbellItem,
    Held,
    InterruptItem,
    Item,
    Kind,
    MemoryItem,
    Reference,
    Refused,
    Removed,
    TableComplete,
    VmmConnection,
    VmmEvent,
    Welcomed,
)

from hcd.frontend.errors import BackendError

__all__ = ["Gone", "Vmm"]

EVERYTHING = Capability(0xFF)
#: where the guest would see the shared memory, unless the device asks for a place
MEMORY_ADDRESS = 0xD0000000


class Gone(BackendError):
    """hcd closed the connection."""


class Vmm:
    """Connects on construction, and has the whole table when the constructor returns.

    ``register`` says what becomes of each item: 0 or an errno. ``held``: from :meth:`keep` of an earlier one.
    ``timeout`` in seconds, for whatever is waited for; BackendError when it is over.
    """

    def __init__(
        self,
        path: object,
        *,
        register: Callable[[Item], int] = lambda item: 0,
        held: Sequence[Held] = (),
        timeout: float = 20.0,
    ) -> None:
        self.items: dict[Reference, Item] = {one.item.reference: one.item for one in held}
        self.fds: dict[Reference, int] = {one.item.reference: one.fd for one in held}
        self.adopted: list[Reference] = []
        self.removed: list[Reference] = []
        self.welcome: Welcomed | None = None
        self.refused: Refused | None = None
        self._register = register
        self._timeout = timeout
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(timeout)
        self.conn = VmmConnection("hcd.testing", EVERYTHING, held)
        try:
            self.sock.connect(str(path))
            self.send()
            self.until(TableComplete)
        except BaseException:
            self.close()
            raise

    # -- the protocol

    def send(self) -> None:
        for data, fds in self.conn.data_to_send():
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            self.sock.sendmsg([data], ancillary)

    def until(self, kind: type[VmmEvent]) -> VmmEvent:
        """Handle what comes up to and including the first ``kind``. Gone when hcd hangs up before."""
        while True:
            while (event := self.conn.next_event()) is not None:
                self._handle(event)
                self.send()
                if isinstance(event, kind):
                    return event
            self._receive()

    def _receive(self) -> None:
        try:
            data, ancillary, flags, _ = self.sock.recvmsg(
                MAX_MESSAGE, socket.CMSG_SPACE(MAX_ITEMS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError:
            raise BackendError(f"hcd said nothing for {self._timeout:g} s") from None
        if not data:
            raise Gone(self.refused.text if self.refused else "hcd hung up")
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
        fds = array.array("i")
        for _, _, payload in ancillary:
            fds.frombytes(payload)
        self.conn.receive_data(data, fds)

    def _handle(self, event: VmmEvent) -> None:
        match event:
            case Welcomed():
                self.welcome = event
            case Refused():
                self.refused = event
            case Added(items, fds):
                for item, fd in zip(items, fds, strict=True):
                    self._take(item, fd)
                self.conn.answer([self._answer(item) for item in items])
            case Removed(references):
                for reference in references:
                    self.removed.append(reference)
                    del self.items[reference]
                    os.close(self.fds.pop(reference))
                self.conn.answer([0] * len(references))
            case TableComplete():
                pass

    def _take(self, item: Item, fd: int | None) -> None:
        if fd is None:
            self.adopted.append(item.reference)
        else:
            self.items[item.reference] = item
            self.fds[item.reference] = fd

    def _answer(self, item: Item) -> int | tuple[int, int]:
        error = self._register(item)
        return (0, item.wanted or MEMORY_ADDRESS) if isinstance(item, MemoryItem) and not error else error

    # -- the guest

    def reference(self, name: str, kind: Kind = Kind.DOORBELL) -> Reference:
        """The item of that kind and name. KeyError without one."""
        for reference, item in self.items.items():
            if reference.kind is kind and isinstance(item, DoorbellItem | InterruptItem) and item.name == name:
                return reference
        raise KeyError(name)

    def names(self, kind: Kind) -> list[str]:
        """The doorbells, or the interrupts, in the order of the table."""
        found = (item for reference, item in self.items.items() if reference.kind is kind)
        return [item.name for item in found if isinstance(item, DoorbellItem | InterruptItem)]

    def ring(self, name: str, count: int = 1) -> None:
        """Ring a doorbell ``count`` times at once."""
        os.eventfd_write(self.fds[self.reference(name)], count)

    def wait_interrupt(self, name: str, timeout: float | None = None) -> int:
        """Wait for an interrupt; how often it was signalled since it was looked at last."""
        fd = self.fds[self.reference(name, Kind.INTERRUPT)]
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        seconds = self._timeout if timeout is None else timeout
        if not poll.poll(seconds * 1000):
            raise BackendError(f"interrupt {name} did not come in {seconds:g} s")
        return os.eventfd_read(fd)

    def map_memory(self) -> mmap.mmap:
        """The shared memory. ValueError where the device has none. The caller closes it."""
        (item,) = (item for item in self.items.values() if isinstance(item, MemoryItem))
        return mmap.mmap(self.fds[item.reference], item.size)

    # -- the end

    def keep(self) -> list[Held]:
        """Hang up and keep what came from hcd, for the next connection."""
        held = [Held(self.items[reference], fd) for reference, fd in self.fds.items()]
        self.fds.clear()
        self.close()
        return held

    def close(self) -> None:
        """Hang up."""
        self.sock.close()
        for fd in [*self.fds.values(), *self.conn.take_unclaimed_fds()]:
            os.close(fd)
        self.fds.clear()

    def __enter__(self) -> Vmm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
