from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from hcd.dataplane.memory cimport MemoryTable, Region
from hcd.dataplane.stats cimport DoorbellStats, QueueStats

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

ctypedef struct batch_t:      # a completion that the record of requests in flight does not know of yet
    uint16_t head             # as in chain_t, and so on
    uint16_t state
    uint16_t last
    uint16_t slots
    uint32_t written

ctypedef struct track_t:      # what we know of our record of requests in flight: _inflight.pxi
    void *record              # shared; written only
    uint64_t counter          # of chains taken
    uint16_t states           # how many the record has
    uint16_t ahead            # packed: slots that were taken before the record began and never come back
    uint16_t last_batch       # split: the completion before this batch
    uint16_t free_head        # packed: the free states, linked by ``next``
    uint32_t n_free
    uint16_t *next
    batch_t *batch            # at most as many as the ring has entries
    uint32_t n_batch
    uint16_t *again           # heads (packed: states) of recovered chains, oldest first
    uint32_t n_again
    void *copy                # packed: the record as it was found

ctypedef struct vring_t:      # all that polling and publishing touch, for use without the GIL
    uint32_t size
    bint packed
    bint event_idx
    bint indirect
    bint in_order
    bint swap                 # legacy ring of a big-endian guest
    bint running              # started, enabled, mapped and sound: the ring may be touched
    bint notify               # the driver is asked to ring
    bint passive              # what waits in the ring is no reason for a turn
    bint throttled            # a limit holds the queue back: the ring counts as empty
    char *desc                # split: descriptor table; packed: the ring
    char *driver              # split: available ring; packed: driver event area
    char *device              # split: used ring; packed: device event area
    uint32_t again            # recovered chains that are to be taken first
    track_t *track            # NULL: requests in flight are not recorded
    uint16_t last_avail       # next entry to take; packed: slot
    uint16_t avail_seen       # split: avail.idx when it was read last
    uint16_t next_used        # next used entry to write; packed: slot
    uint16_t unpublished      # used entries that the driver cannot see yet
    uint16_t unsignalled      # used entries since the last interrupt decision
    bint signalled_valid      # unsignalled counts from a decision that was really made
    bint avail_wrap           # packed
    bint used_wrap
    int batch_slot            # packed: the first slot of the unpublished batch, -1 without one
    uint16_t batch_flags      # its flags, written last
    int error                 # why the last pop failed
    uint64_t error_a
    uint64_t error_b

ctypedef struct chain_t:      # the scatter list of one request: readable pieces first
    iovec *iov
    uint32_t room
    uint32_t n_out
    uint32_t n_in
    uint64_t out_size
    uint64_t in_size
    uint16_t head             # descriptor index; packed: buffer id
    uint16_t slots            # packed: ring slots that the chain takes
    uint16_t state            # packed, recorded: first and last of the states that hold a copy of it
    uint16_t last
    bint again                # recovered: another process took it from the ring

ctypedef struct bucket_t:
    double rate               # tokens a second; 0: no limit
    double burst              # how many it holds
    double level

ctypedef struct cursor_t:
    uint32_t i                # piece
    uint64_t at               # offset in it
    uint64_t left             # bytes from here on

cdef class Inflight:
    cdef Region region
    cdef readonly int fd
    cdef readonly int num_queues
    cdef readonly int queue_size

    cdef int check(self, uint64_t offset, uint64_t size) except -1
    cdef char *part(self, int index, bint packed) except NULL

cdef class Limit:
    cdef bint on
    cdef bucket_t requests
    cdef bucket_t bytes
    cdef uint64_t filled      # when both buckets were filled last
    cdef double virtual       # virtual time of the queue that was furthest behind at the last wake-up
    cdef uint64_t epoch
    cdef list waiting         # queues that are throttled
    cdef object timer

    cdef void fill(self, uint64_t now) noexcept
    cdef bint enough(self) noexcept
    cdef bint admit(self, Virtqueue q) except -1
    cdef int arm(self, Virtqueue q) except -1
    cdef void charge(self, Virtqueue q, double requests, double bytes) noexcept
    cdef int release(self, Virtqueue q) except -1

cdef class Request:
    cdef Virtqueue vq
    cdef MemoryTable mem
    cdef chain_t c
    cdef cursor_t r
    cdef cursor_t w
    cdef int state
    cdef bint held
    cdef int64_t result       # what complete() was told, while it travels to the owner thread
    cdef uint32_t generation
    cdef uint64_t number      # of the requests taken from its queue, for unpop
    cdef uint64_t popped
    cdef uint64_t woken
    cdef PyObject *newer      # neighbours among the requests in flight
    cdef PyObject *older
    cdef public int op
    cdef public int status

    cdef int live(self) except -1
    cdef const char *header(self, uint64_t offset, uint64_t n, char *spare) except NULL
    cdef int slice(self, cursor_t *k, bint out, uint64_t n, iovec *to, int most) noexcept nogil
    cdef void advance(self, cursor_t *k, bint out, uint64_t n) noexcept nogil
    cdef int finish(self, int64_t written) except -1
    cdef move(self, int fd, int64_t offset, int64_t nbytes, bint out)
    cdef list views(self, uint32_t start, uint32_t n, bint readonly)
    cpdef complete(self, int64_t written=*)

