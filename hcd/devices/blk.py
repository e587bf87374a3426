"""Block device (virtio 1.3, 5.2): a file, a block device or memory as the guest's disk.

All that is slow is done by :class:`hcd.dataplane.blockfile.BlockFile`; here are the meaning of requests and the
configuration space. Sectors are 512 bytes, whatever the logical block size.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from hcd_protocols.virtio.blk import (
    FLAG_UNMAP,
    ID_SIZE,
    REQUEST_HEADER,
    SECTOR_SIZE,
    SEGMENT,
    WCE_OFFSET,
    BlkConfig,
    RequestType,
    Status,
)
from hcd_protocols.virtio.features import BlkFeature
from hcd_protocols.virtio.ids import DeviceId

from hcd.dataplane.blockfile import BlockFile, BlockRam, BlockStore
from hcd.device import ConfigError, Device, DeviceError, GuestError, Handle, Lane, Option, Request, Virtqueue
from hcd.devices.image import open_image

__all__ = ["Block"]

#: data pieces of one request: what fits a ring of 128 beside header and status
SEG_MAX = 126
#: limits of DISCARD and WRITE_ZEROES: sectors in one segment, segments in one request
FILE_LIMITS = (1 << 21, 16)
#: memory is cleared in the reactor: little enough to take well under a millisecond, and a turn of such few
RAM_LIMITS = (1 << 13, 1)
#: bytes of one of its pieces: SEG_MAX of them are less than a disk in memory takes in one request
RAM_SIZE_MAX = 256 << 10
#: what a file system keeps together: the physical block size that guests are told
PHYSICAL = 4096
#: seconds between two log lines about the same kind of failure
LOG_INTERVAL = 60.0

IN, OUT = int(RequestType.IN), int(RequestType.OUT)
FLUSH, GET_ID = int(RequestType.FLUSH), int(RequestType.GET_ID)
DISCARD, WRITE_ZEROES = int(RequestType.DISCARD), int(RequestType.WRITE_ZEROES)
IOERR, UNSUPP = int(Status.IOERR), int(Status.UNSUPP)
HEADER = REQUEST_HEADER.size

#: what the log wrapper calls requests
NAMES = {IN: "read", OUT: "write"} | {int(kind): kind.name.lower() for kind in RequestType if kind > OUT}

OPERATIONS = ("read", "write", "flush", "discard", "write_zeroes", "get_id", "other")
OP_READ, OP_WRITE, OP_FLUSH, OP_DISCARD, OP_WRITE_ZEROES, OP_GET_ID, OP_OTHER = range(7)


class Block(Device):
    """``blk``. A request is header, data and a status byte, over descriptors as the driver likes (5.2.6)."""

    virtio_id = DeviceId.BLOCK
    description = "disk: a file, a block device or memory"
    vhost_user_type = "block"
    vhost_user_features = ("read-only", "blk-file")
    operations = OPERATIONS
    options = (
        Option("blk-file", "path", "file or block device to serve"),
        Option("ram", "size", "serve so many bytes of memory instead; contents end with the process"),
        Option("read-only", "bool", "refuse writes", default=False),
        Option("direct", "bool", "go past the page cache (O_DIRECT)", default=False),
        Option("num-queues", "int", "request queues", default=1, minimum=1, maximum=64),
        Option("serial", "str", "serial number, up to 20 bytes", default=""),
        Option("block-size", "int", "logical block size, a power of two", default=512, minimum=512, maximum=65536),
        Option("force-raw", "bool", "serve an image that looks like qcow2, vmdk, vhdx, luks... as raw", default=False),
    )

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, {option.key: option.default for option in self.options} | dict(options))
        if (self.option["blk_file"] is None) == (self.option["ram"] is None):
            raise ConfigError("expected exactly one of blk-file and ram")
        if self.option["ram"] is not None and self.option["read_only"]:
            raise ConfigError("read-only: a disk in memory that nobody can write to holds nothing")
        if self.option["ram"] is not None and self.option["direct"]:
            raise ConfigError("direct: a disk in memory has no page cache to go past")
        self.block_size: int = self.option["block_size"]
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"block-size {self.block_size}: expected a power of two")
        self._serial = os.fsencode(self.option["serial"])
        if len(self._serial) > ID_SIZE:
            raise ConfigError(f"serial: {len(self._serial)} bytes; expected up to {ID_SIZE}")
        self._disk: BlockStore
        self._limits = RAM_LIMITS if self.option["ram"] is not None else FILE_LIMITS
        self._watch: Handle | None = None
        self._lane: Lane
        self._writeback = 1
        self._logged: dict[object, tuple[float, int]] = {}

    # -- what it is

    @property
    def num_queues(self) -> int:
        count: int = self.option["num_queues"]
        return count

    @property
    def features(self) -> int:
        features = (
            BlkFeature.SEG_MAX | BlkFeature.BLK_SIZE | BlkFeature.FLUSH | BlkFeature.TOPOLOGY | BlkFeature.CONFIG_WCE
        )
        if self.num_queues > 1:
            features |= BlkFeature.MQ
        if self.option["ram"] is not None:
            features |= BlkFeature.SIZE_MAX
        if self.option["read_only"]:
            features |= BlkFeature.RO
        else:
            features |= BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES
        return int(features)

    def config(self) -> bytes:
        sectors, segments = self._limits if not self.option["read_only"] else (0, 0)
        exponent = max(0, (PHYSICAL // self.block_size).bit_length() - 1)
        return BlkConfig(
            capacity=self._disk.size // SECTOR_SIZE,
            size_max=RAM_SIZE_MAX if self.option["ram"] is not None else 0,
            seg_max=SEG_MAX,
            blk_size=self.block_size,
            physical_block_exp=exponent,
            min_io_size=1 << exponent,
            writeback=self._writeback,
            num_queues=self.num_queues,
            max_discard_sectors=sectors,
            max_discard_seg=segments,
            discard_sector_alignment=max(PHYSICAL, self.block_size) // SECTOR_SIZE,
            max_write_zeroes_sectors=sectors,
            max_write_zeroes_seg=segments,
            write_zeroes_may_unmap=1,
        ).to_bytes()

    def write_config(self, offset: int, data: bytes) -> None:
        if offset != WCE_OFFSET or len(data) != 1 or data[0] > 1:
            raise DeviceError(f"{len(data)} bytes at {offset} of the configuration space cannot be written; only the "
                              f"write-cache mode at {WCE_OFFSET} can, with 0 or 1")
        # It outlives the connection: a guest whose front end reconnects does not set it again, another one reads it.
        self._writeback = data[0]
        self._disk.writethrough = not data[0]

    def storage_size(self) -> int:
        return self._disk.size

    def resize(self, size: int | None) -> int:
        if size is not None and size % self.block_size:
            raise DeviceError(f"{size} bytes are no multiple of its blocks of {self.block_size}")
        if size is not None and self.option["read_only"]:
            raise DeviceError("it is read-only: let its image grow by other means, then resize it without a size")
        try:
            # a rest that is no whole block stays out of sight, as at the start
            wanted = self._disk.stored() // self.block_size * self.block_size if size is None else size
            return self._disk.grow(wanted)
        except ValueError as e:
            raise DeviceError(f"{e}; a disk does not shrink while it is served") from e
        except OSError as e:
            what = self.option["blk_file"] or "ram"
            raise DeviceError(f"{what} cannot be made larger from here: {e.strerror or e}") from e

    def connect(self, features: int) -> None:
        # 5.2.5.2: a driver that knows neither flush nor the mode counts on what it wrote
        careless = not features & (BlkFeature.FLUSH | BlkFeature.CONFIG_WCE)
        self._disk.writethrough = careless or not self._writeback

    # -- its life

    def open(self, lane: Lane) -> None:
        self._lane = lane
        if self.option["ram"] is not None:
            self._disk = self._open_ram(self.option["ram"])
        else:
            self._disk = self._open_file(self.option["blk_file"])
        self._disk.on_error = self._failed
        if self._disk.fileno() >= 0:
            lane.post(self._start_watch)

    def _open_ram(self, size: int) -> BlockRam:
        try:
            return BlockRam(self._whole_blocks(size, "ram"))
        except OSError as e:
            raise ConfigError(f"ram: {e.strerror}") from e

    def _open_file(self, path: str) -> BlockFile:
        read_only = self.option["read_only"]
        direct_block = self.block_size if self.option["direct"] else 0
        fd = open_image(
            path, read_only=read_only, force_raw=self.option["force_raw"], log=self.log, direct_block=direct_block
        )
        try:
            size = self._whole_blocks(os.lseek(fd, 0, os.SEEK_END), f"blk-file {path}")
            return BlockFile(fd, size, read_only=read_only)
        except BaseException:
            os.close(fd)
            raise

    def _whole_blocks(self, size: int, what: str) -> int:
        whole = size // self.block_size * self.block_size
        if not whole:
            raise ConfigError(f"{what}: {size} bytes are less than one block of {self.block_size}")
        if whole != size:
            self.log.warning("%s: %d bytes are no multiple of %d; the last %d are not served",
                             what, size, self.block_size, size - whole)
        return whole

    def _start_watch(self) -> None:
        self._watch = self._lane.watch(self._disk.fileno(), self._disk.reap)

    def close(self) -> None:
        if not hasattr(self, "_disk"):
            return
        if self._disk.fileno() >= 0:
            self._stop_watch()
        if not self._disk.close():
            self.log.error("I/O on %s hangs; its thread stays behind", self.option["blk_file"])

    def _stop_watch(self) -> None:
        """The lane must let go of the eventfd before it is closed."""
        stopped = threading.Event()

        def stop() -> None:
            if self._watch is not None:
                self._watch.cancel()
                self._watch = None
            stopped.set()

        self._lane.post(stop)
        stopped.wait(1.0)

    # -- requests

    def process(self, queue: Virtqueue) -> None:
        disk = self._disk
        try:
            for request in queue:
                kind = request.u32(0)
                if kind == IN:
                    disk.read(request, request.u64(8))
                elif kind == OUT:
                    request.op = OP_WRITE
                    sector = request.u64(8)
                    request.skip(HEADER)
                    disk.write(request, sector)
                else:
                    self._process_other(request, kind)
        finally:
            disk.submit()

    def _process_other(self, request: Request, kind: int) -> None:
        if kind == FLUSH:
            request.op = OP_FLUSH
            self._disk.flush(request)
        elif kind in (DISCARD, WRITE_ZEROES):
            request.op = OP_DISCARD if kind == DISCARD else OP_WRITE_ZEROES
            self._process_ranges(request, kind)
        elif kind == GET_ID:
            request.op = OP_GET_ID
            room = max(0, request.writable_size - 1)
            self._disk.answer(request, 0, request.write(self._serial.ljust(ID_SIZE, b"\0")[:room]))
        else:
            request.op = OP_OTHER
            self._disk.refuse(request, UNSUPP, f"request type {kind} is not known")

    def _process_ranges(self, request: Request, kind: int) -> None:
        """DISCARD and WRITE_ZEROES: segments of sector, sectors, flags (5.2.6)."""
        most, most_segments = self._limits
        size = request.readable_size - HEADER
        if size % SEGMENT.size or not 0 < size <= most_segments * SEGMENT.size:
            why = f"{size} bytes of segments; expected {SEGMENT.size} for each of 1 to {most_segments}"
            self._disk.refuse(request, IOERR, why)
            return
        ranges = []
        for at in range(HEADER, request.readable_size, SEGMENT.size):
            sectors, flags = request.u32(at + 8), request.u32(at + 12)
            if flags & ~FLAG_UNMAP or (flags and kind == DISCARD):
                self._disk.refuse(request, UNSUPP, f"segment flags {flags:#x} are not known")
                return
            if sectors > most:
                self._disk.refuse(request, IOERR, f"a segment of {sectors} sectors; at most {most} were offered")
                return
            ranges.append((request.u64(at), sectors, bool(flags)))
        if kind == DISCARD:
            self._disk.discard(request, ranges)
        else:
            self._disk.write_zeroes(request, ranges)

    def describe(self, request: Request) -> str:
        kind = request.u32(0)
        if kind not in (IN, OUT):
            return NAMES.get(kind, f"type {kind}")
        size = request.writable_size - 1 if kind == IN else request.readable_size - HEADER
        return f"{NAMES[kind]} sector {request.u64(8)}, {size} bytes"

    def fail_request(self, request: Request, status: int) -> None:
        if request.writable_size:
            self._disk.answer(request, status)
        else:
            super().fail_request(request, status)

    # -- failures

    def _failed(self, request: Request, error: Exception) -> None:
        """One request failed, by the file's fault or the guest's: the first of its kind in a minute is logged."""
        kind = error.errno if isinstance(error, OSError) else "guest"
        now = time.monotonic()
        since, more = self._logged.get(kind, (-LOG_INTERVAL, 0))
        if now - since < LOG_INTERVAL:
            self._logged[kind] = (since, more + 1)
            return
        self._logged[kind] = (now, 0)
        also = f" ({more} more since the last such message)" if more else ""
        index, operation = request.queue.index, OPERATIONS[request.op]
        if isinstance(error, GuestError):
            self.log.warning("queue %d: bad %s request of the driver: %s%s", index, operation, error, also)
        else:
            self.log.error("queue %d: %s failed: %s%s", index, operation, error, also)
