# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Raw doorbells: eventfds that a guest rings, without a ring in memory behind them; and interrupts back.

Theory of operation.

* The kernel adds one to the eventfd for each ring; reading it takes the sum. So rings are counted exactly, however many
  come before hcd wakes, and one wake-up hands all of them to the handler at once.
* An eventfd carries no time. Where the guest wrote its time-stamp counter into shared memory before it rang, and the
  VMM told how that counter relates to ours, the time from the stamp to the wake-up is known. A stamp belongs to the
  last ring: it counts only when exactly one ring came, and once.
* Neither reading nor signalling ever blocks: the eventfds are non-blocking.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t

from hcd.dataplane._atomics cimport hcd_bump, hcd_now
from hcd.dataplane.stats cimport DoorbellStats, InterruptStats, hist_add

import os

from hcd.errors import contained

cdef extern from "_tsc.h" nogil:
    bint HCD_HAS_TSC
    uint64_t hcd_tsc()
    uint64_t hcd_load64(const void *p)

from hcd.dataplane.virtqueue cimport nudge, read_eventfd

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void *buf, size_t n)

HAS_TSC = bool(HCD_HAS_TSC)


def tsc():
    """The time-stamp counter now; 0 where there is none."""
    return hcd_tsc()


cdef double LONGEST_NS = 10e9     # a stamp that is older is no stamp of this ring


cdef class Bell:
    """One doorbell that is being served. Its lane's thread alone touches it. The fd stays the caller's."""

    def __cinit__(self, str name, int fd, DoorbellStats stats not None):
        self.name = name
        self.fd = fd
        self.stats = stats

    def __dealloc__(self):
        PyBuffer_Release(&self.memory)      # no buffer: does nothing

    # -- stamps

    def set_stamp(self, memory, Py_ssize_t offset):
        """The guest writes its TSC at ``offset`` of ``memory`` before it rings. ValueError when it is not inside."""
        self.release()
        PyObject_GetBuffer(memory, &self.memory, PyBUF_SIMPLE)
        if offset < 0 or offset % 8 or offset + 8 > self.memory.len:
            self.release()
            raise ValueError(f"a stamp at {offset} is not in the shared memory, or not aligned")
        self.stamp = <const char *>self.memory.buf + offset
        self.last_stamp = hcd_load64(self.stamp)

    def set_clock(self, uint32_t tsc_khz, int64_t tsc_offset):
        """guest TSC = TSC + ``tsc_offset``, at ``tsc_khz``; 0: not known."""
        self.khz = tsc_khz if HCD_HAS_TSC else 0
        self.offset = tsc_offset

    def release(self):
        """Let go of the memory."""
        self.stamp = NULL
        PyBuffer_Release(&self.memory)      # no buffer: does nothing

    cdef void observe_stamp(self, uint64_t woken) noexcept:
        cdef uint64_t stamp = hcd_load64(self.stamp)
        cdef uint64_t tsc = hcd_tsc(), late = hcd_now() - woken
        cdef double ns
        if stamp == self.last_stamp:
            return
        self.last_stamp = stamp
        ns = <double><int64_t>(tsc + <uint64_t>self.offset - stamp) * 1e6 / self.khz - <double>late
        if 0 < ns < LONGEST_NS:
            hist_add(&self.stats.c_ring, <uint64_t>ns)

    # -- rings

    cdef uint64_t collect(self, uint64_t woken) except? 0xffffffffffffffff:
        cdef uint64_t value = 0
        cdef ssize_t n
        n = read_eventfd(self.fd, &value)
        if n != 8:
            if n < 0 and errno == EINTR:
                raise OSError(errno, f"doorbell {self.name}: the VMM made its eventfd block")
            if n < 0 and errno != EAGAIN:
                raise OSError(errno, f"doorbell {self.name}: {os.strerror(errno)}")
            return 0
        self.woken = woken
        self.answered = False
        self.stats.c_rings += value
        self.stats.c_wakeups += 1
        if self.stamp != NULL and self.khz:
            if value == 1:
                self.observe_stamp(woken)
            else:
                self.last_stamp = hcd_load64(self.stamp)
        hcd_bump(&self.stats.version)
        return value

    cdef int rung(self, uint64_t woken) except -1:
        cdef uint64_t value
        try:
            value = self.collect(woken)
            if value:
                hist_add(&self.stats.c_dispatch, hcd_now() - woken)
                hcd_bump(&self.stats.version)
                self.handler(self, value)
        except BaseException as e:
            if self.on_error is None:
                raise
            self.on_error(self, contained(e))
        return 0

    def take(self):
        """Rings since the last call, counted; 0 without any."""
        return self.collect(hcd_now())

    def enter(self):
        """The handler is entered now."""
        hist_add(&self.stats.c_dispatch, hcd_now() - self.woken)
        hcd_bump(&self.stats.version)


# what became of an interrupt: the values of the label "outcome"
cdef str SENT = "sent", PENDING = "pending", ABSENT = "absent"


cdef class Interrupt:
    """One interrupt of the guest. The fd stays the caller's; -1: nobody is attached."""

    def __cinit__(self, str name, InterruptStats stats not None):
        self.name = name
        self.fd = -1
        self.stats = stats

    def set_fd(self, int fd):
        self.fd = fd

    cpdef bint signal(self, Bell answers=None) except? False:
        """Interrupt the guest; whether one was sent or is due already. Never blocks.

        ``answers``: the doorbell whose rings this answers; their response time is observed, once.
        """
        cdef str outcome = self.send()
        cdef bint reached = outcome is not ABSENT
        if reached and answers is not None and not answers.answered and answers.woken:
            answers.answered = True
            hist_add(&answers.stats.c_response, hcd_now() - answers.woken)
            hcd_bump(&answers.stats.version)
        if self.on_signal is not None:
            self.on_signal(self, answers, outcome)
        return reached

    cdef str send(self):
        cdef uint64_t one = 1
        if self.fd < 0:
            self.stats.absent += 1
            return ABSENT
        nudge()
        if write(self.fd, &one, 8) == 8:
            self.stats.sent += 1
            return SENT
        if errno == EINTR:
            self.fd = -1              # the VMM made it block: it is not signalled again
        elif errno != EAGAIN:
            self.stats.absent += 1
            return ABSENT
        self.stats.pending += 1
        return PENDING
