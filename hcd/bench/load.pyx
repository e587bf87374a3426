# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The compiled load loop: a driver that keeps block requests in flight on the rings of a Frontend.

It has to be cheap next to what it measures, so each in-flight request owns a slot: three descriptors, a header, a data
buffer and a status byte that never move. Submitting one again is writing the sector and an available entry. Rings are
driven as Linux drives them: completions are taken until none is left, resubmitted together, published once, and the
device is rung if it asked for that. Asleep, the loop waits on the call eventfds.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from hcd.dataplane._atomics cimport (
    hcd_fence,
    hcd_load16,
    hcd_load16_acquire,
    hcd_now,
    hcd_relax,
    hcd_store16,
    hcd_store16_release,
)
from hcd.dataplane.stats cimport Histogram, hist_add, hist_t

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout)
    short POLLIN

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *buf, size_t n)
    ssize_t write(int fd, const void *buf, size_t n)

cdef enum:
    NEXT = 1
    WRITE = 2
    AVAIL = 0x80
    USED = 0x8000
    SECTOR = 512
    MAX_QUEUES = 64
    STALL_MS = 5000

READ, WRITE_ALL, MIX = 0, 1, 2


ctypedef struct desc_t:
    uint64_t addr
    uint32_t len
    uint16_t a                # split: flags; packed: id
    uint16_t b                # split: next;  packed: flags

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

ctypedef struct queue_t:
    uint32_t size
    bint packed
    bint event_idx
    desc_t *desc
    char *driver
    char *device
    int kick
    int call
    uint16_t next_avail       # split: index; packed: slot
    uint16_t published
    uint16_t last_used
    bint avail_wrap
    bint used_wrap
    uint16_t batch            # packed: chains since the last publication
    int head                  # packed: first slot of the unpublished batch, -1
    uint16_t head_flags
    uint16_t asked            # where the device was asked to be rung for last
    slot_t *slots
    uint64_t kicks
    uint64_t calls
    uint64_t requests
    uint64_t errors
    uint64_t mismatches


cdef inline uint64_t xorshift(uint64_t *state) noexcept nogil:
    cdef uint64_t x = state[0]
    x ^= x << 13
    x ^= x >> 7
    x ^= x << 17
    state[0] = x
    return x


cdef inline bint need_event(uint16_t event, uint16_t new, uint16_t old) noexcept nogil:
    return <uint16_t>(new - event - 1) < <uint16_t>(new - old)


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


cdef inline uint16_t packed_flags(queue_t *q, uint16_t flags) noexcept nogil:
    return flags | (AVAIL if q.avail_wrap else USED)


cdef inline void packed_put(queue_t *q, uint64_t addr, uint32_t length, uint16_t ident, uint16_t flags,
                            bint first) noexcept nogil:
    cdef desc_t *d = &q.desc[q.next_avail]
    d.addr = addr
    d.len = length
    d.a = ident
    flags = packed_flags(q, flags)
    if first and q.head < 0:
        q.head = q.next_avail
        q.head_flags = flags
    else:
        hcd_store16_release(&d.b, flags)
    q.next_avail += 1
    if q.next_avail == q.size:
        q.next_avail = 0
        q.avail_wrap = not q.avail_wrap


cdef void submit(queue_t *q, uint32_t i, uint32_t size) noexcept nogil:
    """Make slot ``i`` available; its header is filled in."""
    cdef slot_t *s = &q.slots[i]
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


cdef void publish(queue_t *q) noexcept nogil:
    """Let the device see what was submitted, and ring if it asked for that."""
    cdef uint64_t one = 1
    cdef bint ring
    cdef uint16_t old, off_wrap, event, flags
    if q.packed:
        if q.head < 0:
            return
        hcd_store16_release(&q.desc[q.head].b, q.head_flags)
        q.head = -1
        hcd_fence()
        flags = hcd_load16_acquire(q.device + 2)
        off_wrap = hcd_load16(q.device)
        old = <uint16_t>(q.next_avail - q.batch)
        q.batch = 0
        ring = flags == 0
        if flags == 2:
            event = off_wrap & 0x7fff
            if (off_wrap >> 15) != q.avail_wrap:
                event -= q.size
            ring = need_event(event, q.next_avail, old)
    else:
        if q.published == q.next_avail:
            return
        old = q.published
        q.published = q.next_avail
        hcd_store16_release(q.driver + 2, q.next_avail)
        hcd_fence()
        if q.event_idx:
            ring = need_event(hcd_load16(q.device + 4 + 8 * q.size), q.next_avail, old)
        else:
            ring = not hcd_load16(q.device) & 1
    if ring:
        write(q.kick, &one, 8)
        q.kicks += 1


