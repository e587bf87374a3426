"""ioctl(2) for KVM.

``fcntl.ioctl`` takes its integer argument as a signed 32-bit number, which KVM_SET_TSS_ADDR's address does not fit,
and it copies structures; ctypes passes both as they are. A ctypes call runs without the GIL, so a vCPU thread in
KVM_RUN does not keep others from running.
"""

from __future__ import annotations

import ctypes
from typing import Any

from hcd_protocols.kvm import Ioctl

from hcd.kvm.errors import KvmError

__all__ = ["call", "try_call"]

_libc = ctypes.CDLL(None, use_errno=True)
_ioctl = _libc.ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_ioctl.restype = ctypes.c_int


def try_call(fd: int, ioctl: Ioctl, argument: int | ctypes.Structure = 0) -> int:
    """The result of the ioctl, or the errno as a negative number."""
    given: Any = argument if isinstance(argument, int) else ctypes.byref(argument)
    result: int = _ioctl(fd, ioctl, given)
    return result if result >= 0 else -ctypes.get_errno()


def call(fd: int, ioctl: Ioctl, argument: int | ctypes.Structure = 0, subject: str = "") -> int:
    """The result of the ioctl. KvmError, naming ``subject``, when it fails."""
    result = try_call(fd, ioctl, argument)
    if result < 0:
        raise KvmError(ioctl, -result, subject)
    return result
