"""Virtio-blk requests over a queue: one at a time, or many in flight (virtio 1.3, 5.2.6).

Every request has a slot of guest memory: 16 bytes of header, data, one byte of status. The status byte is set
to a value that no device writes before the request goes out, so a device that forgets it is found.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hcd.frontend.errors import BackendError, RequestFailed, RingFull
from hcd.frontend.memory import SharedMemory
from hcd.frontend.queue import Queue

__all__ = ["BlockDriver", "BlockRequest"]

SECTOR = 512
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
NAMES = {
    IN: "read",
    OUT: "write",
    FLUSH: "flush",
    GET_ID: "get-id",
    DISCARD: "discard",
    WRITE_ZEROES: "write-zeroes",
}
UNTOUCHED = 0xA5
_WRITABLE = frozenset({IN, GET_ID})


@dataclass(slots=True)
class BlockRequest:
    """One request. ``data`` goes to the device; ``result`` and ``status`` come back.

    ``length`` is the bytes to read for IN and GET_ID. ``pieces`` cuts the data into descriptors of these
    sizes (the rest goes into a last one).
    """

    kind: int
    sector: int = 0
    data: bytes = b""
    length: int = 0
    pieces: tuple[int, ...] = ()
    indirect: bool = False
    status: int = -1
    result: bytes = b""
    written: int = 0

    @property
    def writable(self) -> bool:
        return self.kind in _WRITABLE

    def check(self) -> BlockRequest:
        """RequestFailed unless the device reported success."""
        if self.status:
            name = NAMES.get(self.kind, f"request type {self.kind}")
            message = f"{name} at sector {self.sector} failed with status {self.status}"
            raise RequestFailed(message, self.status)
        return self


@dataclass(slots=True)
class _Slot:
    header: int
    status: int
    data: int = 0
    room: int = 0
    request: BlockRequest = field(default_factory=lambda: BlockRequest(IN))


class BlockDriver:
    """Issues requests on one queue. ``big_endian``: the header of a legacy big-endian guest."""

    def __init__(
        self, memory: SharedMemory, queue: Queue, *, timeout: float = 5.0, big_endian: bool = False
    ) -> None:
        self.memory = memory
        self.queue = queue
        self.timeout = timeout
        self._header = struct.Struct((">" if big_endian else "<") + "IIQ")
        self._segment = struct.Struct((">" if big_endian else "<") + "QII")
        self._idle: list[_Slot] = []
        self._busy: dict[int, _Slot] = {}

    # -- one at a time

    def read(self, sector: int, length: int) -> bytes:
        """``length`` bytes from ``sector`` (512-byte units) on. RequestFailed if the device says so."""
        return self.run(BlockRequest(IN, sector, length=length)).check().result

    def write(self, sector: int, data: bytes) -> None:
        self.run(BlockRequest(OUT, sector, data)).check()

    def flush(self) -> None:
        self.run(BlockRequest(FLUSH)).check()

    def get_id(self) -> str:
        """The serial number, up to 20 bytes."""
        answer = self.run(BlockRequest(GET_ID, length=20)).check().result
        return answer.partition(b"\0")[0].decode("ascii", "replace")

    def discard(self, sector: int, count: int) -> None:
        self.run(BlockRequest(DISCARD, 0, self._segment.pack(sector, count, 0))).check()

    def write_zeroes(self, sector: int, count: int, *, unmap: bool = False) -> None:
        self.run(BlockRequest(WRITE_ZEROES, 0, self._segment.pack(sector, count, int(unmap)))).check()

    def run(self, request: BlockRequest) -> BlockRequest:
        """Issue one request and wait for it; its status is not checked."""
        self.submit(request)
        while request.status < 0:
            self.wait()
        return request

    # -- many in flight

    def pipeline(self, requests: Iterable[BlockRequest], depth: int) -> Iterator[BlockRequest]:
        """Keep up to ``depth`` requests in flight; yields them as they finish, status not checked.

        Every batch is published with at most one kick.
        """
        source = iter(requests)
        more = True
        while more or self._busy:
            while more and len(self._busy) < depth:
                request = next(source, None)
                if request is None:
                    more = False
                else:
                    self.add(request)
            self.queue.publish()
            if self._busy:
                yield from self.wait()

    def submit(self, request: BlockRequest) -> None:
        """Add, publish, kick if wanted."""
        self.add(request)
        self.queue.publish()

    def add(self, request: BlockRequest) -> None:
        """Put the request into the ring; ``queue.publish`` shows it to the device."""
        size = request.length if request.writable else len(request.data)
        slot = self._slot(size)
        slot.request = request
        self.memory.write(slot.header, self._header.pack(request.kind, 0, request.sector))
        self.memory.write(slot.status, bytes([UNTOUCHED]))
        if not request.writable:
            self.memory.write(slot.data, request.data)
        data = _cut(slot.data, size, request.pieces)
        readable = [(slot.header, 16)] + ([] if request.writable else data)
        writable = (data if request.writable else []) + [(slot.status, 1)]
        try:
            token = self.queue.ring.add(readable, writable, request.indirect)
        except RingFull:
            self._idle.append(slot)
            raise
        self._busy[token] = slot

    def wait(self) -> list[BlockRequest]:
        """Wait until at least one request has finished; all that have."""
        return [self._finish(done.token, done.written) for done in self.queue.wait(self.timeout)]

    def poll(self) -> list[BlockRequest]:
        """Those that have finished; does not wait."""
        return [self._finish(done.token, done.written) for done in self.queue.used()]

    @property
    def inflight(self) -> int:
        return len(self._busy)

    def _finish(self, token: int, written: int) -> BlockRequest:
        slot = self._busy.pop(token)
        request = slot.request
        request.status = self.memory.read(slot.status, 1)[0]
        request.written = written
        if request.writable:
            request.result = self.memory.read(slot.data, request.length)
        self._idle.append(slot)
        if request.status == UNTOUCHED:
            raise BackendError(f"the device finished a {NAMES.get(request.kind, '?')} without a status")
        return request

    def _slot(self, size: int) -> _Slot:
        slot = self._idle.pop() if self._idle else _Slot(self.memory.alloc(16), self.memory.alloc(1))
        if slot.room < size:
            if slot.room:
                self.memory.free(slot.data)
            slot.data, slot.room = self.memory.alloc(size, SECTOR), size
        return slot


def _cut(gpa: int, size: int, pieces: tuple[int, ...]) -> list[tuple[int, int]]:
    """``size`` bytes at ``gpa`` as buffers of the sizes ``pieces`` and one for the rest."""
    buffers: list[tuple[int, int]] = []
    for piece in pieces:
        buffers.append((gpa, min(piece, size)))
        gpa, size = gpa + buffers[-1][1], size - buffers[-1][1]
    return [*buffers, (gpa, size)] if size else buffers
