from libc.stdint cimport int64_t, uint32_t, uint64_t

from hcd.dataplane.virtqueue cimport Request, iovec

cdef extern from "_blockio.h" nogil:
    ctypedef struct hcd_range_t:
        uint64_t offset
        uint64_t length
        int unmap
    ctypedef struct hcd_job:
        hcd_job *next
        void *request
        void *memory
        const iovec *iov
        uint64_t at
        uint64_t offset
        uint64_t left
        uint64_t moved
        hcd_range_t *ranges
        uint32_t n_ranges
        char *pattern
        int kind
        int sync
        int error
    ctypedef struct hcd_list:
        hcd_job *first
    ctypedef struct hcd_pool:
        int done_fd
        int threads
        void *ring
        uint64_t ring_jobs
        uint64_t ring_rest

cdef class BlockStore:
    cdef readonly uint64_t size          # bytes, whole sectors
    cdef readonly bint read_only
    cdef public bint writethrough
    cdef public object on_error
    cdef public int head                 # bytes of an answer in front of the data; -1: a status byte behind it
    cdef public object on_failure
    cdef readonly uint64_t errors        # I/O errors
    cdef readonly uint64_t refusals      # guest's mistakes

    cdef int settle(self, Request r, int status, uint64_t moved, object why=*) except -1
    cdef int settle_head(self, Request r, int status, uint64_t moved, object why) except -1
    cdef bint answerable(self, Request r) except -1
    cdef uint64_t room(self, Request r) noexcept
    cdef int refused(self, Request r, int status, str why) except -1
    cdef int failed(self, Request r, int number, uint64_t moved) except -1
    cdef int complain(self, Request r, object error) except -1
    cdef bint placed(self, Request r, uint64_t sector, uint64_t have, int64_t *nbytes, bint out) except -1
    cdef bint grows(self, uint64_t size) except -1
    cdef bint takes_ranges(self, Request r, object ranges) except -1

cdef class BlockFile(BlockStore):
    cdef int fd
    cdef hcd_pool *pool
    cdef hcd_list batch                  # jobs that wait for submit()
    cdef int waiting                     # so many
    cdef hcd_job *spare                  # job structures to use again
    cdef readonly bint nowait            # reads from the page cache are tried first
    cdef readonly int inflight           # jobs between their making and reap()
    cdef readonly uint64_t inline_reads  # requests that the page cache served whole
    cdef readonly uint64_t jobs
    cdef readonly uint64_t batches

    cdef hcd_job *job(self, Request r, int kind) except NULL
    cdef int put(self, hcd_job *job) except -1
    cdef int submit_now(self) except -1
    cdef int transfer(self, Request r, uint64_t offset, uint64_t nbytes, uint64_t moved, int kind) except -1
    cdef hcd_job *range_job(self, Request r, object ranges, int kind) except? NULL
    cdef hcd_job *drop(self, hcd_job *job) noexcept
    cdef int finish_jobs(self) except -1

cdef class BlockRam(BlockStore):
    cdef char *base

    cdef int zero_ranges(self, Request r, tuple ranges) except -1
    cdef void zero(self, uint64_t offset, uint64_t length) noexcept nogil
