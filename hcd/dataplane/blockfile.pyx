# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Block storage behind virtio-blk-like requests. See blockfile.pyi for the contract of every method.

Theory of operation.

* Nothing that may wait for a disk runs in the lane. A read, unless it is a large one, is tried with preadv2(RWF_NOWAIT) straight into guest memory,
  with the GIL held: the page cache has it, or the call says so at once (and starts reading ahead). It may also come back
  short at the edge of what is cached; the worker goes on from there. Files that don't know RWF_NOWAIT (tmpfs) or would wait in spite of it
  (O_DIRECT) are found out when they are opened.
* Writes, flushes and the rest always wait for somebody. They are collected while the handler runs and handed to the
  worker (_blockio.h) in one batch by ``submit``; results come back through one eventfd and are completed by ``reap``.
  Past the page cache they go to an io_uring, every few before the handler has looked at the others: the disk would
  stand still meanwhile.
* A request with the worker must not lose its scatter list or its guest memory, whatever happens to its queue: the job
  holds a reference to the request and one to the memory table. Memory that was revoked makes the worker's system call
  fail with EFAULT, which is no fault of the disk.
* The status byte is not written once the ring was stopped: the memory may serve another purpose by then.
"""

import os
import stat

cimport cython
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport EAGAIN, EFAULT, EILSEQ, EINTR, EIO, EOPNOTSUPP, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from posix.stdlib cimport posix_memalign
from libc.string cimport memcmp, memcpy, memset

from hcd.dataplane.memory cimport guard_faults, guarded_copy
from hcd.dataplane.virtqueue cimport Request, Virtqueue, cursor_t, iovec

from hcd.errors import GuestError

cdef extern from "<sys/uio.h>" nogil:
    ssize_t preadv2(int fd, const iovec *iov, int n, long offset, int flags)
    int RWF_NOWAIT

cdef extern from "<fcntl.h>" nogil:
    int fcntl(int fd, int command, ...)
    int F_GETFL, O_DIRECT

cdef extern from "<errno.h>" nogil:
    int ECANCELED

cdef extern from "<unistd.h>" nogil:
    ssize_t read_fd "read"(int fd, void *buf, size_t n)
    int close_fd "close"(int fd)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    void *mremap(void *addr, size_t length, size_t new_length, int flags, ...)
    int madvise(void *addr, size_t length, int advice)
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MADV_DONTNEED, MADV_DONTDUMP
    int MREMAP_MAYMOVE
    void *MAP_FAILED

cdef extern from "_blockio.h" nogil:
    int HCD_READ, HCD_WRITE, HCD_FLUSH, HCD_DISCARD, HCD_ZERO, HCD_SAME, HCD_COMPARE, HCD_DIFFERENT
    int HCD_PATTERN, HCD_ALIGNMENT, HCD_PIECES, HCD_POOL_MOST, HCD_URING_EARLY
    void hcd_list_clear(hcd_list *list)
    void hcd_list_add(hcd_list *list, hcd_job *job)
    hcd_job *hcd_list_take(hcd_list *list)
    hcd_pool *hcd_pool_new(int fd, int block_device, int most, int ring)
    void hcd_pool_map(hcd_pool *pool, uint64_t length, int (*copy)(void *, const void *, size_t) noexcept nogil)
    void hcd_pool_submit(hcd_pool *pool, hcd_list *batch)
    hcd_job *hcd_pool_finished(hcd_pool *pool)
    int hcd_pool_stop(hcd_pool *pool, long ms)
    void hcd_pool_free(hcd_pool *pool)

cdef enum:
    SECTOR = 512
    OK = 0
    IOERR = 1
    UNSUPP = 2
    MOST_RANGES = 1024
    INLINE_PIECES = 128       # as HCD_PIECES
    INLINE_MOST = 1 << 20     # bytes that are read in the lane: copying takes time, and other devices wait meanwhile
    RAM_MOST = 32 << 20       # bytes of one request of a disk in memory, for the same reason

cdef uint64_t PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")


cdef class BlockStore:
    """What files and memory have in common."""

    # -- completing

    def __cinit__(self, *args, **kwargs):
        self.head = -1

    cdef int settle(self, Request r, int status, uint64_t moved, object why=None) except -1:
        """Complete ``r``: its last writable byte, and ``moved`` data bytes before it. Without success: ``why``."""
        cdef Virtqueue q = r.vq
        cdef iovec *last
        r.live()
        r.status = status if status <= UNSUPP else IOERR
        if self.head >= 0:
            return self.settle_head(r, status, moved, why)
        if r.c.in_size == 0:
            r.finish(0)
            return 0
        if q.started and r.generation == q.generation:
            last = &r.c.iov[r.c.n_out + r.c.n_in - 1]
            (<char *>last.iov_base)[last.iov_len - 1] = <char>status
        r.finish(<int64_t>moved + 1)
        return 0

    cdef int settle_head(self, Request r, int status, uint64_t moved, object why) except -1:
        """Complete ``r``, whose answer is in place already; without success the device has to make another one."""
        cdef Virtqueue q = r.vq
        if status == OK:
            r.finish(self.head + <int64_t>moved)
            return 0
        if self.on_failure is not None and q.started and r.generation == q.generation:
            self.on_failure(r, why)
        if not r.completed:
            r.finish(0)
        return 0

    cdef int refused(self, Request r, int status, str why) except -1:
        cdef Virtqueue q = r.vq
        cdef object error = GuestError(why)
        self.refusals += 1
        q.stats.guest_error()
        self.settle(r, status, 0, error)
        return self.complain(r, error)

    cdef int failed(self, Request r, int number, uint64_t moved) except -1:
        cdef Virtqueue q = r.vq
        if number == HCD_DIFFERENT:
            return self.settle(r, IOERR, moved, OSError(EILSEQ, "the disk has other bytes"))
        if number == EILSEQ:         # Linux says so too, of a block that fails its check
            number, text = EIO, "the disk's protection information does not fit its data (EILSEQ)"
        else:
            text = os.strerror(number)
        cdef object error = OSError(number, text)
        if number == ECANCELED:
            return self.settle(r, IOERR, moved, error)
        if number == EFAULT:
            error = GuestError("the guest memory of the request went away")
            self.refusals += 1
            q.stats.guest_error()
            self.settle(r, IOERR, moved, error)
            return self.complain(r, error)
        self.errors += 1
        self.settle(r, UNSUPP if number == EOPNOTSUPP else IOERR, moved, error)
        return self.complain(r, error)

    cdef int complain(self, Request r, object error) except -1:
        if self.on_error is not None:
            self.on_error(r, error)
        return 0

    def answer(self, Request request not None, int status=0, uint64_t written=0):
        if not 0 <= status <= 255:
            raise ValueError(f"a status is one byte, not {status}")
        if request.c.in_size and written >= request.c.in_size:
            raise ValueError(f"{written} bytes and a status don't fit into {request.c.in_size}")
        if request.c.in_size == 0:
            self.refused(request, IOERR, "the request has no room for its status")
        else:
            self.settle(request, status, written)

    def refuse(self, Request request not None, int status, str why not None):
        self.refused(request, status, why)

    # -- checking

    cdef bint answerable(self, Request r) except -1:
        """Whether there is room for an answer. Completes ``r`` if not."""
        if r.c.in_size >= <uint64_t>(self.head if self.head >= 0 else 1):
            return True
        self.refused(r, IOERR, "the request has no room for its status")
        return False

    cdef uint64_t room(self, Request r) noexcept:
        """Bytes from the write cursor on that are for data."""
        return r.w.left if self.head >= 0 else r.w.left - 1 if r.w.left else 0

    cdef bint placed(self, Request r, uint64_t sector, uint64_t have, int64_t *nbytes, bint out) except -1:
        """Whether ``nbytes`` (-1: ``have``) of the ``have`` bytes are whole sectors that exist. Completes ``r`` if not."""
        r.live()
        if nbytes[0] < 0:
            nbytes[0] = <int64_t>have
        elif <uint64_t>nbytes[0] > have:
            raise ValueError(f"{nbytes[0]} bytes of a request that has {have}")
        if not self.answerable(r):
            return False
        if nbytes[0] % SECTOR:
            self.refused(r, IOERR, f"{nbytes[0]} bytes are no whole sectors")
        elif sector > self.size / SECTOR or <uint64_t>nbytes[0] > self.size - sector * SECTOR:
            self.refused(r, IOERR, f"{nbytes[0]} bytes at sector {sector} are past the end, {self.size // SECTOR}")
        elif out and self.read_only:
            self.refused(r, IOERR, "a write to a read-only disk")
        else:
            return True
        return False

    cdef bint takes_ranges(self, Request r, object ranges) except -1:
        """As ``placed``, for a list of (sector, sectors, unmap)."""
        cdef uint64_t total = self.size / SECTOR, sector, count
        r.live()
        if not self.answerable(r):
            return False
        if self.read_only:
            self.refused(r, IOERR, "a write to a read-only disk")
            return False
        if len(ranges) > MOST_RANGES:
            self.refused(r, IOERR, f"{len(ranges)} ranges in one request")
            return False
        for sector, count, _ in ranges:
            if sector > total or count > total - sector:
                self.refused(r, IOERR, f"{count} sectors at sector {sector} are past the end, {total}")
                return False
        return True

    # -- growing

    def stored(self):
        return self.size

    def grow(self, uint64_t size):
        raise NotImplementedError

    cdef bint grows(self, uint64_t size) except -1:
        """ValueError if ``size`` is less than there is: requests may be on their way there."""
        if size < self.size:
            raise ValueError(f"{size} bytes are fewer than the {self.size} that the guest sees")
        if size % SECTOR:
            raise ValueError(f"{size} bytes are no whole sectors of {SECTOR}")
        return size > self.size

    # -- the worker's side: nothing to do where there is none

    def submit(self):
        pass

    def fileno(self):
        return -1

    def reap(self):
        pass

    def close(self, double timeout=5.0):
        return True


@cython.final
cdef class BlockFile(BlockStore):
    """A file or block device."""

    def __cinit__(self, int fd, int64_t size=-1, *, bint read_only=False, int workers=4, bint ring=True):
        cdef char byte
        cdef iovec iov
        cdef bint device
        hcd_list_clear(&self.batch)
        self.fd = -1
        if not 1 <= workers <= HCD_POOL_MOST:
            raise ValueError(f"{workers} workers; expected 1 to {HCD_POOL_MOST}")
        device = stat.S_ISBLK(os.fstat(fd).st_mode)
        if size < 0:
            size = os.lseek(fd, 0, os.SEEK_END)
        self.size = <uint64_t>size / SECTOR * SECTOR
        self.read_only = read_only
        iov.iov_base = &byte
        iov.iov_len = 1
        with nogil:               # devices beside this one serve requests meanwhile
            self.nowait = not fcntl(fd, F_GETFL) & O_DIRECT and (
                preadv2(fd, &iov, 1, 0, RWF_NOWAIT) >= 0 or errno == EAGAIN)
            self.pool = hcd_pool_new(fd, device, workers, ring)
        if self.pool == NULL:
            raise OSError(errno, os.strerror(errno))
        if not read_only:
            guard_faults()
            hcd_pool_map(self.pool, self.size, guarded_copy)
        self.fd = fd

    def __dealloc__(self):
        cdef hcd_job *job
        if self.pool != NULL and hcd_pool_stop(self.pool, 1000):
            job = hcd_pool_finished(self.pool)
            while job != NULL:
                job = self.drop(job)
            hcd_pool_free(self.pool)
            close_fd(self.fd)
        while self.batch.first != NULL:
            self.drop(hcd_list_take(&self.batch))
        while self.spare != NULL:
            job = self.spare
            self.spare = job.next
            free(job)

    @property
    def ring_jobs(self):
        return self.pool.ring_jobs if self.pool != NULL and self.pool.ring != NULL else -1

    @property
    def ring_rest(self):
        return self.pool.ring_rest if self.pool != NULL else 0

    # -- requests

    def read(self, Request request not None, uint64_t sector, int64_t nbytes=-1):
        cdef iovec iov[INLINE_PIECES]
        cdef int pieces
        cdef ssize_t got = 0
        if not self.placed(request, sector, self.room(request), &nbytes, False):
            return
        if nbytes == 0:
            self.settle(request, OK, 0)
            return
        if self.nowait and nbytes <= INLINE_MOST:
            pieces = request.slice(&request.w, False, nbytes, iov, INLINE_PIECES)
            got = preadv2(self.fd, iov, pieces, sector * SECTOR, RWF_NOWAIT)
            if got == nbytes:
                self.inline_reads += 1
                self.settle(request, OK, nbytes)
                return
            if got < 0:
                if errno == EOPNOTSUPP:
                    self.nowait = False
                elif errno != EAGAIN and errno != EINTR:
                    self.failed(request, errno, 0)
                    return
                got = 0
        self.transfer(request, sector * SECTOR, nbytes, got, HCD_READ)

    def write(self, Request request not None, uint64_t sector, int64_t nbytes=-1):
        if not self.placed(request, sector, request.r.left, &nbytes, True):
            return
        if nbytes == 0:
            self.settle(request, OK, 0)
            return
        self.transfer(request, sector * SECTOR, nbytes, 0, HCD_WRITE)

    def flush(self, Request request not None):
        cdef int64_t nothing = 0
        if not self.placed(request, 0, 0, &nothing, False):
            return
        if self.read_only:
            self.settle(request, OK, 0)
        else:
            self.put(self.job(request, HCD_FLUSH))

    def discard(self, Request request not None, ranges):
        cdef hcd_job *job = self.range_job(request, tuple(ranges), HCD_DISCARD)
        if job != NULL:
            self.put(job)

    def write_zeroes(self, Request request not None, ranges):
        cdef hcd_job *job = self.range_job(request, tuple(ranges), HCD_ZERO)
        if job != NULL:
            self.put(job)

    def write_same(self, Request request not None, uint64_t sector, uint64_t sectors, bytes block not None):
        cdef hcd_job *job
        cdef char *one = block
        cdef int size = len(block), at
        same_size(block, sectors)
        job = self.range_job(request, ((sector, sectors, False),), HCD_SAME)
        if job == NULL:
            return
        if posix_memalign(<void **>&job.pattern, HCD_ALIGNMENT, HCD_PATTERN) != 0:
            self.drop(job)
            raise MemoryError
        for at in range(0, HCD_PATTERN, size):
            memcpy(job.pattern + at, one, size)
        self.put(job)

    def compare(self, Request request not None, uint64_t sector, int64_t nbytes=-1):
        if not self.placed(request, sector, request.r.left, &nbytes, False):
            return
        if nbytes == 0:
            self.settle(request, OK, 0)
            return
        self.transfer(request, sector * SECTOR, nbytes, 0, HCD_COMPARE)

    def stored(self):
        if self.pool == NULL:
            raise ValueError("the file is closed")
        return os.lseek(self.fd, 0, os.SEEK_END)

    def grow(self, uint64_t size):
        if self.grows(size):
            if size > self.stored():
                os.ftruncate(self.fd, size)
            # The mapping stays as it is, threads use it: small writes behind the old end go by pwrite.
            self.size = size
        return self.size

    # -- jobs

    cdef hcd_job *job(self, Request r, int kind) except NULL:
        """A job for ``r``, with the references that keep its memory."""
        cdef hcd_job *job = self.spare
        if self.pool == NULL:
            raise ValueError("the file is closed")
        if job != NULL:
            self.spare = job.next
            memset(job, 0, sizeof(hcd_job))
        else:
            job = <hcd_job *>calloc(1, sizeof(hcd_job))
            if job == NULL:
                raise MemoryError
        Py_INCREF(r)
        Py_INCREF(r.mem)
        job.request = <void *>r
        job.memory = <void *>r.mem
        job.kind = kind
        job.sync = self.writethrough
        return job

    cdef hcd_job *drop(self, hcd_job *job) noexcept:
        """Give up what a job holds; returns the next one in its list."""
        cdef hcd_job *next_one = job.next
        Py_DECREF(<object>job.request)
        Py_DECREF(<object>job.memory)
        free(job.ranges)
        job.ranges = NULL
        free(job.pattern)
        job.pattern = NULL
        job.next = self.spare
        self.spare = job
        return next_one

    cdef int put(self, hcd_job *job) except -1:
        (<Request>job.request).held = True     # an exception in the handler no longer fails it
        hcd_list_add(&self.batch, job)
        self.waiting += 1
        self.inflight += 1
        self.jobs += 1
        if self.waiting >= HCD_URING_EARLY and self.pool.ring != NULL:
            self.submit_now()
        return 0

    cdef int transfer(self, Request r, uint64_t offset, uint64_t nbytes, uint64_t moved, int kind) except -1:
        """Leave ``nbytes`` from the cursor on to the worker; the first ``moved`` are done."""
        cdef hcd_job *job = self.job(r, kind)
        job.offset = offset + moved
        job.left = nbytes - moved
        job.moved = moved
        if kind == HCD_READ:
            r.advance(&r.w, False, moved)
            job.iov = r.c.iov + r.c.n_out + r.w.i
            job.at = r.w.at
        else:
            job.iov = r.c.iov + r.r.i
            job.at = r.r.at
        return self.put(job)

    cdef hcd_job *range_job(self, Request r, object ranges, int kind) except? NULL:
        """A job for ranges. NULL: there are such that cannot be, and ``r`` is completed."""
        cdef hcd_job *job
        cdef uint32_t i
        if not self.takes_ranges(r, ranges):
            return NULL
        job = self.job(r, kind)
        job.ranges = <hcd_range_t *>malloc((len(ranges) + 1) * sizeof(hcd_range_t))
        if job.ranges == NULL:
            self.drop(job)
            raise MemoryError
        job.n_ranges = len(ranges)
        for i in range(job.n_ranges):
            job.ranges[i].offset = <uint64_t>ranges[i][0] * SECTOR
            job.ranges[i].length = <uint64_t>ranges[i][1] * SECTOR
            job.ranges[i].unmap = bool(ranges[i][2])
        return job

    def submit(self):
        if self.waiting:
            self.submit_now()

    cdef int submit_now(self) except -1:
        self.batches += 1
        self.waiting = 0
        hcd_pool_submit(self.pool, &self.batch)      # with the GIL: others may keep it for longer than this takes
        return 0

    def fileno(self):
        return self.pool.done_fd if self.pool != NULL else -1

    def reap(self):
        cdef uint64_t value
        if self.pool != NULL:
            read_fd(self.pool.done_fd, &value, 8)
            self.finish_jobs()

    cdef int finish_jobs(self) except -1:
        """Complete all that the worker handed back; one that cannot be completed does not hold up the others."""
        cdef hcd_job *job = hcd_pool_finished(self.pool)
        cdef Request r
        problem = None
        while job != NULL:
            r = <Request>job.request
            self.inflight -= 1
            try:
                if job.error:
                    self.failed(r, job.error, job.moved if job.kind == HCD_READ else 0)
                else:
                    self.settle(r, OK, job.moved if job.kind == HCD_READ else 0)
            except Exception as e:
                problem = e
            job = self.drop(job)
        if problem is not None:
            raise problem
        return 0

    def close(self, double timeout=5.0):
        cdef hcd_pool *pool = self.pool
        cdef long ms = <long>(timeout * 1000)
        cdef bint ended
        if pool == NULL:
            return True
        self.submit()
        with nogil:
            ended = hcd_pool_stop(pool, ms)
        self.finish_jobs()
        if ended and self.pool != NULL:
            self.pool = NULL
            with nogil:           # to take a large mapping apart takes a while
                hcd_pool_free(pool)
            os.close(self.fd)
        return bool(ended)


@cython.final
cdef class BlockRam(BlockStore):
    """A disk in memory: everything is done at once."""

    def __cinit__(self, uint64_t size):
        cdef void *p
        if size == 0 or size % SECTOR:
            raise ValueError(f"a disk of {size} bytes; expected a multiple of {SECTOR}")
        p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if p == MAP_FAILED:
            raise OSError(errno, f"no memory for a disk of {size} bytes")
        madvise(p, size, MADV_DONTDUMP)
        self.base = <char *>p
        self.size = size

    def __dealloc__(self):
        if self.base != NULL:
            with nogil:           # a large disk takes a while, and devices beside this one serve requests
                munmap(self.base, self.size)

    def grow(self, uint64_t size):
        cdef void *p
        if self.base == NULL:
            raise ValueError("the disk is closed")
        if self.grows(size):
            p = mremap(self.base, self.size, size, MREMAP_MAYMOVE)
            if p == MAP_FAILED:
                raise OSError(errno, f"no memory for a disk of {size} bytes")
            self.base = <char *>p
            self.size = size
        return self.size

    cdef bint placed(self, Request r, uint64_t sector, uint64_t have, int64_t *nbytes, bint out) except -1:
        if not BlockStore.placed(self, r, sector, have, nbytes, out):
            return False
        if nbytes[0] > RAM_MOST:
            self.refused(r, IOERR, f"{nbytes[0]} bytes in one request to a disk in memory, which takes {RAM_MOST}")
            return False
        return True

    def read(self, Request request not None, uint64_t sector, int64_t nbytes=-1):
        if self.placed(request, sector, self.room(request), &nbytes, False):
            copy(request, self.base + sector * SECTOR, nbytes, False)
            self.settle(request, OK, nbytes)

    def write(self, Request request not None, uint64_t sector, int64_t nbytes=-1):
        if self.placed(request, sector, request.r.left, &nbytes, True):
            copy(request, self.base + sector * SECTOR, nbytes, True)
            self.settle(request, OK, 0)

    def flush(self, Request request not None):
        cdef int64_t nothing = 0
        if self.placed(request, 0, 0, &nothing, False):
            self.settle(request, OK, 0)

    def discard(self, Request request not None, ranges):
        self.zero_ranges(request, tuple(ranges))

    def write_zeroes(self, Request request not None, ranges):
        self.zero_ranges(request, tuple(ranges))

    def write_same(self, Request request not None, uint64_t sector, uint64_t sectors, bytes block not None):
        cdef char *one = block
        cdef uint64_t at = sector * SECTOR, end = at + sectors * SECTOR, size = len(block)
        same_size(block, sectors)
        if self.takes_ranges(request, ((sector, sectors, False),)):
            while at < end:
                memcpy(self.base + at, one, size)
                at += size
            self.settle(request, OK, 0)

    def compare(self, Request request not None, uint64_t sector, int64_t nbytes=-1):
        if self.placed(request, sector, request.r.left, &nbytes, False):
            if matches(request, self.base + sector * SECTOR, nbytes):
                self.settle(request, OK, 0)
            else:
                self.failed(request, HCD_DIFFERENT, 0)

    cdef int zero_ranges(self, Request r, tuple ranges) except -1:
        cdef uint64_t sector, count
        if not self.takes_ranges(r, ranges):
            return 0
        for sector, count, _ in ranges:
            self.zero(sector * SECTOR, count * SECTOR)
        return self.settle(r, OK, 0)

    cdef void zero(self, uint64_t offset, uint64_t length) noexcept nogil:
        """Zeroes, by giving whole pages back to the system."""
        cdef uint64_t first = (offset + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)
        cdef uint64_t last = (offset + length) & ~(PAGE_SIZE - 1)
        if first >= last:
            memset(self.base + offset, 0, length)
            return
        memset(self.base + offset, 0, first - offset)
        if madvise(self.base + first, last - first, MADV_DONTNEED) != 0:
            memset(self.base + first, 0, last - first)
        memset(self.base + last, 0, offset + length - last)

    def close(self, double timeout=5.0):
        if self.base != NULL:
            with nogil:           # a large disk takes a while, and devices beside this one serve requests
                munmap(self.base, self.size)
        self.base = NULL
        self.size = 0               # what still comes is past the end
        return True


cdef void copy(Request r, char *at, uint64_t nbytes, bint out) noexcept:
    """Between the request's scatter list, from its cursor on, and memory."""
    cdef iovec piece
    cdef cursor_t *k = &r.r if out else &r.w
    while nbytes:
        r.slice(k, out, nbytes, &piece, 1)
        if out:
            memcpy(at, piece.iov_base, piece.iov_len)
        else:
            memcpy(piece.iov_base, at, piece.iov_len)
        r.advance(k, out, piece.iov_len)
        at += piece.iov_len
        nbytes -= piece.iov_len


cdef bint matches(Request r, const char *bytes, uint64_t nbytes) noexcept:
    """Whether the next readable bytes of the request are these."""
    cdef iovec piece
    while nbytes:
        r.slice(&r.r, True, nbytes, &piece, 1)
        if memcmp(bytes, piece.iov_base, piece.iov_len) != 0:
            return False
        r.advance(&r.r, True, piece.iov_len)
        bytes += piece.iov_len
        nbytes -= piece.iov_len
    return True


cdef int same_size(bytes block, uint64_t sectors) except -1:
    """ValueError unless ``block`` can be repeated over so many sectors."""
    cdef int size = len(block)
    if size not in (512, 1024, 2048, 4096) or sectors * SECTOR % size:
        raise ValueError(f"a block of {size} bytes over {sectors} sectors")
    return 0
