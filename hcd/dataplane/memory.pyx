# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Guest memory: regions that a front end shares by file descriptor.

Theory of operation (vhost-user.rst, "Multiple queue support" and "Memory access"; facts that shaped this):

* There are three address spaces: guest-physical (descriptors), the front end's own (ring addresses in
  SET_VRING_ADDR), and our mapping. A table is immutable; a new SET_MEM_TABLE or ADD_MEM_REG makes a new table that
  shares the regions that stay. Rings take over the new table at once, requests keep the one they were taken with, so
  a mapping lives until its last user is done with it.
* Memory can be taken away under running I/O: the session ends, draining timed out, or the front end truncated the
  file. Unmapping would turn late accesses into faults in somebody else's memory. So a region is *revoked*: another
  mapping replaces it in place, where system calls see EFAULT and the processor's late accesses hit zero pages; the
  range is freed when its last user is gone. See _faults.h.
* Everything is checked before it is mapped: an empty region, one that wraps, one that overlaps another, one longer
  than its file (its tail would be SIGBUS) is the front end's fault, a ProtocolError.
"""

import os
import stat

from libc.errno cimport errno
from libc.stdint cimport uint16_t, uint64_t
from libc.stdlib cimport calloc, free

from hcd_protocols.errors import ProtocolError

# _GNU_SOURCE for mremap comes with Python.h
cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    void *mremap(void *addr, size_t old_length, size_t length, int flags)
    int MREMAP_MAYMOVE
    int madvise(void *addr, size_t length, int advice)
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_NORESERVE, MADV_DONTDUMP
    void *MAP_FAILED

cdef extern from "<sys/vfs.h>" nogil:
    struct statfs_t "statfs":
        long f_type
        long f_bsize
    int fstatfs(int fd, statfs_t *buf)

cdef extern from "_faults.h" nogil:
    int hcd_faults_install()
    int hcd_slot_take(void *base, size_t length)
    void hcd_slot_release(int slot)
    int hcd_slot_poisoned(int slot)
    int hcd_slot_revoke(int slot)
    void hcd_slot_alarm(int slot, int fd)
    int hcd_guarded_copy(void *to, const void *source, size_t n)

cdef enum:
    HUGETLBFS_MAGIC = 0x958458f6

cdef enum:
    RECENT_SHIFT = 20         # addresses of one MiB share an entry of what is remembered

cdef uint64_t PAGE = os.sysconf("SC_PAGE_SIZE")


cdef int guarded_copy(void *to, const void *source, size_t n) noexcept nogil:
    """memcpy(3) that returns -1 where either side faults (see _faults.h), once ``guard_faults`` was called."""
    return hcd_guarded_copy(to, source, n)


cdef int guard_faults() except -1:
    """Make ``guarded_copy`` work in this process."""
    if hcd_faults_install() != 0:
        raise OSError(errno, "sigaction")
    return 0


cdef class Region:
    """One mapped region. ``fd`` stays the caller's and may be closed once this returns.

    All sizes and addresses are bytes. Raises ProtocolError when the region cannot be what the front end says.
    """

    def __cinit__(self, uint64_t guest_addr, uint64_t size, uint64_t user_addr, uint64_t mmap_offset, int fd):
        self.slot = -1
        self.guest_addr = guest_addr
        self.size = size
        self.user_addr = user_addr
        self.mmap_offset = mmap_offset
        self.check()
        if fd != -1:               # twin() fills in its own mapping
            self.check_file(fd)
            self.map(fd)

    cdef int check(self) except -1:
        if self.size == 0:
            raise ProtocolError(f"{self}: the region is empty")
        for name, start in (("guest", self.guest_addr), ("user", self.user_addr), ("mmap offset", self.mmap_offset)):
            if start + int(self.size) > 1 << 64:
                raise ProtocolError(f"{self}: the {name} range wraps around")
        if int(self.mmap_offset) + int(self.size) >= 1 << 63:
            raise ProtocolError(f"{self}: the range is larger than any file")
        return 0

    cdef int check_file(self, int fd) except -1:
        try:
            status = os.fstat(fd)
        except OSError as e:
            raise ProtocolError(f"{self}: fd {fd}: {e.strerror}") from None
        mode = status.st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode)):
            raise ProtocolError(f"{self}: the fd is {describe_mode(mode)}, not memory that can be mapped")
        if stat.S_ISREG(mode) and self.mmap_offset + self.size > <uint64_t>status.st_size:
            raise ProtocolError(f"{self}: the file has {status.st_size} bytes, the region ends at "
                                f"{int(self.mmap_offset) + int(self.size)}")
        return 0

    cdef int map(self, int fd) except -1:
        cdef uint64_t page = PAGE
        cdef statfs_t fs
        cdef uint64_t start
        cdef void *p
        if fstatfs(fd, &fs) == 0 and (fs.f_type & 0xffffffff) == HUGETLBFS_MAGIC:
            page = fs.f_bsize
        start = self.mmap_offset & ~(page - 1)
        self.length = (self.mmap_offset - start + self.size + page - 1) & ~(page - 1)
        p = mmap(NULL, self.length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, <long>start)
        if p == MAP_FAILED:
            raise ProtocolError(f"{self}: the fd cannot be mapped: {os.strerror(errno)}")
        return self.place(p, self.length, self.mmap_offset - start)

    cdef int place(self, void *p, size_t length, size_t inside) except -1:
        self.base = <char *>p
        self.length = length
        self.host = self.base + inside
        madvise(p, self.length, MADV_DONTDUMP)
        if hcd_faults_install() != 0:
            raise OSError(errno, "sigaction")
        self.slot = hcd_slot_take(p, self.length)
        if self.slot < 0:
            raise ProtocolError(f"{self}: this process has no room for more memory regions")
        return 0

    def __dealloc__(self):
        if self.slot >= 0:
            hcd_slot_release(self.slot)
        if self.base != NULL:
            with nogil:           # a large guest takes a while, and other guests are served meanwhile
                munmap(self.base, self.length)

    def revoke(self):
        """Take the memory away in place: late accesses are harmless. Again and again without harm."""
        if self.is_revoked:
            return
        self.is_revoked = True
        cdef int slot = self.slot, failed
        with nogil:
            failed = hcd_slot_revoke(slot)
        if failed != 0:
            raise OSError(errno, f"{self}: it cannot be revoked: {os.strerror(errno)}")

    def twin(self):
        """A second mapping of the same memory, for users that go on when this one is revoked (mremap(2), "Notes":
        an old size of 0 on a shared mapping makes a copy)."""
        cdef Region other = Region.__new__(Region, self.guest_addr, self.size, self.user_addr, self.mmap_offset, -1)
        cdef void *p = mremap(self.base, 0, self.length, MREMAP_MAYMOVE)
        if p == MAP_FAILED:
            raise OSError(errno, f"{self}: it cannot be mapped again: {os.strerror(errno)}")
        other.place(p, self.length, self.host - self.base)
        return other

    def set_alarm(self, int fd):
        """Signal eventfd ``fd`` when the region turns out to be truncated; -1: nobody. It must outlive that."""
        hcd_slot_alarm(self.slot, fd)

    @property
    def revoked(self):
        return self.is_revoked

    @property
    def poisoned(self):
        """Whether the file turned out shorter than the region: somebody truncated it."""
        return self.slot >= 0 and hcd_slot_poisoned(self.slot) != 0

    def same_place(self, other_guest, other_size, other_user):
        """Whether REM_MEM_REG with these numbers means this region (the spec compares just these three)."""
        return (self.guest_addr, self.size, self.user_addr) == (other_guest, other_size, other_user)

    def __str__(self):
        return f"memory region at guest address {self.guest_addr:#x} of {self.size:#x} bytes"


def describe_mode(mode):
    """What kind of file an fd is, for messages."""
    for test, name in ((stat.S_ISDIR, "a directory"), (stat.S_ISSOCK, "a socket"), (stat.S_ISFIFO, "a pipe"),
                       (stat.S_ISREG, "a regular file"), (stat.S_ISCHR, "a character device"),
                       (stat.S_ISBLK, "a block device")):
        if test(mode):
            return name
    return "no file"


cdef class MemoryTable:
    """The memory of one guest at one moment; immutable. Regions may not overlap (ProtocolError)."""

    def __cinit__(self, regions=()):
        cdef Region r, before = None
        cdef int i
        ordered = sorted(regions, key=_guest_addr)
        for r in ordered:
            if before is not None and before.guest_addr + before.size > r.guest_addr:
                raise ProtocolError(f"{r} overlaps the {before}")
            before = r
        self.regions = tuple(ordered)
        self.n = len(ordered)
        self.spans = <span_t *>calloc(self.n + 1, sizeof(span_t))
        if self.spans == NULL:
            raise MemoryError
        for i, r in enumerate(ordered):
            self.spans[i].gpa = r.guest_addr
            self.spans[i].size = r.size
            self.spans[i].uva = r.user_addr
            self.spans[i].host = r.host

    def __dealloc__(self):
        free(self.spans)

    cdef char *find(self, uint64_t gpa, uint64_t size, uint64_t *run) noexcept nogil:
        """The host address of ``gpa``, and in ``run`` how many of ``size`` bytes lie there in one piece; or NULL."""
        cdef uint16_t *remembered = &self.recent[(gpa >> RECENT_SHIFT) % RECENT]
        cdef int low = 0, high = self.n - 1, middle = remembered[0]
        cdef span_t *s
        cdef uint64_t inside
        if self.n == 0:
            return NULL
        while True:
            s = &self.spans[middle]
            if gpa < s.gpa:
                high = middle - 1
            elif gpa - s.gpa >= s.size:
                low = middle + 1
            else:
                break
            if low > high:
                return NULL
            middle = (low + high) // 2
        remembered[0] = <uint16_t>middle
        inside = s.size - (gpa - s.gpa)
        run[0] = size if size < inside else inside
        return s.host + (gpa - s.gpa)

    cdef char *find_user(self, uint64_t uva, uint64_t size) noexcept nogil:
        """The host address of ``size`` bytes at the front end's address ``uva``, whole in one region; or NULL."""
        cdef int i
        cdef span_t *s
        for i in range(self.n):
            s = &self.spans[i]
            if uva >= s.uva and uva - s.uva < s.size:
                if size <= s.size - (uva - s.uva):
                    return s.host + (uva - s.uva)
        return NULL

    def read(self, uint64_t gpa, uint64_t size):
        """``size`` bytes at guest-physical ``gpa``; LookupError where the guest has no memory. For tests and tools."""
        cdef uint64_t run = 0
        cdef char *p
        out = bytearray()
        while size:
            p = self.find(gpa, size, &run)
            if p == NULL:
                raise LookupError(f"guest address {gpa:#x} is in no memory region")
            out += p[:run]
            gpa += run
            size -= run
        return bytes(out)

    def user_mapped(self, uint64_t uva, uint64_t size):
        """Whether ``size`` bytes at the front end's address ``uva`` lie in one region."""
        return self.find_user(uva, size) != NULL

    @property
    def poisoned(self):
        """Whether the front end truncated the memory of some region."""
        return any(r.poisoned for r in self.regions)

    def with_region(self, Region region):
        """A table that has ``region`` too."""
        return MemoryTable((*self.regions, region))

    def without_region(self, uint64_t guest_addr, uint64_t size, uint64_t user_addr):
        """A table without the region that the three numbers name; LookupError when there is none."""
        kept = tuple(r for r in self.regions if not r.same_place(guest_addr, size, user_addr))
        if len(kept) == len(self.regions):
            raise LookupError(f"no memory region at guest address {guest_addr:#x} of {size:#x} bytes")
        return MemoryTable(kept)

    def set_alarm(self, int fd):
        """Signal eventfd ``fd`` when some region turns out to be truncated; -1: nobody."""
        for region in self.regions:
            region.set_alarm(fd)

    def twin(self):
        """A table of second mappings of the same memory; revoking one leaves the other."""
        return MemoryTable([region.twin() for region in self.regions])

    def revoke(self):
        """Revoke every region: the end of the session that they belong to."""
        for region in self.regions:
            region.revoke()


def _guest_addr(Region region):
    return region.guest_addr
