# The hot families as Prometheus text (exposition format 0.0.4), written without the GIL.
#
# A scrape of hundreds of queues is megabytes, of which a few lines differ from the last one; made anew, or under the
# GIL, it would stall the handlers of the reactor, and push what they work with out of the processor's caches. So each
# family is a document that is kept. A scrape asks each *owner* of series (a queue, a doorbell on a path, a device) for
# its version, and writes over the series that moved of those where it is another one. The document of a family is built
# again only when series came or went or when a text changed its length, and then with what did not move copied from the
# last one. Whoever sends a document holds a view of it, without a copy; a scrape meanwhile leaves that one alone and
# builds its own.

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
    size_t at                 # where in the document
    size_t length
    int family
    bint valid                # there is a text in the document

ctypedef struct owner_t:
    const uint64_t *version   # NULL: it has none, look at every series
    const uint64_t *since     # not NULL, and not 0 there: a series shows a time that goes on
    uint64_t seen             # the version in the documents
    int first                 # of its series, which lie together
    int count

ctypedef struct family_t:
    const char *name
    buf_t *text               # of its document
    int *order                # its series, as they stand in the document
    int count
    int room
    bint age                  # the values are times of CLOCK_MONOTONIC: print how long ago
    bint seconds              # the values are nanoseconds: print seconds
    bint only_live            # leave out histograms that never counted
    bint fixed                # somebody holds the document: build another one
    bint stale                # the document has to be built

cdef enum:
    F_RINGS = 0
    F_WAKEUPS
    F_REQUESTS
    F_FOUND
    F_BYTES
    F_INTERRUPTS
    F_INFLIGHT
    F_OLDEST
    F_THROTTLED
    F_DISPATCH
    F_RESPONSE
    F_RING
    F_LATENCY
    F_CONNECTED
    F_HANDOVERS
    F_HANDOVER_READY
    F_PROTOCOL_ERRORS
    F_GUEST_ERRORS
    F_HANDLER_ERRORS
    F_SLOW_STEPS
    F_STUCK
    F_PATH_CONFLICTS
    N_FAMILIES

#: name, type and HELP, in the order of the enumeration above and of the text
FAMILIES = (
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
    ("hcd_oldest_request_seconds", "gauge", "Age of the oldest request in flight; 0 without one."),
    ("hcd_throttled_seconds_total", "counter",
     "How long the limits of the device held the queue back while its driver had requests."),
    ("hcd_doorbell_dispatch_seconds", "histogram",
     "From the wake-up by a ring to the entry of the device's handler."),
    ("hcd_doorbell_response_seconds", "histogram",
     "From the wake-up by a ring to the interrupt that answers the first request it brought."),
    ("hcd_doorbell_ring_seconds", "histogram",
     "From the guest's own stamp to the wake-up; only where the guest stamps its rings."),
    ("hcd_request_latency_seconds", "histogram",
     "From taking a request off the ring to its completion, by operation, from the first one on."),
    ("hcd_connected", "gauge", "1 while a front end is connected to the device."),
    ("hcd_handovers_total", "counter",
     "Sessions of the process before this one that were gone on with (resumed), or had to end (failed)."),
    ("hcd_handover_ready", "gauge",
     "1 while the connected front end would not notice a restart of hcd: the service manager keeps its session."),
    ("hcd_protocol_errors_total", "counter", "Connections that ended because the front end broke the protocol."),
    ("hcd_guest_errors_total", "counter",
     "Rings and requests refused because the driver in the guest broke the rules."),
    ("hcd_handler_errors_total", "counter",
     "Mistakes of the device: exceptions that escaped it, requests that it did not complete in time."),
    ("hcd_slow_steps_total", "counter",
     "Times that code of the device ran for more than 50 ms without a break and held up all devices of its lane."),
    ("hcd_stuck_requests", "gauge", "Requests in flight for longer than stuck_after."),
    ("hcd_path_conflicts", "gauge",
     "1 while the path that QEMU reports is another one than the declared path."),
)
#: their series begin with the first observation (docs/decisions/0009)
ONLY_LIVE = ("hcd_doorbell_ring_seconds", "hcd_request_latency_seconds")
STATUS_NAMES = ("ok", "error", "unsupported")

