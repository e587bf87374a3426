"""One logical unit: a disk that is a file, a block device or memory, and the commands that Linux, sg3_utils and
SeaBIOS send it.

Data goes straight between file and guest memory (:class:`hcd.dataplane.blockfile.BlockStore`): the answer of success
is written in advance, the store completes the request behind it, and :meth:`Disk.failed` replaces it where it turns
out otherwise.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from hcd_protocols.virtio.scsi import RESPONSE_SIZE

from hcd.dataplane.blockfile import BlockFile, BlockStore
from hcd.device import DeviceError, GuestError, Request
from hcd.devices import scsi_pages, scsi_reply
from hcd.devices.scsi_cdb import (
    Extent,
    Op,
    Refused,
    Sense,
    SenseCode,
    extent,
    find_command,
    fixed_sense,
    parameter_room,
    unmap_extents,
)
from hcd.devices.scsi_pages import MAX_UNMAP_EXTENTS, WCE, Traits

__all__ = ["OPERATIONS", "OP_EVENT", "OP_TASK", "Disk"]

OPERATIONS = ("command", "read", "write", "flush", "unmap", "write_same", "verify", "task", "event")
OP_COMMAND, OP_READ, OP_WRITE, OP_FLUSH, OP_UNMAP, OP_WRITE_SAME, OP_VERIFY, OP_TASK, OP_EVENT = range(9)
SECTOR = 512
#: bytes that one UNMAP or WRITE SAME may cover: of a file, of memory (which is filled in the reactor)
MOST_FILE, MOST_RAM = 1 << 30, 1 << 20

#: commands that work while a unit attention is pending, and in spite of it (SPC-4, 4.5.6; SAM-5, 5.14)
QUIET = frozenset((Op.INQUIRY, Op.REPORT_LUNS, Op.REQUEST_SENSE))
#: commands that need a medium that turns
MEDIUM = frozenset(
    (
        *(Op.TEST_UNIT_READY, Op.READ_6, Op.READ_10, Op.READ_12, Op.READ_16, Op.WRITE_6, Op.WRITE_10, Op.WRITE_12),
        *(Op.WRITE_16, Op.VERIFY_10, Op.VERIFY_16, Op.SYNCHRONIZE_CACHE_10, Op.SYNCHRONIZE_CACHE_16, Op.UNMAP),
        *(Op.WRITE_SAME_10, Op.WRITE_SAME_16),
    )
)
WRITES = frozenset(("write", "write_same", "unmap"))


@dataclass(slots=True)
class Disk:
    """Logical unit ``unit`` of ``target``, on ``store``."""

    target: int
    unit: int
    store: BlockStore
    block_size: int
    serial: bytes
    #: the units of this target, for REPORT LUNS
    siblings: Callable[[], list[tuple[int, int]]]
    write_cache: bool = True
    stopped: bool = False
    _attention: deque[SenseCode] = field(default_factory=deque)
    _factor: int = 1
    _commands: dict[str, Callable[[Request, bytes], None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._factor = self.block_size // SECTOR
        self._commands = {
            "test_unit_ready": self._good,
            "request_sense": self._request_sense,
            "read": self.read,
            "write": self.write,
            "inquiry": self._inquiry,
            "mode_select": self._mode_select,
            "mode_sense": lambda request, cdb: self._answer(request, cdb, scsi_pages.mode_sense(cdb, self.traits)),
            "start_stop": self._start_stop,
            "read_capacity_10": lambda request, _: scsi_reply.data(request, scsi_pages.capacity_10(self.traits), 8),
            "read_capacity_16": lambda request, cdb: self._answer(request, cdb, scsi_pages.capacity_16(self.traits)),
            "verify": self._verify,
            "synchronize_cache": self._synchronize_cache,
            "write_same": self._write_same,
            "unmap": self._unmap,
            "report_luns": lambda request, cdb: self._answer(request, cdb, scsi_pages.report_luns(self.siblings())),
            "report_opcodes": lambda request, cdb: self._answer(request, cdb, scsi_pages.report_opcodes(cdb)),
        }
        self.store.head = RESPONSE_SIZE
        self.store.on_failure = self.failed

    @property
    def name(self) -> str:
        return f"{self.target}:{self.unit}"

    @property
    def blocks(self) -> int:
        return self.store.size // self.block_size

    @property
    def most_blocks(self) -> int:
        return (MOST_FILE if isinstance(self.store, BlockFile) else MOST_RAM) // self.block_size

    @property
    def traits(self) -> Traits:
        return Traits(self.blocks, self.block_size, self.serial, self.store.read_only, self.write_cache,
                      self.most_blocks)

    @property
    def busy(self) -> bool:
        """Whether requests of it are with the worker."""
        return isinstance(self.store, BlockFile) and self.store.inflight > 0

    # -- state

    def reset(self, tell: bool = False) -> None:
        """As at power on. ``tell``: the initiator learns of it by a unit attention."""
        self.write_cache, self.stopped = True, False
        self._attention.clear()
        if tell:
            self.attend(Sense.RESET)

    def attend(self, sense: SenseCode) -> None:
        """The next command that is not excepted ends with this unit attention; each is told once."""
        if sense not in self._attention:
            self._attention.append(sense)

    def grow(self, size: int | None) -> int:
        """As :meth:`hcd.device.Device.resize`."""
        if size is not None and size % self.block_size:
            raise DeviceError(f"{size} bytes are no multiple of its blocks of {self.block_size}")
        if size is not None and self.store.read_only:
            raise DeviceError("it is read-only: let its image grow by other means, then resize it without a size")
        before = self.store.size
        try:
            wanted = self.store.stored() // self.block_size * self.block_size if size is None else size
            self.store.grow(wanted)
        except ValueError as error:
            raise DeviceError(f"disk {self.name}: {error}; a disk does not shrink while it is served") from error
        except OSError as error:
            raise DeviceError(f"disk {self.name} cannot be made larger: {error.strerror or error}") from error
        if self.store.size != before:
            self.attend(Sense.CAPACITY_CHANGED)
        return self.store.size

    # -- commands

    def execute(self, request: Request, cdb: bytes) -> None:
        """Carry out the command in ``cdb``; the cursor of ``request`` stands at its data."""
        try:
            command = find_command(cdb)
            if self._attention and cdb[0] not in QUIET:
                raise Refused(self._attention.popleft())
            if self.stopped and cdb[0] in MEDIUM:
                raise Refused(Sense.NOT_READY_STOPPED)
            if self.store.read_only and command.name in WRITES:
                raise Refused(Sense.WRITE_PROTECTED)
            self._commands[command.name](request, cdb)
        except Refused as refused:
            scsi_reply.check(request, refused.sense, refused.field)

    def read(self, request: Request, cdb: bytes) -> None:
        request.op = OP_READ
        where = self._placed(cdb)
        size = where.blocks * self.block_size
        if size > request.writable - RESPONSE_SIZE:
            scsi_reply.overrun(request)
            return
        scsi_reply.prepare(request, size)
        self.store.read(request, where.lba * self._factor, size)

    def write(self, request: Request, cdb: bytes) -> None:
        request.op = OP_WRITE
        where = self._placed(cdb)
        size = where.blocks * self.block_size
        if size > request.readable:
            scsi_reply.overrun(request)
            return
        scsi_reply.prepare(request, size)
        self.store.writethrough = where.fua or not self.write_cache
        self.store.write(request, where.lba * self._factor, size)

    def _placed(self, cdb: bytes) -> Extent:
        where = extent(cdb)
        where.check(self.blocks)
        return where

    def _good(self, request: Request, _: bytes = b"") -> None:
        scsi_reply.data(request, b"", 0)

    def _answer(self, request: Request, cdb: bytes, data: bytes) -> None:
        scsi_reply.data(request, data, parameter_room(cdb))

    def _inquiry(self, request: Request, cdb: bytes) -> None:
        if cdb[1] & 0x02 or (cdb[2] and not cdb[1] & 0x01):
            raise Refused(Sense.INVALID_FIELD, 2 if cdb[2] else 1)
        vital = cdb[1] & 0x01
        self._answer(request, cdb, scsi_pages.vital_data(cdb[2], self.traits) if vital else scsi_pages.inquiry())

    def _request_sense(self, request: Request, cdb: bytes) -> None:
        if cdb[1] & 0x01:
            raise Refused(Sense.INVALID_FIELD, 1)  # descriptor format
        sense = self._attention.popleft() if self._attention else Sense.NO_SENSE
        self._answer(request, cdb, fixed_sense(sense))

    def _start_stop(self, request: Request, cdb: bytes) -> None:
        if cdb[4] & 0xF0 == 0:  # with a power condition START does not count
            self.stopped = not cdb[4] & 0x01
        self._flush(request)

    def _synchronize_cache(self, request: Request, cdb: bytes) -> None:
        self._placed(cdb)
        self._flush(request)

    def _flush(self, request: Request) -> None:
        request.op = OP_FLUSH
        scsi_reply.prepare(request)
        self.store.flush(request)

    def _verify(self, request: Request, cdb: bytes) -> None:
        """Without data nothing is read: the image is the host's to look after. With data they are compared."""
        request.op = OP_VERIFY
        where = self._placed(cdb)
        compare = cdb[1] & 0x06
        if compare & 0x04:
            raise Refused(Sense.INVALID_FIELD, 1)  # one block with all of the medium
        size = where.blocks * self.block_size if compare else 0
        if size > request.readable:
            scsi_reply.overrun(request)
            return
        scsi_reply.prepare(request, size)
        self.store.compare(request, where.lba * self._factor, size)

    def _write_same(self, request: Request, cdb: bytes) -> None:
        request.op = OP_WRITE_SAME
        no_data = cdb[0] == Op.WRITE_SAME_16 and cdb[1] & 0x01
        if cdb[1] & 0x16 or (cdb[0] == Op.WRITE_SAME_10 and cdb[1] & 0x01):
            raise Refused(Sense.INVALID_FIELD, 1)
        where = self._placed(cdb)
        blocks = where.blocks or self.blocks - where.lba
        if blocks > self.most_blocks:
            raise Refused(Sense.INVALID_FIELD, 7 if cdb[0] == Op.WRITE_SAME_10 else 10)
        used = 0 if no_data else self.block_size
        if used > request.readable:
            scsi_reply.overrun(request)
            return
        block = request.read(used)
        scsi_reply.prepare(request)
        self.store.writethrough = not self.write_cache
        first, sectors, unmap = where.lba * self._factor, blocks * self._factor, bool(cdb[1] & 0x08)
        if any(block):
            self.store.write_same(request, first, sectors, block)
        else:
            self.store.write_zeroes(request, [(first, sectors, unmap)])

    def _unmap(self, request: Request, cdb: bytes) -> None:
        request.op = OP_UNMAP
        if cdb[1] & 0x01:
            raise Refused(Sense.INVALID_FIELD, 1)
        size = parameter_room(cdb)
        if size > request.readable:
            scsi_reply.overrun(request)
            return
        extents = unmap_extents(request.read(size), MAX_UNMAP_EXTENTS)
        for each in extents:
            each.check(self.blocks)
        if sum(each.blocks for each in extents) > self.most_blocks:
            raise Refused(Sense.INVALID_PARAMETER)
        scsi_reply.prepare(request)
        self.store.writethrough = not self.write_cache
        self.store.discard(request, [(each.lba * self._factor, each.blocks * self._factor, True) for each in extents])

    def _mode_select(self, request: Request, cdb: bytes) -> None:
        """Only the write cache can be switched; everything else must be sent as it is."""
        if cdb[1] & 0x01 or not cdb[1] & 0x10:
            raise Refused(Sense.INVALID_FIELD, 1)
        size = parameter_room(cdb)
        if size > request.readable:
            scsi_reply.overrun(request)
            return
        data = request.read(size)
        head = 4 if cdb[0] == Op.MODE_SELECT_6 else 8
        if 0 < size < head:
            raise Refused(Sense.PARAMETER_LENGTH)
        descriptor = 0 if not size else data[3] if head == 4 else int.from_bytes(data[6:8], "big")
        self._change_modes(data[head + descriptor :])
        if self.write_cache:
            self._good(request)
        else:
            self._flush(request)  # what was written before must be as safe as what comes

    def _change_modes(self, data: bytes) -> None:
        pages = scsi_pages.mode_pages(scsi_pages.CURRENT, self.traits)
        write_cache = self.write_cache
        while data:
            current = pages.get(data[0])
            if current is None or len(data) < len(current):
                raise Refused(Sense.INVALID_PARAMETER if current is None else Sense.PARAMETER_LENGTH)
            page, data = bytearray(data[: len(current)]), data[len(current) :]
            if page[0] == scsi_pages.CACHING:
                write_cache = bool(page[2] & WCE)
                page[2] = page[2] & ~WCE | current[2] & WCE
            if page != current:
                raise Refused(Sense.INVALID_PARAMETER)
        self.write_cache = write_cache

    # -- what the store could not do

    def failed(self, request: Request, error: Exception) -> None:
        """Replace the answer of success."""
        if isinstance(error, GuestError):
            scsi_reply.check(request, Sense.INTERNAL)
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            scsi_reply.check(request, Sense.NO_SPACE)
        elif isinstance(error, OSError) and error.errno == errno.EILSEQ:
            scsi_reply.check(request, Sense.MISCOMPARE)
        else:
            reading = request.op in (OP_READ, OP_VERIFY)
            scsi_reply.check(request, Sense.READ_ERROR if reading else Sense.WRITE_ERROR)
