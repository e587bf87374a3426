"""A vCPU: registers, what it tells its guest about itself, and a run loop that cannot hang.

Theory of operation. KVM_RUN returns when the guest needs its VMM, or when a signal arrives. What a guest does is not
ours to trust (a hypercall that a hypervisor does not know may spin for ever), so every run has a deadline. A timer
thread then *kicks*: it sets ``immediate_exit`` in the shared page, for a KVM_RUN that has not begun, and sends a
signal to the thread, for one that has. The signal is blocked in the thread and let through inside KVM_RUN only
(KVM_SET_SIGNAL_MASK): no handler is needed, which only Python's main thread could install, and a kick that comes
early is not lost but pending.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from hcd_protocols import kvm as abi
from hcd_protocols.kvm import Exit, Ioctl

from hcd.kvm.errors import KvmError
from hcd.kvm.ioctl import call, try_call

__all__ = ["KICK_SIGNAL", "RunEnd", "Vcpu"]

KICK_SIGNAL = signal.SIGRTMIN + 3

_EINTR, _EAGAIN = 4, 11
_MAX_CPUID = 256


@dataclass(frozen=True, slots=True)
class RunEnd:
    """Why a run ended: ``reason`` is None when the time was over. ``detail`` says it in words."""

    reason: Exit | int | None
    detail: str

    @property
    def timed_out(self) -> bool:
        return self.reason is None


class Vcpu:
    """One vCPU. Run it on one thread at a time; :meth:`kick` is for any thread."""

    def __init__(self, kvm_fd: int, vm_fd: int, number: int) -> None:
        self.number = number
        self._kvm_fd = kvm_fd
        self.fd = call(vm_fd, Ioctl.CREATE_VCPU, number, f"vCPU {number}")
        try:
            size = call(kvm_fd, Ioctl.GET_VCPU_MMAP_SIZE)
            self._page = mmap.mmap(self.fd, size, flags=mmap.MAP_SHARED)
        except BaseException:
            os.close(self.fd)
            raise
        self._run: abi.Run | None = abi.Run.from_buffer(self._page)
        self._thread = 0
        self._kicking = threading.Lock()  # a kick after its run had ended would end the process
        self._kicked = False  # one signal is enough, and more of them would fill a queue that has a limit

    def close(self) -> None:
        """Harmless when repeated."""
        if self.fd < 0:
            return
        self._run = None
        self._page.close()
        os.close(self.fd)
        self.fd = -1

    @property
    def page(self) -> abi.Run:
        """The page shared with KVM: valid after a run, until the next one."""
        assert self._run is not None, "the vCPU is closed"
        return self._run

    @property
    def page_address(self) -> int:
        return ctypes.addressof(self.page)

    # -- registers

    @property
    def regs(self) -> abi.Regs:
        regs = abi.Regs()
        call(self.fd, Ioctl.GET_REGS, regs)
        return regs

    @regs.setter
    def regs(self, regs: abi.Regs) -> None:
        call(self.fd, Ioctl.SET_REGS, regs)

    @property
    def sregs(self) -> abi.Sregs:
        sregs = abi.Sregs()
        call(self.fd, Ioctl.GET_SREGS, sregs)
        return sregs

    @sregs.setter
    def sregs(self, sregs: abi.Sregs) -> None:
        call(self.fd, Ioctl.SET_SREGS, sregs)

    def set_msrs(self, values: Mapping[int, int]) -> list[int]:
        """Write model-specific registers in this order; returns those that KVM refused, and all behind them."""
        numbers = list(values)
        msrs = abi.msrs_type(len(numbers))(nmsrs=len(numbers))
        for entry, number in zip(msrs.entries, numbers, strict=True):
            entry.index, entry.data = number, values[number]
        return numbers[call(self.fd, Ioctl.SET_MSRS, msrs) :]

    def supported_cpuid(self) -> list[abi.CpuidEntry2]:
        """The CPUID leaves that KVM can offer on this host."""
        cpuid = abi.cpuid2_type(_MAX_CPUID)(nent=_MAX_CPUID)
        call(self._kvm_fd, Ioctl.GET_SUPPORTED_CPUID, cpuid)
        return list(cpuid.entries[: cpuid.nent])

    def set_cpuid(self, entries: Iterable[abi.CpuidEntry2]) -> None:
        """The CPUID leaves that the guest sees; before its first run."""
        leaves = list(entries)
        cpuid = abi.cpuid2_type(len(leaves))(nent=len(leaves))
        for index, leaf in enumerate(leaves):
            cpuid.entries[index] = leaf
        call(self.fd, Ioctl.SET_CPUID2, cpuid)

    # -- time

    def tsc_offset(self) -> int | None:
        """What KVM adds to the host's TSC for the guest, modulo 2^64; None where this kernel does not tell
        (KVM_VCPU_TSC_OFFSET, Linux 5.16)."""
        value = ctypes.c_uint64()
        attribute = abi.DeviceAttr(
            group=abi.VCPU_TSC_CTRL, attr=abi.VCPU_TSC_OFFSET, addr=ctypes.addressof(value)
        )
        return value.value if try_call(self.fd, Ioctl.GET_DEVICE_ATTR, attribute) == 0 else None

    def tsc_khz(self) -> int | None:
        """The frequency of the guest's TSC; None where it is not known."""
        khz = try_call(self.fd, Ioctl.GET_TSC_KHZ)
        return khz if khz > 0 else None

    # -- running

    def run(
        self,
        timeout: float,
        answer: Callable[[Vcpu], bool] = lambda _: False,
        loop: Callable[[Vcpu], int] | None = None,
    ) -> RunEnd:
        """Run the guest until ``answer`` returns False for an exit, or ``timeout`` seconds have passed.

        ``answer`` looks at :attr:`page`, answers the exit and returns True to go on. ``loop`` replaces KVM_RUN: it
        returns 0 or a negative errno, and may answer exits itself. KvmError when KVM_RUN fails. Signals of the
        process still interrupt it and are handled by Python.
        """
        self.page.immediate_exit = 0
        over = threading.Event()
        old = signal.pthread_sigmask(signal.SIG_BLOCK, [KICK_SIGNAL])
        self._thread = threading.get_ident()
        self._set_mask(old)
        timer = threading.Timer(timeout, self._time_is_over, [over])
        timer.daemon = True
        timer.start()
        try:
            return self._run_until(over, answer, loop or _enter)
        finally:
            timer.cancel()
            timer.join()
            with self._kicking:
                self._thread = 0
            self._drain_kicks()
            signal.pthread_sigmask(signal.SIG_SETMASK, old)

    def kick(self) -> None:
        """Make a run of this vCPU return from KVM_RUN soon; nothing if it does not run. Any thread."""
        with self._kicking:
            if self._thread and not self._kicked:
                self._kicked = True
                self.page.immediate_exit = 1
                signal.pthread_kill(self._thread, KICK_SIGNAL)

    def _time_is_over(self, over: threading.Event) -> None:
        over.set()
        self.kick()

    def _run_until(
        self, over: threading.Event, answer: Callable[[Vcpu], bool], enter: Callable[[Vcpu], int]
    ) -> RunEnd:
        while not over.is_set():
            result = enter(self)
            if result in (-_EINTR, -_EAGAIN):
                self._drain_kicks()
                continue
            if result < 0:
                raise KvmError(Ioctl.RUN, -result, f"vCPU {self.number}")
            if not answer(self):
                return RunEnd(_reason(self.page), self.describe_exit())
        return RunEnd(None, f"time is over at instruction {self.regs.rip:#x}")

    def _drain_kicks(self) -> None:
        """A kick that was not for the deadline: run on."""
        with self._kicking:
            self._kicked = False
            self.page.immediate_exit = 0
            while signal.sigtimedwait([KICK_SIGNAL], 0) is not None:
                pass

    def _set_mask(self, blocked: Iterable[int]) -> None:
        bits = sum(1 << (number - 1) for number in blocked if number != KICK_SIGNAL)
        data = struct.pack("=IQ", 8, bits)
        mask = _SignalMask8.from_buffer_copy(data)
        call(self.fd, Ioctl.SET_SIGNAL_MASK, mask)

    def describe_exit(self) -> str:
        """The last exit, in words."""
        page = self.page
        reason = _reason(page)
        if reason == Exit.IO:
            way = "out" if page.io.direction else "in"
            return f"{way} at port {page.io.port:#x}, {page.io.size} bytes"
        if reason == Exit.MMIO:
            return f"{'write' if page.mmio.is_write else 'read'} at {page.mmio.phys_addr:#x}, {page.mmio.len} bytes"
        if reason == Exit.INTERNAL_ERROR:
            why = "KVM's emulator does not know the instruction" if page.internal.suberror == 1 else "internal error"
            return f"{why} at {self.regs.rip:#x}"
        if reason == Exit.FAIL_ENTRY:
            return f"the processor refused to enter the guest ({page.fail_entry.hardware_entry_failure_reason:#x})"
        if reason == Exit.SHUTDOWN:
            return "the guest shut down (triple fault)"
        return reason.name if isinstance(reason, Exit) else f"exit {reason}"

    def io_data(self) -> bytes:
        """What the guest wrote by the OUT that it exited for."""
        io = self.page.io
        start = io.data_offset
        return bytes(self._page[start : start + io.size * io.count])


class _SignalMask8(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("len", ctypes.c_uint32), ("set", ctypes.c_uint64))


def _enter(vcpu: Vcpu) -> int:
    return try_call(vcpu.fd, Ioctl.RUN)


def _reason(page: abi.Run) -> Exit | int:
    try:
        return Exit(page.exit_reason)
    except ValueError:
        return int(page.exit_reason)
