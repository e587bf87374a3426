"""A VMM's side of the doorbell socket: attach a virtual machine to a device of hcd.

hcd sends the device's table in parts, each item with its eventfd or memory; what arrives is registered in the
virtual machine and answered with 0 or an errno, item by item. A thread then follows the changes that hcd makes to the
table. When hcd goes away everything is unregistered: a doorbell that rings into nothing would look like a device that
does not answer. The eventfds and the memory stay here, so that :meth:`Attachment.connect` can offer them to the next
hcd by their ids. docs/doorbells.md has the protocol.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from hcd_protocols.doorbell import (
    MAX_ITEMS,
    MAX_MESSAGE,
    Added,
    Capability,
    DoorbellItem,
    Held,
    InterruptItem,
    Item,
    MemoryItem,
    Place,
    ProtocolError,
    Reference,
    Refused,
    Removed,
    TableComplete,
    VmmConnection,
    Welcomed,
)
from hcd_protocols.kvm import Cap

from hcd.errors import HcdError
from hcd.kvm.errors import KvmError
from hcd.kvm.memory import Memory
from hcd.kvm.vcpu import Vcpu
from hcd.kvm.vm import Kvm, Registration, Route, Vm

__all__ = ["AttachError", "Attached", "Attachment", "attach", "capabilities"]

_ANCILLARY = socket.CMSG_SPACE(MAX_ITEMS * 4)


class AttachError(HcdError):
    """hcd is not there, refused us, or broke the protocol."""


@dataclass(slots=True)
class Attached:
    """One item of the table and what became of it: ``error`` is 0 or an errno, ``reason`` says it in words."""

    item: Item
    fd: int
    registration: Registration | None = None
    memory: Memory | None = None
    gsi: int = -1
    error: int = 0
    reason: str = ""


def capabilities(kvm: Kvm) -> Capability:
    """What this kernel can register, in the words of the protocol."""
    found = Capability.MEMORY
    for cap, capability in (
        (Cap.IOEVENTFD, Capability.PIO | Capability.MMIO),
        (Cap.IOEVENTFD_NO_LENGTH, Capability.MMIO_ANY_LENGTH),
        (Cap.IOEVENTFD_ANY_LENGTH, Capability.PIO_ANY_LENGTH),
        (Cap.HYPERV_EVENTFD, Capability.HYPERV),
        (Cap.IRQFD, Capability.IRQFD),
    ):
        if kvm.check_extension(cap):
            found |= capability
    return found


class Attachment:
    """The table of one device in ``vm``. Methods are for one thread; ``on_end`` is called on the reader's.

    ``route_of`` says where an interrupt goes; ``place`` where the guest is to see memory for which hcd names no
    address. ``clock`` is the vCPU whose TSC offset hcd is told; without it stamps mean nothing to hcd.
    """

    def __init__(
        self,
        vm: Vm,
        path: str,
        *,
        name: str = "hcd-kvm",
        route_of: Callable[[InterruptItem], Route],
        place: Callable[[MemoryItem], int] = lambda item: item.wanted,
        clock: Vcpu | None = None,
        on_end: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.vm = vm
        self.path = path
        self.device = ""
        self.items: dict[Reference, Attached] = {}
        self._name = name
        self._route_of = route_of
        self._place = place
        self._clock = clock
        self._on_end = on_end
        self._socket: socket.socket | None = None
        self._protocol: VmmConnection | None = None
        self._complete = False
        self._closing = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- what is attached

    def doorbell(self, name: str) -> Attached:
        """The doorbell called ``name``. KeyError without one."""
        return self._named(DoorbellItem, name)

    def interrupt(self, name: str) -> Attached:
        return self._named(InterruptItem, name)

    @property
    def doorbells(self) -> list[Attached]:
        return [one for one in self.items.values() if isinstance(one.item, DoorbellItem)]

    @property
    def memory(self) -> Memory | None:
        """The device's shared memory, where it has some."""
        return next((one.memory for one in self.items.values() if one.memory is not None), None)

    def _named(self, kind: type[DoorbellItem | InterruptItem], name: str) -> Attached:
        for one in self.items.values():
            if isinstance(one.item, kind) and one.item.name == name:
                return one
        raise KeyError(name)

    # -- life

    def connect(self, timeout: float = 10) -> None:
        """Attach, offering what an earlier connection left. Returns when the whole table is answered.

        AttachError when hcd is not there, is busy with another VMM, or does not send its table within ``timeout``
        seconds of silence.
        """
        held = [Held(one.item, one.fd) for one in self.items.values()]
        self._protocol = VmmConnection(self._name, capabilities(self.vm.kvm), held)
        self._complete = self._closing = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(self.path)
            self._tell_clock()
            while not self._complete:
                self._receive()
            self._socket.settimeout(None)
        except BaseException as exc:
            self._disconnect()
            if isinstance(exc, OSError):
                raise AttachError(f"{self.path}: {exc.strerror or exc}") from exc
            raise
        self._thread = threading.Thread(target=self._follow, name=f"attached to {self.device}", daemon=True)
        self._thread.start()

    def detach(self) -> None:
        """Unregister everything and hang up; eventfds and memory stay. Harmless when repeated."""
        self._closing = True
        connected = self._socket
        if connected is not None:
            with contextlib.suppress(OSError):  # the reader has just closed it
                connected.shutdown(socket.SHUT_RDWR)
        self.wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the connection has ended and all is unregistered; False when ``timeout`` seconds were over."""
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def close(self) -> None:
        """:meth:`detach`, and give up eventfds and memory too."""
        self.detach()
        for one in self.items.values():
            self._release(one)
        self.items.clear()

    # -- the reader's thread

    def _follow(self) -> None:
        try:
            while True:
                self._receive()
        except (OSError, AttachError) as exc:
            reason = str(exc)
        finally:
            self._disconnect()
        if not self._closing:
            self._on_end(reason)

    def _disconnect(self) -> None:
        """Hang up first: hcd must not ring what is going away."""
        if self._protocol is not None:
            for fd in self._protocol.take_unclaimed_fds():
                os.close(fd)
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        for one in self.items.values():
            _unregister(one)

    # -- messages

    def _receive(self) -> None:
        """Take one message and act on it. AttachError when hcd hung up, or the message is a wrong one."""
        assert self._socket is not None
        assert self._protocol is not None
        self._send()
        packet, ancillary, flags, _ = self._socket.recvmsg(MAX_MESSAGE + 1, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        fds = [fd for _, _, data in ancillary for fd in memoryview(data).cast("i")]
        if not packet:
            raise AttachError(f"{self.path}: hcd hung up")
        self._protocol.receive_data(packet, fds)
        try:
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError("file descriptors were lost: this process may have no more")
            while (event := self._protocol.next_event()) is not None:
                self._handle(event)
        except ProtocolError as exc:
            self._protocol.send_error(str(exc))
            self._send()
            raise AttachError(f"{self.path}: hcd broke the protocol: {exc}") from exc
        self._send()

    def _send(self) -> None:
        assert self._socket is not None
        assert self._protocol is not None
        for packet, fds in self._protocol.data_to_send():
            socket.send_fds(self._socket, [packet], list(fds), socket.MSG_NOSIGNAL)

    def _handle(self, event: Welcomed | Added | Removed | TableComplete | Refused) -> None:
        assert self._protocol is not None
        match event:
            case Welcomed():
                self.device = event.device
            case Added():
                attached = [self._take(item, fd) for item, fd in zip(event.items, event.fds, strict=True)]
                self._protocol.answer([self._register(one) for one in attached])
            case Removed():
                for reference in event.references:
                    one = self.items.pop(reference)
                    _unregister(one)
                    self._release(one)
                self._protocol.answer([0] * len(event.references))
            case TableComplete():
                self._complete = True
            case Refused():
                raise AttachError(f"{self.path}: hcd refused: {event.text}")

    def _tell_clock(self) -> None:
        if self._clock is None or self._protocol is None:
            return
        offset, khz = self._clock.tsc_offset(), self._clock.tsc_khz()
        if offset is not None and khz is not None:
            signed = offset - (1 << 64) if offset >> 63 else offset
            self._protocol.set_clock(tsc_khz=khz, tsc_offset=signed)

    def _take(self, item: Item, fd: int | None) -> Attached:
        """The entry of ``item``: a new one with its descriptor, or the one that we hold."""
        if fd is not None:
            self.items[item.reference] = Attached(item, fd)
        return self.items[item.reference]

    # -- in the virtual machine

    def _register(self, one: Attached) -> int | tuple[int, int]:
        """Register one item; what to answer. Its entry keeps the outcome."""
        one.error, one.reason = 0, ""
        try:
            match one.item:
                case DoorbellItem():
                    one.registration = self._register_doorbell(one.item, one.fd)
                    return 0
                case InterruptItem():
                    return 0, self._register_interrupt(one, one.item)
                case MemoryItem():
                    return 0, self._register_memory(one, one.item)
        except KvmError as exc:
            one.error, one.reason = exc.errno, str(exc)
        except OSError as exc:
            one.error, one.reason = exc.errno or errno.EIO, exc.strerror or str(exc)
        except ValueError as exc:  # memory that is smaller than it is said to be
            one.error, one.reason = errno.EINVAL, str(exc)
        return one.error

    def _register_doorbell(self, item: DoorbellItem, fd: int) -> Registration:
        if item.place in (Place.PIO, Place.MMIO):
            return self.vm.ioeventfd(
                fd,
                item.address,
                pio=item.place is Place.PIO,
                width=item.width,
                datamatch=item.datamatch,
                name=item.name,
            )
        if item.place is Place.HYPERV:
            return self.vm.hyperv_eventfd(fd, item.address, name=item.name)
        has = "has them" if self.vm.kvm.xen_event_channels else "has none either"
        raise OSError(errno.EOPNOTSUPP, f"hcd.kvm registers no Xen event channels; this kernel {has}")

    def _register_interrupt(self, one: Attached, item: InterruptItem) -> int:
        if one.gsi < 0:
            gsi = self.vm.free_gsi()
            self.vm.route({gsi: self._route_of(item)})
            one.gsi = gsi  # only now: without a route it would raise nothing
        one.registration = self.vm.irqfd(one.fd, one.gsi, name=item.name)
        return one.gsi

    def _register_memory(self, one: Attached, item: MemoryItem) -> int:
        if one.memory is None:
            address = item.wanted or self._place(item)
            one.memory = self.vm.add_memory(address, item.size, one.fd)
        return one.memory.address

    def _release(self, one: Attached) -> None:
        if one.memory is not None:
            self.vm.remove_memory(one.memory)
            one.memory = None
        if one.gsi >= 0 and self.vm.fd >= 0:
            self.vm.route({one.gsi: None})
        os.close(one.fd)


def _unregister(one: Attached) -> None:
    registration, one.registration = one.registration, None
    if registration is not None:
        registration.close()


def attach(
    vm: Vm,
    socket_path: str,
    *,
    route_of: Callable[[InterruptItem], Route],
    place: Callable[[MemoryItem], int] = lambda item: item.wanted,
    clock: Vcpu | None = None,
    on_end: Callable[[str], None] = lambda _: None,
) -> Attachment:
    """Register the whole table of the device behind ``socket_path`` in ``vm``. See :class:`Attachment`."""
    attachment = Attachment(vm, socket_path, route_of=route_of, place=place, clock=clock, on_end=on_end)
    attachment.connect()
    return attachment
