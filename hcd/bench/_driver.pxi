# The driver's side of a ring, compiled: what the load loops of hcd bench have in common.
#
# A load uses chains of one length only, and slot i of a split ring always has the same descriptors, so that nothing is
# allocated. Rings are driven as Linux drives them: submit some, publish once, ring if the device asked for that.

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from hcd.dataplane._atomics cimport (
    hcd_fence,
    hcd_load16,
    hcd_load16_acquire,
    hcd_log2,
    hcd_now,
    hcd_relax,
    hcd_store16,
    hcd_store16_release,
)

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
    MAX_QUEUES = 64
    STALL_MS = 5000
    FINE = 32                 # buckets per power of two of the latencies: 3 % wide
    BUCKETS = 1280            # up to 2**40 ns


ctypedef struct desc_t:
    uint64_t addr
    uint32_t len
    uint16_t a                # split: flags; packed: id
    uint16_t b                # split: next;  packed: flags

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
    void *slots               # what the load keeps of each chain in flight
    uint64_t kicks
    uint64_t calls
    uint64_t requests
    uint64_t errors
    uint64_t mismatches


ctypedef struct latencies_t:
    uint64_t count
    uint64_t counts[BUCKETS]


cdef inline void note(latencies_t *h, uint64_t ns) noexcept nogil:
    """Count one latency."""
    cdef int power
    cdef uint64_t i = ns
    if ns >= FINE:
        power = hcd_log2(ns) - 5
        i = <uint64_t>power * FINE + (ns >> power)
    if i >= BUCKETS:
        i = BUCKETS - 1
    h.counts[i] += 1
    h.count += 1


cdef double quantile_of(latencies_t *h, double q) noexcept:
    """The middle of the bucket in which quantile ``q`` lies, in ns; 0 without any."""
    cdef uint64_t i, seen = 0, power
    cdef double rank = q * h.count
    for i in range(BUCKETS):
        seen += h.counts[i]
        if h.counts[i] and seen >= rank:
            if i < FINE:
                return i
            power = i / FINE - 1
            return (<double>(i % FINE + FINE) + 0.5) * <double>(<uint64_t>1 << power)
    return 0.0


cdef inline uint64_t xorshift(uint64_t *state) noexcept nogil:
    cdef uint64_t x = state[0]
    x ^= x << 13
    x ^= x >> 7
    x ^= x << 17
    state[0] = x
    return x


cdef inline bint need_event(uint16_t event, uint16_t new, uint16_t old) noexcept nogil:
    return <uint16_t>(new - event - 1) < <uint16_t>(new - old)


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


cdef inline int take(queue_t *q, uint32_t chain, uint32_t *written) noexcept nogil:
    """The slot of one used chain of ``chain`` descriptors, or -1; what the device wrote goes to ``written``."""
    cdef uint16_t flags
    cdef desc_t *d
    cdef uint32_t used[2]
    if q.packed:
        d = &q.desc[q.last_used]
        flags = hcd_load16_acquire(&d.b)
        if ((flags & AVAIL) != 0) != q.used_wrap or ((flags & USED) != 0) != q.used_wrap:
            return -1
        used[0] = d.a
        written[0] = d.len
        q.last_used += chain
        if q.last_used >= q.size:
            q.last_used -= q.size
            q.used_wrap = not q.used_wrap
        return used[0]
    if hcd_load16_acquire(q.device + 2) == q.last_used:
        return -1
    memcpy(used, q.device + 4 + 8 * (q.last_used & (q.size - 1)), 8)
    q.last_used += 1
    written[0] = used[1]
    return used[0] / chain


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


cdef char *address(list keep, memory, uint64_t gpa, uint64_t size) except NULL:
    """Where ``size`` bytes of guest memory are; ``keep`` holds the view that keeps them there."""
    cdef uint8_t[::1] view = memory.view(gpa, size)
    keep.append(view)
    return <char *>&view[0]


cdef int adopt_ring(queue_t *q, queue, list keep) except -1:
    """Take over the ring of a hcd.frontend.queue.Queue that was started and never used."""
    ring, memory = queue.ring, queue.ring.memory
    q.size = ring.size
    q.packed = ring.packed
    q.event_idx = ring.event_idx
    q.desc = <desc_t *>address(keep, memory, ring.desc, 16 * ring.size)
    q.driver = address(keep, memory, ring.driver, 4 if ring.packed else 6 + 2 * ring.size)
    q.device = address(keep, memory, ring.device, 4 if ring.packed else 6 + 8 * ring.size)
    q.kick, q.call = queue.kick_fd, queue.call_fd
    q.avail_wrap = q.used_wrap = True
    q.head = -1
    return 0
