"""Block storage behind virtio-blk-like requests: a file or block device, or plain memory.

A request of this kind carries its data in the writable part (reads) or behind a header in the readable part (writes),
and its last writable byte is a status: 0 ok, 1 I/O error, 2 unsupported. The methods below complete the request, soon
or later, with that byte, ``status`` for the metrics, and the data bytes + 1 as written. A request without a writable
byte is completed with 0 written.

Addresses and counts are in sectors of 512 bytes, sizes in bytes. Mistakes of the guest (past the end, not whole
sectors, a write to a read-only store, too small a buffer) fail that request and count as a guest error of its queue.
"""

from collections.abc import Callable, Iterable

from hcd.dataplane.virtqueue import Request

class BlockStore:
    """What files and memory have in common. The lane's thread alone calls it, but for ``close``."""

    @property
    def size(self) -> int: ...  # bytes, whole sectors
    @property
    def read_only(self) -> bool: ...
    @property
    def errors(self) -> int: ...  # requests that failed because of the file
    @property
    def refusals(self) -> int: ...  # requests that failed because of the guest
    writethrough: bool  # writes reach stable storage before they complete
    on_error: Callable[[Request, Exception], object] | None  # after each failed one: OSError or GuestError
    # For devices whose answer stands in front of the data (virtio-scsi). -1: a status byte behind it, as above. Otherwise
    # so many bytes of the writable part are the answer of success, which the device has written before it hands a request
    # over; with success it is completed with these and the data. Without, ``on_failure`` is called with the same error
    # as on_error and completes it with another answer; if nobody may read that any more it is completed with nothing.
    head: int
    on_failure: Callable[[Request, Exception], object] | None

    # -- growing

    def stored(self) -> int: ...  # bytes that the file has by now, which may be more than ``size``
    # Have ``size`` bytes from now on, and return that: a smaller file is made as large. ValueError for fewer than there
    # are and for parts of sectors, OSError where the file cannot grow.
    def grow(self, size: int) -> int: ...

    # -- each takes the request over and completes it

    # what fits before the status byte, or nbytes of it, from the write cursor on
    def read(self, request: Request, sector: int, nbytes: int = -1) -> None: ...
    # what is left behind the read cursor (``skip`` the header first), or nbytes of it
    def write(self, request: Request, sector: int, nbytes: int = -1) -> None: ...
    def flush(self, request: Request) -> None: ...
    # (sector, sectors, may unmap) each; discard ignores the last. At most 1024 ranges
    def discard(self, request: Request, ranges: Iterable[tuple[int, int, bool]]) -> None: ...
    def write_zeroes(self, request: Request, ranges: Iterable[tuple[int, int, bool]]) -> None: ...
    # ``block``, of 512 to 4096 bytes, again and again
    def write_same(self, request: Request, sector: int, sectors: int, block: bytes) -> None: ...
    # what is left behind the read cursor, or nbytes of it, with what is stored: OSError EILSEQ where it differs
    def compare(self, request: Request, sector: int, nbytes: int = -1) -> None: ...
    def answer(self, request: Request, status: int = 0, written: int = 0) -> None: ...  # the device did it itself
    def refuse(self, request: Request, status: int, why: str) -> None: ...  # a mistake of the guest

    # -- the worker's side; nothing of it in memory

    def submit(self) -> None: ...  # at the end of process(): hand the worker what has to wait and is not with it yet
    def fileno(self) -> int: ...  # readable when reap() has something to complete; -1: never
    def reap(self) -> None: ...  # complete what the worker has finished
    def close(self, timeout: float = 5.0) -> bool: ...  # any thread, requests at rest; False: I/O hangs, see BlockFile

class BlockFile(BlockStore):
    """A file or block device by descriptor, which becomes its own (not when the constructor raises).

    ``size`` -1: as large as the file is, cut to whole sectors. Reads of up to 1 MiB are served at once from the page cache
    where the file can do RWF_NOWAIT; everything else goes to up to ``workers`` threads, which start when they are needed, and
    completes out of order. Past the page cache (a descriptor with O_DIRECT) reads and writes go to an io_uring first, if
    ``ring`` allows it and the kernel has it: the threads get what it could not do in one go.

    ``close`` fails requests that no thread has begun (their status is an I/O error) and waits up to ``timeout`` seconds
    for those that run. If one hangs for longer, its thread, descriptor and memory stay, and ``close`` can be called again.
    """

    def __init__(self, fd: int, size: int = -1, *, read_only: bool = False, workers: int = 4, ring: bool = True) -> None: ...
    @property
    def nowait(self) -> bool: ...  # whether reads are tried without waiting
    @property
    def inflight(self) -> int: ...  # requests with the worker
    @property
    def inline_reads(self) -> int: ...  # requests that the page cache served whole
    @property
    def jobs(self) -> int: ...  # requests handed to the worker
    @property
    def batches(self) -> int: ...  # in so many batches
    @property
    def ring_jobs(self) -> int: ...  # of these, taken by the io_uring; -1: there is none
    @property
    def ring_rest(self) -> int: ...  # of these, finished by a thread

class BlockRam(BlockStore):
    """``size`` bytes of zeroes in memory, lazily allocated, gone at ``close``. Discarded ranges read as zeroes.

    What is copied is copied in the lane: requests of more than 32 MiB are refused.
    """

    def __init__(self, size: int) -> None: ...
