"""The tiny virtual machine: one vCPU in flat 32-bit protected mode, its memory, and the programs that ring.

Every program is the same loop: take the time, ring, take the time, note the difference in TSC ticks. A *trip* also
waits in between until the interrupt that answers the ring was seen. Where the doorbell has a stamp, the first time goes
there too. Memory: ::

    0x0500  GDT, 0x0600 IDT     flat code and data; one gate, for the interrupt
    0x1000  the program         ends by a write to port 0xF4
    0x2000  its variables
    0x3000  the interrupt handler
    0x8000  end of the stack
    1 MiB   differences, 4 bytes each
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from hcd_protocols import kvm as abi
from hcd_protocols.kvm import Cap, Exit

from hcd.kvm.exits import answer_writes
from hcd.kvm.vcpu import RunEnd, Vcpu
from hcd.kvm.vm import Kvm, MsiRoute, Vm
from hcd.lab import code

__all__ = ["MAX_SAMPLES", "VECTOR", "Machine", "Result", "Ring"]

VECTOR = 0x40

_GDT, _IDT, _CODE, _HANDLER, _STACK = 0x500, 0x600, 0x1000, 0x3000, 0x8000
_STARTED, _NEXT, _LEFT, _SEEN, _STATUS = 0x2000, 0x2004, 0x2008, 0x200C, 0x2010
_SAMPLES = 1 << 20
_MEMORY = 8 << 20
MAX_SAMPLES = (_MEMORY - _SAMPLES) // 4
_END_PORT = 0xF4
_CODE_SELECTOR, _DATA_SELECTOR = 0x08, 0x10
_FLAT_CODE, _FLAT_DATA = 0x00CF9B000000FFFF, 0x00CF93000000FFFF
_INTERRUPT_GATE = 0x8E
_PROTECTION_ENABLE = 1
_FLAGS_ALWAYS_1 = 2

#: local APIC: software enable with spurious vector 0xFF; end of interrupt
_APIC = 0xFEE00000
_APIC_SPURIOUS, _APIC_EOI = _APIC + 0xF0, _APIC + 0xB0
_APIC_ENABLE = 0x1FF

_HV_GUEST_OS_ID = 0x40000000
_HV_LEAVES = {
    0x40000000: (0x40000005, *struct.unpack("<III", abi.SIGNATURE_HYPERV)),
    0x40000001: (int.from_bytes(b"Hv#1", "little"), 0, 0, 0),
    0x40000002: (0, 0, 0, 0),
    # hypercall MSRs are there; messages may be posted and events signalled (TLFS 2.4)
    0x40000003: (1 << 5, 1 << 4 | 1 << 5, 0, 0),
    0x40000004: (0, 0, 0, 0),
    0x40000005: (0, 0, 0, 0),
}
_HYPERVISOR_PRESENT = 1 << 31


@dataclass(frozen=True, slots=True)
class Ring:
    """Machine code that rings once. ``as_hyperv``: hypercalls are Hyper-V's, not KVM's. ``answered_here``: the write
    leaves KVM, and this process answers it."""

    code: bytes
    as_hyperv: bool = False
    answered_here: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """One run: ``ticks`` of the TSC for every ring that came back, ``status`` what hypercalls returned, or-ed.

    ``why`` is empty when all rings came back.
    """

    ticks: array[int]
    status: int
    why: str


class Machine:
    """The virtual machine. ``hypercall`` is the instruction of this processor's vendor."""

    def __init__(self, kvm: Kvm, *, hypercall: bytes = code.VMCALL) -> None:
        self.kvm = kvm
        self.hypercall = hypercall
        self.hyperv = bool(kvm.check_extension(Cap.HYPERV_EVENTFD))
        self.vm: Vm = kvm.create_vm()
        try:
            self.memory = self.vm.add_memory(0, _MEMORY)
            self.vm.create_irqchip()
            self.vcpu: Vcpu = self.vm.create_vcpu()
            self.vcpu.set_cpuid(_cpuid(self.vcpu, hyperv=self.hyperv))
            self._set_up_interrupt()
        except BaseException:
            self.vm.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.vm.close()

    @property
    def route(self) -> MsiRoute:
        """What an interrupt must be for the guest to see it."""
        return MsiRoute(_APIC, VECTOR)

    # -- what rings

    def hyperv_event(self, connection: int) -> Ring:
        """HvSignalEvent, fast, in the 32-bit convention (TLFS 3.7.2): edx:eax input, ebx:ecx and edi:esi parameters."""
        registers = (
            (code.EDX, 0),
            (code.EAX, 0x1005D),
            (code.EBX, 0),
            (code.ECX, connection),
            (code.EDI, 0),
            (code.ESI, 0),
        )
        loads = b"".join(code.load(register, value) for register, value in registers)
        return Ring(loads + self.hypercall + code.or_memory(code.EAX, _STATUS), as_hyperv=True)

    def null_hypercall(self) -> Ring:
        """KVM_HC_VAPIC_POLL_IRQ: every KVM knows it, and does nothing."""
        return Ring(code.load(code.EAX, 1) + self.hypercall + code.or_memory(code.EAX, _STATUS))

    # -- runs

    def run_exits(self, ring: Ring, count: int, timeout: float) -> Result:
        """Ring ``count`` times and note what each took in the guest; give up after ``timeout`` seconds."""
        start = code.RDTSC + code.store(code.EAX, _STARTED)
        return self._run(_measure(start + ring.code), ring, count, timeout)

    def run_trips(self, ring: Ring, count: int, timeout: float, *, stamp: int | None = None) -> Result:
        """Ring, wait for the interrupt, ``count`` times. ``stamp``: where the guest writes its TSC before it rings."""
        start = code.set_memory(_SEEN, 0) + code.RDTSC + code.store(code.EAX, _STARTED)
        if stamp is not None:
            start += code.store(code.EAX, stamp) + code.store(code.EDX, stamp + 4)
        program = _measure(start + ring.code + code.spin_while_zero(_SEEN))
        enable = code.write_memory(_APIC_SPURIOUS, _APIC_ENABLE, 4) + code.STI
        return self._run(enable + program, ring, count, timeout)

    def _run(self, program: bytes, ring: Ring, count: int, timeout: float) -> Result:
        if not 0 < count <= MAX_SAMPLES:
            raise ValueError(f"{count} rings in one run; expected 1 to {MAX_SAMPLES}")
        self._prepare(program, count)
        if self.hyperv:
            self.vcpu.set_msrs({_HV_GUEST_OS_ID: 1 if ring.as_hyperv else 0})
        end = self.vcpu.run(timeout, loop=_answer_writes if ring.answered_here else None)
        done = (self.memory.read_u32(_NEXT) - _SAMPLES) // 4
        ticks = array("I", self.memory.read(_SAMPLES, 4 * done))
        return Result(ticks, self.memory.read_u32(_STATUS), _why(self.vcpu, end, timeout))

    def _prepare(self, program: bytes, count: int) -> None:
        self.memory.write(_CODE, program)
        for address, value in ((_NEXT, _SAMPLES), (_LEFT, count), (_SEEN, 0), (_STATUS, 0)):
            self.memory.write_u32(address, value)
        sregs = self.vcpu.sregs
        sregs.cr0 |= _PROTECTION_ENABLE
        sregs.cs = _segment(_CODE_SELECTOR, 0xB)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, _segment(_DATA_SELECTOR, 0x3))
        sregs.gdt.base, sregs.gdt.limit = _GDT, 23
        sregs.idt.base, sregs.idt.limit = _IDT, 8 * (VECTOR + 1) - 1
        self.vcpu.sregs = sregs
        self.vcpu.regs = abi.Regs(rip=_CODE, rsp=_STACK, rflags=_FLAGS_ALWAYS_1)

    def _set_up_interrupt(self) -> None:
        self.memory.write(_GDT, struct.pack("<QQQ", 0, _FLAT_CODE, _FLAT_DATA))
        gate = struct.pack("<HHBBH", _HANDLER, _CODE_SELECTOR, 0, _INTERRUPT_GATE, 0)
        self.memory.write(_IDT + 8 * VECTOR, gate)
        # A trip waits with dead registers, so the handler may use them.
        acknowledge = code.write_memory(_APIC_EOI, 0, 4)
        self.memory.write(_HANDLER, code.set_memory(_SEEN, 1) + acknowledge + code.return_from_interrupt())