cdef int take(queue_t *q) noexcept nogil:
    """The slot of one used chain, or -1."""
    cdef uint16_t flags
    cdef desc_t *d
    cdef uint32_t ident
    if q.packed:
        d = &q.desc[q.last_used]
        flags = hcd_load16_acquire(&d.b)
        if ((flags & AVAIL) != 0) != q.used_wrap or ((flags & USED) != 0) != q.used_wrap:
            return -1
        ident = d.a
        q.last_used += 3
        if q.last_used >= q.size:
            q.last_used -= q.size
            q.used_wrap = not q.used_wrap
        return ident
    if hcd_load16_acquire(q.device + 2) == q.last_used:
        return -1
    memcpy(&ident, q.device + 4 + 8 * (q.last_used & (q.size - 1)), 4)
    q.last_used += 1
    return ident / 3


cdef bint arm(queue_t *q) noexcept nogil:
    """Ask for a call at the next used chain; whether one is there already."""
    if q.packed:
        hcd_store16(q.driver, q.last_used | (0x8000 if q.used_wrap else 0))
        hcd_store16_release(q.driver + 2, 2 if q.event_idx else 0)
    elif q.event_idx:
        hcd_store16(q.driver + 4 + 2 * q.size, q.last_used)
    else:
        hcd_store16(q.driver, 0)
    hcd_fence()
    if q.packed:
        return packed_used(q)
    return hcd_load16(q.device + 2) != q.last_used


cdef inline bint packed_used(queue_t *q) noexcept nogil:
    cdef uint16_t flags = hcd_load16(&q.desc[q.last_used].b)
    return ((flags & AVAIL) != 0) == q.used_wrap and ((flags & USED) != 0) == q.used_wrap


cdef void disarm(queue_t *q) noexcept nogil:
    if q.packed:
        hcd_store16(q.driver + 2, 1)
    elif not q.event_idx:
        hcd_store16(q.driver, 1)


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
    cdef hist_t latencies
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
        q.size = ring.size
        q.packed = ring.packed
        q.event_idx = ring.event_idx
        q.desc = <desc_t *>self.address(memory, ring.desc, 16 * ring.size)
        q.driver = self.address(memory, ring.driver, 4 if ring.packed else 6 + 2 * ring.size)
        q.device = self.address(memory, ring.device, 4 if ring.packed else 6 + 8 * ring.size)
        q.kick, q.call = queue.kick_fd, queue.call_fd
        q.avail_wrap = q.used_wrap = True
        q.head = -1
        q.slots = <slot_t *>calloc(self.depth, sizeof(slot_t))
        if q.slots == NULL:
            raise MemoryError
        for i in range(self.depth):
            self.make_slot(q, memory, i)
        return 0

    cdef int make_slot(self, queue_t *q, memory, uint32_t i) except -1:
        cdef slot_t *s = &q.slots[i]
        s.gpa_header = memory.alloc(64, 64)
        s.gpa_data = memory.alloc(self.size, 4096)
        s.gpa_status = s.gpa_header + 32
        s.header = self.address(memory, s.gpa_header, 64)
        s.data = self.address(memory, s.gpa_data, self.size)
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

    cdef char *address(self, memory, uint64_t gpa, uint64_t size) except NULL:
        cdef uint8_t[::1] view = memory.view(gpa, size)
        self.keep.append(view)
        return <char *>&view[0]

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
        cdef slot_t *s
        cdef uint64_t now
        while True:
            i = take(q)
            if i < 0:
                break
            s = &q.slots[i]
            now = hcd_now()
            hist_add(&self.latencies, now - s.submitted)
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
        with nogil:
            for i in range(self.n):
                q = &self.queues[i]
                for k in range(self.depth):
                    if left != NULL:
                        if left[0] == 0:
                            break
                        left[0] -= 1
                        self.prepare(&q.slots[k], left[0])
                    else:
                        self.prepare(&q.slots[k], -1)
                    q.slots[k].submitted = hcd_now()
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
                if self.queues[i].slots[k].submitted > newest:
                    newest = self.queues[i].slots[k].submitted
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
        memset(&self.latencies, 0, sizeof(hist_t))
        for i in range(self.n):
            self.queues[i].requests = self.queues[i].kicks = self.queues[i].calls = 0

    def latency(self):
        """A histogram of the latencies."""
        return Histogram.view(&self.latencies, self)

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
