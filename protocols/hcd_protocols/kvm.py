"""The part of Linux's KVM interface that hcd uses: ioctl numbers, capabilities, structures (x86-64).

Names are the kernel's without ``KVM_`` (ioctls, :class:`Ioctl`), ``KVM_CAP_`` (capabilities, :class:`Cap`) and
``kvm_`` (structures). The numbers of an architecture follow from the sizes of its structures, so they are computed
here from the structures themselves; a test compares every number, size and offset with the headers of the kernel
that it runs on. Documentation: Linux, Documentation/virt/kvm/api.rst, the section named after the ioctl.

Structures are ``ctypes`` ones because the kernel takes their address. Padding that the kernel ignores is left out
where the size does not need it.
"""

from __future__ import annotations

import ctypes
import enum
from ctypes import c_int32, c_uint8, c_uint16, c_uint32, c_uint64
from typing import Any

__all__ = [
    "API_VERSION",
    "SIGNATURE_HYPERV",
    "Cap",
    "Exit",
    "Ioctl",
    "IoeventfdFlag",
    "IrqfdFlag",
    "MpState",
    "RoutingType",
    "XenAttr",
    "XenFlag",
    "cpuid2_type",
    "irq_routing_type",
    "msrs_type",
]

API_VERSION = 12

#: highest Hyper-V connection id that KVM takes (KVM_HYPERV_CONN_ID_MASK)
HYPERV_CONN_ID_MASK = 0x00FFFFFF
#: KVM_HYPERV_EVENTFD_DEASSIGN
HYPERV_EVENTFD_DEASSIGN = 1
#: the vendor string of Hyper-V's CPUID leaves, which an enlightened guest looks for
SIGNATURE_HYPERV = b"Microsoft Hv"

#: KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET: a device attribute of the vCPU, u64, guest TSC = host TSC + offset
VCPU_TSC_CTRL = 0
VCPU_TSC_OFFSET = 0

_KVMIO = 0xAE
_WRITE, _READ = 1, 2


class _Struct(ctypes.Structure):
    """Shows its fields: errors and tests print structures."""

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name, *_ in self._fields_)
        return f"{type(self).__name__}({fields})"


def _each(kind: type[Any], names: str) -> tuple[tuple[str, type[Any]], ...]:
    return tuple((name, kind) for name in names.split())


# -- memory


class UserspaceMemoryRegion(_Struct):
    """kvm_userspace_memory_region: ``memory_size`` 0 deletes the slot."""

    _fields_ = (
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    )


# -- doorbells