cdef class Pace:
    cdef uint64_t cost        # of an early interrupt
    cdef uint64_t until       # when the next may be made
    cdef uint32_t made_since  # interrupts since ``cost`` began to be measured

    cpdef bint holds(self, uint64_t now, uint64_t left)
    cpdef made(self, uint64_t began, uint64_t now)

cdef class Virtqueue:
    cdef vring_t ring
    cdef readonly int index
    cdef int max_size
    cdef uint64_t feature_bits
    cdef MemoryTable mem
    cdef track_t track
    cdef Inflight inflight_area
    cdef bint resume
    cdef readonly int recovered
    cdef uint64_t uva_desc
    cdef uint64_t uva_driver
    cdef uint64_t uva_device
    cdef bint started
    cdef bint enabled
    cdef bint halted
    cdef int n_ops
    cdef readonly str broken
    cdef readonly int kick_fd
    cdef int call_fd
    cdef int err_fd
    cdef bint spurious
    cdef bint call_used                  # an interrupt was signalled on call_fd
    cdef bint call_owed
    cdef unsigned long owner
    cdef uint32_t generation
    cdef uint64_t taken       # requests so far, without those that were put back
    # in flight, oldest first, and requests that wait to be used again
    cdef PyObject *oldest
    cdef PyObject *newest
    cdef list pool
    cdef PyObject *current    # the request taken last, while it is in flight
    cdef int n_inflight
    cdef int n_stale          # of these, for a ring that was: set up anew since
    # this turn
    cdef bint in_turn
    cdef bint dirty
    cdef bint breaking        # on_error hears that the ring broke; the handler, if one runs, goes on
    cdef bint corked          # publish nothing yet: a frame is spread over several requests
    cdef bint by_ring
    cdef int budget
    cdef bint had_work        # the ring held requests when the turn began
    cdef uint64_t found       # requests taken by then
    cdef uint32_t publish_at
    cdef readonly Pace pace
    cdef uint64_t turn_began
    cdef uint32_t turn_done   # completions in it
    cdef uint64_t woken
    cdef uint64_t batch_woken
    # its limit, shared with the other queues of the device: see _limit.pxi
    cdef Limit limit
    cdef double virtual
    cdef double virtual_end
    cdef uint64_t epoch
    cdef uint64_t throttled_since
    # where things are counted
    cdef DoorbellStats doorbell
    cdef readonly QueueStats stats
    # callbacks
    cdef public object device
    cdef public object handler
    cdef public object scheduler      # flush_later(queue), completions(queue): see reactor.pyx
    cdef public object on_error       # (queue, exception): the handler raised, or the ring is broken
    cdef public object on_drained
    cdef public object on_take        # (request) -> bool: a wrapper sees each request first; False: it keeps it
    cdef public object on_settle      # (request, written) -> bool: and each completion; False: settle_held() follows
    cdef public object tag            # whatever the owner wants to find here again
    cdef list remote
    # the reactor's notes
    cdef bint ready
    cdef bint awake
    cdef bint ready_by_ring
    cdef uint64_t ready_woken

    cdef Request take(self)
    cdef Request take_next(self)
    cpdef unpop(self, Request r)
    cdef Request fresh(self)
    cdef void new_generation(self) noexcept
    cdef bint resolve(self)
    cdef void link(self, Request r) noexcept
    cdef int retire(self, Request r, int64_t written, uint64_t now) except -1
    cdef bint put_off(self, uint64_t now) except -1
    cdef int interrupt(self) except -1
    cdef int ask_kicks(self, bint on) except -1
    cdef void unlink(self, Request r) noexcept
    cdef int break_ring(self, str why) except -1
    cdef int used(self, Request r, uint32_t written) except -1
    cdef int settle(self, Request r, int64_t written) except -1
    cdef Request oldest_of_ring(self)
    cdef int settle_now(self, Request r, int64_t written) except -1
    cdef int flush_now(self) except -1
    cdef uint32_t batch_size(self) noexcept
    cdef int signal(self) except -1
    cdef bint update_running(self)
    cdef int unthrottle(self) except -1
    cpdef flush(self)
    cpdef uint64_t read_kick(self) except? 0xffffffffffffffff
    cpdef begin_turn(self, uint64_t woken, bint by_ring, bint batch=*)
    cpdef bint stalled(self) except -1
    cpdef end_turn(self)
    cpdef bint enable_kicks(self) except -1
    cpdef disable_kicks(self)
    cpdef take_remote(self)
    cpdef bint available(self) except -1

cdef bint ring_has_work(vring_t *r) noexcept nogil
cdef void nudge() noexcept nogil
cdef ssize_t read_eventfd(int fd, uint64_t *value) noexcept nogil
cdef void nudge_end() noexcept nogil
