# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The compiled load loop: a driver that keeps block requests in flight on the rings of a Frontend.

It has to be cheap next to what it measures, so each in-flight request owns a slot: three descriptors, a header, a data
buffer and a status byte that never move. Submitting one again is writing the sector and an available entry. Rings are
driven as Linux drives them: completions are taken until none is left, resubmitted together, published once, and the
device is rung if it asked for that. Asleep, the loop waits on the call eventfds.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

include "_driver.pxi"

cdef enum:
    SECTOR = 512

READ, WRITE_ALL, MIX = 0, 1, 2


ctypedef struct slot_t:
    uint64_t submitted        # CLOCK_MONOTONIC, ns
    uint64_t offset           # in the disk, bytes
    char *header
    char *data
    uint8_t *status
    uint64_t gpa_header
    uint64_t gpa_data
    uint64_t gpa_status
    bint reads


cdef inline slot_t *slots(queue_t *q) noexcept nogil:
    return <slot_t *>q.slots


cdef void fill_pattern(char *data, uint64_t offset, uint64_t size) noexcept nogil:
    cdef uint64_t i, word
    for i in range(size / 8):
        word = (offset + 8 * i) * <uint64_t>0x9E3779B97F4A7C15
        memcpy(data + 8 * i, &word, 8)


cdef bint has_pattern(const char *data, uint64_t offset, uint64_t size) noexcept nogil:
    cdef uint64_t i, word, found
    for i in range(size / 8):
        word = (offset + 8 * i) * <uint64_t>0x9E3779B97F4A7C15
        memcpy(&found, data + 8 * i, 8)
        if found != word:
            return False
    return True


cdef void submit(queue_t *q, uint32_t i, uint32_t size) noexcept nogil:
    """Make slot ``i`` available; its header is filled in."""
    cdef slot_t *s = &slots(q)[i]
    cdef uint16_t data_flags = NEXT | (WRITE if s.reads else 0)
    s.status[0] = 0xff
    if q.packed:
        packed_put(q, s.gpa_header, 16, i, NEXT, True)
        packed_put(q, s.gpa_data, size, i, data_flags, False)
        packed_put(q, s.gpa_status, 1, i, WRITE, False)
        q.batch += 3
        return
    q.desc[3 * i + 1].a = data_flags
    hcd_store16(q.driver + 4 + 2 * (q.next_avail & (q.size - 1)), 3 * i)
    q.next_avail += 1


