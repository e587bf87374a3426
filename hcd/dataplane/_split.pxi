# Split virtqueues (virtio 1.3, 2.7): descriptor table, available ring, used ring.
#
# avail: flags@0 idx@2 ring@4 used_event@4+2N; used: flags@0 idx@2 ring@4 (id,len) avail_event@4+8N. A legacy ring has
# the same layout at the addresses that the front end gives; only its byte order is the guest's own.

cdef inline void split_desc(const vring_t *r, desc_t *d) noexcept nogil:
    if r.swap:
        d.addr = hcd_swap64(d.addr)
        d.len = hcd_swap32(d.len)
        d.flags = hcd_swap16(d.flags)
        d.other = hcd_swap16(d.other)


cdef inline bint split_has_work(vring_t *r) noexcept nogil:
    if r.avail_seen != r.last_avail:
        return True
    return ring16(r, hcd_load16(r.driver + 2)) != r.last_avail


cdef inline uint16_t split_waiting(vring_t *r) noexcept nogil:
    """How many chains wait in the ring."""
    cdef uint16_t seen = ring16(r, hcd_load16_acquire(r.driver + 2))
    if <uint16_t>(seen - r.last_avail) <= r.size:
        r.avail_seen = seen
    return <uint16_t>(r.avail_seen - r.last_avail)


cdef int split_pop(vring_t *r, MemoryTable mem, chain_t *c) noexcept nogil:
    """1: a chain is in ``c``; 0: the ring is empty; -1: the driver broke the rules."""
    cdef uint16_t behind
    cdef uint16_t head
    if r.avail_seen == r.last_avail:
        r.avail_seen = ring16(r, hcd_load16_acquire(r.driver + 2))
        behind = <uint16_t>(r.avail_seen - r.last_avail)
        if behind == 0:
            return 0
        if behind > r.size:
            return failed(r, E_AVAIL_INDEX, behind, r.size)
    head = ring16(r, hcd_load16(r.driver + 4 + 2 * (r.last_avail & (r.size - 1))))
    if head >= r.size:
        return failed(r, E_HEAD, head, r.size)
    if split_chain(r, mem, c, head) != 0:
        return -1
    c.head = head
    c.slots = 1
    r.last_avail += 1
    if r.track != NULL:
        split_record_take(r.track, head)
    return 1


cdef int split_chain(vring_t *r, MemoryTable mem, chain_t *c, uint16_t head) noexcept nogil:
    cdef desc_t d
    cdef uint32_t steps = 0, i = head
    while True:
        steps += 1
        if steps > r.size:
            return failed(r, E_LONG, 0, r.size)
        memcpy(&d, r.desc + 16 * i, 16)
        split_desc(r, &d)
        if d.flags & INDIRECT:
            if d.flags & NEXT:
                return failed(r, E_INDIRECT_NEXT, 0, 0)
            return split_indirect(r, mem, c, d.addr, d.len)
        if chain_add(r, c, mem, d.addr, d.len, (d.flags & WRITE) != 0) != 0:
            return -1
        if not d.flags & NEXT:
            return 0
        i = d.other
        if i >= r.size:
            return failed(r, E_NEXT, i, r.size)


cdef int split_indirect(vring_t *r, MemoryTable mem, chain_t *c, uint64_t table, uint32_t length) noexcept nogil:
    cdef desc_t d
    cdef uint32_t steps = 0, i = 0, n = length / 16
    if indirect_check(r, length) != 0:
        return -1
    while True:
        steps += 1
        if steps > n:
            return failed(r, E_LONG, 0, n)
        if table_entry(r, mem, table, i, &d) != 0:
            return -1
        split_desc(r, &d)
        if d.flags & INDIRECT:
            return failed(r, E_NESTED, 0, 0)
        if chain_add(r, c, mem, d.addr, d.len, (d.flags & WRITE) != 0) != 0:
            return -1
        if not d.flags & NEXT:
            return 0
        i = d.other
        if i >= n:
            return failed(r, E_NEXT, i, n)


cdef inline void split_used(vring_t *r, uint16_t head, uint32_t written) noexcept nogil:
    cdef char *entry = r.device + 4 + 8 * (r.next_used & (r.size - 1))
    cdef uint32_t ident = head
    if r.swap:
        ident = hcd_swap32(ident)
        written = hcd_swap32(written)
    hcd_store32(entry, ident)
    hcd_store32(entry + 4, written)
    r.next_used += 1


cdef inline void split_publish(vring_t *r) noexcept nogil:
    hcd_store16_release(r.device + 2, ring16(r, r.next_used))


cdef inline bint split_wants_interrupt(vring_t *r) noexcept nogil:
    if not r.event_idx:
        return not ring16(r, hcd_load16(r.driver)) & 1
    if not r.signalled_valid:
        return True
    return need_event(ring16(r, hcd_load16(r.driver + 4 + 2 * r.size)), r.next_used,
                      <uint16_t>(r.next_used - r.unsignalled))


cdef inline void split_ask_kicks(vring_t *r, bint on) noexcept nogil:
    if not r.event_idx:
        hcd_store16(r.device, ring16(r, 0 if on else 1))
    elif on:
        hcd_store16(r.device + 4 + 8 * r.size, ring16(r, r.last_avail))


cdef inline void split_ask_next_kick(vring_t *r) noexcept nogil:
    """A kick for whatever is added from now on, although the ring holds requests already."""
    cdef uint16_t seen
    cdef int i
    if not r.event_idx:
        hcd_store16(r.device, 0)
        return
    for i in range(8):        # a driver that goes on adding meanwhile has no need to kick: the ring is looked at again
        seen = hcd_load16(r.driver + 2)
        hcd_store16(r.device + 4 + 8 * r.size, seen)
        hcd_fence()
        if hcd_load16(r.driver + 2) == seen:
            return


cdef inline void split_unpop(vring_t *r, uint16_t head) noexcept nogil:
    r.last_avail -= 1
    if r.track != NULL:
        split_record_unpop(r.track, head)
