# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The compiled load loop of ``hcd bench net``: frames go in at one port and are looked at where they come out.

A flow is a transmit queue and the receive queue at the other end. It keeps up to ``depth`` frames between the two: more
would only measure how fast frames are thrown away. So a frame carries the number of its place in the flow; a number
that was skipped is a frame that was dropped, and makes room in the window at once. When nothing arrives for a while,
the whole window counts as dropped.

A flow without a receive queue sends as fast as the back end takes frames.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

include "_driver.pxi"

cdef enum:
    ETHERNET = 14
    SEQUENCE = 14             # where the number stands in a frame
    PAYLOAD = 22
    MOST_HEADER = 12
    FLOWS = 2
    STAMPS = 65536            # more than any window
    LOST_NS = 200000000       # a window that nothing came out of for so long is lost


ctypedef struct flow_t:
    queue_t tx
    queue_t rx
    bint receives
    char **frames             # of each transmit slot: header, then the frame
    char **buffers            # of each receive slot
    uint64_t *gpa_frames
    uint64_t *gpa_buffers
    uint32_t *idle            # transmit slots that are free
    uint32_t n_idle
    uint64_t *stamps          # when number n was sent, at n modulo STAMPS
    uint64_t next             # number of the next frame
    uint64_t expected         # number of the next one to arrive
    uint64_t most             # stop at this number
    uint64_t heard            # when one arrived last
    uint64_t sent             # counted since forget()
    uint64_t received
    uint64_t dropped
    uint64_t wrong
    uint64_t strangers        # frames of somebody else


cdef void fill_payload(char *frame, uint32_t size, uint64_t number) noexcept nogil:
    cdef uint32_t i
    for i in range(PAYLOAD, size):
        frame[i] = <char>(number + i)


cdef bint has_payload(const char *frame, uint32_t size, uint64_t number) noexcept nogil:
    cdef uint32_t i
    for i in range(PAYLOAD, size):
        if frame[i] != <char>(number + i):
            return False
    return True


