# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Counters and histograms of the data plane, and the text of the hot metric families.

Every counter has one writer (the thread that owns the queue) and any number of readers, which may be one increment
behind; those of a whole device, which several threads count, are added to atomically. Whoever changed counters of a
queue or of a doorbell raises their ``version`` afterwards: a scrape of thousands of series looks at hundreds of these.

A histogram keeps four sub-buckets per power of two: a quantile is at most 25 % off. Exported are the powers of
two alone, 2**10 to 2**30 ns (about 1 us to 1 s): those bounds are exact, and a scrape stays readable.
"""

from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset, strlen

from hcd.dataplane._atomics cimport hcd_add64, hcd_bump, hcd_load64_acquire, hcd_log2, hcd_now

import threading


BOUNDS_NS = tuple(1 << k for k in range(10, 31))

cdef enum:
    LOW = 10
    HIGH = 30


cdef inline int bucket_of(uint64_t ns) noexcept nogil:
    # Bucket 4*(e-1)+s holds (2**e + s*2**(e-2), ...]: upper bounds inclusive, as Prometheus has them.
    cdef uint64_t v
    cdef int e, i
    if ns < 5:
        return 0
    v = ns - 1
    e = hcd_log2(v)
    i = (e - 1) * HIST_SUB + <int>((v >> (e - 2)) & 3)
    return i if i < HIST_SIZE else HIST_SIZE - 1


cdef inline uint64_t bucket_top(int i) noexcept nogil:
    cdef int e = i / HIST_SUB + 1
    if i == 0:
        return 4
    return (<uint64_t>(4 + i % HIST_SUB + 1)) << (e - 2)


cdef void hist_add(hist_t *h, uint64_t ns) noexcept nogil:
    h.counts[bucket_of(ns)] += 1
    h.sum += ns
    h.count += 1


cdef void hist_merge(hist_t *h, const hist_t *other) noexcept nogil:
    cdef int i
    for i in range(HIST_SIZE):
        h.counts[i] += other.counts[i]
    h.sum += other.sum
    h.count += other.count


cdef class Histogram:
    """Log-linear histogram of nanoseconds. One writer, any reader."""

    def __init__(self):
        if self.h == NULL:
            self.h = <hist_t *>calloc(1, sizeof(hist_t))
            self.owned = True
        if self.h == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.owned:
            free(self.h)

    @staticmethod
    cdef Histogram view(hist_t *h, object owner, uint64_t *version):
        cdef Histogram self = Histogram.__new__(Histogram)
        self.h = h
        self.owner = owner
        self.version = version
        return self

    @property
    def count(self):
        return self.h.count

    @property
    def sum_ns(self):
        return self.h.sum

    def observe(self, uint64_t ns):
        hist_add(self.h, ns)
        if self.version != NULL:
            hcd_bump(self.version)

    def quantile(self, double q):
        """The upper bound of the bucket that holds the q-quantile, in nanoseconds; 0.0 while empty."""
        cdef uint64_t total = 0, seen = 0
        cdef int i
        for i in range(HIST_SIZE):
            total += self.h.counts[i]
        if total == 0:
            return 0.0
        for i in range(HIST_SIZE):
            seen += self.h.counts[i]
            if seen >= q * total and seen > 0:
                return float(bucket_top(i))
        return float(bucket_top(HIST_SIZE - 1))

    def cumulative(self):
        """Counts at or below each of BOUNDS_NS, and of all."""
        cdef uint64_t seen = 0
        cdef int i, k = LOW
        out = []
        for i in range(HIST_SIZE):
            while k <= HIGH and i == (k - 1) * HIST_SUB:
                out.append(seen)
                k += 1
            seen += self.h.counts[i]
        out.append(seen)
        return out

    def merge(self, Histogram other):
        hist_merge(self.h, other.h)
        if self.version != NULL:
            hcd_bump(self.version)


cdef class DeviceStats:
    """What is counted of one device as a whole, and what is the matter with it now."""

    def add_handler_errors(self, uint64_t n=1):
        """From any thread."""
        hcd_add64(&self.handler_errors, n)


cdef class DoorbellStats:
    """Counters of one doorbell on one path."""

    @property
    def rings(self):
        return self.c_rings

    @property
    def wakeups(self):
        return self.c_wakeups

    @property
    def dispatch(self):
        return Histogram.view(&self.c_dispatch, self, &self.version)

    @property
    def response(self):
        return Histogram.view(&self.c_response, self, &self.version)

    @property
    def ring(self):
        return Histogram.view(&self.c_ring, self, &self.version)

    def add_rings(self, uint64_t rings):
        """One wake-up by so many."""
        self.c_rings += rings
        self.c_wakeups += 1
        hcd_bump(&self.version)

    def merge(self, DoorbellStats other):
        self.c_rings += other.c_rings
        self.c_wakeups += other.c_wakeups
        hist_merge(&self.c_dispatch, &other.c_dispatch)
        hist_merge(&self.c_response, &other.c_response)
        hist_merge(&self.c_ring, &other.c_ring)
        hcd_bump(&self.version)


cdef class InterruptStats:
    """Counters of one interrupt of a doorbell device."""


cdef class QueueStats:
    """Counters of one queue of one device, for as long as the device exists."""

    def __cinit__(self, operations, DeviceStats device=None):
        self.operations = tuple(operations)
        self.device = DeviceStats() if device is None else device
        if not 1 <= len(self.operations) <= MAX_OPS:
            raise ValueError(f"a device names 1 to {MAX_OPS} operations, not {len(self.operations)}")
        self.latencies = <hist_t *>calloc(len(self.operations), sizeof(hist_t))
        if self.latencies == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.latencies)

    cdef void guest_error(self) noexcept:
        self.c.guest_errors += 1
        hcd_add64(&self.device.guest_errors, 1)

    def requests(self, int op, int status):
        if not (0 <= op < len(self.operations) and 0 <= status < STATUSES):
            raise IndexError("no such operation or status")
        return self.c.requests[op * STATUSES + status]

    def latency(self, int op):
        if not 0 <= op < len(self.operations):
            raise IndexError("no such operation")
        return Histogram.view(&self.latencies[op], self, &self.c.version)

    def oldest_ns(self):
        cdef uint64_t oldest = self.c.oldest
        cdef uint64_t now = hcd_now()
        return now - oldest if oldest and now > oldest else 0

    @property
    def found_by_ring(self):
        return self.c.found_ring

    @property
    def found_by_poll(self):
        return self.c.found_poll

    @property
    def bytes_from_guest(self):
        return self.c.from_guest

    @property
    def bytes_to_guest(self):
        return self.c.to_guest

    @property
    def interrupts_sent(self):
        return self.c.sent

    @property
    def interrupts_suppressed(self):
        return self.c.suppressed

    @property
    def interrupts_pending(self):
        return self.c.pending

    @property
    def interrupts_absent(self):
        return self.c.absent

    @property
    def inflight(self):
        return self.c.inflight

    @property
    def throttled_ns(self):
        return self.c.throttled

    @property
    def drops(self):
        return self.c.drops

    @drops.setter
    def drops(self, uint64_t value):
        self.c.drops = value

    @property
    def guest_errors(self):
        return self.c.guest_errors

    @guest_errors.setter
    def guest_errors(self, uint64_t value):
        hcd_add64(&self.device.guest_errors, value - self.c.guest_errors)
        self.c.guest_errors = value

    @property
    def handler_errors(self):
        return self.c.handler_errors

    @handler_errors.setter
    def handler_errors(self, uint64_t value):
        hcd_add64(&self.device.handler_errors, value - self.c.handler_errors)
        self.c.handler_errors = value


include "_hottext.pxi"
