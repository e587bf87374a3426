# The hot families as Prometheus text (exposition format 0.0.4), written without the GIL.
#
# A scrape of hundreds of queues is megabytes, of which a few lines differ from the last one; made anew, or under the
# GIL, it would stall the handlers of the reactor. So there is one document, and a scrape writes over those series in it
# that moved. It is built again only when series came or went or when a text changed its length, and then with what did
# not move copied from the last one. Whoever sends the document holds a view of it, without a copy; a scrape meanwhile
# leaves that one alone and builds its own.

ctypedef struct buf_t:
    char *p
    size_t used
    size_t room
    bint full                 # memory ran out: the text has holes

ctypedef struct series_t:
    const uint64_t *value     # of a counter or gauge
    const hist_t *h           # of a histogram
    char *labels
    uint64_t seen             # the value, or the count, in the document
    bint valid                # there is a text in the document
    size_t at
    size_t length

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
    ("hcd_request_latency_seconds", "From taking a request off the ring to its completion, by operation, from the first one on."),
)
THROTTLED_FAMILY = ("hcd_throttled_seconds_total", "counter",
                    "How long the limits of the device held the queue back while its driver had requests.")
#: their series begin with the first observation (docs/decisions/0009)
ONLY_LIVE = ("hcd_doorbell_ring_seconds", "hcd_request_latency_seconds")
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
        b.full = True
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


cdef void write_histogram(buf_t *b, const char *family, const char *labels, const hist_t *h) noexcept nogil:
    # The count is taken from the buckets, so that the lines agree with each other while the owner counts on.
    cdef uint64_t seen = 0, total = h.sum
    cdef int i, k = LOW
    for i in range(HIST_SIZE):
        while k <= HIGH and i == (k - 1) * HIST_SUB:
            bucket_line(b, family, labels, BOUND_TEXT[k - LOW], seen)
            k += 1
        seen += h.counts[i]
    bucket_line(b, family, labels, "+Inf", seen)
    buf_str(b, family)
    buf_put(b, "_sum{", 5)
    buf_str(b, labels)
    buf_put(b, "} ", 2)
    buf_seconds(b, total)
    buf_put(b, "\n", 1)
    buf_str(b, family)
    buf_put(b, "_count{", 7)
    buf_str(b, labels)
    buf_put(b, "} ", 2)
    buf_u64(b, seen)
    buf_put(b, "\n", 1)


