"""Guest memory that a front end makes up and shares: memfds at chosen guest-physical addresses.

A region has three addresses, and confusing two of them is the classic bug of a back end: the *guest-physical*
address (descriptors hold it), the *user* address of the front end (SET_VRING_ADDR and the memory table hold
it) and the place in the fd (``mmap_offset``). They are different numbers here by default, so a mix-up shows.

The memory has no lock: a driver and a device share it by the rules of their rings.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["MemorySlot", "SharedMemory", "full_fence"]

DEFAULT_GPA = 0x4000_0000
#: user address of a region = its guest-physical address + this, unless the slot says otherwise
USER_OFFSET = 0x7E00_0000_0000

_fence = threading.Lock()


def full_fence() -> None:
    """Order every earlier store before every later load (StoreLoad), for this thread.

    CPython has no fence. Taking a lock is an atomic read-modify-write, which is a full barrier on x86 and on
    s390x, and acquire plus release elsewhere.
    """
    with _fence:
        pass


@dataclass(frozen=True, slots=True)
class MemorySlot:
    """Where one region goes. All in bytes; ``user_addr`` None: :data:`USER_OFFSET` above ``gpa``."""

    gpa: int
    size: int
    user_addr: int | None = None
    mmap_offset: int = 0


class Region:
    """One mapped region: its addresses, its memfd and a writable view of its bytes."""

    def __init__(self, slot: MemorySlot, seal: bool) -> None:
        self.gpa = slot.gpa
        self.size = slot.size
        self.user_addr = slot.gpa + USER_OFFSET if slot.user_addr is None else slot.user_addr
        self.mmap_offset = slot.mmap_offset
        self.fd = os.memfd_create("hcd-frontend", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, slot.mmap_offset + slot.size)
            if seal:
                _seal_size(self.fd)
            whole = memoryview(mmap.mmap(self.fd, slot.mmap_offset + slot.size))
        except BaseException:
            os.close(self.fd)
            raise
        self.view = whole[slot.mmap_offset :]
        # Address zero of a space is a poor thing to hand out: keep the first 64 bytes of each region back.
        self._free = [(min(64, slot.size), slot.size)]
        self._taken: dict[int, int] = {}

    @property
    def end(self) -> int:
        return self.gpa + self.size

    def alloc(self, size: int, align: int) -> int | None:
        """First fit; the offset in the region, or None."""
        for i, (start, end) in enumerate(self._free):
            at = start + -(self.gpa + start) % align
            if at + size > end:
                continue
            self._free[i : i + 1] = [hole for hole in ((start, at), (at + size, end)) if hole[0] < hole[1]]
            self._taken[at] = size
            return at
        return None

    def free(self, offset: int) -> None:
        size = self._taken.pop(offset)
        holes = sorted([*self._free, (offset, offset + size)])
        merged = [holes[0]]
        for start, end in holes[1:]:
            if start == merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        self._free = merged


class SharedMemory:
    """Guest memory of one or several regions, readable and writable by guest-physical address.

    ``seal`` seals the memfds against shrinking and growing, as QEMU does; without it a hostile test can
    truncate ``region.fd``. Addresses outside every region raise ValueError: here they are a mistake of the
    caller.
    """

    def __init__(self, slots: Sequence[MemorySlot], *, seal: bool = True) -> None:
        self.regions: list[Region] = []
        try:
            for slot in slots:
                self.regions.append(Region(slot, seal))
        except BaseException:
            self.close()
            raise

    @classmethod
    def of_size(cls, size: int, *, gpa: int = DEFAULT_GPA, seal: bool = True) -> SharedMemory:
        """One region of ``size`` bytes at ``gpa``."""
        return cls([MemorySlot(gpa, size)], seal=seal)

    def close(self) -> None:
        """Close the memfds. The mapping goes when the last view of it is dropped."""
        for region in self.regions:
            os.close(region.fd)
        self.regions = []

    def __enter__(self) -> SharedMemory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def region_at(self, gpa: int) -> Region:
        for region in self.regions:
            if region.gpa <= gpa < region.end:
                return region
        raise ValueError(f"no memory at guest address {gpa:#x}")

    def user_addr(self, gpa: int) -> int:
        """The front end's own address of ``gpa``: what SET_VRING_ADDR carries."""
        region = self.region_at(gpa)
        return region.user_addr + gpa - region.gpa

    def view(self, gpa: int, size: int) -> memoryview:
        """A writable view of ``size`` bytes that lie in one region."""
        region = self.region_at(gpa)
        if gpa + size > region.end:
            raise ValueError(f"{size} bytes at {gpa:#x} leave the region that ends at {region.end:#x}")
        offset = gpa - region.gpa
        return region.view[offset : offset + size]

    def _pieces(self, gpa: int, size: int) -> Iterator[memoryview]:
        while size:
            region = self.region_at(gpa)
            length = min(size, region.end - gpa)
            yield self.view(gpa, length)
            gpa += length
            size -= length

    def read(self, gpa: int, size: int) -> bytes:
        """``size`` bytes, which may lie in several adjacent regions."""
        return b"".join(self._pieces(gpa, size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``gpa``; it may lie in several adjacent regions."""
        done = 0
        for piece in self._pieces(gpa, len(data)):
            piece[:] = data[done : done + len(piece)]
            done += len(piece)

    def alloc(self, size: int, align: int = 16, *, region: int | None = None) -> int:
        """Take ``size`` bytes of one region (the first that has room, or the one of that index).

        Not cleared after an earlier use. MemoryError when nothing is left.
        """
        for candidate in self.regions if region is None else [self.regions[region]]:
            offset = candidate.alloc(max(size, 1), align)
            if offset is not None:
                return candidate.gpa + offset
        raise MemoryError(f"no {size} bytes of guest memory are free")

    def free(self, gpa: int) -> None:
        """Give back what ``alloc`` returned."""
        region = self.region_at(gpa)
        region.free(gpa - region.gpa)


def _seal_size(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
