# Rate limits of a device: two token buckets, requests and bytes, that its queues share.
#
# A request may be taken while there is a whole token in the one bucket and anything in the other; then it is charged
# what it is, so that the level may fall below zero and the average is exact without a look at the request beforehand.
# Bytes are the readable part and the room for the answer; what the answer did not use is given back when the request is
# completed, so that they add up to hcd_request_bytes_total.
#
# A queue that finds nothing is *throttled*: its ring counts as empty for everybody who looks (reactor, polling, devices),
# its kicks stay off, and one timer of the device wakes it when there is enough again. Nobody polls for tokens.
#
# Fairness between the queues of a device: each has a virtual time, which goes on by what its requests cost (in seconds
# of the bucket that is short). While queues wait, those that are behind go first, and none gets ahead of the others by
# more than a slice. Alone, a queue may use all there is; nobody is behind for what happened before the buckets were
# full last (an *epoch*), nor ever by more than a second.
#
# Everything here happens on the thread that owns the queues. Without a limit a request pays for one comparison.

cdef double SLICE = 0.002     # seconds' worth of tokens that a wake-up is for, and by which queues may differ
cdef double SHORTEST = 0.0005
cdef double MOST_BEHIND = 1.0
cdef double LONGEST = 1.0     # a longer wait is cut in pieces, so that the metric goes on
cdef double LEAST_BURST = 0.005  # seconds' worth: timers are not more exact than a millisecond


cdef inline void bucket_fill(bucket_t *b, double seconds) noexcept nogil:
    if b.rate > 0:
        b.level += b.rate * seconds
        if b.level > b.burst:
            b.level = b.burst


cdef inline bint bucket_full(const bucket_t *b) noexcept nogil:
    return b.rate <= 0 or b.level >= b.burst


cdef inline double bucket_wait(const bucket_t *b, double least, int queues) noexcept nogil:
    """Seconds until there is a slice for ``queues``, at least ``least`` for each."""
    cdef double want = b.rate * SLICE
    if b.rate <= 0:
        return 0
    if want < least * queues:
        want = least * queues
    if want > b.burst:
        want = b.burst
    return (want - b.level) / b.rate


cdef inline void bucket_set(bucket_t *b, double rate, double burst) noexcept nogil:
    cdef bint new = b.rate <= 0
    b.rate = rate
    b.burst = burst if burst > rate * LEAST_BURST else rate * LEAST_BURST
    if b.burst < 1:
        b.burst = 1
    if new or b.level > b.burst:
        b.level = b.burst


cdef class Limit:
    """What the queues of one device may take. See virtqueue.pyi."""

    def __cinit__(self):
        self.waiting = []

    def set(self, double requests=0, double requests_burst=0, double bytes=0, double bytes_burst=0):
        self.fill(hcd_now())
        bucket_set(&self.requests, requests, requests_burst)
        bucket_set(&self.bytes, bytes, bytes_burst)
        self.on = requests > 0 or bytes > 0
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.wake()

    @property
    def active(self):
        return bool(self.on)

    @property
    def throttled(self):
        return len(self.waiting)

    cdef void fill(self, uint64_t now) noexcept:
        cdef double seconds = (now - self.filled) / 1e9 if now > self.filled else 0
        self.filled = now
        bucket_fill(&self.requests, seconds)
        bucket_fill(&self.bytes, seconds)
        if not self.waiting and bucket_full(&self.requests) and bucket_full(&self.bytes):
            self.epoch += 1

    cdef bint enough(self) noexcept:
        return (self.requests.rate <= 0 or self.requests.level >= 1) and (self.bytes.rate <= 0 or self.bytes.level > 0)

    cdef bint admit(self, Virtqueue q) except -1:
        """Whether ``q`` may take a request now. False: it is throttled, and will get a turn later."""
        self.fill(hcd_now())       # each time: what came while it was full must not be there later
        if q.epoch != self.epoch:
            q.epoch = self.epoch
            q.virtual = self.virtual
        if self.enough() and (not self.waiting or q.virtual < q.virtual_end):
            return True
        q.ring.throttled = True
        q.throttled_since = hcd_now()
        self.waiting.append(q)
        if self.timer is None:
            self.arm(q)
        return False

    cdef int arm(self, Virtqueue q) except -1:
        cdef int n = <int>len(self.waiting)
        cdef double bytes = bucket_wait(&self.bytes, 1, n), wait = bucket_wait(&self.requests, 1, n)
        if wait < bytes:
            wait = bytes
        wait = SHORTEST if wait < SHORTEST else LONGEST if wait > LONGEST else wait
        self.timer = q.scheduler.call_later(wait, self.wake)
        return 0

    def wake(self):
        """Let the queues that are behind go on, as far as there are tokens."""
        cdef Virtqueue q
        cdef double least, most
        cdef uint64_t now = hcd_now()
        self.timer = None
        if not self.waiting:
            return
        self.fill(now)
        for q in self.waiting:
            q.stats.c.throttled += now - q.throttled_since
            hcd_bump(&q.stats.c.version)
            q.throttled_since = now
        if self.enough() or not self.on:
            queues = sorted(self.waiting, key=_virtual_time)
            most = (<Virtqueue>queues[len(queues) - 1]).virtual
            self.waiting = []
            for q in queues:
                if q.virtual < most - MOST_BEHIND:
                    q.virtual = most - MOST_BEHIND
            least = self.virtual = (<Virtqueue>queues[0]).virtual
            for q in queues:
                if q.virtual <= least + SLICE or not self.on:
                    q.virtual_end = least + 2 * SLICE
                    q.ring.throttled = False
                    q.scheduler.schedule(q)
                else:
                    self.waiting.append(q)
        if self.waiting:
            self.arm(self.waiting[0])

    cdef void charge(self, Virtqueue q, double requests, double bytes) noexcept:
        """``q`` took so much; negative: it gives that back."""
        cdef double cost = 0, other = 0
        if self.requests.rate > 0:
            self.requests.level -= requests
            cost = requests / self.requests.rate
        if self.bytes.rate > 0:
            self.bytes.level -= bytes
            other = bytes / self.bytes.rate
        q.virtual += cost if cost * cost > other * other else other

    cdef int release(self, Virtqueue q) except -1:
        """``q`` is not served any more."""
        if q.ring.throttled:
            q.ring.throttled = False
            q.stats.c.throttled += hcd_now() - q.throttled_since
            hcd_bump(&q.stats.c.version)
            self.waiting.remove(q)
        return 0


def _virtual_time(Virtqueue q):
    return q.virtual
