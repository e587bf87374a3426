# The hot families as Prometheus text (exposition format 0.0.4), written without the GIL.
#
# A scrape of hundreds of queues is megabytes; made under the GIL it would stall the handlers of the reactor. So the
# text of each histogram is kept and redone only when its count moved, and the whole document is put together in C.

ctypedef struct buf_t:
    char *p
    size_t used
    size_t room

ctypedef struct cache_t:      # the text of one histogram
    const hist_t *h
    char *labels
    const char *family
    uint64_t count
    bint valid
    buf_t text

cdef struct counter_t:        # one line: NAME{LABELS} VALUE
    const uint64_t *value
    char *labels

cdef enum:
    F_RINGS = 0
    F_WAKEUPS
    F_REQUESTS
    F_FOUND
    F_BYTES
    F_INTERRUPTS
    F_INFLIGHT
    COUNTERS
    H_DISPATCH = 0
    H_RESPONSE
    H_RING
    H_LATENCY
    HISTOGRAMS

COUNTER_FAMILIES = (
    ("hcd_doorbell_rings_total", "counter",
     "Rings by the guest: the sum of the kick eventfd's values, less the spurious first one of QEMU."),
    ("hcd_doorbell_wakeups_total", "counter",
     "Times that rings woke hcd. Rings that come while hcd is awake share a wake-up."),
    ("hcd_requests_total", "counter", "Requests completed, by operation and status."),
    ("hcd_requests_found_total", "counter",
     "Requests taken from the ring, by how they were found: after a ring, or by polling. "
     "Polling and EVENT_IDX suppress rings, so rings are fewer than requests."),
    ("hcd_request_bytes_total", "counter",
     "Bytes of completed requests, headers included: from_guest is the readable part, to_guest what was written."),
    ("hcd_interrupts_total", "counter",
     "Interrupt decisions after completions: sent, suppressed by the driver, pending (one is due already), "
     "absent (the front end gave no call fd)."),
    ("hcd_requests_inflight", "gauge", "Requests taken from the ring and not completed yet."),
)
HISTOGRAM_FAMILIES = (
    ("hcd_doorbell_dispatch_seconds", "From the wake-up by a ring to the entry of the device's handler."),
    ("hcd_doorbell_response_seconds",
     "From the wake-up by a ring to the interrupt that answers the first request it brought."),
    ("hcd_doorbell_ring_seconds", "From the guest's own stamp to the wake-up; only where the guest stamps its rings."),
    ("hcd_request_latency_seconds", "From taking a request off the ring to its completion, by operation."),
)
OLDEST_FAMILY = ("hcd_oldest_request_seconds", "gauge", "Age of the oldest request in flight; 0 without one.")
STATUS_NAMES = ("ok", "error", "unsupported")

cdef const char *BOUND_TEXT[21]
_bound_text = [repr(ns / 1e9).encode() for ns in BOUNDS_NS]
cdef int _k
for _k in range(21):
    BOUND_TEXT[_k] = _bound_text[_k]


cdef bint buf_room(buf_t *b, size_t n) noexcept nogil:
    cdef size_t want
    cdef char *p
    if b.used + n <= b.room:
        return True
    want = b.room * 2 if b.room * 2 > b.used + n else b.used + n + 256
    p = <char *>realloc(b.p, want)
    if p == NULL:
        return False
    b.p = p
    b.room = want
    return True


cdef void buf_put(buf_t *b, const char *s, size_t n) noexcept nogil:
    if buf_room(b, n):
        memcpy(b.p + b.used, s, n)
        b.used += n


cdef void buf_str(buf_t *b, const char *s) noexcept nogil:
    buf_put(b, s, strlen(s))


cdef void buf_u64(buf_t *b, uint64_t v) noexcept nogil:
    cdef char digits[20]
    cdef int i = 20
    while True:
        i -= 1
        digits[i] = <char>(48 + v % 10)
        v //= 10
        if v == 0:
            break
    buf_put(b, digits + i, 20 - i)


