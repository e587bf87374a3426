"""Virtio-blk requests over a queue: one at a time, or many in flight (virtio 1.3, 5.2.6).

Every request has a slot of guest memory: 16 bytes of header, data, one byte of status. The status byte is set
to a value that no device writes before the request goes out, so a device that forgets it is found.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hcd_protocols.virtio.blk import CONFIG_SIZE, FLAG_UNMAP, ID_SIZE, SECTOR_SIZE, BlkConfig, RequestType
from hcd_protocols.virtio.features import BlkFeature

from hcd.frontend.client import Frontend
from hcd.frontend.errors import BackendError, RequestFailed, RingFull
from hcd.frontend.memory import SharedMemory
from hcd.frontend.queue import Queue

__all__ = ["BLOCK_FEATURES", "BlockDriver", "BlockRequest", "read_config"]

#: what this driver can live with; mask the features with it
BLOCK_FEATURES = (
    BlkFeature.SIZE_MAX
    | BlkFeature.SEG_MAX
    | BlkFeature.GEOMETRY
    | BlkFeature.RO
    | BlkFeature.BLK_SIZE
    | BlkFeature.FLUSH
    | BlkFeature.TOPOLOGY
    | BlkFeature.CONFIG_WCE
    | BlkFeature.MQ
    | BlkFeature.DISCARD
    | BlkFeature.WRITE_ZEROES
)

#: a status that no device writes
UNTOUCHED = 0xA5
_WRITABLE = frozenset({RequestType.IN, RequestType.GET_ID})


def read_config(frontend: Frontend) -> BlkConfig:
    """The device's configuration space up to WRITE_ZEROES."""
    return BlkConfig.from_bytes(frontend.config(0, CONFIG_SIZE))


@dataclass(slots=True)
class BlockRequest:
    """One request. ``data`` goes to the device; ``result`` and ``status`` come back.

    ``kind`` is a RequestType or any other number; ``length`` the bytes to read for IN and GET_ID. ``pieces``
    cuts the data into descriptors of these sizes (the rest goes into a last one).
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

    def __str__(self) -> str:
        known = self.kind in RequestType.__members__.values()
        return f"{RequestType(self.kind).name if known else self.kind} at sector {self.sector}"

    def check(self) -> BlockRequest:
        """RequestFailed unless the device reported success."""
        if self.status:
            raise RequestFailed(f"{self} failed with status {self.status}", self.status)
        return self


@dataclass(slots=True)
class _Slot:
    header: int
    status: int
    data: int = 0
    room: int = 0
    request: BlockRequest = field(default_factory=lambda: BlockRequest(RequestType.IN))


class BlockDriver:
    """Issues requests on one queue.

    ``big_endian``: headers of a legacy big-endian guest. ``polled``: look at the ring instead of waiting for calls.
    """

    def __init__(
        self,
        memory: SharedMemory,
        queue: Queue,
        *,
        timeout: float = 20.0,
        big_endian: bool = False,
        polled: bool = False,
    ) -> None:
        self.memory = memory
        self.queue = queue
        self.timeout = timeout
        self.polled = polled
        self._header = struct.Struct((">" if big_endian else "<") + "IIQ")
        self._segment = struct.Struct((">" if big_endian else "<") + "QII")
        self._idle: list[_Slot] = []
        self._busy: dict[int, _Slot] = {}

    # -- one at a time

    def read(self, sector: int, length: int) -> bytes:
        """``length`` bytes from ``sector`` (512-byte units) on. RequestFailed if the device says so."""
        return self.run(BlockRequest(RequestType.IN, sector, length=length)).check().result

    def write(self, sector: int, data: bytes) -> None:
        self.run(BlockRequest(RequestType.OUT, sector, data)).check()

    def flush(self) -> None:
        self.run(BlockRequest(RequestType.FLUSH)).check()

    def get_id(self) -> str:
        """The serial number, up to 20 bytes."""
        answer = self.run(BlockRequest(RequestType.GET_ID, length=ID_SIZE)).check().result
        return answer.partition(b"\0")[0].decode("ascii", "replace")

    def discard(self, sector: int, count: int) -> None:
        self.run(BlockRequest(RequestType.DISCARD, 0, self._segment.pack(sector, count, 0))).check()

    def write_zeroes(self, sector: int, count: int, *, unmap: bool = False) -> None:
        segment = self._segment.pack(sector, count, FLAG_UNMAP * unmap)
        self.run(BlockRequest(RequestType.WRITE_ZEROES, 0, segment)).check()

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
        used = self.queue.spin(self.timeout) if self.polled else self.queue.wait(self.timeout)
        return [self._finish(done.token, done.written) for done in used]

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
            raise BackendError(f"{request}: finished without a status")
        return request

    def _slot(self, size: int) -> _Slot:
        slot = self._idle.pop() if self._idle else _Slot(self.memory.alloc(16), self.memory.alloc(1))
        if slot.room < size:
            if slot.room:
                self.memory.free(slot.data)
            slot.data, slot.room = self.memory.alloc(size, SECTOR_SIZE), size
        return slot


def _cut(gpa: int, size: int, pieces: tuple[int, ...]) -> list[tuple[int, int]]:
    """``size`` bytes at ``gpa`` as buffers of the sizes ``pieces`` and one for the rest."""
    buffers: list[tuple[int, int]] = []
    for piece in pieces:
        buffers.append((gpa, min(piece, size)))
        gpa, size = gpa + buffers[-1][1], size - buffers[-1][1]
    return [*buffers, (gpa, size)] if size else buffers