class Ioeventfd(_Struct):
    """kvm_ioeventfd. ``len`` 0 takes any width; then there can be no datamatch (EINVAL)."""

    _fields_ = (
        ("datamatch", c_uint64),
        ("addr", c_uint64),
        ("len", c_uint32),
        ("fd", c_int32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    )


class IoeventfdFlag(enum.IntFlag):
    """KVM_IOEVENTFD_FLAG_*"""

    DATAMATCH = 1 << 0
    PIO = 1 << 1
    DEASSIGN = 1 << 2
    VIRTIO_CCW_NOTIFY = 1 << 3


class HypervEventfd(_Struct):
    """kvm_hyperv_eventfd: HvSignalEvent on connection ``conn_id`` rings ``fd``."""

    _fields_ = (("conn_id", c_uint32), ("fd", c_int32), ("flags", c_uint32), ("padding", c_uint32 * 3))


# -- interrupts


class Irqfd(_Struct):
    """kvm_irqfd: a write to the eventfd ``fd`` raises ``gsi``."""

    _fields_ = (
        ("fd", c_uint32),
        ("gsi", c_uint32),
        ("flags", c_uint32),
        ("resamplefd", c_uint32),
        ("pad", c_uint8 * 16),
    )


class IrqfdFlag(enum.IntFlag):
    """KVM_IRQFD_FLAG_*"""

    DEASSIGN = 1 << 0
    RESAMPLE = 1 << 1


class RoutingType(enum.IntEnum):
    """KVM_IRQ_ROUTING_*"""

    IRQCHIP = 1
    MSI = 2
    S390_ADAPTER = 3
    HV_SINT = 4
    XEN_EVTCHN = 5


class IrqRoutingIrqchip(_Struct):
    """kvm_irq_routing_irqchip: ``irqchip`` 0 is the first PIC, 1 the second, 2 the IOAPIC."""

    _fields_ = (("irqchip", c_uint32), ("pin", c_uint32))


class IrqRoutingMsi(_Struct):
    """kvm_irq_routing_msi; ``devid`` is unused on x86."""

    _fields_ = (("address_lo", c_uint32), ("address_hi", c_uint32), ("data", c_uint32), ("devid", c_uint32))


class IrqRoutingHvSint(_Struct):
    """kvm_irq_routing_hv_sint"""

    _fields_ = (("vcpu", c_uint32), ("sint", c_uint32))


class IrqRoutingXenEvtchn(_Struct):
    """kvm_irq_routing_xen_evtchn"""

    _fields_ = (("port", c_uint32), ("vcpu", c_uint32), ("priority", c_uint32))


class _Route(ctypes.Union):
    _fields_ = (
        ("irqchip", IrqRoutingIrqchip),
        ("msi", IrqRoutingMsi),
        ("hv_sint", IrqRoutingHvSint),
        ("xen_evtchn", IrqRoutingXenEvtchn),
        ("pad", c_uint32 * 8),
    )


class IrqRoutingEntry(_Struct):
    """kvm_irq_routing_entry"""

    _fields_ = (("gsi", c_uint32), ("type", c_uint32), ("flags", c_uint32), ("pad", c_uint32), ("u", _Route))


class IrqRouting(_Struct):
    """kvm_irq_routing without its entries (:func:`irq_routing_type` has them)"""

    _fields_ = (("nr", c_uint32), ("flags", c_uint32))


class Msi(_Struct):
    """kvm_msi"""

    _fields_ = (
        ("address_lo", c_uint32),
        ("address_hi", c_uint32),
        ("data", c_uint32),
        ("flags", c_uint32),
        ("devid", c_uint32),
        ("pad", c_uint8 * 12),
    )


# -- vCPU


class Regs(_Struct):
    """kvm_regs"""

    _fields_ = _each(c_uint64, "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags")


class Segment(_Struct):
    """kvm_segment"""

    _fields_ = (
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        *_each(c_uint8, "type present dpl db s l g avl unusable padding"),
    )


class Dtable(_Struct):
    """kvm_dtable: GDT or IDT register"""

    _fields_ = (("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3))


class Sregs(_Struct):
    """kvm_sregs"""

    _fields_ = (
        *_each(Segment, "cs ds es fs gs ss tr ldt"),
        ("gdt", Dtable),
        ("idt", Dtable),
        *_each(c_uint64, "cr0 cr2 cr3 cr4 cr8 efer apic_base"),
        ("interrupt_bitmap", c_uint64 * 4),
    )


class CpuidEntry2(_Struct):
    """kvm_cpuid_entry2; ``flags`` bit 0: the sub-leaf ``index`` counts"""

    _fields_ = (
        *_each(c_uint32, "function index flags eax ebx ecx edx"),
        ("padding", c_uint32 * 3),
    )


class Cpuid2(_Struct):
    """kvm_cpuid2 without its entries (:func:`cpuid2_type` has them)"""

    _fields_ = (("nent", c_uint32), ("padding", c_uint32))


class MsrEntry(_Struct):
    """kvm_msr_entry"""

    _fields_ = (("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64))


class Msrs(_Struct):
    """kvm_msrs without its entries (:func:`msrs_type` has them)"""

    _fields_ = (("nmsrs", c_uint32), ("pad", c_uint32))


class MpState(_Struct):
    """kvm_mp_state"""

    _fields_ = (("mp_state", c_uint32),)


class SignalMask(_Struct):
    """kvm_signal_mask without the set, which follows: ``len`` bytes, 8 for the kernel's sigset_t"""

    _fields_ = (("len", c_uint32),)


class DeviceAttr(_Struct):
    """kvm_device_attr: ``addr`` points at the value"""

    _fields_ = (("flags", c_uint32), ("group", c_uint32), ("attr", c_uint64), ("addr", c_uint64))


class EnableCap(_Struct):
    """kvm_enable_cap"""

    _fields_ = (("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64))


# -- kvm_run: the page that a vCPU shares with its VMM


class RunIo(_Struct):
    """KVM_EXIT_IO: ``direction`` 1 is out; the data is at ``data_offset`` in the page"""

    _fields_ = (
        ("direction", c_uint8),
        ("size", c_uint8),
        ("port", c_uint16),
        ("count", c_uint32),
        ("data_offset", c_uint64),
    )


class RunMmio(_Struct):
    """KVM_EXIT_MMIO"""

    _fields_ = (("phys_addr", c_uint64), ("data", c_uint8 * 8), ("len", c_uint32), ("is_write", c_uint8))


class RunHypercall(_Struct):
    """KVM_EXIT_HYPERCALL"""

    _fields_ = (("nr", c_uint64), ("args", c_uint64 * 6), ("ret", c_uint64), ("longmode", c_uint32))


class RunFailEntry(_Struct):
    """KVM_EXIT_FAIL_ENTRY"""

    _fields_ = (("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32))


class RunInternal(_Struct):
    """KVM_EXIT_INTERNAL_ERROR: ``suberror`` 1 is an instruction that KVM's emulator does not know"""

    _fields_ = (("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16))


class _RunUnion(ctypes.Union):
    _fields_ = (
        ("io", RunIo),
        ("mmio", RunMmio),
        ("hypercall", RunHypercall),
        ("fail_entry", RunFailEntry),
        ("internal", RunInternal),
        ("padding", c_uint8 * 256),
    )


class Run(_Struct):
    """kvm_run up to the union; what follows is not used"""

    _fields_ = (
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("u", _RunUnion),
    )
    _anonymous_ = ("u",)


class Exit(enum.IntEnum):
    """KVM_EXIT_*"""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    NMI = 16
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    HYPERV = 27
    XEN = 34


# -- Xen (Linux 5.18): structures and a probe; nothing here registers an event channel


class XenHvmConfig(_Struct):
    """kvm_xen_hvm_config"""

    _fields_ = (
        ("flags", c_uint32),
        ("msr", c_uint32),
        ("blob_addr_32", c_uint64),
        ("blob_addr_64", c_uint64),
        ("blob_size_32", c_uint8),
        ("blob_size_64", c_uint8),
        ("pad2", c_uint8 * 30),
    )


class XenFlag(enum.IntFlag):
    """KVM_XEN_HVM_CONFIG_*: what KVM_CHECK_EXTENSION of XEN_HVM answers"""

    HYPERCALL_MSR = 1 << 0
    INTERCEPT_HCALL = 1 << 1
    SHARED_INFO = 1 << 2
    RUNSTATE = 1 << 3
    EVTCHN_2LEVEL = 1 << 4
    EVTCHN_SEND = 1 << 5


class XenAttr(enum.IntEnum):
    """KVM_XEN_ATTR_TYPE_*"""

    LONG_MODE = 0
    SHARED_INFO = 1
    UPCALL_VECTOR = 2
    EVTCHN = 3
    XEN_VERSION = 4


class _XenEventfd(_Struct):
    _fields_ = (("port", c_uint32), ("fd", c_int32))


class _XenPort(_Struct):
    _fields_ = (("port", c_uint32), ("vcpu", c_uint32), ("priority", c_uint32))


class _XenDeliver(ctypes.Union):
    _fields_ = (("port", _XenPort), ("eventfd", _XenEventfd), ("padding", c_uint32 * 4))


class _XenEvtchn(_Struct):
    _fields_ = (("send_port", c_uint32), ("type", c_uint32), ("flags", c_uint32), ("deliver", _XenDeliver))


class _XenAttrUnion(ctypes.Union):
    _fields_ = (("long_mode", c_uint8), ("vector", c_uint8), ("evtchn", _XenEvtchn), ("pad", c_uint64 * 8))


class XenHvmAttr(_Struct):
    """kvm_xen_hvm_attr; with type EVTCHN and ``deliver.eventfd`` (port 0) a send rings the eventfd"""

    _fields_ = (("type", c_uint16), ("pad", c_uint16 * 3), ("u", _XenAttrUnion))


# -- arrays whose length the caller knows


def irq_routing_type(count: int) -> type[Any]:
    """kvm_irq_routing with ``count`` entries."""
    return _with_entries("IrqRouting", IrqRouting, IrqRoutingEntry, count)


def cpuid2_type(count: int) -> type[Any]:
    """kvm_cpuid2 with ``count`` entries."""
    return _with_entries("Cpuid2", Cpuid2, CpuidEntry2, count)


def msrs_type(count: int) -> type[Any]:
    """kvm_msrs with ``count`` entries."""
    return _with_entries("Msrs", Msrs, MsrEntry, count)


def _with_entries(name: str, head: type[_Struct], entry: type[_Struct], count: int) -> type[Any]:
    return type(f"{name}{count}", (head,), {"_fields_": (("entries", entry * count),)})


# -- numbers


def _io(number: int) -> int:
    return _KVMIO << 8 | number


def _iow(number: int, structure: type[Any]) -> int:
    return _WRITE << 30 | ctypes.sizeof(structure) << 16 | _io(number)


def _ior(number: int, structure: type[Any]) -> int:
    return _READ << 30 | ctypes.sizeof(structure) << 16 | _io(number)


def _iowr(number: int, structure: type[Any]) -> int:
    return _iow(number, structure) | _READ << 30


class Ioctl(enum.IntEnum):
    """KVM_* request numbers. On /dev/kvm, a VM or a vCPU, as api.rst says."""

    GET_API_VERSION = _io(0x00)
    CREATE_VM = _io(0x01)
    CHECK_EXTENSION = _io(0x03)
    GET_VCPU_MMAP_SIZE = _io(0x04)
    GET_SUPPORTED_CPUID = _iowr(0x05, Cpuid2)
    CREATE_VCPU = _io(0x41)
    SET_USER_MEMORY_REGION = _iow(0x46, UserspaceMemoryRegion)
    SET_TSS_ADDR = _io(0x47)
    CREATE_IRQCHIP = _io(0x60)
    SET_GSI_ROUTING = _iow(0x6A, IrqRouting)
    IRQFD = _iow(0x76, Irqfd)
    IOEVENTFD = _iow(0x79, Ioeventfd)
    XEN_HVM_CONFIG = _iow(0x7A, XenHvmConfig)
    RUN = _io(0x80)
    GET_REGS = _ior(0x81, Regs)
    SET_REGS = _iow(0x82, Regs)
    GET_SREGS = _ior(0x83, Sregs)
    SET_SREGS = _iow(0x84, Sregs)
    GET_MSRS = _iowr(0x88, Msrs)
    SET_MSRS = _iow(0x89, Msrs)
    SET_CPUID2 = _iow(0x90, Cpuid2)
    SET_SIGNAL_MASK = _iow(0x8B, SignalMask)
    GET_MP_STATE = _ior(0x98, MpState)
    SET_MP_STATE = _iow(0x99, MpState)
    ENABLE_CAP = _iow(0xA3, EnableCap)
    GET_TSC_KHZ = _io(0xA3)
    SIGNAL_MSI = _iow(0xA5, Msi)
    HYPERV_EVENTFD = _iow(0xBD, HypervEventfd)
    XEN_HVM_SET_ATTR = _iow(0xC9, XenHvmAttr)
    SET_DEVICE_ATTR = _iow(0xE1, DeviceAttr)
    GET_DEVICE_ATTR = _iow(0xE2, DeviceAttr)
    HAS_DEVICE_ATTR = _iow(0xE3, DeviceAttr)


class Cap(enum.IntEnum):
    """KVM_CAP_*: what KVM_CHECK_EXTENSION is asked for."""

    IRQCHIP = 0
    USER_MEMORY = 3
    SET_TSS_ADDR = 4
    EXT_CPUID = 7
    IRQ_ROUTING = 25
    IRQFD = 32
    IOEVENTFD = 36
    XEN_HVM = 38
    HYPERV = 44
    GET_TSC_KHZ = 61
    SIGNAL_MSI = 77
    IRQFD_RESAMPLE = 82
    IOEVENTFD_NO_LENGTH = 100
    SPLIT_IRQCHIP = 121
    IOEVENTFD_ANY_LENGTH = 122
    HYPERV_SYNIC = 123
    VCPU_ATTRIBUTES = 127
    IMMEDIATE_EXIT = 136
    HYPERV_SYNIC2 = 148
    HYPERV_EVENTFD = 154
    EXIT_HYPERCALL = 201