cdef void buf_seconds(buf_t *b, uint64_t ns) noexcept nogil:
    cdef char text[40]
    cdef int n = snprintf(text, sizeof(text), "%llu.%09llu", <unsigned long long>(ns // 1000000000),
                          <unsigned long long>(ns % 1000000000))
    buf_put(b, text, n)


cdef void bucket_line(buf_t *b, const char *family, const char *labels, const char *bound, uint64_t value) noexcept nogil:
    buf_str(b, family)
    buf_put(b, "_bucket{", 8)
    buf_str(b, labels)
    buf_put(b, ",le=\"", 5)
    buf_str(b, bound)
    buf_put(b, "\"} ", 3)
    buf_u64(b, value)
    buf_put(b, "\n", 1)


cdef void render_histogram(cache_t *c) noexcept nogil:
    # The count is taken from the buckets, so that the lines agree with each other while the owner counts on.
    cdef uint64_t seen = 0, total
    cdef int i, k = LOW
    cdef buf_t *b = &c.text
    c.count = c.h.count
    total = c.h.sum
    b.used = 0
    for i in range(HIST_SIZE):
        while k <= HIGH and i == (k - 1) * HIST_SUB:
            bucket_line(b, c.family, c.labels, BOUND_TEXT[k - LOW], seen)
            k += 1
        seen += c.h.counts[i]
    bucket_line(b, c.family, c.labels, "+Inf", seen)
    buf_str(b, c.family)
    buf_put(b, "_sum{", 5)
    buf_str(b, c.labels)
    buf_put(b, "} ", 2)
    buf_seconds(b, total)
    buf_put(b, "\n", 1)
    buf_str(b, c.family)
    buf_put(b, "_count{", 7)
    buf_str(b, c.labels)
    buf_put(b, "} ", 2)
    buf_u64(b, seen)
    buf_put(b, "\n", 1)
    c.valid = True


cdef class _Histograms:
    """The series of one histogram family."""

    cdef bytes name
    cdef bytes head
    cdef cache_t *items
    cdef int n
    cdef int room
    cdef list keep            # (device, owner, labels) of each item
    cdef bint only_live       # leave out series that never counted

    def __cinit__(self, str name, str text, bint only_live=False):
        self.name = name.encode()
        self.head = f"# HELP {name} {text}\n# TYPE {name} histogram\n".encode()
        self.keep = []
        self.only_live = only_live

    def __dealloc__(self):
        cdef int i
        for i in range(self.n):
            free(self.items[i].text.p)
        free(self.items)

    cdef int add(self, str device, object owner, const hist_t *h, bytes labels) except -1:
        cdef cache_t *grown
        if self.n == self.room:
            grown = <cache_t *>realloc(self.items, (self.room * 2 + 8) * sizeof(cache_t))
            if grown == NULL:
                raise MemoryError
            self.items = grown
            self.room = self.room * 2 + 8
        memset(&self.items[self.n], 0, sizeof(cache_t))
        self.items[self.n].h = h
        self.items[self.n].labels = labels
        self.items[self.n].family = self.name
        self.keep.append((device, owner, labels))
        self.n += 1
        return 0

    cdef int remove(self, str device) except -1:
        cdef int i, kept = 0
        keep = []
        for i in range(self.n):
            if self.keep[i][0] == device:
                free(self.items[i].text.p)
            else:
                self.items[kept] = self.items[i]
                keep.append(self.keep[i])
                kept += 1
        self.n = kept
        self.keep = keep
        return 0

    cdef void render(self, buf_t *b) noexcept nogil:
        cdef int i
        cdef cache_t *c
        for i in range(self.n):
            c = &self.items[i]
            if self.only_live and c.h.count == 0:
                continue
            if not c.valid or c.h.count != c.count:
                render_histogram(c)
            buf_put(b, c.text.p, c.text.used)


cdef class _Counters:
    """The series of one counter or gauge family."""

    cdef bytes name
    cdef bytes head
    cdef counter_t *items
    cdef int n
    cdef int room
    cdef list keep
    cdef bint age             # the values are times of CLOCK_MONOTONIC: print how long ago

    def __cinit__(self, str name, str kind, str text, bint age=False):
        self.name = name.encode()
        self.head = f"# HELP {name} {text}\n# TYPE {name} {kind}\n".encode()
        self.keep = []
        self.age = age

    def __dealloc__(self):
        free(self.items)

    cdef int add(self, str device, object owner, const uint64_t *value, bytes labels) except -1:
        cdef counter_t *grown
        if self.n == self.room:
            grown = <counter_t *>realloc(self.items, (self.room * 2 + 8) * sizeof(counter_t))
            if grown == NULL:
                raise MemoryError
            self.items = grown
            self.room = self.room * 2 + 8
        self.items[self.n].value = value
        self.items[self.n].labels = labels
        self.keep.append((device, owner, labels))
        self.n += 1
        return 0

    cdef int remove(self, str device) except -1:
        cdef int i, kept = 0
        keep = []
        for i in range(self.n):
            if self.keep[i][0] != device:
                self.items[kept] = self.items[i]
                keep.append(self.keep[i])
                kept += 1
        self.n = kept
        self.keep = keep
        return 0

    cdef void render(self, buf_t *b, const char *name, uint64_t now) noexcept nogil:
        cdef int i
        cdef uint64_t value
        for i in range(self.n):
            value = self.items[i].value[0]
            buf_str(b, name)
            buf_put(b, "{", 1)
            buf_str(b, self.items[i].labels)
            buf_put(b, "} ", 2)
            if self.age:
                buf_seconds(b, now - value if value and now > value else 0)
            else:
                buf_u64(b, value)
            buf_put(b, "\n", 1)


def _escape(str value):
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _labels(**labels):
    return ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items()).encode()