def _measure(between: bytes) -> bytes:
    """``between`` begins by noting the time; behind it, note the difference, until no ring is left."""
    body = (
        between
        + code.RDTSC
        + code.subtract_memory(code.EAX, _STARTED)
        + code.load_memory(code.EDI, _NEXT)
        + code.store_at(code.EAX, code.EDI)
        + code.add_memory(_NEXT, 4)
        + code.add_memory(_LEFT, 0xFF)  # -1
    )
    return code.loop(body) + code.out_byte(_END_PORT)


def _segment(selector: int, kind: int) -> abi.Segment:
    return abi.Segment(base=0, limit=0xFFFFFFFF, selector=selector, type=kind, present=1, dpl=0, db=1, s=1, g=1)


def _answer_writes(vcpu: Vcpu) -> int:
    return answer_writes(vcpu.fd, vcpu.page_address, _END_PORT)


def _why(vcpu: Vcpu, end: RunEnd, timeout: float) -> str:
    if end.timed_out:
        return f"does not return: stopped after {timeout:g} s at instruction {vcpu.regs.rip:#x}"
    page = vcpu.page
    ended = end.reason == Exit.IO and page.io.direction and page.io.port == _END_PORT
    return "" if ended else end.detail


def _cpuid(vcpu: Vcpu, *, hyperv: bool) -> list[abi.CpuidEntry2]:
    """What KVM offers; with ``hyperv`` under Hyper-V's name, so that HvSignalEvent is taken."""
    leaves = vcpu.supported_cpuid()
    if not hyperv:
        return leaves
    leaves = [leaf for leaf in leaves if leaf.function >> 8 != 0x400000]
    for leaf in leaves:
        if leaf.function == 1:
            leaf.ecx |= _HYPERVISOR_PRESENT
    return leaves + [
        abi.CpuidEntry2(function=number, eax=eax, ebx=ebx, ecx=ecx, edx=edx)
        for number, (eax, ebx, ecx, edx) in _HV_LEAVES.items()
    ]
