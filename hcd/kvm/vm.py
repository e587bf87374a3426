"""/dev/kvm and a virtual machine: memory, doorbells, interrupts.

Theory of operation. A *doorbell* is an entry in one of KVM's lists: a port or an address with an eventfd
(KVM_IOEVENTFD), or a Hyper-V connection id with one (KVM_HYPERV_EVENTFD). When a guest writes there, KVM adds 1 to
the eventfd in the exit handler and resumes the guest; no process of the host is involved until somebody reads the
eventfd. The value written is not passed on: only a *datamatch* tells values apart, an eventfd for each. An *interrupt*
is the way back: whoever writes to an eventfd (KVM_IRQFD) makes KVM raise a GSI, and the GSI's route says what that is,
usually an MSI message to a vCPU's local APIC.

All of it must be asked for by the process that created the virtual machine (EIO otherwise), so a VMM registers what
hcd hands out, and this module is the VMM's side. To undo a registration KVM wants exactly what it was made with;
:class:`Registration` keeps that.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from hcd_protocols import kvm as abi
from hcd_protocols.kvm import Cap, Ioctl, IoeventfdFlag, IrqfdFlag, RoutingType

from hcd.errors import HcdError
from hcd.kvm.ioctl import call, try_call
from hcd.kvm.memory import Memory
from hcd.kvm.vcpu import Vcpu

__all__ = ["IrqchipRoute", "Kvm", "MsiRoute", "Registration", "Route", "Vm"]

DEVICE = "/dev/kvm"
#: where KVM puts three pages of its own on Intel's processors: below the BIOS, as every VMM does
_TSS_ADDRESS = 0xFFFBD000
_IOAPIC, _IOAPIC_PINS = 2, 24
_PIC_PINS = 8


class Kvm:
    """An open /dev/kvm. HcdError when there is none, or it cannot be used."""

    def __init__(self, path: str = DEVICE) -> None:
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise HcdError(f"cannot open {path}: {exc.strerror}{_hint(exc)}") from exc
        try:
            version = call(self.fd, Ioctl.GET_API_VERSION)
            if version != abi.API_VERSION:
                raise HcdError(f"{path} has API version {version}; expected {abi.API_VERSION}")
        except BaseException:
            self.close()
            raise

    def check_extension(self, cap: Cap) -> int:
        """What this kernel says of ``cap``: 0 without it, a positive number with it (for some, how much of it)."""
        return max(0, try_call(self.fd, Ioctl.CHECK_EXTENSION, int(cap)))

    @property
    def capabilities(self) -> dict[Cap, int]:
        """Every capability that hcd asks for."""
        return {cap: self.check_extension(cap) for cap in Cap}

    @property
    def xen_event_channels(self) -> bool:
        """Whether the kernel could ring an eventfd for Xen's EVTCHNOP_send. hcd only says so; it registers none."""
        return bool(self.check_extension(Cap.XEN_HVM) & abi.XenFlag.EVTCHN_SEND)

    def create_vm(self) -> Vm:
        return Vm(self)

    def close(self) -> None:
        """Harmless when repeated. Virtual machines live on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _hint(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return " (members of the group that owns it may: usually kvm)"
    if isinstance(error, FileNotFoundError):
        return " (this kernel has no KVM, or its module is not loaded)"
    return ""


@dataclass(frozen=True, slots=True)
class MsiRoute:
    """A GSI that is an MSI message. On x86 ``address`` names the local APIC, the low byte of ``data`` the vector."""

    address: int
    data: int


@dataclass(frozen=True, slots=True)
class IrqchipRoute:
    """A GSI that is a pin: ``irqchip`` 0 is the first PIC, 1 the second, 2 the IOAPIC."""

    irqchip: int
    pin: int


Route = MsiRoute | IrqchipRoute


class Registration:
    """An eventfd that KVM knows. The eventfd stays the caller's."""

    def __init__(self, vm: Vm, ioctl: Ioctl, undo: abi.Ioeventfd | abi.HypervEventfd | abi.Irqfd, subject: str) -> None:
        self._vm: Vm | None = vm
        self._ioctl = ioctl
        self._undo = undo
        self.subject = subject

    def close(self) -> None:
        """Take it back. Harmless when repeated, and after the virtual machine was closed."""
        vm, self._vm = self._vm, None
        if vm is not None and vm.fd >= 0:
            call(vm.fd, self._ioctl, self._undo, self.subject)

    def __repr__(self) -> str:
        return f"<Registration {self.subject}{'' if self._vm else ', undone'}>"