cdef list _names = [name.encode() for name, _, _ in FAMILIES]
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


cdef bint has_moved(const family_t *f, const series_t *s) noexcept nogil:
    """Whether the text of ``s`` in the document is not true any more. An age is another each time, unless 0."""
    cdef uint64_t value = s.h.count if s.h != NULL else s.value[0]
    return not s.valid or value != s.seen or (f.age and value != 0)


cdef void write_series(buf_t *b, const family_t *f, series_t *s, uint64_t now) noexcept nogil:
    if s.h != NULL:
        s.seen = s.h.count
        if s.seen or not f.only_live:
            write_histogram(b, f.name, s.labels, s.h)
        return
    s.seen = s.value[0]
    buf_str(b, f.name)
    buf_put(b, "{", 1)
    buf_str(b, s.labels)
    buf_put(b, "} ", 2)
    if f.age:
        buf_seconds(b, now - s.seen if s.seen and now > s.seen else 0)
    elif f.seconds:
        buf_seconds(b, s.seen)
    else:
        buf_u64(b, s.seen)
    buf_put(b, "\n", 1)


cdef void patch_owner(owner_t *o, series_t *series, family_t *families, buf_t *scratch, uint64_t now) noexcept nogil:
    """Write what moved over its old text, or say whose document has to be built because that does not do."""
    cdef int i
    cdef uint64_t version = 0
    cdef series_t *s
    cdef family_t *f
    if o.version != NULL:
        version = hcd_load64_acquire(o.version)
        if version == o.seen and (o.since == NULL or o.since[0] == 0):
            return
    for i in range(o.first, o.first + o.count):
        s = &series[i]
        f = &families[s.family]
        if not has_moved(f, s):
            continue
        if not f.fixed and not f.stale and s.valid:
            scratch.used = 0
            write_series(scratch, f, s, now)
            if scratch.used == s.length and not scratch.full:
                memcpy(f.text.p + s.at, scratch.p, s.length)
                continue
        s.valid = False
        f.stale = True
    o.seen = version


cdef void build_family(buf_t *made, family_t *f, series_t *series, uint64_t now) noexcept nogil:
    cdef int i
    cdef size_t start
    cdef series_t *s
    for i in range(f.count):
        s = &series[f.order[i]]
        start = made.used
        if s.valid:
            buf_put(made, f.text.p + s.at, s.length)
        else:
            write_series(made, f, s, now)
        s.at = start
        s.length = made.used - start
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


def _labels(labels, **more):
    return ",".join(f'{name}="{_escape(value)}"' for name, value in {**labels, **more}.items()).encode()


