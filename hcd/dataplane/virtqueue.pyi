"""Virtqueues (split and packed) and the requests that come out of them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

from hcd.dataplane.memory import MemoryTable
from hcd.dataplane.stats import DoorbellStats, QueueStats

Buffer = bytes | bytearray | memoryview

class Request:
    """One request of a driver: device-readable bytes first, then device-writable ones.

    ``read`` and ``pwritev`` advance a cursor through the readable part, ``write`` and ``preadv`` one through the
    writable part. Valid until ``complete``; every method then raises ValueError.
    """

    @property
    def queue(self) -> Virtqueue: ...
    @property
    def readable(self) -> int: ...  # bytes after the read cursor
    @property
    def writable(self) -> int: ...  # bytes after the write cursor
    @property
    def readable_size(self) -> int: ...  # of the whole readable part
    @property
    def writable_size(self) -> int: ...
    @property
    def completed(self) -> bool: ...
    op: int  # index into Device.operations, for the metrics
    status: int  # for the metrics: 0 ok, 1 error, 2 unsupported

    def u8(self, offset: int) -> int: ...  # little-endian, absolute offset in the readable part
    # u16 to u64: the driver's byte order, which is little-endian but for legacy rings of big-endian guests
    def u16(self, offset: int) -> int: ...  # GuestError past its end; the cursor stays
    def u32(self, offset: int) -> int: ...
    def u64(self, offset: int) -> int: ...
    # at most nbytes, from the cursor. -1: all, GuestError for more than 16 MiB: descriptors may all name the same memory
    def read(self, nbytes: int = -1) -> bytes: ...
    def skip(self, nbytes: int) -> None: ...  # the read cursor
    def write(self, data: Buffer) -> int: ...  # returns what fitted
    def write_at(self, offset: int, data: Buffer) -> None: ...  # absolute; GuestError past the end; cursor stays
    def preadv(self, fd: int, offset: int, nbytes: int = -1) -> int: ...  # file -> guest; offset -1: readv
    def pwritev(self, fd: int, offset: int, nbytes: int = -1) -> int: ...  # guest -> file; offset -1: writev
    def copy_to(self, other: Request, nbytes: int = -1) -> int: ...  # rest of readable -> other's writable cursor
    def readable_views(self) -> list[memoryview]: ...
    def writable_views(self) -> list[memoryview]: ...
    def complete(self, written: int = -1) -> None: ...  # any thread, any order, exactly once; -1: what write() wrote
    def hold(self) -> None: ...  # process() keeps it beyond its return: an exception there does not fail it

class Inflight:
    """A region with the record of requests in flight of every queue (vhost-user.rst, "Inflight I/O tracking").

    It outlives the process, as a file descriptor that somebody else holds too: the front end (SET_INFLIGHT_FD), or
    systemd. The life of one that hcd keeps for itself, where the front end negotiated none:

        area = Inflight.create(num_queues, queue_size)      # queue_size: the largest ring, Device.max_queue_size
        queue.set_inflight(area, resume=False)              # before queue.start(), whose base then counts
        ... area.fd goes elsewhere, with area.offset, area.size, area.num_queues and area.queue_size ...
        ... this process dies at any moment, with requests in flight ...
        area = Inflight.map(fd, offset, size, num_queues, queue_size)
        queue.set_inflight(area, resume=True)               # now record and ring say where the ring stands
        queue.start(...)                                    # base counts only if the record was never begun

    ``queue.start`` takes the chains that were in flight into ``queue.recovered`` (their number); the queue hands them
    out again before new ones, in their old order, and interrupts the driver once. What was published to the driver
    is not handed out again; what was completed and not published is.

    The layout is that of the standard for split and for packed rings, chosen when a queue starts; a region that
    ``create`` made has room for either. Wrong numbers, an fd that cannot hold the region, and a record that
    contradicts itself or its ring are a ProtocolError. Unless sealed, the region may be truncated under us, as guest
    memory may be: see ``set_alarm`` of memory regions.
    """

    @staticmethod
    def create(num_queues: int, queue_size: int) -> Inflight: ...  # a sealed memfd, empty
    @staticmethod
    def map(fd: int, offset: int, size: int, num_queues: int, queue_size: int) -> Inflight: ...  # takes fd over, always
    @property
    def fd(self) -> int: ...  # -1 after close
    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...  # bytes
    @property
    def num_queues(self) -> int: ...
    @property
    def queue_size(self) -> int: ...
    @property
    def holds_packed(self) -> bool: ...  # it has room for the records of packed rings, which are larger
    @property
    def poisoned(self) -> bool: ...  # somebody truncated it
    def set_alarm(self, fd: int) -> None: ...
    def close(self) -> None: ...  # the fd; queues that use the region keep its memory

class Limit:
    """What the queues of one device may take together, on average and at once. For the thread that owns them."""

    def __init__(self) -> None: ...
    def set(
        self, requests: float = 0, requests_burst: float = 0, bytes: float = 0, bytes_burst: float = 0
    ) -> None: ...  # a second; 0: no limit. Bursts of less than 5 ms worth, or of less than one, are so much
    @property
    def active(self) -> bool: ...
    @property
    def throttled(self) -> int: ...  # queues that it holds back now

class Pace:
    """How often one driver is interrupted in the middle of a batch: see _pace.pxi. Times in ns, of one clock."""

    def holds(self, now: int, left: int) -> bool: ...  # put off? ``left``: how long what waits in the ring will take
    def made(self, began: int, now: int) -> None: ...

class Virtqueue:
    """The device's side of one ring. Its owner thread alone touches it, but for ``Request.complete``."""

    def __init__(self, index: int, doorbell: DoorbellStats, stats: QueueStats, max_size: int = 1024) -> None: ...

    # -- for devices

    @property
    def index(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def features(self) -> int: ...  # as negotiated
    @property
    def resumed(self) -> bool: ...  # requests were taken from it before: here, or by a process that is no more
    @property
    def running(self) -> bool: ...  # started, enabled, mapped and sound
    @property
    def inflight(self) -> int: ...
    @property
    def broken(self) -> str: ...  # why no request is taken any more; "" while the ring is sound
    @property
    def stats(self) -> QueueStats: ...
    @property
    def pace(self) -> Pace: ...
    device: Any
    tag: Any
    def __iter__(self) -> Self: ...  # pops until empty or the turn's budget is used up
    def __next__(self) -> Request: ...
    def pop(self) -> Request | None: ...  # ignores the budget
    def pop_many(self, most: int) -> list[Request]: ...
    def complete_many(self, requests: Iterable[Request], written: int = -1) -> None: ...
    def flush(self) -> None: ...  # publish completions and notify now; happens by itself after process()
    #: requests may wait in the ring: they are no reason for a turn, a kick is. For receive queues, and for queues
    #: whose device can take no more just now. False at every start of the queue.
    passive: bool
    def schedule(self) -> None: ...  # ask for a turn although nobody rings
    def lost(self) -> list[Request]: ...
    def enable_kicks(self) -> bool: ...  # of a passive queue, until its next turn; True: the ring holds requests
    def available(self) -> bool: ...  # the ring holds a request
    def unpop(self, r: Request) -> None: ...  # put back the one taken last (again and again); else ValueError

    # -- for the session that owns it (hcd.backend) and its lane

    handler: Callable[[Virtqueue], Any]
    scheduler: Any
    on_error: Callable[[Virtqueue, Exception], None] | None
    on_drained: Callable[[Virtqueue], None] | None
    on_take: Callable[[Request], bool] | None  # sees each request first; False: keeps it (hcd.wrappers)
    on_settle: Callable[[Request, int], bool] | None  # sees each completion; False: settle_held() follows
    def settle_held(self, r: Request) -> None: ...
    @property
    def kick_fd(self) -> int: ...
    @property
    def is_started(self) -> bool: ...
    @property
    def base(self) -> int: ...
    def own(self) -> None: ...
    def set_doorbell(self, doorbell: DoorbellStats) -> None: ...
    def set_memory(self, mem: MemoryTable) -> None: ...
    def set_kick(self, fd: int, spurious: bool = False) -> None: ...
    def set_call(self, fd: int) -> None: ...
    def owe_interrupt(self) -> None: ...
    def set_err(self, fd: int) -> None: ...
    def set_inflight(self, area: Inflight | None, resume: bool = True) -> None: ...  # takes effect at start()
    @property
    def recovered(self) -> int: ...  # chains that the last start() found in flight
    @property
    def waiting(self) -> int: ...  # of these, not taken yet
    def start(
        self, features: int, size: int, desc: int, driver: int, device: int, base: int, big_endian: bool = False
    ) -> None: ...
    def set_limit(self, limit: Limit | None) -> None: ...
    def set_enabled(self, enabled: bool) -> None: ...
    def halt(self) -> None: ...
    def stop(self, told: bool = False) -> int: ...  # told: the front end says where the next ring begins
    def read_kick(self) -> int: ...
    def begin_turn(self, woken: int, by_ring: bool, batch: bool = True) -> None: ...
    def stalled(self) -> bool: ...  # this turn took nothing of what the ring holds, and the queue is not passive
    def end_turn(self) -> None: ...
    def older_than(self, ns: int) -> int: ...  # requests in flight for longer than that
    def unfinished(self) -> Request | None: ...
    def disable_kicks(self) -> None: ...
    def take_remote(self) -> None: ...
