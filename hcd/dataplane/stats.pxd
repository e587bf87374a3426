from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    HIST_SUB = 4          # sub-buckets per power of two
    HIST_SIZE = 168       # up to 2**42 ns, more than an hour
    MAX_OPS = 16
    STATUSES = 3

ctypedef struct hist_t:
    uint64_t count
    uint64_t sum
    uint64_t counts[168]

ctypedef struct queue_counts_t:
    uint64_t version         # hcd_bump after others changed; while a request is in flight, they are looked at anyway
    uint64_t oldest          # CLOCK_MONOTONIC of the oldest request's pop, 0 without one
    uint64_t found_ring
    uint64_t found_poll
    uint64_t from_guest
    uint64_t to_guest
    uint64_t sent
    uint64_t suppressed
    uint64_t pending
    uint64_t absent
    uint64_t drops
    uint64_t guest_errors
    uint64_t handler_errors
    uint64_t inflight
    uint64_t throttled       # ns
    uint64_t requests[48]    # MAX_OPS * STATUSES

cdef void hist_add(hist_t *h, uint64_t ns) noexcept nogil

cdef class Histogram:
    cdef hist_t *h
    cdef bint owned
    cdef object owner        # keeps the memory of a histogram that is part of another object
    cdef uint64_t *version   # of that object; NULL: none

    @staticmethod
    cdef Histogram view(hist_t *h, object owner, uint64_t *version)

cdef class DeviceStats:
    cdef public uint64_t connected, handover_ready, handovers_resumed, handovers_failed
    cdef public uint64_t protocol_errors, guest_errors, handler_errors
    cdef public uint64_t slow_steps, stuck_requests, path_conflict

cdef class DoorbellStats:
    cdef uint64_t version    # hcd_bump after any of the others changed
    cdef uint64_t c_rings
    cdef uint64_t c_wakeups
    cdef hist_t c_dispatch
    cdef hist_t c_response
    cdef hist_t c_ring

cdef class InterruptStats:
    cdef public uint64_t sent
    cdef public uint64_t pending
    cdef public uint64_t absent

cdef class QueueStats:
    cdef readonly tuple operations
    cdef readonly DeviceStats device
    cdef queue_counts_t c
    cdef hist_t *latencies   # one per operation
    cdef void guest_error(self) noexcept
