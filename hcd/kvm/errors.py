"""Errors of KVM: which ioctl, for which doorbell, and what the errno means there."""

from __future__ import annotations

import errno as codes
import os
from collections.abc import Mapping

from hcd_protocols.kvm import Ioctl

from hcd.errors import HcdError

__all__ = ["KvmError", "meaning"]

_ANYWHERE: Mapping[int, str] = {
    codes.EIO: "the virtual machine belongs to another process; only the one that created it may do this",
    codes.ENOTTY: "this kernel does not have it",
    codes.ENODEV: "KVM has no support for it on this processor",
    codes.EBADF: "the file descriptor is not open, or not of the kind that KVM wants",
    codes.EMFILE: "the process has too many open files",
}

_HERE: Mapping[tuple[int, int], str] = {
    (Ioctl.IOEVENTFD, codes.EEXIST): "another doorbell stands at this address, with the same width and datamatch or "
    "with any",
    (Ioctl.IOEVENTFD, codes.EINVAL): "a width is 0 (any), 1, 2, 4 or 8 bytes, the address must not wrap, and any width "
    "cannot have a datamatch; or the file descriptor is no eventfd",
    (Ioctl.IOEVENTFD, codes.ENOENT): "no doorbell is registered with just this address, width, datamatch and eventfd",
    (Ioctl.IOEVENTFD, codes.ENOSPC): "the bus of the virtual machine is full",
    (Ioctl.HYPERV_EVENTFD, codes.EINVAL): "a connection id has 24 bits; or the file descriptor is no eventfd",
    (Ioctl.HYPERV_EVENTFD, codes.EEXIST): "another doorbell has this connection id",
    (Ioctl.HYPERV_EVENTFD, codes.ENOENT): "no doorbell has this connection id",
    (Ioctl.HYPERV_EVENTFD, codes.ENOTTY): "this kernel was built without Hyper-V's hypercalls (CONFIG_KVM_HYPERV)",
    (Ioctl.IRQFD, codes.EBUSY): "the eventfd raises another interrupt already",
    (Ioctl.IRQFD, codes.EINVAL): "the virtual machine has no interrupt controller in the kernel, or the descriptor is "
    "no eventfd",
    (Ioctl.IRQFD, codes.EAGAIN): "the interrupt controller is not ready",
    (Ioctl.CREATE_VCPU, codes.EEXIST): "the virtual machine has a vCPU of this number",
    (Ioctl.CREATE_VM, codes.EBUSY): "another hypervisor uses the processor's virtualisation",
    (Ioctl.SET_USER_MEMORY_REGION, codes.EEXIST): "the region overlaps another one",
    (Ioctl.SET_USER_MEMORY_REGION, codes.EINVAL): "address and size must be multiples of the page size",
    (Ioctl.SET_GSI_ROUTING, codes.EINVAL): "a route is of a type that this kernel does not know, or its number is "
    "too high",
    (Ioctl.RUN, codes.EFAULT): "the guest touched memory that its VMM does not back",
}


def meaning(ioctl: int, code: int) -> str:
    """What ``code`` (an errno) of ``ioctl`` tells; the system's words where nothing better is known."""
    return _HERE.get((ioctl, code)) or _ANYWHERE.get(code) or os.strerror(code)


class KvmError(HcdError):
    """An ioctl of KVM failed. ``errno`` as the kernel gave it; ``subject`` is what it was for, "" if nothing in
    particular."""

    def __init__(self, ioctl: Ioctl, code: int, subject: str = "") -> None:
        self.ioctl = ioctl
        self.errno = code
        self.subject = subject
        name = codes.errorcode.get(code, str(code))
        where = f" for {subject}" if subject else ""
        super().__init__(f"KVM_{ioctl.name}{where}: {name}: {meaning(ioctl, code)}")