cdef class HotText:
    """Renders the hot families; add, remove and render may come from any thread, one at a time."""

    cdef list counters
    cdef list histograms
    cdef _Counters oldest
    cdef object lock

    def __cinit__(self):
        self.lock = threading.Lock()
        self.counters = [_Counters(*family) for family in COUNTER_FAMILIES]
        self.histograms = [_Histograms(name, text, name == "hcd_doorbell_ring_seconds")
                           for name, text in HISTOGRAM_FAMILIES]
        self.oldest = _Counters(*OLDEST_FAMILY, age=True)

    def add_doorbell(self, str device, str queue, str path, DoorbellStats stats):
        """Export ``stats`` under the labels given. A later call with the same labels adds a second series: don't."""
        labels = _labels(device=device, queue=queue, path=path)
        with self.lock:
            (<_Counters>self.counters[F_RINGS]).add(device, stats, &stats.rings, labels)
            (<_Counters>self.counters[F_WAKEUPS]).add(device, stats, &stats.wakeups, labels)
            (<_Histograms>self.histograms[H_DISPATCH]).add(device, stats, &stats.c_dispatch, labels)
            (<_Histograms>self.histograms[H_RESPONSE]).add(device, stats, &stats.c_response, labels)
            (<_Histograms>self.histograms[H_RING]).add(device, stats, &stats.c_ring, labels)

    def add_queue(self, str device, str queue, QueueStats stats):
        cdef int op, status
        with self.lock:
            for op, name in enumerate(stats.operations):
                for status in range(STATUSES):
                    (<_Counters>self.counters[F_REQUESTS]).add(
                        device, stats, &stats.c.requests[op * STATUSES + status],
                        _labels(device=device, queue=queue, op=name, status=STATUS_NAMES[status]))
                (<_Histograms>self.histograms[H_LATENCY]).add(
                    device, stats, &stats.latencies[op], _labels(device=device, queue=queue, op=name))
            self._count(device, queue, stats, F_FOUND, "by", "ring", &stats.c.found_ring)
            self._count(device, queue, stats, F_FOUND, "by", "poll", &stats.c.found_poll)
            self._count(device, queue, stats, F_BYTES, "direction", "from_guest", &stats.c.from_guest)
            self._count(device, queue, stats, F_BYTES, "direction", "to_guest", &stats.c.to_guest)
            self._count(device, queue, stats, F_INTERRUPTS, "outcome", "sent", &stats.c.sent)
            self._count(device, queue, stats, F_INTERRUPTS, "outcome", "suppressed", &stats.c.suppressed)
            self._count(device, queue, stats, F_INTERRUPTS, "outcome", "pending", &stats.c.pending)
            self._count(device, queue, stats, F_INTERRUPTS, "outcome", "absent", &stats.c.absent)
            labels = _labels(device=device, queue=queue)
            (<_Counters>self.counters[F_INFLIGHT]).add(device, stats, &stats.c.inflight, labels)
            self.oldest.add(device, stats, &stats.c.oldest, labels)

    def add_interrupt(self, str device, str interrupt, InterruptStats stats):
        """Export ``stats``; the interrupt's name stands as the queue."""
        with self.lock:
            self._count(device, interrupt, stats, F_INTERRUPTS, "outcome", "sent", &stats.sent)
            self._count(device, interrupt, stats, F_INTERRUPTS, "outcome", "pending", &stats.pending)
            self._count(device, interrupt, stats, F_INTERRUPTS, "outcome", "absent", &stats.absent)

    cdef int _count(self, str device, str queue, object stats, int family, str label, str value,
                    const uint64_t *counter) except -1:
        labels = _labels(**{"device": device, "queue": queue, label: value})
        return (<_Counters>self.counters[family]).add(device, stats, counter, labels)

    def remove_device(self, str device):
        cdef _Counters c
        cdef _Histograms h
        with self.lock:
            for c in self.counters:
                c.remove(device)
            for h in self.histograms:
                h.remove(device)
            self.oldest.remove(device)

    def render(self):
        """The hot families: HELP and TYPE of each, then its series."""
        cdef buf_t b
        cdef _Counters c
        cdef _Histograms h
        cdef const char *name
        cdef uint64_t now = hcd_now()
        memset(&b, 0, sizeof(b))
        with self.lock:
            for c in [*self.counters, self.oldest]:
                buf_put(&b, c.head, len(c.head))
                name = c.name
                with nogil:
                    c.render(&b, name, now)
            for h in self.histograms:
                buf_put(&b, h.head, len(h.head))
                with nogil:
                    h.render(&b)
        try:
            return PyBytes_FromStringAndSize(b.p, b.used)
        finally:
            free(b.p)
