# The record of requests in flight (vhost-user.rst, "Inflight I/O tracking"): what a process that is killed leaves to the
# next one.
#
# Theory of operation.
#
# * The record lies in memory that the front end keeps (SET_INFLIGHT_FD), or that hcd made for itself. While a ring
#   runs it is only written, never read: what is needed of it stands in a private copy (track_t). It is read once, when
#   a ring is resumed, from a snapshot of which every field is checked: the other side may write it as it likes.
# * A kill cuts this thread between two instructions. Each place of the cut must leave a record from which everything
#   follows: which chains are in flight, in which order they came, where the ring stands. hcd_step() marks where the
#   order of stores matters.
# * Split ring. A chain is in flight from ``inflight = 1`` on. Completions form a list, newest first, that begins at
#   last_batch_head; used_idx is the used index that the record knows of. When the ring's used index is ahead of it,
#   the newest so many completions were published but not struck off yet.
# * Packed ring. Slots of the ring are overwritten by completions in any order, so the record keeps a copy of each
#   descriptor; copies form chains and a free list. free_head and used_idx run ahead while a batch is published, their
#   old_ twins follow when it is over: if they differ, the flags of the first slot of the batch tell whether the driver
#   can see it. It cannot: the batch is undone, also in the ring, where later slots of it may be marked used already.
#   The standard compares the indexes alone; a batch of the whole ring moves only the wrap counter, so both count here.
# * Completions are recorded when they are published, a batch at a time: taking is never interleaved with half a batch.

cdef extern from "_inflight.h" nogil:
    ctypedef struct hcd_split_state:
        uint8_t inflight
        uint16_t next
        uint64_t counter
    ctypedef struct hcd_split_record:
        uint16_t version
        uint16_t desc_num
        uint16_t last_batch_head
        uint16_t used_idx
        hcd_split_state *desc
    ctypedef struct hcd_packed_state:
        uint8_t inflight
        uint16_t next
        uint16_t last
        uint16_t num
        uint64_t counter
        uint16_t id
        uint16_t flags
        uint32_t len
        uint64_t addr
    ctypedef struct hcd_packed_record:
        uint16_t version
        uint16_t desc_num
        uint16_t free_head
        uint16_t old_free_head
        uint16_t used_idx
        uint16_t old_used_idx
        uint8_t used_wrap
        uint8_t old_used_wrap
        uint16_t ahead
        hcd_packed_state *desc
    void hcd_step()
    void hcd_put_heads(hcd_packed_record *r, uint16_t head, uint16_t old_head)
    void hcd_put_used(hcd_packed_record *r, uint16_t used, int wrap, uint16_t old_used, int old_wrap, uint16_t ahead)

cdef enum:
    RECORD_VERSION = 1
    RECORD_ALIGN = 64         # of one queue's record in the region, as other back ends have it


cdef uint64_t record_bytes(uint64_t entries, bint packed) noexcept nogil:
    """Bytes of one queue's record."""
    cdef uint64_t n = 32 + 32 * entries if packed else 16 + 16 * entries
    return (n + RECORD_ALIGN - 1) & ~<uint64_t>(RECORD_ALIGN - 1)


cdef class _Mapping(Region):
    def __str__(self):
        return f"in-flight region of {self.size:#x} bytes at offset {self.mmap_offset:#x}"


