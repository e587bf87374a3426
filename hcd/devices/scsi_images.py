"""The disks of a SCSI host: how an operator writes them down, and opening them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from hcd.dataplane.blockfile import BlockFile, BlockRam, BlockStore
from hcd.device import ConfigError
from hcd.devices.image import open_image

__all__ = ["SHAPE", "DiskSpec", "open_store", "parse_disks"]

SHAPE = "[TARGET[:LUN]=]PATH or [TARGET[:LUN]=]ram:SIZE, then ,read-only ,direct ,later ,serial=TEXT ,block-size=N"
MAX_TARGET, MAX_UNIT = 255, 16383
_DISK = re.compile(r"(?:(?P<target>[0-9]{1,5})(?::(?P<unit>[0-9]{1,5}))?=)?(?P<where>[^,]+)(?P<flags>(?:,[^,]+)*)")
_SIZE = re.compile(r"([0-9]+)([KMGT]?)", re.IGNORECASE)
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}

Log = logging.LoggerAdapter[logging.Logger]


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """One disk as it was asked for. ``later``: its file need not be there yet."""

    text: str
    target: int
    unit: int
    path: str = ""
    ram: int = 0
    flags: frozenset[str] = field(default_factory=frozenset)
    serial: bytes = b""
    block_size: int = 512

    @property
    def later(self) -> bool:
        return "later" in self.flags


def parse_disks(texts: Sequence[str]) -> list[DiskSpec]:
    """ConfigError with the text that cannot be understood. Disks without a target get the next one."""
    disks: list[DiskSpec] = []
    for text in texts:
        free = max((disk.target for disk in disks), default=-1) + 1
        disk = _parse(text, free)
        if any((other.target, other.unit) == (disk.target, disk.unit) for other in disks):
            raise ConfigError(f'disk "{text}": there is a disk {disk.target}:{disk.unit} already')
        disks.append(disk)
    if not disks:
        raise ConfigError("a SCSI host without a disk; expected at least one option disk")
    return disks


def _parse(text: str, free: int) -> DiskSpec:
    match = _DISK.fullmatch(text)
    if match is None:
        raise ConfigError(f'disk "{text}": expected {SHAPE}')
    target, unit = int(match["target"] or free), int(match["unit"] or 0)
    if target > MAX_TARGET or unit > MAX_UNIT:
        raise ConfigError(f'disk "{text}": targets go up to {MAX_TARGET}, logical units up to {MAX_UNIT}')
    plain, serial, block_size = set(), b"", 512
    for flag in filter(None, match["flags"].split(",")):
        key, _, value = flag.partition("=")
        if flag in ("read-only", "direct", "later"):
            plain.add(flag)
        elif key == "serial" and 0 < len(os.fsencode(value)) <= 36 and value.isascii() and value.isprintable():
            serial = value.encode()
        elif key == "block-size" and value in ("512", "1024", "2048", "4096"):
            block_size = int(value)
        else:
            raise ConfigError(f'disk "{text}": "{flag}" is not understood; expected {SHAPE}')
    ram = _ram(match["where"], text)
    if ram and plain:
        raise ConfigError(f'disk "{text}": a disk in memory is none of {", ".join(sorted(plain))}')
    return DiskSpec(text, target, unit, "" if ram else match["where"], ram, frozenset(plain), serial, block_size)


def _ram(where: str, text: str) -> int:
    if not where.startswith("ram:"):
        return 0
    match = _SIZE.fullmatch(where[4:])
    size = int(match[1]) << _UNITS[match[2].upper()] if match else 0
    if not size or size % 4096 or size > 1 << 46:
        raise ConfigError(f'disk "{text}": expected a size such as ram:64M, a multiple of 4096')
    return size


def open_store(disk: DiskSpec, log: Log, *, force_raw: bool, patience: float | None = None) -> BlockStore:
    """Open what ``disk`` is on. ConfigError; ``patience`` as in :func:`hcd.devices.image.open_image`."""
    if disk.ram:
        try:
            return BlockRam(disk.ram)
        except OSError as error:
            raise ConfigError(f"disk {disk.text}: {error.strerror}") from error
    read_only = "read-only" in disk.flags
    direct_block = disk.block_size if "direct" in disk.flags else 0
    fd = open_image(
        disk.path, read_only=read_only, force_raw=force_raw, log=log, direct_block=direct_block, option="disk",
        patience=patience,
    )
    try:
        size = os.lseek(fd, 0, os.SEEK_END) // disk.block_size * disk.block_size
        if not size:
            raise ConfigError(f"disk {disk.path}: it has not even one block of {disk.block_size} bytes")
        return BlockFile(fd, size, read_only=read_only)
    except BaseException:
        os.close(fd)
        raise
