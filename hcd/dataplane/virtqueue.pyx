# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Virtqueues, the device's side (virtio 1.3, 2.6 to 2.8), and the requests that come out of them.

Theory of operation.

* One thread owns a ring and alone touches it. The exception is ``Request.complete``: from another thread it puts
  the request into a list and wakes the owner, which then writes the used entry.
* Nothing that a driver wrote is trusted, and each thing is read once: descriptors are copied before they are
  checked, an indirect table entry by entry. A driver that breaks the rules breaks its ring: no more requests are
  taken from it until it is set up anew, the error says what was wrong, everything else goes on.
* Completions are published in batches: used entries are written as they come, the index (packed: the flags of the
  first descriptor) at the end of a turn or after a number of them, and one interrupt decision is made then.
* Between publishing and reading the driver's wish for an interrupt stands a full fence, and between asking for kicks
  and looking at the ring again another (2.7.7, 2.7.10): both sides could otherwise go to sleep.
* While requests are taken, the driver is asked not to kick: without EVENT_IDX by a flag, with it by leaving the event
  index where it is, behind.
* The eventfds are shared with the front end, which can make them block: _nudge.h says how a call gets out again.
* ``generation`` counts set-ups: a request that outlived its ring (a drain that timed out) is settled and forgotten.
"""

import fcntl
import os
import stat
import sys

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBuffer_FillInfo,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.pythread cimport PyThread_get_thread_ident
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.errno cimport EAGAIN, EFAULT, EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memmove, memset

from hcd.dataplane._atomics cimport (
    hcd_bump,
    hcd_fence,
    hcd_le16,
    hcd_le32,
    hcd_le64,
    hcd_load16,
    hcd_load16_acquire,
    hcd_now,
    hcd_store16,
    hcd_store16_release,
    hcd_store32,
    hcd_swap16,
    hcd_swap32,
    hcd_swap64,
)
from hcd.dataplane.memory cimport MemoryTable, Region
from hcd.dataplane.stats cimport STATUSES, DoorbellStats, QueueStats, hist_add

from hcd.dataplane.memory import describe_mode
from hcd.errors import GuestError
from hcd_protocols.errors import ProtocolError

cdef extern from "<sys/uio.h>" nogil:
    ssize_t readv(int fd, const iovec *iov, int n)
    ssize_t writev(int fd, const iovec *iov, int n)
    ssize_t preadv(int fd, const iovec *iov, int n, long offset)
    ssize_t pwritev(int fd, const iovec *iov, int n, long offset)

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void *buf, size_t n)

cdef extern from "_nudge.h" nogil:
    void hcd_nudge()
    void hcd_nudge_end()
    ssize_t hcd_read_eventfd(int fd, uint64_t *value)

cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(PyObject *o)

if sys.byteorder != "little":
    raise ImportError("hcd runs on little-endian hosts")

cdef enum:
    BUDGET = 64               # requests of one turn: a busy queue leaves the reactor to the others after that many
    HEAVY = 16                # log2 of the bytes (64 KiB) that count as one more request
    PUBLISH_AT = 32           # completions that a driver waits for at most before it sees the first
    PUBLISH_SOON = 6          # the same where it asks for one interrupt at a time (EVENT_IDX): it goes on while we do

    F_INDIRECT_DESC = 28
    F_EVENT_IDX = 29
    F_RING_PACKED = 34
    F_IN_ORDER = 35

include "_ring.pxi"
include "_split.pxi"
include "_packed.pxi"
include "_inflight.pxi"
include "_limit.pxi"
include "_pace.pxi"
include "_request.pxi"


cdef void nudge() noexcept nogil:
    """See _nudge.h: to be called before a write to an eventfd that somebody else shares."""
    hcd_nudge()


cdef ssize_t read_eventfd(int fd, uint64_t *value) noexcept nogil:
    """See _nudge.h: as read(2), never asleep."""
    return hcd_read_eventfd(fd, value)


cdef void nudge_end() noexcept nogil:
    """The calling thread makes no more such calls."""
    hcd_nudge_end()


cdef bint ring_has_work(vring_t *r) noexcept nogil:
    """Whether a look at the ring finds a request. Touches guest memory: only while ``running``."""
    if r.throttled:
        return False
    if r.again:
        return True
    return packed_has_work(r) if r.packed else split_has_work(r)


@cython.no_gc_clear
cdef class Virtqueue:
    """The device's side of one ring. Its owner thread alone touches it, but for ``Request.complete``."""

    def __cinit__(self, int index, DoorbellStats doorbell, QueueStats stats, int max_size=1024):
        self.index = index
        self.doorbell = doorbell
        self.stats = stats
        self.max_size = max_size
        self.n_ops = len(stats.operations)
        self.kick_fd = self.call_fd = self.err_fd = -1
        self.broken = ""
        self.pool = []
        self.remote = []
        self.owner = PyThread_get_thread_ident()
        self.mem = MemoryTable()
        self.pace = Pace()
        self.ring.batch_slot = -1
        self.publish_at = PUBLISH_AT

    def __dealloc__(self):
        # Requests in flight hold a reference to this queue, so there are none left here.
        drop_record(self)

    # -- set-up, on the owner thread

    def own(self):
        """Make the calling thread the owner."""
        self.owner = PyThread_get_thread_ident()

    def set_doorbell(self, DoorbellStats doorbell):
        """Count rings into ``doorbell`` from now on."""
        self.doorbell = doorbell

    def set_memory(self, MemoryTable mem not None):
        """Use ``mem`` for what comes. A ring that it does not hold any more is at rest until a table does."""
        self.mem = mem
        if self.started:
            self.resolve()
        self.update_running()

    def set_kick(self, int fd, bint spurious=False):
        """The kick eventfd, non-blocking, or -1. ``spurious``: its value counts one ring that nobody rang."""
        self.kick_fd = fd
        self.spurious = spurious

    def set_call(self, int fd):
        """The fd to signal interrupts on, or -1. What may have gone nowhere is signalled now.

        That is an interrupt that found no fd, and the last one if it was signalled on another: QEMU hands over an fd
        that nobody reads first, and for vhost-user-scsi the one that counts after the ring was enabled.
        """
        cdef bint again = self.call_owed or (self.call_used and self.started and fd != self.call_fd)
        self.call_fd = fd
        if fd >= 0 and again:
            self.call_owed = False
            self.interrupt()
            self.call_used = False

    def owe_interrupt(self):
        """The driver may lack an interrupt: the next call fd gets one."""
        self.call_owed = True

    def set_err(self, int fd):
        """The fd that tells the front end that the ring broke, or -1."""
        self.err_fd = fd

    def set_inflight(self, Inflight area, bint resume=True):
        """From the next start on, record the requests in flight in ``area``; None: not at all."""
        self.inflight_area = area
        self.resume = resume

    def start(self, uint64_t features, uint32_t size, uint64_t desc, uint64_t driver, uint64_t device, uint32_t base,
              bint big_endian=False):
        """Set the ring up at the front end's addresses; it runs once it is enabled too.

        ``base`` is what SET_VRING_BASE carries: for a split ring the next available index, for a packed one also
        wrap counters and the used position. Raises ProtocolError when the ring is misplaced or not in memory.
        """
        cdef vring_t *r = &self.ring
        drop_record(self)
        self.recovered = 0
        self.unthrottle()
        memset(r, 0, sizeof(vring_t))
        r.batch_slot = -1
        r.packed = (features >> F_RING_PACKED) & 1
        if not 0 < size <= <uint32_t>self.max_size or (not r.packed and size & (size - 1)):
            raise ProtocolError(f"queue {self.index}: a ring of {size} entries; expected "
                                f"{'' if r.packed else 'a power of two '}up to {self.max_size}")
        if desc % 16 or driver % (4 if r.packed else 2) or device % 4:
            raise ProtocolError(f"queue {self.index}: a ring address is misaligned: descriptors {desc:#x}, "
                                f"driver {driver:#x}, device {device:#x}")
        self.feature_bits = features
        r.size = size
        r.event_idx = (features >> F_EVENT_IDX) & 1
        r.indirect = (features >> F_INDIRECT_DESC) & 1
        r.in_order = (features >> F_IN_ORDER) & 1
        self.publish_at = PUBLISH_SOON if r.event_idx else PUBLISH_AT
        r.swap = big_endian and not r.packed
        r.notify = True            # a driver rings until it is asked not to
        self.uva_desc, self.uva_driver, self.uva_device = desc, driver, device
        if not self.resolve():
            raise ProtocolError(f"queue {self.index}: the ring is outside the shared memory: descriptors {desc:#x}, "
                                f"driver {driver:#x}, device {device:#x}, {size} entries")
        self.set_base(base)
        if self.inflight_area is not None:
            attach_record(self)
        self.broken = ""
        self.call_used = False
        self.new_generation()
        self.started = True
        self.update_running()
        if self.call_owed and self.call_fd >= 0:
            self.set_call(self.call_fd)

    def set_base(self, uint32_t base):
        cdef vring_t *r = &self.ring
        if not r.packed:
            r.last_avail = r.avail_seen = <uint16_t>base
            r.next_used = ring16(r, hcd_load16(r.device + 2))
            return
        # DPDK's virtio-user leaves the used half zero; QEMU fills both (facts: 0x00008000 and 0x80008000).
        if base >> 16 == 0 and base & 0x8000:
            base |= base << 16
        # User-mode Linux sends 0 for a new ring too, whose wrap counters are 1 all the same. 0 is also where a ring
        # stands after every second lap; only a new ring has no used mark in it.
        elif base == 0 and not packed_was_used(r):
            base = 0x80008000
        r.last_avail = base & 0x7fff
        r.avail_wrap = (base >> 15) & 1
        r.next_used = (base >> 16) & 0x7fff
        r.used_wrap = base >> 31
        if r.last_avail >= r.size or r.next_used >= r.size:
            raise ProtocolError(f"queue {self.index}: base {base:#x} is outside a ring of {r.size} entries")

    cdef void new_generation(self) noexcept:
        """What is in flight now belongs to a ring that was; what only waits for an older request (IN_ORDER) is done."""
        cdef PyObject *p = self.oldest
        cdef Request r
        while p != NULL:
            r = <Request>p
            p = r.newer
            if r.state == WAITS:
                r.state = DONE
                r.mem = None
                self.unlink(r)
        self.generation += 1
        self.n_stale = self.n_inflight

    cdef bint resolve(self):
        cdef vring_t *r = &self.ring
        cdef uint64_t n = r.size, event = 2 if r.event_idx else 0
        cdef uint64_t driver = 4 if r.packed else 4 + 2 * n + event
        cdef uint64_t device = 4 if r.packed else 4 + 8 * n + event
        r.desc = self.mem.find_user(self.uva_desc, 16 * n)
        r.driver = self.mem.find_user(self.uva_driver, driver)
        r.device = self.mem.find_user(self.uva_device, device)
        if r.desc == NULL or r.driver == NULL or r.device == NULL:
            r.desc = r.driver = r.device = NULL
            return False
        return True

    cdef bint update_running(self):
        self.ring.running = (self.started and self.enabled and not self.halted and self.ring.desc != NULL
                             and not self.broken)
        if not self.ring.running:
            self.unthrottle()
        return self.ring.running

    cdef int unthrottle(self) except -1:
        if self.limit is not None:
            self.limit.release(self)
        return 0

    def set_limit(self, Limit limit):
        """Take no more than ``limit`` allows to all queues that have it; None: as much as there is."""
        self.unthrottle()
        self.limit = limit

    def set_enabled(self, bint enabled):
        self.enabled = enabled
        self.update_running()

    def halt(self):
        """Take no more requests; those in flight may still be completed into the ring."""
        self.halted = True
        self.update_running()

    def stop(self, bint told=False):
        """End the use of the ring; returns its base. Requests still in flight are forgotten when they complete.

        ``told``: the front end learns the base, and says where the next ring begins. So a record that has nothing in
        flight ends here: the next ring may be another one.
        """
        cdef uint32_t base = self.base
        if self.started:
            self.take_remote()
            self.flush_now()
            base = self.base
        self.started = False
        self.halted = False
        self.ring.desc = self.ring.driver = self.ring.device = NULL
        if told and self.n_inflight == 0 and self.ring.unpublished == 0:
            end_record(&self.ring)
        self.ring.unpublished = 0
        drop_record(self)
        self.new_generation()
        self.update_running()
        self.pool.clear()
        return base

    @property
    def base(self):
        """What GET_VRING_BASE answers."""
        cdef vring_t *r = &self.ring
        if not r.packed:
            return r.last_avail
        return r.last_avail | r.avail_wrap << 15 | <uint32_t>r.next_used << 16 | <uint32_t>r.used_wrap << 31

    # -- what it is

    @property
    def resumed(self):
        return self.started and self.base != (0x80008000 if self.ring.packed else 0)

    @property
    def size(self):
        return self.ring.size

    @property
    def features(self):
        return self.feature_bits

    @property
    def running(self):
        return bool(self.ring.running)

    @property
    def is_started(self):
        return self.started

    @property
    def passive(self):
        return bool(self.ring.passive)

    @passive.setter
    def passive(self, bint passive):
        self.ring.passive = passive

    def schedule(self):
        self.scheduler.schedule(self)

    @property
    def inflight(self):
        return self.n_inflight

    @property
    def waiting(self):
        return self.ring.again

    # -- taking requests

    cdef Request fresh(self):
        """A request object that nobody else refers to."""
        cdef Request r
        cdef Py_ssize_t n = PyList_GET_SIZE(self.pool), i
        for i in range(n - 1, n - 4, -1):
            if i < 0:
                break
            if Py_REFCNT(<PyObject *>PyList_GET_ITEM(self.pool, i)) == 1:
                if i != n - 1:
                    self.pool[i], self.pool[n - 1] = self.pool[n - 1], self.pool[i]
                return self.pool.pop()
        r = Request.__new__(Request)
        r.vq = self
        return r

    cdef Request take(self):
        """The next request, None when there is none; wrappers see it first and may keep it."""
        cdef Request r = self.take_next()
        while r is not None and self.on_take is not None and not self.on_take(r):
            r = self.take_next()
        return r

    cdef Request take_next(self):
        cdef Request r
        cdef int got
        if not self.ring.running or not ring_has_work(&self.ring):
            return None
        if self.n_inflight - self.n_stale + self.ring.unpublished >= <int>self.ring.size:
            self.break_ring(f"more chains are made available than the ring of {self.ring.size} holds, while as many "
                            "are in flight")
            return None
        if self.limit is not None and self.limit.on and not self.limit.admit(self):
            return None
        r = self.fresh()
        r.c.n_out = r.c.n_in = 0
        r.c.out_size = r.c.in_size = 0
        r.c.again = False
        if self.ring.again:
            got = pop_again(&self.ring, self.mem, &r.c)
        elif self.ring.packed:
            got = packed_pop(&self.ring, self.mem, &r.c)
        else:
            got = split_pop(&self.ring, self.mem, &r.c)
        if got <= 0:
            self.pool.append(r)
            if got < 0:
                self.break_ring(ERRORS[self.ring.error].format(a=self.ring.error_a, b=self.ring.error_b))
            return None
        r.mem = self.mem
        r.r.i = r.w.i = 0
        r.r.at = r.w.at = 0
        r.r.left = r.c.out_size
        r.w.left = r.c.in_size
        r.state = INFLIGHT
        r.held = False
        r.op = r.status = 0
        r.generation = self.generation
        self.taken += 1
        r.number = self.taken
        r.popped = hcd_now()
        r.woken = self.woken if self.by_ring else 0
        if self.by_ring:
            self.stats.c.found_ring += 1
        else:
            self.stats.c.found_poll += 1
        if self.limit is not None and self.limit.on:
            self.limit.charge(self, 1, <double>(r.c.out_size + r.c.in_size))
        self.link(r)
        return r

    cdef void link(self, Request r) noexcept:
        Py_INCREF(r)
        r.newer = NULL
        r.older = self.newest
        if self.newest != NULL:
            (<Request>self.newest).newer = <PyObject *>r
        else:
            self.oldest = <PyObject *>r
            self.stats.c.oldest = r.popped
        self.newest = <PyObject *>r
        self.current = <PyObject *>r
        self.n_inflight += 1
        self.stats.c.inflight += 1

    cdef void unlink(self, Request r) noexcept:
        if r.older != NULL:
            (<Request>r.older).newer = r.newer
        else:
            self.oldest = r.newer
            self.stats.c.oldest = (<Request>r.newer).popped if r.newer != NULL else 0
        if r.newer != NULL:
            (<Request>r.newer).older = r.older
        else:
            self.newest = r.older
        if self.current == <PyObject *>r:
            self.current = NULL
        self.n_inflight -= 1
        self.n_stale -= r.generation != self.generation
        self.stats.c.inflight -= 1
        hcd_bump(&self.stats.c.version)
        Py_DECREF(r)

    cdef int break_ring(self, str why) except -1:
        cdef uint64_t one = 1
        self.broken = why
        self.update_running()
        self.stats.guest_error()
        if self.err_fd >= 0:
            hcd_nudge()
            write(self.err_fd, &one, 8)
        if self.on_error is not None:
            self.breaking = True
            try:
                self.on_error(self, GuestError(why))
            finally:
                self.breaking = False
        return 0

    def __iter__(self):
        return self

    def __next__(self):
        cdef Request r
        if self.budget <= 0:
            raise StopIteration
        r = self.take()
        if r is None:
            raise StopIteration
        self.budget -= 1 + <int>min((r.c.out_size + r.c.in_size) >> HEAVY, <uint64_t>BUDGET)
        return r

    def pop(self):
        return self.take()

    def pop_many(self, int most):
        cdef Request r
        out = []
        while most > 0:
            r = self.take()
            if r is None:
                break
            out.append(r)
            most -= 1
        return out

    cpdef unpop(self, Request r):
        r.live()
        # The ring goes back by one place: what was taken there last, and is not answered, is all that can be put back.
        if r.vq is not self or r.number != self.taken or r.generation != self.generation:
            raise ValueError("only the request that was taken last can be put back")
        self.taken -= 1
        if self.by_ring:
            self.stats.c.found_ring -= 1
        else:
            self.stats.c.found_poll -= 1
        if self.limit is not None and self.limit.on:
            self.limit.charge(self, -1, -<double>(r.c.out_size + r.c.in_size))
        if r.c.again:
            self.ring.again += 1
        elif self.ring.packed:
            packed_unpop(&self.ring, &r.c)
        else:
            split_unpop(&self.ring, r.c.head)
        r.state = DONE
        r.mem = None
        self.pool.append(r)
        self.unlink(r)

    cpdef bint available(self) except -1:
        return self.ring.running and ring_has_work(&self.ring)

    # -- completing them

    def complete_many(self, requests, int64_t written=-1):
        cdef Request r
        for r in requests:
            r.finish(written)

    cdef int settle(self, Request r, int64_t written) except -1:
        """Complete ``r`` on the owner thread, unless a wrapper holds it back."""
        if self.on_settle is not None:
            r.state = TRAVELS
            r.result = written
            if not self.on_settle(r, written):
                return 0
        return self.settle_now(r, written)

    def settle_held(self, Request r):
        """Complete what ``on_settle`` held back."""
        if r.state == TRAVELS:
            self.settle_now(r, r.result)

    cdef int settle_now(self, Request r, int64_t written) except -1:
        cdef uint64_t now = hcd_now()
        cdef Request next_one
        self.stats.c.requests[r.op * STATUSES + r.status] += 1
        self.stats.c.from_guest += r.c.out_size
        self.stats.c.to_guest += written
        if self.limit is not None and self.limit.on:
            self.limit.charge(self, 0, <double>written - <double>r.c.in_size)
        hist_add(&self.stats.latencies[r.op], now - r.popped)
        if not self.ring.in_order or r.generation != self.generation:
            return self.retire(r, written, now)
        r.state = WAITS
        r.result = written
        next_one = self.oldest_of_ring()
        while next_one is not None and next_one.state == WAITS:
            self.retire(next_one, next_one.result, now)
            next_one = self.oldest_of_ring()
        return 0

    cdef Request oldest_of_ring(self):
        """The oldest request in flight that is not left over from a ring that was."""
        cdef PyObject *p = self.oldest
        while p != NULL and (<Request>p).generation != self.generation:
            p = (<Request>p).newer
        return <Request>p if p != NULL else None

    cdef int retire(self, Request r, int64_t written, uint64_t now) except -1:
        cdef bint current = self.started and r.generation == self.generation
        r.state = DONE
        r.mem = None
        if current and self.ring.device != NULL:
            if self.ring.unpublished == 0:
                self.batch_woken = r.woken
            self.used(r, <uint32_t>written)
        if current and PyList_GET_SIZE(self.pool) < <Py_ssize_t>self.ring.size:
            self.pool.append(r)
        self.unlink(r)
        if self.ring.unpublished >= self.publish_at and not self.corked and not self.put_off(now):
            self.flush_now()
        elif self.ring.unpublished and not self.in_turn and not self.dirty and self.scheduler is not None:
            self.dirty = True
            self.scheduler.flush_later(self)
        if self.n_inflight == 0 and self.halted and self.on_drained is not None:
            self.on_drained(self)
        return 0

    cdef int used(self, Request r, uint32_t written) except -1:
        if self.ring.track != NULL:
            record_done(&self.ring, &r.c, written)
        if not self.ring.packed:
            split_used(&self.ring, r.c.head, written)
            self.ring.unsignalled += 1
        else:
            if self.ring.track == NULL:    # else it is written when it is published
                packed_used(&self.ring, r.c.head, r.c.slots, written)
            self.ring.unsignalled += r.c.slots
        self.ring.unpublished += 1
        self.turn_done += 1
        return 0

    cpdef take_remote(self):
        """Complete what other threads handed over."""
        cdef Request r
        while self.remote:
            batch, self.remote = self.remote, []
            for r in batch:
                if r.state == TRAVELS:
                    self.settle(r, r.result)

    cdef bint put_off(self, uint64_t now) except -1:
        """Whether what is completed in this turn stays unpublished for now; see _pace.pxi."""
        cdef uint64_t took = now - self.turn_began
        cdef uint16_t seen = self.ring.avail_seen - self.ring.last_avail
        if not self.in_turn or self.ring.packed or not self.ring.event_idx or now >= self.pace.until:
            return False
        if self.ring.device == NULL or self.turn_done == 0 or not split_wants_interrupt(&self.ring):
            return False
        # What was seen to wait is often enough, and saves a look at what the driver is writing.
        return (self.pace.holds(now, seen * took / self.turn_done)
                or self.pace.holds(now, split_waiting(&self.ring) * took / self.turn_done))

    cpdef flush(self):
        self.flush_now()

    cdef int flush_now(self) except -1:
        """Let the driver see what was completed, and interrupt it if it wants that."""
        self.dirty = False
        if self.ring.unpublished == 0 or self.ring.device == NULL:
            return 0
        if self.ring.track != NULL:
            if self.ring.packed:
                packed_record_publish(&self.ring)
            else:
                split_record_publish(&self.ring)
        elif self.ring.packed:
            packed_publish(&self.ring)
        else:
            split_publish(&self.ring)
        self.ring.unpublished = 0
        return self.signal()

    cdef int signal(self) except -1:
        cdef bint wanted
        cdef uint64_t began, now
        hcd_fence()
        wanted = packed_wants_interrupt(&self.ring) if self.ring.packed else split_wants_interrupt(&self.ring)
        self.ring.unsignalled = 0
        self.ring.signalled_valid = True
        if not wanted:
            self.stats.c.suppressed += 1
            hcd_bump(&self.stats.c.version)
            return 0
        began = hcd_now()
        self.interrupt()
        now = hcd_now()
        self.pace.made(began, now)
        if self.batch_woken:
            hist_add(&self.doorbell.c_response, now - self.batch_woken)
            hcd_bump(&self.doorbell.version)
        return 0

    cdef int interrupt(self) except -1:
        cdef uint64_t one = 1
        cdef ssize_t n = 0
        if self.call_fd >= 0:
            hcd_nudge()
            n = write(self.call_fd, &one, 8)
        if self.call_fd < 0:
            self.stats.c.absent += 1
            self.call_owed = True
        elif n == 8:
            self.stats.c.sent += 1
            self.call_used = True
        elif n < 0 and errno == EAGAIN:
            self.stats.c.pending += 1
        elif n < 0 and errno == EINTR:
            self.stats.c.pending += 1
            hcd_bump(&self.stats.c.version)
            self.call_fd = -1
            self.call_used = False
            return self.break_ring("the front end made the call eventfd block")
        else:
            self.stats.c.absent += 1
        hcd_bump(&self.stats.c.version)
        return 0

    # -- rings and turns, for the lane that owns the queue

    cpdef uint64_t read_kick(self) except? 0xffffffffffffffff:
        """Read the kick eventfd; the number of rings since the last look, 0 when there was none."""
        cdef uint64_t value = 0
        cdef ssize_t n
        if self.kick_fd < 0:
            return 0
        n = hcd_read_eventfd(self.kick_fd, &value)
        if n != 8:
            if n < 0 and errno == EAGAIN:
                return 0
            if n < 0 and errno == EINTR:
                self.break_ring("the front end made the kick eventfd block")
                return 0
            self.break_ring(f"the kick fd fails: {os.strerror(errno) if n < 0 else 'it was closed'}")
            return 0
        if self.spurious:
            self.spurious = False
            value -= 1
        if value:
            self.doorbell.c_rings += value
            self.doorbell.c_wakeups += 1
            hcd_bump(&self.doorbell.version)
        return value

    cpdef begin_turn(self, uint64_t woken, bint by_ring, bint batch=True):
        """The handler is about to run. ``woken`` is when its cause was seen (CLOCK_MONOTONIC, ns).

        ``batch``: completions become visible at the end of the turn; without it, soon after each.
        """
        self.in_turn = batch
        self.publish_at = self.batch_size()
        self.budget = BUDGET
        self.turn_began = hcd_now()
        self.turn_done = 0
        self.woken = woken
        self.by_ring = by_ring
        self.had_work = self.ring.running and ring_has_work(&self.ring)
        self.found = self.stats.c.found_ring + self.stats.c.found_poll
        if by_ring:
            hist_add(&self.doorbell.c_dispatch, self.turn_began - woken)
            hcd_bump(&self.doorbell.version)

    cpdef bint stalled(self) except -1:
        """The handler took no request in this turn, although the ring holds some and the queue is not passive: it
        would get one turn after the other for nothing."""
        return (
            self.had_work and self.ring.running and not self.ring.passive and ring_has_work(&self.ring)
            and self.found == self.stats.c.found_ring + self.stats.c.found_poll
        )

    cdef uint32_t batch_size(self) noexcept:
        """After how many completions to publish. With EVENT_IDX an early publication costs one interrupt at most, and
        the driver takes up the first half of a short ring while the other half is served."""
        cdef uint32_t waiting
        if not self.ring.event_idx or not self.ring.running:
            return PUBLISH_AT
        if self.ring.packed:
            return PUBLISH_SOON
        waiting = <uint16_t>(ring16(&self.ring, hcd_load16(self.ring.driver + 2)) - self.ring.last_avail)
        if waiting >= 2 * PUBLISH_SOON:
            return PUBLISH_SOON
        return waiting / 2 if waiting >= 4 else 2

    cpdef end_turn(self):
        """The handler returned: publish what it completed."""
        self.in_turn = False
        self.budget = 0
        self.by_ring = False       # what is taken outside a turn was not rung for
        self.flush_now()

    def unfinished(self):
        """The request that the handler took last, if it is neither completed nor held; else None. None as well while
        ``on_error`` hears that the ring broke: a handler that looked for one more request has still to end those that
        it has."""
        if self.breaking or self.current == NULL:
            return None
        if (<Request>self.current).held or (<Request>self.current).state != INFLIGHT:
            return None
        return <Request>self.current

    def lost(self):
        """Requests in flight that nobody refers to any more: their handler forgot them. Oldest first."""
        cdef PyObject *p = self.oldest
        found = []
        while p != NULL:
            if Py_REFCNT(p) == 1 and (<Request>p).state == INFLIGHT:
                found.append(<Request>p)
            p = (<Request>p).newer
        return found

    def older_than(self, uint64_t ns):
        """How many requests have been in flight for longer than ``ns`` nanoseconds."""
        cdef PyObject *p = self.oldest
        cdef uint64_t now = hcd_now()
        cdef int n = 0
        while p != NULL and (<Request>p).popped + ns < now:
            n += 1
            p = (<Request>p).newer
        return n

    cpdef bint enable_kicks(self) except -1:
        """Ask the driver to ring; returns whether requests came in meanwhile, which it may not ring for."""
        if not self.ring.running or self.ring.throttled:
            return False
        if self.ring.passive:
            # The event index after the last request taken would pass those that wait: no kick for the next one.
            if self.ring.packed:
                packed_ask_next_kick(&self.ring)
            else:
                split_ask_next_kick(&self.ring)
            self.ring.notify = True
        else:
            self.ask_kicks(True)
        hcd_fence()
        return ring_has_work(&self.ring)

    cpdef disable_kicks(self):
        """Ask the driver not to ring: the ring is looked at anyway."""
        if self.ring.running and self.ring.notify:
            self.ask_kicks(False)

    cdef int ask_kicks(self, bint on) except -1:
        if self.ring.packed:
            packed_ask_kicks(&self.ring, on)
        else:
            split_ask_kicks(&self.ring, on)
        self.ring.notify = on
        return 0