cdef class _Family:
    """The series of one family."""

    cdef bytes name
    cdef bytes head
    cdef series_t *items
    cdef int n
    cdef int room
    cdef list keep            # (device, owner, labels) of each item
    cdef bint age             # the values are times of CLOCK_MONOTONIC: print how long ago
    cdef bint seconds         # the values are nanoseconds: print seconds
    cdef bint only_live       # leave out histograms that never counted

    def __cinit__(self, str name, str kind, str text, *, bint age=False, bint seconds=False,
                  bint only_live=False):
        self.name = name.encode()
        self.head = f"# HELP {name} {text}\n# TYPE {name} {kind}\n".encode()
        self.keep = []
        self.age = age
        self.seconds = seconds
        self.only_live = only_live

    def __dealloc__(self):
        free(self.items)

    cdef int add(self, str device, object owner, const uint64_t *value, const hist_t *h, bytes labels) except -1:
        cdef series_t *grown
        if self.n == self.room:
            grown = <series_t *>realloc(self.items, (self.room * 2 + 8) * sizeof(series_t))
            if grown == NULL:
                raise MemoryError
            self.items = grown
            self.room = self.room * 2 + 8
        memset(&self.items[self.n], 0, sizeof(series_t))
        self.items[self.n].value = value
        self.items[self.n].h = h
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

    cdef void forget(self) noexcept nogil:
        """No series has a text in the document."""
        cdef int i
        for i in range(self.n):
            self.items[i].valid = False

    cdef bint moved(self, const series_t *s) noexcept nogil:
        """Whether the text of ``s`` in the document is not true any more. An age is another each time, unless 0."""
        cdef uint64_t value = s.h.count if s.h != NULL else s.value[0]
        return not s.valid or value != s.seen or (self.age and value != 0)

    cdef void write(self, buf_t *b, series_t *s, const char *name, uint64_t now) noexcept nogil:
        if s.h != NULL:
            s.seen = s.h.count
            if s.seen or not self.only_live:
                write_histogram(b, name, s.labels, s.h)
            return
        s.seen = s.value[0]
        buf_str(b, name)
        buf_put(b, "{", 1)
        buf_str(b, s.labels)
        buf_put(b, "} ", 2)
        if self.age:
            buf_seconds(b, now - s.seen if s.seen and now > s.seen else 0)
        elif self.seconds:
            buf_seconds(b, s.seen)
        else:
            buf_u64(b, s.seen)
        buf_put(b, "\n", 1)

    cdef bint patch(self, buf_t *document, buf_t *scratch, const char *name, uint64_t now) noexcept nogil:
        """Write what moved over its old text. False when one has another length now: the document has to be built."""
        cdef int i
        cdef series_t *s
        for i in range(self.n):
            s = &self.items[i]
            if self.moved(s):
                scratch.used = 0
                self.write(scratch, s, name, now)
                if not s.valid or scratch.used != s.length or scratch.full:
                    s.valid = False
                    return False
                memcpy(document.p + s.at, scratch.p, s.length)
        return True

    cdef void build(self, buf_t *document, const buf_t *last, const char *name, uint64_t now) noexcept nogil:
        cdef int i
        cdef size_t start
        cdef series_t *s
        for i in range(self.n):
            s = &self.items[i]
            start = document.used
            if self.moved(s):
                self.write(document, s, name, now)
            else:
                buf_put(document, last.p + s.at, s.length)
            s.at = start
            s.length = document.used - start
            s.valid = True


cdef class _Document:
    """The text, as a read-only buffer. It does not change while somebody has a view of it."""

    cdef buf_t text
    cdef int views

    def __dealloc__(self):
        free(self.text.p)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.text.p, self.text.used, True, flags)
        self.views += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.views -= 1


def _escape(str value):
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _labels(**labels):
    return ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items()).encode()