cdef class NetLoad:
    """Frames of one size. ``flows``: (transmit queue, receive queue or None, destination, source) each, queues of a
    started Frontend that were not used yet, addresses of six bytes. ``header``: bytes of the virtio header.
    """

    cdef flow_t flows[FLOWS]
    cdef int n
    cdef uint32_t depth
    cdef uint32_t size
    cdef uint32_t header
    cdef bint polls
    cdef bint verifies
    cdef latencies_t latencies
    cdef list keep

    def __cinit__(self, flows, int depth, int size, int header, bint polls, bint verifies):
        if not 1 <= len(flows) <= FLOWS:
            raise ValueError(f"1 to {FLOWS} flows")
        if size < PAYLOAD:
            raise ValueError(f"frames of {size} bytes; at least {PAYLOAD} are needed")
        if not 0 < header <= MOST_HEADER:
            raise ValueError(f"a header of {header} bytes")
        self.n = len(flows)
        self.depth = depth
        self.size = size
        self.header = header
        self.polls = polls
        self.verifies = verifies
        self.keep = []
        for i, (tx, rx, destination, source) in enumerate(flows):
            self.adopt(&self.flows[i], tx, rx, destination, source)

    def __dealloc__(self):
        cdef int i
        for i in range(self.n):
            free(self.flows[i].frames)
            free(self.flows[i].buffers)
            free(self.flows[i].gpa_frames)
            free(self.flows[i].gpa_buffers)
            free(self.flows[i].idle)
            free(self.flows[i].stamps)

    # -- setting up

    cdef int adopt(self, flow_t *f, tx, rx, destination, source) except -1:
        cdef bytes ethernet = bytes(destination) + bytes(source) + b"\x88\xb5"
        cdef uint32_t i
        if len(ethernet) != ETHERNET:
            raise ValueError("addresses have six bytes")
        if self.depth > tx.ring.size:
            raise ValueError(f"depth {self.depth} needs a ring of as many entries, this one has {tx.ring.size}")
        adopt_ring(&f.tx, tx, self.keep)
        f.stamps = <uint64_t *>calloc(STAMPS, 8)
        f.idle = <uint32_t *>calloc(self.depth, 4)
        f.frames = <char **>calloc(self.depth, sizeof(char *))
        f.gpa_frames = <uint64_t *>calloc(self.depth, 8)
        if f.stamps == NULL or f.idle == NULL or f.frames == NULL or f.gpa_frames == NULL:
            raise MemoryError
        for i in range(self.depth):
            f.frames[i] = self.make_buffer(&f.tx, tx.ring.memory, i, self.header + self.size, 0, &f.gpa_frames[i])
            memset(f.frames[i], 0, self.header)
            memcpy(f.frames[i] + self.header, <const char *>ethernet, ETHERNET)
            f.idle[i] = i
        f.n_idle = self.depth
        f.receives = rx is not None
        if f.receives:
            self.adopt_receiver(f, rx)
        return 0

    cdef int adopt_receiver(self, flow_t *f, rx) except -1:
        cdef uint32_t i
        adopt_ring(&f.rx, rx, self.keep)
        f.buffers = <char **>calloc(f.rx.size, sizeof(char *))
        f.gpa_buffers = <uint64_t *>calloc(f.rx.size, 8)
        if f.buffers == NULL or f.gpa_buffers == NULL:
            raise MemoryError
        for i in range(f.rx.size):
            f.buffers[i] = self.make_buffer(&f.rx, rx.ring.memory, i, self.room(), WRITE, &f.gpa_buffers[i])
            self.offer(f, i)
        publish(&f.rx)
        return 0

    cdef char *make_buffer(self, queue_t *q, memory, uint32_t i, uint32_t size, uint16_t flags,
                           uint64_t *gpa) except NULL:
        gpa[0] = memory.alloc(size, 64)
        if not q.packed:
            q.desc[i].addr = gpa[0]
            q.desc[i].len = size
            q.desc[i].a = flags
            q.desc[i].b = 0
        return address(self.keep, memory, gpa[0], size)

    cdef inline uint32_t room(self) noexcept nogil:
        """Of a receive buffer: as Linux and DPDK have it, a whole frame of an ordinary network."""
        return self.header + (self.size if self.size > 1518 else 1518)

    # -- both ends of a flow

    cdef void offer(self, flow_t *f, uint32_t i) noexcept nogil:
        """Give receive buffer ``i`` to the device."""
        self.put(&f.rx, i, f.gpa_buffers, self.room(), WRITE)

    cdef inline void put(self, queue_t *q, uint32_t i, uint64_t *gpa, uint32_t size, uint16_t flags) noexcept nogil:
        if q.packed:
            packed_put(q, gpa[i], size, i, flags, True)
            q.batch += 1
        else:
            hcd_store16(q.driver + 4 + 2 * (q.next_avail & (q.size - 1)), i)
            q.next_avail += 1

    cdef int send(self, flow_t *f, uint64_t now) noexcept nogil:
        """Submit as much as the window and free slots allow; how many frames that were."""
        cdef int n = 0
        cdef uint32_t i
        while f.n_idle and f.next < f.most and not (f.receives and f.next - f.expected >= self.depth):
            f.n_idle -= 1
            i = f.idle[f.n_idle]
            memcpy(f.frames[i] + self.header + SEQUENCE, &f.next, 8)
            if self.verifies:
                fill_payload(f.frames[i] + self.header, self.size, f.next)
            f.stamps[f.next % STAMPS] = now
            self.put(&f.tx, i, f.gpa_frames, self.header + self.size, 0)
            f.next += 1
            n += 1
        publish(&f.tx)
        return n

    cdef int sent(self, flow_t *f) noexcept nogil:
        """Take back the frames that the device has read; how many."""
        cdef int i, n = 0
        cdef uint32_t written
        while True:
            i = take(&f.tx, 1, &written)
            if i < 0:
                break
            f.idle[f.n_idle] = i
            f.n_idle += 1
            n += 1
        f.sent += n
        return n

    cdef int receive(self, flow_t *f, uint64_t now) noexcept nogil:
        """Look at what arrived and give the buffers back; how many frames."""
        cdef int i, n = 0
        cdef uint32_t written
        while True:
            i = take(&f.rx, 1, &written)
            if i < 0:
                break
            self.look(f, f.buffers[i], written, now)
            self.offer(f, i)
            n += 1
        if n:
            f.heard = now
            publish(&f.rx)
        return n

    cdef void look(self, flow_t *f, char *buffer, uint32_t written, uint64_t now) noexcept nogil:
        cdef char *frame = buffer + self.header
        cdef uint64_t number
        if written < self.header + PAYLOAD or <uint8_t>frame[12] != 0x88 or <uint8_t>frame[13] != 0xb5:
            f.strangers += 1
            return
        memcpy(&number, frame + SEQUENCE, 8)
        if number < f.expected or number >= f.next:
            f.wrong += 1          # twice, too late, or never sent
            return
        f.dropped += number - f.expected
        f.expected = number + 1
        f.received += 1
        note(&self.latencies, now - f.stamps[number % STAMPS])
        if self.verifies and (written != self.header + self.size or not has_payload(frame, self.size, number)):
            f.wrong += 1

    # -- the loop

    def run(self, double seconds, flows=None):
        """Send for ``seconds`` over the first ``flows`` (None: all). TimeoutError when the back end takes no frames."""
        self.drive(hcd_now() + <uint64_t>(seconds * 1e9), <uint64_t>-1, 0, self.n if flows is None else flows)

    def send_some(self, int flow, uint64_t count):
        """Send ``count`` frames over one flow, and wait until the back end has read them."""
        if not 0 <= flow < self.n:
            raise ValueError(f"flow {flow} of {self.n}")
        self.drive(<uint64_t>-1, count, flow, flow + 1)

    cdef int drive(self, uint64_t deadline, uint64_t count, int first, int end) except -1:
        cdef uint64_t now = hcd_now(), progress
        cdef int i, busy, failed = 0
        cdef uint64_t idle = 0
        for i in range(first, end):
            self.flows[i].most = self.flows[i].next + count if count < <uint64_t>-1 else count
            self.flows[i].heard = now
        progress = now
        with nogil:
            while True:
                now = hcd_now()
                busy = 0
                for i in range(first, end):
                    if now >= deadline:
                        self.flows[i].most = self.flows[i].next
                    busy += self.turn(&self.flows[i], now)
                if busy:
                    progress = now
                elif self.finished(first, end):
                    break
                elif now - progress > <uint64_t>STALL_MS * 1000000:
                    failed = 1
                    break
                elif self.polls:
                    hcd_relax()
                else:
                    self.sleep(first, end)
        if failed:
            raise TimeoutError(f"the back end took no frame for {STALL_MS / 1000:g} s")
        return 0

    cdef int turn(self, flow_t *f, uint64_t now) noexcept nogil:
        cdef int busy = self.sent(f)
        if f.receives:
            busy += self.receive(f, now)
            if f.next != f.expected and now > f.heard + LOST_NS:
                f.dropped += f.next - f.expected
                f.expected = f.next
                f.heard = now
        return busy + self.send(f, now)

    cdef bint finished(self, int first, int end) noexcept nogil:
        cdef int i
        for i in range(first, end):
            if self.flows[i].next < self.flows[i].most or self.flows[i].n_idle < self.depth:
                return False
            if self.flows[i].receives and self.flows[i].next != self.flows[i].expected:
                return False
        return True

    cdef void sleep(self, int first, int end) noexcept nogil:
        """Wait until a queue has something, or it is time to look for lost frames."""
        cdef pollfd fds[2 * FLOWS]
        cdef queue_t *queues[2 * FLOWS]
        cdef uint64_t value
        cdef int i, n = 0
        cdef bint ready = False
        for i in range(first, end):
            if self.flows[i].receives:
                queues[n] = &self.flows[i].rx
                n += 1
            if not self.flows[i].receives or self.flows[i].n_idle == 0:
                queues[n] = &self.flows[i].tx
                n += 1
        for i in range(n):
            ready = arm(queues[i]) or ready
            fds[i].fd = queues[i].call
            fds[i].events = POLLIN
            fds[i].revents = 0
        if not ready:
            poll(fds, n, LOST_NS / 4000000)
        for i in range(n):
            disarm(queues[i])
            if fds[i].revents and read(fds[i].fd, &value, 8) == 8:
                queues[i].calls += value

    # -- what came out

    def forget(self):
        """Start counting anew: what came so far was the warm-up."""
        cdef int i
        cdef flow_t *f
        memset(&self.latencies, 0, sizeof(latencies_t))
        for i in range(self.n):
            f = &self.flows[i]
            f.sent = f.received = f.dropped = 0
            f.tx.kicks = f.tx.calls = f.rx.kicks = f.rx.calls = 0

    def quantile(self, double q):
        """Of the latencies, in seconds."""
        return quantile_of(&self.latencies, q) / 1e9

    def counts(self, int i):
        """Of one flow: sent, received, dropped, wrong, strangers, kicks, calls (both queues)."""
        cdef flow_t *f
        if not 0 <= i < self.n:
            raise ValueError(f"flow {i} of {self.n}")
        f = &self.flows[i]
        return {
            "sent": f.sent,
            "received": f.received,
            "dropped": f.dropped,
            "wrong": f.wrong,
            "strangers": f.strangers,
            "kicks": f.tx.kicks + f.rx.kicks,
            "calls": f.tx.calls + f.rx.calls,
        }
