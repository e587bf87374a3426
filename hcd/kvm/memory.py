"""Guest memory of a small virtual machine: a memfd, mapped here and given to KVM."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct

__all__ = ["Memory"]


class Memory:
    """``size`` bytes (a multiple of the page size) of guest memory at guest-physical ``address``.

    Backed by ``fd`` (a memfd that somebody else made, from offset 0; it stays the caller's), else by a memfd of its
    own that is sealed against changes of its size. Use :meth:`read_u32` and the like with guest-physical addresses.
    """

    def __init__(self, address: int, size: int, fd: int | None = None) -> None:
        self.address = address
        self.size = size
        self._own_fd = -1
        if fd is None:
            fd = self._own_fd = _make(size)
        try:
            self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
        except BaseException:
            self._close_fd()
            raise
        self.view = memoryview(self._map)
        self._anchor: ctypes.c_char | None = ctypes.c_char.from_buffer(self._map)

    @property
    def host_address(self) -> int:
        """Where the mapping begins in this process."""
        assert self._anchor is not None
        return ctypes.addressof(self._anchor)

    def write(self, address: int, data: bytes) -> None:
        start = address - self.address
        self.view[start : start + len(data)] = data

    def read(self, address: int, size: int) -> bytes:
        start = address - self.address
        return bytes(self.view[start : start + size])

    def write_u32(self, address: int, value: int) -> None:
        struct.pack_into("<I", self.view, address - self.address, value)

    def read_u32(self, address: int) -> int:
        value: int = struct.unpack_from("<I", self.view, address - self.address)[0]
        return value

    def close(self) -> None:
        """Unmap it; KVM must have forgotten it before. Harmless when repeated."""
        self._anchor = None
        self.view.release()
        self._map.close()
        self._close_fd()

    def _close_fd(self) -> None:
        if self._own_fd >= 0:
            os.close(self._own_fd)
            self._own_fd = -1


def _make(size: int) -> int:
    fd = os.memfd_create("hcd-guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd
