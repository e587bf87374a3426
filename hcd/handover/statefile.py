"""A small file in memory that survives the process, even in the middle of a write.

Layout, native byte order (it never leaves the machine)::

    0   8  "HCDSTATE"
    8   4  version of what is written into it
    12  4  1 while a message is being handled (busy), else 0
    64     first slot; the second one SLOT bytes later. Each: u64 sequence, u32 length, u32 CRC-32 of the data, data
    behind the slots: answers, in places that are used in turn

Slots are written in turn; the valid one with the higher sequence counts. A process can only die between two stores, so
that is enough, without any ordering by the processor: what was stored before is there.

An answer to the front end is put into the file before it is sent, and sent with sendfile(2) from the file's own
position, which belongs to the open file and so outlives the process. Sending and moving the position are one system
call, in the middle of which nobody can die: the position says whether the answer went out, and how much of it. The
kernel may keep pages of the file in the socket until they are read there, so a place is used again late.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from typing import Self

__all__ = ["ANSWER", "SLOT", "StateError", "StateFile"]

_MAGIC = b"HCDSTATE"
_HEAD = struct.Struct("=8sII")
_BUSY = struct.Struct("=I")
_BUSY_AT = 12
_SLOTS_AT = 64
_SLOT_HEAD = struct.Struct("=QII")
#: bytes of a slot; pages that are never written take no memory
SLOT = 512 << 10
#: bytes of the longest answer: vhost-user's are shorter
ANSWER = 4096
_ANSWERS_AT = _SLOTS_AT + 2 * SLOT
_ANSWERS = 64
_SIZE = _ANSWERS_AT + _ANSWERS * ANSWER


class StateError(Exception):
    """It is no state file, or of another version, or damaged."""


class StateFile:
    """A state file, mapped. ``fd`` is its own descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, _SIZE)
        self._sequence = 0
        self._answers = 0

    @classmethod
    def create(cls, version: int) -> Self:
        fd = os.memfd_create("hcd-state", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, _SIZE)
            made = cls(fd)
        except BaseException:
            os.close(fd)
            raise
        _HEAD.pack_into(made._map, 0, _MAGIC, version, 0)
        return made

    @classmethod
    def open(cls, fd: int, version: int) -> Self:
        """The file that an earlier process made; ``fd`` becomes its own. StateError leaves it to the caller."""
        if os.fstat(fd).st_size != _SIZE:
            raise StateError("it is no state file")
        found = cls(fd)
        magic, written, _ = _HEAD.unpack_from(found._map, 0)
        if magic == _MAGIC and written == version:
            return found
        found._map.close()
        raise StateError(f"its version is {written}, expected {version}" if magic == _MAGIC else "it is no state file")

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)

    @property
    def busy(self) -> bool:
        """Whether a message is being handled: what is written may be out of date."""
        return bool(_BUSY.unpack_from(self._map, _BUSY_AT)[0])

    @busy.setter
    def busy(self, busy: bool) -> None:
        _BUSY.pack_into(self._map, _BUSY_AT, busy)

    def stage(self, answer: bytes) -> int:
        """Put ``answer`` where sendfile finds it next; returns its place. ValueError if it is too long."""
        if len(answer) > ANSWER:
            raise ValueError(f"an answer of {len(answer)} bytes; expected up to {ANSWER}")
        at = _ANSWERS_AT + self._answers % _ANSWERS * ANSWER
        self._answers += 1
        self._map[at : at + len(answer)] = answer
        os.lseek(self.fd, at, os.SEEK_SET)
        return at

    def sent_since(self, at: int) -> int:
        """How many bytes of the answer at ``at`` went out."""
        return os.lseek(self.fd, 0, os.SEEK_CUR) - at

    def write(self, data: bytes) -> None:
        """Replace what is written. ValueError if it does not fit."""
        if len(data) > SLOT - _SLOT_HEAD.size:
            raise ValueError(f"{len(data)} bytes of state; {SLOT - _SLOT_HEAD.size} fit")
        sequence = self._sequence + 1
        at = _SLOTS_AT + sequence % 2 * SLOT
        _SLOT_HEAD.pack_into(self._map, at, 0, 0, 0)  # not valid while it is written
        body = at + _SLOT_HEAD.size
        self._map[body : body + len(data)] = data
        _SLOT_HEAD.pack_into(self._map, at, sequence, len(data), zlib.crc32(data))
        self._sequence = sequence

    def read(self) -> bytes:
        """What was written last. StateError if nothing whole is there."""
        best = max((self._read_slot(_SLOTS_AT + index * SLOT) for index in range(2)), key=lambda found: found[0])
        if not best[0]:
            raise StateError("nothing whole was written into it")
        self._sequence = best[0]
        return best[1]

    def _read_slot(self, at: int) -> tuple[int, bytes]:
        sequence, length, checksum = _SLOT_HEAD.unpack_from(self._map, at)
        body = at + _SLOT_HEAD.size
        if not sequence or length > SLOT - _SLOT_HEAD.size:
            return 0, b""
        data = self._map[body : body + length]
        return (sequence, data) if zlib.crc32(data) == checksum else (0, b"")
