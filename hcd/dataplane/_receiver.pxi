# A receive queue of a network device: buffers for one frame, and the frame into them.

@cython.final
cdef class Receiver:
    """One receive queue, and how its driver wants frames."""

    def __cinit__(self, int index, Virtqueue q not None):
        self.q = q
        self.index = index
        self.header = header_of(q.feature_bits)
        self.mergeable = (q.feature_bits >> F_MRG_RXBUF) & 1
        self.swap = q.ring.swap

    cdef int gather(self, uint64_t need, bint whole_ring=False) except -100:
        """Take buffers that hold ``need`` bytes, as few as do; they are the newest requests in flight. Returns how
        many, or NO_BUFFERS, TOO_LARGE or BAD_BUFFER, and none is taken then. ``whole_ring``: a ring full of buffers
        is enough in any case."""
        cdef Request r = self.q.take()
        cdef uint64_t room
        cdef int n = 1
        if r is None:
            return NO_BUFFERS
        room = r.c.in_size
        if room < self.header + <uint64_t>ETHERNET and not (self.mergeable and room >= self.header):
            # It never holds a frame, and would stand in the way of those behind it.
            r.status = 1
            r.finish(0)
            guest_error(self.q, f"a receive buffer of {room} bytes, too small for any frame")
            return BAD_BUFFER
        while room < need:
            if not self.mergeable or n >= <int>self.q.ring.size:
                if whole_ring:
                    break
                self.give_back(n)
                return TOO_LARGE
            r = self.q.take()
            if r is None:
                self.give_back(n)
                return NO_BUFFERS
            room += r.c.in_size
            n += 1
        return n

    cdef int give_back(self, int n) except -1:
        while n:
            self.q.unpop(<Request>self.q.newest)
            n -= 1
        return 0

    cdef Request oldest_of(self, int n):
        cdef PyObject *p = self.q.newest
        while n > 1:
            p = (<Request>p).older
            n -= 1
        return <Request>p

    cdef void write_header(self, Request r, uint16_t buffers) noexcept:
        cdef char header[12]
        memset(header, 0, 12)
        if self.swap:
            buffers = hcd_swap16(buffers)
        memcpy(header + 10, &buffers, 2)
        put(r, header, self.header)

    cdef int finish(self, int n, uint64_t total, int op) except -1:
        """Complete the newest ``n`` requests, into which ``total`` bytes were written one after the other."""
        cdef Request r = self.oldest_of(n), following
        cdef uint64_t part
        self.q.corked = n > 1
        try:
            while n:
                n -= 1
                following = <Request>r.newer if n else None
                part = r.c.in_size if r.c.in_size < total else total
                total -= part
                r.op = op
                r.finish(<int64_t>part)
                r = following
        finally:
            self.q.corked = False
        if self.q.ring.unpublished >= LATE:
            self.q.flush_now()
        return 0

    cdef int place(self, int n, const frame_t *f, int op) except -1:
        """Put the frame into the newest ``n`` requests and complete them."""
        cdef Request r
        cdef place_t k
        cdef int i
        begin(f, &k)
        if n == 1:
            r = <Request>self.q.newest
            self.write_header(r, 1)
            fill(r, f, &k)
            r.op = op
            return r.finish(<int64_t>(self.header + f.size))
        r = self.oldest_of(n)
        self.write_header(r, <uint16_t>n)
        for i in range(n):
            fill(r, f, &k)
            if i + 1 < n:
                r = <Request>r.newer
        return self.finish(n, self.header + f.size, op)