class Vm:
    """A virtual machine of this process. Close it after its vCPUs have stopped running."""

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        self.fd = call(kvm.fd, Ioctl.CREATE_VM)
        self.vcpus: list[Vcpu] = []
        self._slots: dict[int, Memory] = {}
        self._routes: dict[int, list[Route]] = {}
        if kvm.check_extension(Cap.SET_TSS_ADDR):
            call(self.fd, Ioctl.SET_TSS_ADDR, _TSS_ADDRESS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it with all that belongs to it. Harmless when repeated."""
        for vcpu in self.vcpus:
            vcpu.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        for memory in self._slots.values():
            memory.close()
        self._slots.clear()

    # -- what it is made of

    def add_memory(self, address: int, size: int, fd: int | None = None) -> Memory:
        """Give the guest ``size`` bytes at ``address``; backed by ``fd`` if given (see :class:`Memory`)."""
        slot = next(number for number in itertools.count() if number not in self._slots)
        memory = Memory(address, size, fd)
        try:
            self._set_region(slot, memory, size)
        except BaseException:
            memory.close()
            raise
        self._slots[slot] = memory
        return memory

    def remove_memory(self, memory: Memory) -> None:
        """Take it from the guest and unmap it. Harmless when repeated, and after the virtual machine was closed."""
        for slot, found in list(self._slots.items()):
            if found is memory:
                self._set_region(slot, memory, 0)
                del self._slots[slot]
                memory.close()

    def _set_region(self, slot: int, memory: Memory, size: int) -> None:
        region = abi.UserspaceMemoryRegion(
            slot=slot, guest_phys_addr=memory.address, memory_size=size, userspace_addr=memory.host_address
        )
        call(self.fd, Ioctl.SET_USER_MEMORY_REGION, region, f"memory at {memory.address:#x}, {memory.size} bytes")

    def create_irqchip(self) -> None:
        """PICs, IOAPIC and local APICs in the kernel; before the first vCPU. HLT does not exit from then on."""
        call(self.fd, Ioctl.CREATE_IRQCHIP)
        pics = {pin: [IrqchipRoute(pin // _PIC_PINS, pin % _PIC_PINS)] for pin in range(2 * _PIC_PINS)}
        self._routes = {pin: [*pics.get(pin, []), IrqchipRoute(_IOAPIC, pin)] for pin in range(_IOAPIC_PINS)}

    def create_vcpu(self, number: int = 0) -> Vcpu:
        vcpu = Vcpu(self.kvm.fd, self.fd, number)
        self.vcpus.append(vcpu)
        return vcpu

    # -- doorbells

    def ioeventfd(
        self, fd: int, address: int, *, pio: bool, width: int = 0, datamatch: int | None = None, name: str = ""
    ) -> Registration:
        """A write of ``width`` bytes (0: any) to ``address``, a port or a guest-physical address, rings ``fd``.

        With ``datamatch`` only a write of that value does. KvmError names the doorbell.
        """
        flags = IoeventfdFlag.PIO if pio else IoeventfdFlag(0)
        if datamatch is not None:
            flags |= IoeventfdFlag.DATAMATCH
        subject = _doorbell(name, "port" if pio else "address", address, width, datamatch)
        entry = abi.Ioeventfd(datamatch=datamatch or 0, addr=address, len=width, fd=fd, flags=flags)
        call(self.fd, Ioctl.IOEVENTFD, entry, subject)
        entry.flags |= IoeventfdFlag.DEASSIGN
        return Registration(self, Ioctl.IOEVENTFD, entry, subject)

    def hyperv_eventfd(self, fd: int, connection: int, *, name: str = "") -> Registration:
        """HvSignalEvent on ``connection`` rings ``fd``. The vCPU must look like Hyper-V's to its guest."""
        subject = _doorbell(name, "Hyper-V connection", connection, 0, None)
        call(self.fd, Ioctl.HYPERV_EVENTFD, abi.HypervEventfd(conn_id=connection, fd=fd), subject)
        undo = abi.HypervEventfd(conn_id=connection, fd=-1, flags=abi.HYPERV_EVENTFD_DEASSIGN)
        return Registration(self, Ioctl.HYPERV_EVENTFD, undo, subject)

    # -- interrupts

    def irqfd(self, fd: int, gsi: int, *, name: str = "") -> Registration:
        """A write to ``fd`` raises ``gsi``. At once if the eventfd is not zero now."""
        subject = f'interrupt "{name}" (GSI {gsi})' if name else f"GSI {gsi}"
        call(self.fd, Ioctl.IRQFD, abi.Irqfd(fd=fd, gsi=gsi), subject)
        return Registration(self, Ioctl.IRQFD, abi.Irqfd(fd=fd, gsi=gsi, flags=IrqfdFlag.DEASSIGN), subject)

    def free_gsi(self) -> int:
        """The lowest number behind the IOAPIC's pins that has no route."""
        return next(gsi for gsi in itertools.count(_IOAPIC_PINS) if gsi not in self._routes)

    def route(self, routes: Mapping[int, Route | None]) -> None:
        """Change where GSIs go; None: nowhere. The others stay."""
        table = dict(self._routes)
        for gsi, route in routes.items():
            table.pop(gsi, None)
            if route is not None:
                table[gsi] = [route]
        entries = [_entry(gsi, route) for gsi, chips in sorted(table.items()) for route in chips]
        routing = abi.irq_routing_type(len(entries))(nr=len(entries))
        for index, entry in enumerate(entries):
            routing.entries[index] = entry
        call(self.fd, Ioctl.SET_GSI_ROUTING, routing, f"GSI {', '.join(map(str, routes))}")
        self._routes = table


def _entry(gsi: int, route: Route) -> abi.IrqRoutingEntry:
    if isinstance(route, IrqchipRoute):
        entry = abi.IrqRoutingEntry(gsi=gsi, type=RoutingType.IRQCHIP)
        entry.u.irqchip.irqchip, entry.u.irqchip.pin = route.irqchip, route.pin
        return entry
    entry = abi.IrqRoutingEntry(gsi=gsi, type=RoutingType.MSI)
    entry.u.msi.address_lo, entry.u.msi.address_hi = route.address & 0xFFFFFFFF, route.address >> 32
    entry.u.msi.data = route.data
    return entry


def _doorbell(name: str, place: str, address: int, width: int, datamatch: int | None) -> str:
    words = [f"{place} {address:#x}"]
    if place != "Hyper-V connection":
        words.append(f"{width} bytes" if width else "any width")
    if datamatch is not None:
        words.append(f"value {datamatch:#x}")
    where = ", ".join(words)
    return f'doorbell "{name}" ({where})' if name else f"doorbell at {where}"
