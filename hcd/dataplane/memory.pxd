from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef enum:
    RECENT = 64

ctypedef struct span_t:       # one region of a table, by guest-physical address
    uint64_t gpa
    uint64_t size
    uint64_t uva              # where the front end has it
    char *host                # where we have it

cdef class Region:
    cdef readonly uint64_t guest_addr
    cdef readonly uint64_t size
    cdef readonly uint64_t user_addr
    cdef readonly uint64_t mmap_offset
    cdef char *base
    cdef size_t length
    cdef char *host
    cdef int slot
    cdef bint is_revoked
    cdef int check(self) except -1
    cdef int check_file(self, int fd) except -1
    cdef int map(self, int fd) except -1
    cdef int place(self, void *p, size_t length, size_t inside) except -1

cdef class MemoryTable:
    cdef object __weakref__
    cdef readonly tuple regions
    cdef span_t *spans
    cdef int n
    cdef uint16_t recent[64]  # spans of the last hits, by address; a wrong one costs a search, never correctness
    cdef char *find(self, uint64_t gpa, uint64_t size, uint64_t *run) noexcept nogil
    cdef char *find_user(self, uint64_t uva, uint64_t size) noexcept nogil

cdef int guarded_copy(void *to, const void *source, size_t n) noexcept nogil
cdef int guard_faults() except -1