cdef class HotText:
    """Renders the hot families; add, remove and render may come from any thread, one at a time."""

    cdef list counters
    cdef list histograms
    cdef _Family oldest
    cdef _Family throttled
    cdef _Document document
    cdef buf_t scratch
    cdef bint torn            # series went: the places in the document are not those of the text any more
    cdef object lock

    def __cinit__(self):
        self.lock = threading.Lock()
        self.counters = [_Family(*family) for family in COUNTER_FAMILIES]
        self.histograms = [_Family(name, "histogram", text, only_live=name in ONLY_LIVE)
                           for name, text in HISTOGRAM_FAMILIES]
        self.oldest = _Family(*OLDEST_FAMILY, age=True)
        self.throttled = _Family(*THROTTLED_FAMILY, seconds=True)
        self.document = _Document()
        self.torn = True

    def __dealloc__(self):
        free(self.scratch.p)

    def add_doorbell(self, str device, str queue, str path, DoorbellStats stats):
        """Export ``stats`` under the labels given. A later call with the same labels adds a second series: don't."""
        labels = _labels(device=device, queue=queue, path=path)
        with self.lock:
            self._family(F_RINGS).add(device, stats, &stats.rings, NULL, labels)
            self._family(F_WAKEUPS).add(device, stats, &stats.wakeups, NULL, labels)
            self._histogram(H_DISPATCH).add(device, stats, NULL, &stats.c_dispatch, labels)
            self._histogram(H_RESPONSE).add(device, stats, NULL, &stats.c_response, labels)
            self._histogram(H_RING).add(device, stats, NULL, &stats.c_ring, labels)

    def add_queue(self, str device, str queue, QueueStats stats):
        cdef int op, status
        with self.lock:
            for op, name in enumerate(stats.operations):
                for status in range(STATUSES):
                    self._family(F_REQUESTS).add(
                        device, stats, &stats.c.requests[op * STATUSES + status], NULL,
                        _labels(device=device, queue=queue, op=name, status=STATUS_NAMES[status]))
                self._histogram(H_LATENCY).add(
                    device, stats, NULL, &stats.latencies[op], _labels(device=device, queue=queue, op=name))
            self._count(device, queue, stats, F_FOUND, "by", "ring", &stats.c.found_ring)
            self._count(device, queue, stats, F_FOUND, "by", "poll", &stats.c.found_poll)
            self._count(device, queue, stats, F_BYTES, "direction", "from_guest", &stats.c.from_guest)
            self._count(device, queue, stats, F_BYTES, "direction", "to_guest", &stats.c.to_guest)
            self._count(device, queue, stats, F_INTERRUPTS, "outcome", "sent", &stats.c.sent)
            self._count(device, queue, stats, F_INTERRUPTS, "outcome", "suppressed", &stats.c.suppressed)
            self._count(device, queue, stats, F_INTERRUPTS, "outcome", "pending", &stats.c.pending)
            self._count(device, queue, stats, F_INTERRUPTS, "outcome", "absent", &stats.c.absent)
            labels = _labels(device=device, queue=queue)
            self._family(F_INFLIGHT).add(device, stats, &stats.c.inflight, NULL, labels)
            self.oldest.add(device, stats, &stats.c.oldest, NULL, labels)
            self.throttled.add(device, stats, &stats.c.throttled, NULL, labels)

    def add_interrupt(self, str device, str interrupt, InterruptStats stats):
        """Export ``stats``; the interrupt's name stands as the queue."""
        with self.lock:
            self._count(device, interrupt, stats, F_INTERRUPTS, "outcome", "sent", &stats.sent)
            self._count(device, interrupt, stats, F_INTERRUPTS, "outcome", "pending", &stats.pending)
            self._count(device, interrupt, stats, F_INTERRUPTS, "outcome", "absent", &stats.absent)

    cdef int _count(self, str device, str queue, object stats, int family, str label, str value,
                    const uint64_t *counter) except -1:
        labels = _labels(**{"device": device, "queue": queue, label: value})
        return self._family(family).add(device, stats, counter, NULL, labels)

    cdef _Family _family(self, int index):
        return self.counters[index]

    cdef _Family _histogram(self, int index):
        return self.histograms[index]

    def remove_device(self, str device):
        cdef _Family family
        with self.lock:
            self.torn = True
            for family in self._families():
                family.remove(device)

    def _families(self):
        return [*self.counters, self.oldest, self.throttled, *self.histograms]

    def render(self):
        """The hot families, HELP and TYPE of each and then its series, as a view of the document: release it soon.
        While it is held, the document stays as it is and another one is made for whoever asks."""
        cdef uint64_t now = hcd_now()
        with self.lock:
            if self.torn or self.document.views or not self._patch(now):
                self._build(now)
            return memoryview(self.document)

    cdef bint _patch(self, uint64_t now) except -1:
        cdef _Family family
        cdef const char *name
        cdef bint fits
        for family in self._families():
            name = family.name
            with nogil:
                fits = family.patch(&self.document.text, &self.scratch, name, now)
            if not fits:
                return False
        return True

    cdef int _build(self, uint64_t now) except -1:
        cdef _Family family
        cdef const char *name
        cdef _Document made = _Document()
        self.torn = True      # until it is done: what follows may fail for want of memory
        buf_room(&made.text, self.document.text.used + self.document.text.used // 16)
        for family in self._families():
            buf_put(&made.text, family.head, len(family.head))
            name = family.name
            with nogil:
                family.build(&made.text, &self.document.text, name, now)
        if made.text.full:
            for family in self._families():
                family.forget()
            raise MemoryError("no memory for the text of the metrics")
        self.document = made
        self.torn = False
        return 0
