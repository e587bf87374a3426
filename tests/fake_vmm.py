"""A VMM without a virtual machine: it speaks the doorbell protocol and rings by writing the eventfds."""

from __future__ import annotations

import array
import mmap
import os
import socket
import time
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

from hcd.dataplane import bell

EVERYTHING = Capability(0xFF)
Register = Callable[[Item], int]


class Gone(Exception):
    """hcd closed the connection."""


class FakeVmm:
    """Connects on construction and has the whole table when the constructor returns.

    ``register`` says what becomes of each item: 0 or an errno. ``held``: from :meth:`keep` of an earlier one.
    """

    def __init__(self, path: str, *, register: Register = lambda item: 0, held: Sequence[Held] = ()) -> None:
        self.items: dict[Reference, Item] = {one.item.reference: one.item for one in held}
        self.fds: dict[Reference, int] = {one.item.reference: one.fd for one in held}
        self.adopted: list[Reference] = []
        self.removed: list[Reference] = []
        self.welcome: Welcomed | None = None
        self.refused: Refused | None = None
        self._register = register
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(20)
        self.conn = VmmConnection("fake", EVERYTHING, held)
        try:
            self.sock.connect(path)
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
            data, ancillary, flags, _ = self.sock.recvmsg(
                MAX_MESSAGE, socket.CMSG_SPACE(MAX_ITEMS * 4), socket.MSG_CMSG_CLOEXEC
            )
            if not data:
                raise Gone(self.refused.text if self.refused else "")
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
        return (0, 0xD0000000) if isinstance(item, MemoryItem) and not error else error

    # -- the guest

    def reference(self, name: str, kind: Kind = Kind.DOORBELL) -> Reference:
        for reference, item in self.items.items():
            if reference.kind is kind and isinstance(item, DoorbellItem | InterruptItem) and item.name == name:
                return reference
        raise KeyError(name)

    def ring(self, name: str, count: int = 1) -> None:
        os.eventfd_write(self.fds[self.reference(name)], count)

    def interrupts(self, name: str) -> int:
        """Wait for the interrupt, and how often it was signalled since it was looked at last."""
        fd = self.fds[self.reference(name, Kind.INTERRUPT)]
        os.set_blocking(fd, True)
        return os.eventfd_read(fd)

    def map_memory(self) -> mmap.mmap:
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
        self.sock.close()
        for fd in [*self.fds.values(), *self.conn.take_unclaimed_fds()]:
            os.close(fd)
        self.fds.clear()

    def __enter__(self) -> FakeVmm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def measure_tsc() -> tuple[int, Callable[[], int]]:
    """The rate of this machine's TSC in kHz, and a function that estimates its value now."""
    begin, began = bell.tsc(), time.monotonic_ns()
    while time.monotonic_ns() - began < 20_000_000:
        pass
    khz = (bell.tsc() - begin) * 1_000_000 // (time.monotonic_ns() - began)
    return khz, bell.tsc