cdef class HotText:
    """Renders the hot families; add, remove and render may come from any thread, one at a time."""

    cdef family_t families[N_FAMILIES]
    cdef series_t *series
    cdef int n_series
    cdef int room_series
    cdef owner_t *owners
    cdef int n_owners
    cdef int room_owners
    cdef list heads           # HELP and TYPE of each family
    cdef list documents       # of each family
    cdef list keep            # of each owner: its device, and what the pointers here point into
    cdef buf_t scratch
    cdef object lock

    def __cinit__(self):
        cdef int i
        self.lock = threading.Lock()
        self.heads, self.documents, self.keep = [], [], []
        for i, (name, kind, text) in enumerate(FAMILIES):
            self.families[i].name = <bytes>_names[i]
            self.families[i].age = i == F_OLDEST
            self.families[i].seconds = i == F_THROTTLED
            self.families[i].only_live = name in ONLY_LIVE
            self.heads.append(f"# HELP {name} {text}\n# TYPE {name} {kind}\n".encode())
            self.documents.append(None)
            self.families[i].stale = True

    def __dealloc__(self):
        cdef int i
        for i in range(N_FAMILIES):
            free(self.families[i].order)
        free(self.series)
        free(self.owners)
        free(self.scratch.p)

    # -- series

    def add_device(self, str device, DeviceStats stats):
        """Export ``stats``. A second call for the same series adds them twice: don't; so for all of these."""
        labels = {"device": device}
        with self.lock:
            self._own(device, stats, NULL, NULL)
            self._count(F_CONNECTED, &stats.connected, _labels(labels))
            self._count(F_HANDOVERS, &stats.handovers_resumed, _labels(labels, outcome="resumed"))
            self._count(F_HANDOVERS, &stats.handovers_failed, _labels(labels, outcome="failed"))
            self._count(F_HANDOVER_READY, &stats.handover_ready, _labels(labels))
            self._count(F_PROTOCOL_ERRORS, &stats.protocol_errors, _labels(labels))
            self._count(F_GUEST_ERRORS, &stats.guest_errors, _labels(labels))
            self._count(F_HANDLER_ERRORS, &stats.handler_errors, _labels(labels))
            self._count(F_SLOW_STEPS, &stats.slow_steps, _labels(labels))
            self._count(F_STUCK, &stats.stuck_requests, _labels(labels))
            self._count(F_PATH_CONFLICTS, &stats.path_conflict, _labels(labels))

    def add_doorbell(self, str device, str queue, str path, DoorbellStats stats):
        labels = {"device": device, "queue": queue, "path": path}
        with self.lock:
            self._own(device, stats, &stats.version, NULL)
            self._count(F_RINGS, &stats.c_rings, _labels(labels))
            self._count(F_WAKEUPS, &stats.c_wakeups, _labels(labels))
            self._observe(F_DISPATCH, &stats.c_dispatch, _labels(labels))
            self._observe(F_RESPONSE, &stats.c_response, _labels(labels))
            self._observe(F_RING, &stats.c_ring, _labels(labels))

    def add_queue(self, str device, str queue, QueueStats stats):
        cdef int op, status
        labels = {"device": device, "queue": queue}
        with self.lock:
            self._own(device, stats, &stats.c.version, &stats.c.oldest)
            for op, name in enumerate(stats.operations):
                for status in range(STATUSES):
                    self._count(F_REQUESTS, &stats.c.requests[op * STATUSES + status],
                                _labels(labels, op=name, status=STATUS_NAMES[status]))
                self._observe(F_LATENCY, &stats.latencies[op], _labels(labels, op=name))
            self._count(F_FOUND, &stats.c.found_ring, _labels(labels, by="ring"))
            self._count(F_FOUND, &stats.c.found_poll, _labels(labels, by="poll"))
            self._count(F_BYTES, &stats.c.from_guest, _labels(labels, direction="from_guest"))
            self._count(F_BYTES, &stats.c.to_guest, _labels(labels, direction="to_guest"))
            self._count(F_INTERRUPTS, &stats.c.sent, _labels(labels, outcome="sent"))
            self._count(F_INTERRUPTS, &stats.c.suppressed, _labels(labels, outcome="suppressed"))
            self._count(F_INTERRUPTS, &stats.c.pending, _labels(labels, outcome="pending"))
            self._count(F_INTERRUPTS, &stats.c.absent, _labels(labels, outcome="absent"))
            self._count(F_INFLIGHT, &stats.c.inflight, _labels(labels))
            self._count(F_OLDEST, &stats.c.oldest, _labels(labels))
            self._count(F_THROTTLED, &stats.c.throttled, _labels(labels))

    def add_interrupt(self, str device, str interrupt, InterruptStats stats):
        """Export ``stats``; the interrupt's name stands as the queue."""
        labels = {"device": device, "queue": interrupt}
        with self.lock:
            self._own(device, stats, NULL, NULL)
            self._count(F_INTERRUPTS, &stats.sent, _labels(labels, outcome="sent"))
            self._count(F_INTERRUPTS, &stats.pending, _labels(labels, outcome="pending"))
            self._count(F_INTERRUPTS, &stats.absent, _labels(labels, outcome="absent"))

    def remove_device(self, str device):
        cdef int i, j, kept_owners = 0, kept_series = 0
        cdef owner_t o
        keep = []
        with self.lock:
            for i in range(N_FAMILIES):
                self.families[i].count = 0
                self.families[i].stale = True
            for i in range(self.n_owners):
                if self.keep[i][0] == device:
                    continue
                o = self.owners[i]
                for j in range(o.count):
                    self.series[kept_series + j] = self.series[o.first + j]
                    self._place(kept_series + j)
                o.first = kept_series
                kept_series += o.count
                self.owners[kept_owners] = o
                kept_owners += 1
                keep.append(self.keep[i])
            self.n_owners = kept_owners
            self.n_series = kept_series
            self.keep = keep

    cdef int _own(self, str device, object stats, const uint64_t *version, const uint64_t *since) except -1:
        """The series that come next are those of ``stats``, which holds the memory of all pointers."""
        cdef owner_t *grown
        cdef owner_t *o
        if self.n_owners == self.room_owners:
            grown = <owner_t *>realloc(self.owners, (self.room_owners * 2 + 8) * sizeof(owner_t))
            if grown == NULL:
                raise MemoryError
            self.owners = grown
            self.room_owners = self.room_owners * 2 + 8
        o = &self.owners[self.n_owners]
        memset(o, 0, sizeof(owner_t))
        o.version = version
        o.since = since
        o.first = self.n_series
        self.keep.append((device, stats, []))
        self.n_owners += 1
        return 0

    cdef int _count(self, int family, const uint64_t *value, bytes labels) except -1:
        return self._add(family, value, NULL, labels)

    cdef int _observe(self, int family, const hist_t *h, bytes labels) except -1:
        return self._add(family, NULL, h, labels)

    cdef int _add(self, int family, const uint64_t *value, const hist_t *h, bytes labels) except -1:
        """One more series of the last owner."""
        cdef series_t *grown
        cdef series_t *s
        if self.n_series == self.room_series:
            grown = <series_t *>realloc(self.series, (self.room_series * 2 + 64) * sizeof(series_t))
            if grown == NULL:
                raise MemoryError
            self.series = grown
            self.room_series = self.room_series * 2 + 64
        s = &self.series[self.n_series]
        memset(s, 0, sizeof(series_t))
        s.value = value
        s.h = h
        s.labels = labels
        s.family = family
        self._place(self.n_series)
        self.keep[self.n_owners - 1][2].append(labels)
        self.n_series += 1
        self.owners[self.n_owners - 1].count += 1
        return 0

    cdef int _place(self, int i) except -1:
        """Series ``i`` is the next one of its family."""
        cdef family_t *f = &self.families[self.series[i].family]
        cdef int *grown
        if f.count == f.room:
            grown = <int *>realloc(f.order, (f.room * 2 + 16) * sizeof(int))
            if grown == NULL:
                raise MemoryError
            f.order = grown
            f.room = f.room * 2 + 16
        f.order[f.count] = i
        f.count += 1
        f.stale = True
        return 0

    # -- text

    def render(self):
        """The hot families, HELP and TYPE of each and then its series: a view of the document of each. Release them
        soon: while one is held, its document stays as it is and another one is made for whoever asks."""
        cdef uint64_t now = hcd_now()
        cdef int i
        cdef _Document document
        with self.lock:
            for i in range(N_FAMILIES):
                document = self.documents[i]
                self.families[i].fixed = document is not None and document.views > 0
            with nogil:
                for i in range(self.n_owners):
                    patch_owner(&self.owners[i], self.series, self.families, &self.scratch, now)
            for i in range(N_FAMILIES):
                if self.families[i].stale:
                    self._build(i, now)
            return list(map(memoryview, self.documents))

    cdef int _build(self, int family, uint64_t now) except -1:
        cdef family_t *f = &self.families[family]
        cdef _Document made = _Document()
        cdef bytes head = self.heads[family]
        cdef int i
        if f.text != NULL:
            buf_room(&made.text, f.text.used + f.text.used // 16)
        buf_put(&made.text, head, len(head))
        with nogil:
            build_family(&made.text, f, self.series, now)
        if made.text.full:
            for i in range(f.count):
                self.series[f.order[i]].valid = False
            raise MemoryError("no memory for the text of the metrics")
        self.documents[family] = made
        f.text = &made.text
        f.stale = False
        return 0
