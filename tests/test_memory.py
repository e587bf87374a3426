"""Guest memory: what is mapped, what is refused, and what happens when it goes away."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hcd_protocols.errors import ProtocolError

from hcd.dataplane.memory import MemoryTable, Region

SIZE = 1 << 20


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("memory")
    os.ftruncate(made, SIZE)
    yield made
    os.close(made)


def mappings() -> int:
    with open("/proc/self/maps", encoding="ascii") as maps:
        return sum("memfd:memory" in line for line in maps)


def test_offsets_need_not_be_whole_pages(fd: int) -> None:
    """mmap_offset is any byte of the file; the guest sees the file from there."""
    os.pwrite(fd, b"hello", 0x1808)
    table = MemoryTable([Region(0x5000, 0x1000, 0, 0x1808, fd)])
    assert table.read(0x5000, 5) == b"hello"


@pytest.mark.parametrize(
    ("guest", "size", "user", "offset", "text"),
    [
        (0, 0, 0, 0, "is empty"),
        ((1 << 64) - 0x1000, 0x1001, 0, 0, "guest range wraps"),
        (0, 0x1001, (1 << 64) - 0x1000, 0, "user range wraps"),
        (0, 0x1000, 0, (1 << 64) - 0x800, "mmap offset range wraps"),
        (0, SIZE + 1, 0, 0, "the file has 1048576 bytes"),
        (0, SIZE, 0, 1, "the file has 1048576 bytes"),
        (0, 1 << 62, 0, 1 << 62, "larger than any file"),
    ],
)
def test_impossible_regions(fd: int, guest: int, size: int, user: int, offset: int, text: str) -> None:
    """Nothing is mapped that is empty, wraps, or is longer than its file."""
    before = mappings()
    with pytest.raises(ProtocolError, match=text):
        Region(guest, size, user, offset, fd)
    assert mappings() == before


@pytest.mark.parametrize(("kind", "text"), [("directory", "a directory"), ("pipe", "a pipe"), ("closed", "Bad file")])
def test_fds_that_are_no_memory(kind: str, text: str) -> None:
    """A directory, a pipe or a closed fd is the front end's fault, and said."""
    read_end, write_end = os.pipe()
    bad = {"directory": os.open("/", os.O_RDONLY), "pipe": read_end, "closed": 999_999}
    try:
        with pytest.raises(ProtocolError, match=text):
            Region(0, 4096, 0, 0, bad[kind])
    finally:
        for fd in (read_end, write_end, bad["directory"]):
            os.close(fd)


def test_a_read_only_fd_cannot_be_mapped(tmp_path: os.PathLike[str]) -> None:
    """Guest memory is written to; a file that is open for reading alone is refused by the kernel."""
    path = os.path.join(tmp_path, "f")
    with open(path, "wb") as file:
        file.truncate(4096)
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(ProtocolError, match="cannot be mapped: Permission denied"):
            Region(0, 4096, 0, 0, fd)
    finally:
        os.close(fd)


def test_overlap_is_refused_and_names_both(fd: int) -> None:
    """Two regions may touch, not overlap."""
    first = Region(0x1000, 0x1000, 0, 0, fd)
    MemoryTable([first, Region(0x2000, 0x1000, 0, 0, fd)])
    with pytest.raises(ProtocolError, match=r"0x1fff.*overlaps.*0x1000"):
        MemoryTable([Region(0x1FFF, 0x1000, 0, 0, fd), first])


def test_lookup_in_many_regions(fd: int) -> None:
    """Every byte of every region is found, nothing between them."""
    regions = [Region(0x2000 * i, 0x1000, 0x100000 + 0x2000 * i, 0x1000 * (i % 200), fd) for i in range(100)]
    table = MemoryTable(regions)
    for i in reversed(range(100)):
        os.pwrite(fd, bytes([i, 1]), 0x1000 * (i % 200) + 0xFFE)
        assert table.read(0x2000 * i + 0xFFE, 2) == bytes([i, 1])
        assert table.user_mapped(0x100000 + 0x2000 * i, 0x1000)
        assert not table.user_mapped(0x100000 + 0x2000 * i, 0x1001)
        with pytest.raises(LookupError):
            table.read(0x2000 * i + 0xFFF, 2)


def test_tables_share_regions_and_let_go(fd: int) -> None:
    """A mapping lives until the last table that has it is gone."""
    a, b = Region(0, 0x1000, 0, 0, fd), Region(0x1000, 0x1000, 0x1000, 0, fd)
    old = MemoryTable([a, b])
    new = old.without_region(0, 0x1000, 0)
    del a, b
    before = mappings()
    assert old.read(0, 1) == b"\0"
    del old
    assert mappings() == before - 1
    with pytest.raises(LookupError):
        new.without_region(0, 0x1000, 0)


def test_revoked_memory_is_harmless(fd: int) -> None:
    """After revoke the processor sees zeros and system calls EFAULT; the file keeps what it had; a twin goes on."""
    os.pwrite(fd, b"secret", 0)
    table = MemoryTable([Region(0, SIZE, 0, 0, fd)])
    twin = table.twin()
    table.revoke()
    table.revoke()
    assert table.read(0, 6) == bytes(6)
    assert twin.read(0, 6) == b"secret"
    assert os.pread(fd, 6, 0) == b"secret"
    assert not table.poisoned


def test_truncated_memory_is_harmless_and_known(fd: int) -> None:
    """Beyond the new end of the file zero pages appear, the region is marked, and its alarm rings."""
    alarm = os.eventfd(0, os.EFD_NONBLOCK)
    table = MemoryTable([Region(0, SIZE, 0, 0, fd)])
    table.set_alarm(alarm)
    os.ftruncate(fd, 0)
    assert table.read(SIZE - 4, 4) == bytes(4)
    assert table.poisoned
    assert os.eventfd_read(alarm) == 1
    os.close(alarm)
