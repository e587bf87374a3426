from libc.stdint cimport uint64_t

from hcd.dataplane.bell cimport Bell
from hcd.dataplane.virtqueue cimport Virtqueue, vring_t

cdef class Watch:
    cdef Reactor reactor
    cdef readonly int fd
    cdef Virtqueue queue      # a kick; None for a plain watch
    cdef Bell bell            # a raw doorbell
    cdef object callback
    cdef bint live

cdef class Timer:
    cdef Reactor reactor
    cdef object callback      # None: it was called, or cancelled

cdef class Reactor:
    cdef int ep
    cdef int wake_fd
    cdef int posted           # something is in posts or completed
    cdef bint stopping
    cdef unsigned long thread  # of run(); 0 before it
    cdef object posts
    cdef list completed
    cdef list timers          # a heap: (when, a number, Timer)
    cdef Py_ssize_t cancelled  # of these
    cdef long timer_seq
    cdef list ready
    cdef list dirty
    cdef list awake
    cdef vring_t **rings      # of the queues in awake
    cdef int room
    cdef dict watches         # by fd
    cdef list gone            # watches that epoll may have reported already
    cdef list lost            # and that it reports for ever
    cdef uint64_t poll_ns
    cdef uint64_t window      # how long polling goes on now, adaptive
    cdef uint64_t idle_since
    cdef uint64_t slow_ns
    cdef readonly uint64_t beats
    cdef readonly uint64_t sleeps
    cdef public object on_error
    cdef public object on_slow

    cdef int wake(self) except -1
    cdef int mark(self, Virtqueue q, uint64_t woken, bint by_ring) except -1
    cdef int turn(self, Virtqueue q) except -1
    cdef int turn_failed(self, Virtqueue q, error) except -1
    cdef int ring(self, Bell bell, uint64_t woken) except -1
    cdef Watch add(self, int fd, callback, Virtqueue q)
    cdef int watch_anew(self, Watch closed) except -1
    cdef int rouse(self, Virtqueue q) except -1
    cdef int run_posted(self) except -1
    cdef int run_timers(self) except -1
    cdef int drop_cancelled(self) except -1
    cdef int call(self, callback) except -1
    cdef int flush_dirty(self) except -1
    cdef int gap_ended(self, uint64_t now) except -1
    cdef int poll(self) except -1
    cdef int sleep(self) except -1
    cdef int collect(self, int timeout) except -1
    cdef int dispatch(self, int n, void *reported) except -1
    cdef int round(self) except -1
    cdef int look(self, int first, uint64_t now) except -1
    cdef int list_rings(self) except -1
    cdef int close_fds(self) except -1