cdef class BlkLoad:
    """Block requests of one size on some queues of a started Frontend.

    ``span``: bytes of the disk that are touched, from 0. ``rw``: READ, WRITE_ALL or MIX (half and half).
    """

    cdef queue_t queues[MAX_QUEUES]
    cdef int n
    cdef uint32_t depth
    cdef uint32_t size
    cdef uint64_t blocks
    cdef int rw
    cdef bint polls
    cdef bint verifies
    cdef uint64_t random
    cdef latencies_t latencies
    cdef uint64_t last            # when the last request was done
    cdef uint64_t gap             # the longest time between two that were done one after the other
    cdef list keep

    def __cinit__(self, queues, int depth, int size, uint64_t span, int rw, bint polls, bint verifies, uint64_t seed=1):
        if not 1 <= len(queues) <= MAX_QUEUES:
            raise ValueError(f"1 to {MAX_QUEUES} queues")
        self.n = len(queues)
        self.depth = depth
        self.size = size
        self.blocks = span / size
        self.rw = rw
        self.polls = polls
        self.verifies = verifies
        self.random = seed * <uint64_t>0x9E3779B97F4A7C15 + 1
        self.keep = []
        for i, queue in enumerate(queues):
            self.adopt(&self.queues[i], queue)

    def __dealloc__(self):
        cdef int i
        for i in range(self.n):
            free(self.queues[i].slots)

    cdef int adopt(self, queue_t *q, queue) except -1:
        ring, memory = queue.ring, queue.ring.memory
        cdef uint32_t i
        if 3 * self.depth > ring.size:
            raise ValueError(f"depth {self.depth} needs a ring of {3 * self.depth} entries, this one has {ring.size}")
        adopt_ring(q, queue, self.keep)
        q.slots = calloc(self.depth, sizeof(slot_t))
        if q.slots == NULL:
            raise MemoryError
        for i in range(self.depth):
            self.make_slot(q, memory, i)
        return 0

    cdef int make_slot(self, queue_t *q, memory, uint32_t i) except -1:
        cdef slot_t *s = &slots(q)[i]
        s.gpa_header = memory.alloc(64, 64)
        s.gpa_data = memory.alloc(self.size, 4096)
        s.gpa_status = s.gpa_header + 32
        s.header = address(self.keep, memory, s.gpa_header, 64)
        s.data = address(self.keep, memory, s.gpa_data, self.size)
        s.status = <uint8_t *>s.header + 32
        if not q.packed:
            self.describe(&q.desc[3 * i], s.gpa_header, 16, NEXT, 3 * i + 1)
            self.describe(&q.desc[3 * i + 1], s.gpa_data, self.size, NEXT, 3 * i + 2)
            self.describe(&q.desc[3 * i + 2], s.gpa_status, 1, WRITE, 0)
        return 0

    cdef void describe(self, desc_t *d, uint64_t addr, uint32_t length, uint16_t flags, uint16_t follows) noexcept:
        d.addr = addr
        d.len = length
        d.a = flags
        d.b = follows

    cdef void prepare(self, slot_t *s, int64_t sequential) noexcept nogil:
        """The next request of a slot: ``sequential`` names the block, -1: a random one."""
        cdef uint64_t random = xorshift(&self.random)
        cdef uint64_t block = <uint64_t>sequential if sequential >= 0 else random % self.blocks
        cdef uint32_t kind
        cdef uint64_t sector
        s.offset = block * self.size
        s.reads = self.rw == 0 or (self.rw == 2 and (random >> 40) & 1)
        kind = 0 if s.reads else 1
        sector = s.offset / SECTOR
        memcpy(s.header, &kind, 4)
        memcpy(s.header + 8, &sector, 8)
        if self.verifies and not s.reads:
            fill_pattern(s.data, s.offset, self.size)

    cdef int reap(self, queue_t *q, uint64_t deadline, uint64_t *left) noexcept nogil:
        """Take what is used; submit as many again while time (``deadline``) or blocks (``left``) last."""
        cdef int i, n = 0
        cdef uint32_t written
        cdef slot_t *s
        cdef uint64_t now
        while True:
            i = take(q, 3, &written)
            if i < 0:
                break
            s = &slots(q)[i]
            now = hcd_now()
            note(&self.latencies, now - s.submitted)
            if now - self.last > self.gap:
                self.gap = now - self.last
            self.last = now
            q.requests += 1
            if s.status[0] != 0:
                q.errors += 1
            elif self.verifies and s.reads and not has_pattern(s.data, s.offset, self.size):
                q.mismatches += 1
            n += 1
            if left != NULL:
                if left[0] == 0:
                    continue
                left[0] -= 1
                self.prepare(s, left[0])
            elif now < deadline:
                self.prepare(s, -1)
            else:
                continue
            s.submitted = now
            submit(q, i, self.size)
        return n

    def run(self, double seconds):
        """Load for ``seconds``; raises TimeoutError when the device stops answering."""
        self.drive(hcd_now() + <uint64_t>(seconds * 1e9), NULL)

    def sweep(self, int rw):
        """Read or write every block of the span once."""
        cdef uint64_t left = self.blocks
        cdef int before = self.rw
        self.rw = rw
        self.drive(0, &left)
        self.rw = before

    cdef int drive(self, uint64_t deadline, uint64_t *left) except -1:
        cdef int i, busy, failed = 0
        cdef uint32_t k
        cdef int64_t inflight = 0
        cdef uint64_t now = hcd_now(), idle
        cdef queue_t *q
        self.last = now
        with nogil:
            for i in range(self.n):
                q = &self.queues[i]
                for k in range(self.depth):
                    if left != NULL:
                        if left[0] == 0:
                            break
                        left[0] -= 1
                        self.prepare(&slots(q)[k], left[0])
                    else:
                        self.prepare(&slots(q)[k], -1)
                    slots(q)[k].submitted = hcd_now()
                    submit(q, k, self.size)
                    inflight += 1
                publish(q)
            idle = 0
            while inflight > 0:
                busy = 0
                for i in range(self.n):
                    q = &self.queues[i]
                    inflight -= self.outstanding_change(q, deadline, left, &busy)
                if busy:
                    idle = 0
                elif self.polls:
                    hcd_relax()
                    idle += 1
                    if idle % 65536 == 0 and self.stalled():
                        failed = 1
                        break
                else:
                    failed = self.sleep()
                    if failed:
                        break
        if failed:
            raise TimeoutError(f"the device did not answer for {STALL_MS / 1000:g} s; {inflight} requests are in flight")
        return 0

    cdef int outstanding_change(self, queue_t *q, uint64_t deadline, uint64_t *left, int *busy) noexcept nogil:
        """One round of a queue; returns by how many its requests in flight went down."""
        cdef uint16_t before = q.next_avail
        cdef uint16_t batch = q.batch
        cdef int n = self.reap(q, deadline, left), again
        if n == 0:
            return 0
        busy[0] = 1
        again = (q.batch - batch) / 3 if q.packed else <uint16_t>(q.next_avail - before)
        publish(q)
        return n - again

    cdef bint stalled(self) noexcept nogil:
        cdef int i
        cdef uint32_t k
        cdef uint64_t newest = 0
        for i in range(self.n):
            for k in range(self.depth):
                if slots(&self.queues[i])[k].submitted > newest:
                    newest = slots(&self.queues[i])[k].submitted
        return hcd_now() - newest > <uint64_t>STALL_MS * 1000000

    cdef int sleep(self) noexcept nogil:
        """Wait for a call; 1: none came for too long."""
        cdef pollfd fds[MAX_QUEUES]
        cdef uint64_t value
        cdef int i, n
        for i in range(self.n):
            if arm(&self.queues[i]):
                return 0
            fds[i].fd = self.queues[i].call
            fds[i].events = POLLIN
            fds[i].revents = 0
        n = poll(fds, self.n, STALL_MS)
        if n < 0 and errno == EINTR:
            return 0
        for i in range(self.n):
            disarm(&self.queues[i])
            if fds[i].revents and read(fds[i].fd, &value, 8) == 8:
                self.queues[i].calls += value
        return n <= 0

    def forget(self):
        """Start counting anew: what came so far was the warm-up."""
        cdef int i
        memset(&self.latencies, 0, sizeof(latencies_t))
        self.gap = 0
        for i in range(self.n):
            self.queues[i].requests = self.queues[i].kicks = self.queues[i].calls = 0

    def quantile(self, double q):
        """Of the latencies, in seconds."""
        return quantile_of(&self.latencies, q) / 1e9

    def longest_gap(self):
        """The longest time without any request being done, in seconds."""
        return self.gap / 1e9

    def counts(self):
        """requests, errors, mismatches, kicks, calls; summed over the queues."""
        cdef int i
        out = {"requests": 0, "errors": 0, "mismatches": 0, "kicks": 0, "calls": 0}
        for i in range(self.n):
            out["requests"] += self.queues[i].requests
            out["errors"] += self.queues[i].errors
            out["mismatches"] += self.queues[i].mismatches
            out["kicks"] += self.queues[i].kicks
            out["calls"] += self.queues[i].calls
        return out