@cython.final
cdef class Inflight:
    """A region with the records of all queues. See virtqueue.pyi for the contract."""

    def __cinit__(self):
        self.fd = -1

    def __dealloc__(self):
        if self.fd >= 0:
            os.close(self.fd)

    @staticmethod
    def create(int num_queues, int queue_size):
        size = num_queues * record_bytes(queue_size, True)
        fd = os.memfd_create("hcd-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(fd)
            raise
        return Inflight.map(fd, 0, size, num_queues, queue_size)

    @staticmethod
    def map(int fd, uint64_t offset, uint64_t size, int num_queues, int queue_size):
        cdef Inflight self = Inflight.__new__(Inflight)
        self.fd = fd
        self.num_queues = num_queues
        self.queue_size = queue_size
        try:
            self.check(offset, size)
            self.region = _Mapping(0, size, 0, offset, fd)
        except BaseException:
            self.close()
            raise
        return self

    cdef int check(self, uint64_t offset, uint64_t size) except -1:
        if not 1 <= self.num_queues <= 65535 or not 1 <= self.queue_size <= 32768:
            raise ProtocolError(f"an in-flight region for {self.num_queues} queues of {self.queue_size} entries")
        if offset % RECORD_ALIGN:
            raise ProtocolError(f"the in-flight region begins at offset {offset:#x}; expected a multiple of "
                                f"{RECORD_ALIGN}")
        try:
            mode = os.fstat(self.fd).st_mode
        except OSError as e:
            raise ProtocolError(f"the in-flight region's fd: {e.strerror}") from None
        if not stat.S_ISREG(mode):
            raise ProtocolError(f"the in-flight region's fd is {describe_mode(mode)}; expected a memfd")
        need = self.num_queues * record_bytes(self.queue_size, False)
        if size < need:
            raise ProtocolError(f"the in-flight region has {size} bytes; {self.num_queues} queues of "
                                f"{self.queue_size} entries take {need}")
        return 0

    cdef char *part(self, int index, bint packed) except NULL:
        """The record of queue ``index``."""
        cdef uint64_t each = record_bytes(self.queue_size, packed)
        if index >= self.num_queues or (index + 1) * each > self.region.size:
            raise ProtocolError(f"queue {index} has no place in the {self.region}, made for {self.num_queues} queues "
                                f"of {self.queue_size} entries")
        return self.region.host + index * each

    @property
    def offset(self):
        return self.region.mmap_offset

    @property
    def size(self):
        return self.region.size

    @property
    def holds_packed(self):
        return self.region.size >= self.num_queues * record_bytes(self.queue_size, True)

    @property
    def poisoned(self):
        return self.region.poisoned

    def set_alarm(self, int fd):
        self.region.set_alarm(fd)

    def close(self):
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


# -- taking and putting back: no reads of the record here

cdef inline void split_record_take(track_t *t, uint16_t head) noexcept nogil:
    cdef hcd_split_record *record = <hcd_split_record *>t.record
    record.desc[head].counter = t.counter
    t.counter += 1
    hcd_step()
    record.desc[head].inflight = 1
    hcd_step()


cdef inline void split_record_unpop(track_t *t, uint16_t head) noexcept nogil:
    (<hcd_split_record *>t.record).desc[head].inflight = 0
    hcd_step()


cdef inline uint16_t packed_record_note(track_t *t, uint16_t at, const desc_t *d) noexcept nogil:
    """Copy a descriptor of the chain that is being taken to free state ``at``; returns the next free one."""
    cdef hcd_packed_state *state = &(<hcd_packed_record *>t.record).desc[at]
    state.addr = d.addr
    state.len = d.len
    state.id = d.flags
    state.flags = d.other
    return t.next[at]


cdef inline void packed_record_take(track_t *t, const chain_t *c) noexcept nogil:
    """The chain was noted from free_head to ``c.last``: it leaves the free list."""
    cdef hcd_packed_record *record = <hcd_packed_record *>t.record
    cdef hcd_packed_state *head = &record.desc[c.state]
    head.last = c.last
    head.num = c.slots
    head.counter = t.counter
    t.counter += 1
    head.inflight = 1
    hcd_step()
    t.free_head = t.next[c.last]
    t.n_free -= c.slots
    hcd_put_heads(record, t.free_head, t.free_head)
    hcd_step()


cdef inline void packed_record_unpop(track_t *t, const chain_t *c) noexcept nogil:
    cdef hcd_packed_record *record = <hcd_packed_record *>t.record
    record.desc[c.last].next = t.next[c.last] = t.free_head
    hcd_step()
    t.free_head = c.state
    t.n_free += c.slots
    hcd_put_heads(record, c.state, c.state)
    hcd_step()
    record.desc[c.state].inflight = 0
    hcd_step()


# -- completing

cdef inline void record_done(vring_t *r, const chain_t *c, uint32_t written) noexcept nogil:
    """``c`` belongs to the batch that is published next."""
    cdef track_t *t = r.track
    cdef batch_t *b = &t.batch[t.n_batch]
    if t.n_batch >= r.size:
        return                # cannot be: see take_next
    b.head = c.head
    b.state = c.state
    b.last = c.last
    b.slots = c.slots
    b.written = written
    t.n_batch += 1


cdef void split_record_publish(vring_t *r) noexcept nogil:
    """Publish the batch, whose used entries are written already."""
    cdef track_t *t = r.track
    cdef hcd_split_record *record = <hcd_split_record *>t.record
    cdef uint32_t i
    for i in range(t.n_batch):
        record.desc[t.batch[i].head].next = t.last_batch
        t.last_batch = t.batch[i].head
    record.last_batch_head = t.last_batch
    hcd_step()
    split_publish(r)
    hcd_step()
    for i in range(t.n_batch):
        record.desc[t.batch[i].head].inflight = 0
    hcd_step()
    record.used_idx = r.next_used
    hcd_step()
    t.n_batch = 0


cdef void packed_record_publish(vring_t *r) noexcept nogil:
    """Write the used descriptors of the batch and publish them."""
    cdef track_t *t = r.track
    cdef hcd_packed_record *record = <hcd_packed_record *>t.record
    cdef batch_t *b
    cdef uint16_t head = t.free_head, old_used = r.next_used, used = r.next_used
    cdef bint old_wrap = r.used_wrap, wrap = r.used_wrap
    cdef uint32_t i
    for i in range(t.n_batch):
        b = &t.batch[i]
        record.desc[b.last].next = t.next[b.last] = head
        head = b.state
        t.n_free += b.slots
        packed_step(r.size, &used, &wrap, b.slots)
    hcd_step()
    hcd_put_heads(record, head, t.free_head)
    hcd_step()
    hcd_put_used(record, used, wrap, old_used, old_wrap, t.ahead)
    hcd_step()
    for i in range(t.n_batch):
        b = &t.batch[i]
        packed_used(r, b.head, b.slots, b.written)
    hcd_step()
    packed_publish(r)
    hcd_step()
    for i in range(t.n_batch):
        record.desc[t.batch[i].state].inflight = 0
    hcd_step()
    hcd_put_heads(record, head, head)
    hcd_step()
    hcd_put_used(record, used, wrap, used, wrap, t.ahead)
    hcd_step()
    t.free_head = head
    t.n_batch = 0


# -- beginning and resuming

cdef void drop_record(Virtqueue q) noexcept:
    cdef track_t *t = &q.track
    q.ring.track = NULL
    q.ring.again = 0
    free(t.next)
    free(t.batch)
    free(t.again)
    free(t.copy)
    memset(t, 0, sizeof(track_t))


cdef void end_record(vring_t *r) noexcept nogil:
    """Nothing is in flight, and whoever sets the ring up again says where it stands."""
    if r.track != NULL and r.again == 0:
        hcd_store16(<char *>r.track.record + 8, 0)
        hcd_step()


cdef int attach_record(Virtqueue q) except -1:
    """The ring stands where the front end says. Move it to where its record says, or begin a record here."""
    cdef vring_t *r = &q.ring
    cdef track_t *t = &q.track
    cdef Inflight area = q.inflight_area
    cdef char *part = area.part(q.index, r.packed)
    cdef uint16_t version
    if r.size > <uint32_t>area.queue_size:
        raise ProtocolError(f"queue {q.index}: a ring of {r.size} entries and an in-flight region for "
                            f"{area.queue_size}")
    t.record = part
    t.states = area.queue_size
    t.next = <uint16_t *>calloc(t.states, sizeof(uint16_t))
    t.batch = <batch_t *>calloc(r.size, sizeof(batch_t))
    t.again = <uint16_t *>calloc(r.size, sizeof(uint16_t))
    if t.next == NULL or t.batch == NULL or t.again == NULL:
        raise MemoryError
    version = hcd_load16((part + 8))
    if version and q.resume:
        if version != RECORD_VERSION:
            damaged(q, f"has version {version}; expected {RECORD_VERSION}")
        resume_packed(q) if r.packed else resume_split(q)
        q.recovered = r.again
        # It may have been killed between publishing a completion and interrupting the driver.
        q.call_owed = True
    elif r.packed:
        begin_packed(q)
    else:
        begin_split(q)
    r.track = t
    return 0


cdef int damaged(Virtqueue q, str why) except -1:
    raise ProtocolError(f"queue {q.index}: the record of requests in flight {why}")


cdef void *snapshot(Virtqueue q, size_t n) except NULL:
    """A private copy of the record, for free(3)."""
    cdef void *copy = malloc(n)
    cdef hcd_split_record *head = <hcd_split_record *>copy
    if copy == NULL:
        raise MemoryError
    memcpy(copy, q.track.record, n)
    if head.desc_num != q.track.states:        # both layouts have it at the same place
        desc_num = head.desc_num
        free(copy)
        damaged(q, f"is for {desc_num} entries; expected {q.track.states}")
    return copy


cdef uint16_t *split_ahead(track_t *t) noexcept nogil:
    """Chains that were taken before the record began and will never be used: the two bytes before the last six of the
    record, behind its last state and there for alignment alone."""
    return <uint16_t *>(<char *>t.record + record_bytes(t.states, False) - 8)


cdef int keep_order(Virtqueue q, list found, uint32_t ahead) except -1:
    """``found``: (counter, head) of the chains in flight; they are taken again in the order of their counters."""
    cdef track_t *t = &q.track
    cdef uint32_t i
    found.sort()
    if len(found) + ahead > q.ring.size:
        damaged(q, f"has {len(found)} chains in flight and {ahead} that are lost, in a ring of {q.ring.size}")
    for i, (counter, head) in enumerate(found):
        t.again[i] = head
    t.n_again = q.ring.again = len(found)
    t.counter = (<uint64_t>found[len(found) - 1][0] + 1) if found else 0
    return 0


cdef int begin_split(Virtqueue q) except -1:
    cdef vring_t *r = &q.ring
    cdef track_t *t = &q.track
    cdef hcd_split_record *record = <hcd_split_record *>t.record
    record.version = 0
    hcd_step()
    memset(record.desc, 0, 16 * t.states)
    record.desc_num = t.states
    record.last_batch_head = 0
    record.used_idx = r.next_used
    split_ahead(t)[0] = <uint16_t>(r.last_avail - r.next_used)
    hcd_step()
    record.version = RECORD_VERSION
    hcd_step()
    return 0


cdef int resume_split(Virtqueue q) except -1:
    cdef vring_t *r = &q.ring
    cdef track_t *t = &q.track
    cdef hcd_split_record *record = <hcd_split_record *>t.record
    cdef uint16_t used = ring16(r, hcd_load16(r.device + 2)), batch, ahead = split_ahead(t)[0]
    cdef uint32_t i, head
    cdef hcd_split_record *copy = <hcd_split_record *>snapshot(q, 16 + 16 * t.states)
    try:
        batch = <uint16_t>(used - copy.used_idx)
        head = copy.last_batch_head
        if batch > t.states:
            damaged(q, f"ends at used index {copy.used_idx}, the ring of {r.size} at {used}")
        for i in range(batch):
            if head >= t.states:
                damaged(q, f"names descriptor {head} as completed; expected one below {t.states}")
            copy.desc[head].inflight = record.desc[head].inflight = 0
            head = copy.desc[head].next
        hcd_step()
        record.used_idx = used
        hcd_step()
        found = []
        for i in range(t.states):
            if copy.desc[i].inflight:
                if i >= r.size:
                    damaged(q, f"has descriptor {i} in flight in a ring of {r.size}")
                found.append((copy.desc[i].counter, i))
        t.last_batch = copy.last_batch_head if copy.last_batch_head < t.states else 0
    finally:
        free(copy)
    keep_order(q, found, ahead)
    r.next_used = used
    r.last_avail = r.avail_seen = <uint16_t>(used + ahead + t.n_again)
    return 0


cdef uint32_t slots_between(uint32_t size, uint16_t begin, bint begin_wrap, uint16_t end, bint end_wrap) noexcept nogil:
    """Slots from one position of a packed ring to a later one; more than ``size`` for positions that cannot be."""
    return end + (0 if begin_wrap == end_wrap else size) - begin


cdef int begin_packed(Virtqueue q) except -1:
    cdef vring_t *r = &q.ring
    cdef track_t *t = &q.track
    cdef hcd_packed_record *record = <hcd_packed_record *>t.record
    cdef uint32_t i, ahead
    record.version = 0
    hcd_step()
    memset(record.desc, 0, 32 * t.states)
    for i in range(t.states):
        record.desc[i].next = t.next[i] = i + 1
    ahead = slots_between(r.size, r.next_used, r.used_wrap, r.last_avail, r.avail_wrap)
    t.ahead = ahead if ahead <= r.size else 0
    record.desc_num = t.states
    hcd_put_heads(record, 0, 0)
    hcd_put_used(record, r.next_used, r.used_wrap, r.next_used, r.used_wrap, t.ahead)
    t.n_free = r.size
    hcd_step()
    record.version = RECORD_VERSION
    hcd_step()
    return 0


cdef int resume_packed(Virtqueue q) except -1:
    cdef vring_t *r = &q.ring
    cdef track_t *t = &q.track
    cdef hcd_packed_record *copy = <hcd_packed_record *>snapshot(q, 32 + 32 * t.states)
    cdef uint32_t slots
    t.copy = copy
    if copy.used_idx >= r.size or copy.old_used_idx >= r.size:
        damaged(q, f"ends at slot {copy.used_idx} or {copy.old_used_idx} of a ring of {r.size}")
    t.ahead = copy.ahead
    packed_end_batch(q, copy)
    found = packed_walk(q, copy, &slots)
    keep_order(q, found, 0)
    if slots + t.ahead > r.size:
        damaged(q, f"has {slots} descriptors in flight and {t.ahead} that are lost, in a ring of {r.size}")
    t.n_free = min(t.n_free, r.size - slots)
    r.next_used = r.last_avail = copy.used_idx
    r.used_wrap = r.avail_wrap = copy.used_wrap & 1
    packed_step(r.size, &r.last_avail, &r.avail_wrap, slots + t.ahead)
    return 0


cdef int packed_end_batch(Virtqueue q, hcd_packed_record *copy) except -1:
    """If a batch was being published, see whether the driver can see it, and finish it or undo it."""
    cdef vring_t *r = &q.ring
    cdef hcd_packed_record *record = <hcd_packed_record *>q.track.record
    cdef uint16_t slot = copy.old_used_idx, flags
    cdef bint wrap = copy.old_used_wrap & 1
    cdef uint32_t i, n = slots_between(r.size, slot, wrap, copy.used_idx, copy.used_wrap & 1)
    if n > r.size:
        damaged(q, f"moves from slot {slot} to {copy.used_idx} of a ring of {r.size}")
    if n and not packed_avail(hcd_load16_acquire(r.desc + 16 * slot + 14), wrap):
        copy.old_free_head = copy.free_head
        copy.old_used_idx, copy.old_used_wrap = copy.used_idx, copy.used_wrap
    else:
        for i in range(n):
            flags = hcd_load16(r.desc + 16 * slot + 14) & ~<uint16_t>(PACKED_AVAIL | PACKED_USED)
            hcd_store16(r.desc + 16 * slot + 14, flags | (PACKED_AVAIL if wrap else PACKED_USED))
            packed_step(r.size, &slot, &wrap, 1)
        copy.free_head = copy.old_free_head
        copy.used_idx, copy.used_wrap = copy.old_used_idx, copy.old_used_wrap
    hcd_step()
    hcd_put_heads(record, copy.free_head, copy.free_head)
    hcd_step()
    hcd_put_used(record, copy.used_idx, copy.used_wrap, copy.used_idx, copy.used_wrap, copy.ahead)
    hcd_step()
    return 0


cdef list packed_walk(Virtqueue q, hcd_packed_record *copy, uint32_t *slots):
    """Check the free list and every chain in flight, whose descriptors are counted in ``slots``."""
    cdef track_t *t = &q.track
    cdef hcd_packed_record *record = <hcd_packed_record *>t.record
    cdef uint32_t i, at = copy.free_head, k
    cdef uint8_t[:] seen = bytearray(t.states)
    t.free_head = at
    t.n_free = slots[0] = 0
    while at < t.states:
        if seen[at]:
            damaged(q, "has a free list that loops")
        seen[at] = 1
        t.n_free += 1
        if copy.desc[at].inflight:
            copy.desc[at].inflight = record.desc[at].inflight = 0
        at = copy.desc[at].next
    found = []
    for i in range(t.states):
        t.next[i] = copy.desc[i].next
        if not copy.desc[i].inflight:
            continue
        at = i
        if not 1 <= copy.desc[i].num <= q.ring.size:
            damaged(q, f"has a chain of {copy.desc[i].num} descriptors in a ring of {q.ring.size}")
        for k in range(copy.desc[i].num):
            if k:
                at = copy.desc[at].next
            if at >= t.states or seen[at]:
                damaged(q, f"has a chain through entry {at}, which is not there or not the chain's")
            seen[at] = 1
        if copy.desc[i].last != at:
            damaged(q, f"has a chain that ends at entry {at}, not {copy.desc[i].last}")
        slots[0] += copy.desc[i].num
        found.append((copy.desc[i].counter, i))
    return found


# -- taking what is recovered

cdef int pop_again(vring_t *r, MemoryTable mem, chain_t *c) noexcept nogil:
    """The next recovered chain, as split_pop and packed_pop take those of the ring."""
    cdef track_t *t = r.track
    cdef uint16_t head = t.again[t.n_again - r.again]
    if r.packed:
        if packed_chain_again(r, mem, c, head) != 0:
            return -1
    else:
        if split_chain(r, mem, c, head) != 0:
            return -1
        c.head = head
        c.slots = 1
    c.again = True
    r.again -= 1
    return 1


cdef int packed_chain_again(vring_t *r, MemoryTable mem, chain_t *c, uint16_t head) noexcept nogil:
    cdef hcd_packed_state *states = (<hcd_packed_record *>r.track.copy).desc
    cdef hcd_packed_state *state = NULL
    cdef desc_t d
    cdef uint32_t i, at = head
    for i in range(states[head].num):
        if i:
            at = state.next
        state = &states[at]
        d.addr = state.addr
        d.len = state.len
        d.flags = state.id
        d.other = state.flags
        if packed_piece(r, mem, c, &d) != 0:
            return -1
    if d.flags >= r.size:
        return failed(r, E_ID, d.flags, r.size)
    c.head = d.flags
    c.slots = states[head].num
    c.state = head
    c.last = states[head].last
    return 0
