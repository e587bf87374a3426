"""The compiled hostile driver (hostile.c) from Python: guest memory, its rings, and the model of what they hold."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hcd.dataplane.memory import MemoryTable
from hcd.frontend.local import map_memory
from hcd.frontend.memory import MemorySlot, SharedMemory

__all__ = ["TEMPLATES", "Arena", "Hostile", "library"]

REGIONS, TEMPLATES = 8, 128

#: Two regions that touch, two small ones that touch, and one at the very end of the address space: what a chain may
#: span, cross and run over.
SLOTS = (
    MemorySlot(0x4000_0000, 0x8_0000),
    MemorySlot(0x4008_0000, 0x1_0000, 0x1000_0000, 0x3000),
    MemorySlot(0x5000_0000, 0x1000),
    MemorySlot(0x5000_1000, 0x2000, 0x2000_0000),
    MemorySlot(0xFFFF_FFFF_FFFF_0000, 0xF000, 0x3000_0000),
)
#: where in the first region rings and buffers are, from its beginning
RING_AREA, HEAP, HEAP_END = 0x0, 0x1_0000, 0x8_0000


class _Region(ctypes.Structure):
    _fields_ = (("gpa", ctypes.c_uint64), ("size", ctypes.c_uint64), ("host", ctypes.c_void_p))


class _Template(ctypes.Structure):
    _fields_ = (("data", ctypes.c_char_p), ("size", ctypes.c_uint32), ("keep", ctypes.c_uint32))


class Hostile(ctypes.Structure):
    """``hostile_t`` of hostile.c."""

    _fields_ = (
        ("random", ctypes.c_uint64),
        ("filled", ctypes.c_uint64),
        ("n_regions", ctypes.c_uint32),
        ("n_templates", ctypes.c_uint32),
        ("regions", _Region * REGIONS),
        ("templates", _Template * TEMPLATES),
        *((name, ctypes.c_uint32) for name in ("size", "packed", "event_idx", "indirect", "swap", "chaos")),
        *((name, ctypes.c_uint64) for name in ("desc", "driver", "device", "heap", "heap_end")),
        ("room_most", ctypes.c_uint32),
        *((name, ctypes.c_uint32) for name in ("avail", "wrap", "last", "seen", "last_wrap")),
        *((name, ctypes.c_uint32) for name in ("head", "slots", "n_out", "n_in")),
        *((name, ctypes.c_uint64) for name in ("out_size", "in_size", "sum")),
        ("thread", ctypes.c_ulong),
        ("racing", ctypes.c_int),
        ("heap_at", ctypes.c_uint64),
        ("race_random", ctypes.c_uint64),
        ("truncate_fd", ctypes.c_int),
    )


@functools.cache
def library() -> Any:
    """hostile.c, compiled once for each of its versions."""
    source = Path(__file__).with_name("hostile.c")
    flags = os.environ.get("HCD_FUZZ_CFLAGS", "-O2").split()
    digest = hashlib.sha256(source.read_bytes() + " ".join(flags).encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"hcd-hostile-{os.getuid()}-{digest}.so"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        command = ["gcc", *flags, "-g", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror"]
        subprocess.run([*command, str(source), "-o", str(partial)], check=True)
        partial.rename(target)
    loaded = ctypes.CDLL(str(target))
    loaded.hostile_size.restype = ctypes.c_size_t
    loaded.hostile_sum.restype = ctypes.c_uint64
    loaded.hostile_sum.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
    assert loaded.hostile_size() == ctypes.sizeof(Hostile), "hostile.c and guest.py differ"
    return loaded


class Arena:
    """Guest memory with a hostile driver in it. Its files may be truncated, its tables revoked."""

    def __init__(self) -> None:
        self.memory = SharedMemory(SLOTS, seal=False)
        self.table: MemoryTable = map_memory(self.memory)
        self.hostile = Hostile()
        self.spans = self._mapped()
        self.at = ctypes.byref(self.hostile)
        for i, region in enumerate(self.memory.regions):
            host = ctypes.addressof(ctypes.c_char.from_buffer(region.view))
            self.hostile.regions[i] = _Region(region.gpa, region.size, host)
        self.hostile.n_regions = len(self.memory.regions)
        start = self.memory.regions[0].gpa
        self.hostile.heap, self.hostile.heap_end = start + HEAP, start + HEAP_END

    def _mapped(self) -> list[tuple[int, int]]:
        """Where hcd has mapped the regions, as the kernel tells it: nothing else may ever be touched."""
        spans = []
        own = {ctypes.addressof(ctypes.c_char.from_buffer(r.view)) - r.mmap_offset for r in self.memory.regions}
        files = {os.fstat(region.fd).st_ino for region in self.memory.regions}
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, _, _, device, inode, *_ = line.split()
            start, end = (int(part, 16) for part in span.split("-"))
            if device == "00:01" and int(inode) in files and start not in own:
                spans.append((start, end))
        return spans

    def remap(self) -> None:
        """A new table; the old one is whoever's holds it."""
        old = set(self.spans)
        self.table = map_memory(self.memory)
        self.spans = [span for span in self._mapped() if span not in old] or self._mapped()

    def holds(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= end for start, end in self.spans)

    def templates(self, templates: list[tuple[bytes, int]]) -> None:
        """What requests look like, and how many bytes at the beginning of each are mostly left alone."""
        self._kept = templates  # the structure holds pointers only
        for i, (data, keep) in enumerate(templates):
            self.hostile.templates[i] = _Template(data, len(data), keep)
        self.hostile.n_templates = len(templates)

    def lay_out(self, *, size: int, packed: bool, event_idx: bool, indirect: bool, swap: bool, place: int = 0) -> None:
        """Put a ring of ``size`` entries into the first region; several fit at ``place`` 0, 1 ..."""
        h = self.hostile
        start = self.memory.regions[0].gpa + RING_AREA + place * 0x8000
        h.size, h.packed, h.event_idx, h.indirect, h.swap = size, packed, event_idx, indirect, swap
        h.desc = start
        h.driver = start + 16 * (size + 1)  # behind the table is a descriptor that is not one of it
        h.device = (h.driver + (4 if packed else 6 + 2 * size) + 3) & ~3

    def close(self) -> None:
        self.memory.close()
