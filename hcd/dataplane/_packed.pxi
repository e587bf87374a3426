# Packed virtqueues (virtio 1.3, 2.8): one ring of descriptors that both sides write, and two event areas.
#
# Descriptor: addr@0 len@8 id@12 flags@14. Available when AVAIL equals our wrap counter and USED does not; used when
# both equal the device's. The flags of the first descriptor of a batch are written last, with a release: until then
# the driver sees none of it. Event area: off_wrap@0, flags@2 (0 enable, 1 disable, 2 at one descriptor).

cdef inline bint packed_avail(uint16_t flags, bint wrap) noexcept nogil:
    return ((flags & PACKED_AVAIL) != 0) == wrap and ((flags & PACKED_USED) != 0) != wrap


cdef inline bint packed_has_work(vring_t *r) noexcept nogil:
    return packed_avail(hcd_load16(r.desc + 16 * r.last_avail + 14), r.avail_wrap)


cdef int packed_pop(vring_t *r, MemoryTable mem, chain_t *c) noexcept nogil:
    """1: a chain is in ``c``; 0: the ring is empty; -1: the driver broke the rules."""
    cdef desc_t d
    cdef track_t *t = r.track
    cdef uint32_t i = r.last_avail, steps = 0
    cdef uint16_t following = t.free_head if t != NULL else 0
    cdef uint16_t flags = hcd_load16_acquire(r.desc + 16 * i + 14)
    if not packed_avail(flags, r.avail_wrap):
        return 0
    while True:
        steps += 1
        if steps > r.size:
            return failed(r, E_LONG, 0, r.size)
        memcpy(&d, r.desc + 16 * i, 16)      # here "flags" is the id and "other" the flags
        if packed_piece(r, mem, c, &d) != 0:
            return -1
        if t != NULL:
            if steps > t.n_free:
                return failed(r, E_FULL, 0, r.size)
            c.last = following
            following = packed_record_note(t, following, &d)
        i += 1
        if i == r.size:
            i = 0
        if not d.other & NEXT:
            break
    if d.flags >= r.size:
        return failed(r, E_ID, d.flags, r.size)
    c.head = d.flags
    c.slots = <uint16_t>steps
    packed_step(r.size, &r.last_avail, &r.avail_wrap, steps)
    if t != NULL:
        c.state = t.free_head
        packed_record_take(t, c)
    return 1


cdef int packed_piece(vring_t *r, MemoryTable mem, chain_t *c, const desc_t *d) noexcept nogil:
    if not d.other & INDIRECT:
        return chain_add(r, c, mem, d.addr, d.len, (d.other & WRITE) != 0)
    if d.other & NEXT:
        return failed(r, E_INDIRECT_NEXT, 0, 0)
    return packed_indirect(r, mem, c, d.addr, d.len)


cdef int packed_indirect(vring_t *r, MemoryTable mem, chain_t *c, uint64_t table, uint32_t length) noexcept nogil:
    cdef desc_t d
    cdef uint32_t i
    if indirect_check(r, length) != 0:
        return -1
    for i in range(length / 16):
        if table_entry(r, mem, table, i, &d) != 0:
            return -1
        if d.other & INDIRECT:
            return failed(r, E_NESTED, 0, 0)
        if chain_add(r, c, mem, d.addr, d.len, (d.other & WRITE) != 0) != 0:
            return -1
    return 0


cdef bint packed_was_used(const vring_t *r) noexcept nogil:
    """Whether the ring stands at slot 0 with wrap counters 0 because it went once round: a used mark is left in it then.

    What is made available in that lap has the same bit, so no look is too late. The first slot alone would not do: it
    may lie inside a chain that began at the end of the ring, and is marked at its head only.
    """
    cdef uint32_t i
    for i in range(r.size):
        if hcd_load16(r.desc + 16 * i + 14) & PACKED_USED:
            return True
    return False


cdef inline void packed_step(uint32_t size, uint16_t *slot, bint *wrap, uint32_t by) noexcept nogil:
    cdef uint32_t to = slot[0] + by
    if to >= size:
        to -= size
        wrap[0] = not wrap[0]
    slot[0] = <uint16_t>to


cdef inline void packed_used(vring_t *r, uint16_t ident, uint16_t slots, uint32_t written) noexcept nogil:
    cdef char *d = r.desc + 16 * r.next_used
    cdef uint16_t flags = WRITE if written else 0
    if r.used_wrap:
        flags |= PACKED_AVAIL | PACKED_USED
    hcd_store32(d + 8, written)
    hcd_store16(d + 12, ident)
    if r.batch_slot < 0:
        r.batch_slot = r.next_used
        r.batch_flags = flags
    else:
        hcd_store16_release(d + 14, flags)
    packed_step(r.size, &r.next_used, &r.used_wrap, slots)


cdef inline void packed_publish(vring_t *r) noexcept nogil:
    hcd_store16_release(r.desc + 16 * r.batch_slot + 14, r.batch_flags)
    r.batch_slot = -1


cdef inline bint packed_wants_interrupt(vring_t *r) noexcept nogil:
    cdef uint16_t flags = hcd_load16_acquire(r.driver + 2)
    cdef uint16_t off_wrap, off
    if flags == 1:
        return False
    if flags != 2 or not r.event_idx or not r.signalled_valid:
        return True
    off_wrap = hcd_load16(r.driver)
    off = off_wrap & 0x7fff
    if (off_wrap >> 15) != r.used_wrap:
        off -= r.size
    return need_event(off, r.next_used, <uint16_t>(r.next_used - r.unsignalled))


cdef inline void packed_ask_kicks(vring_t *r, bint on) noexcept nogil:
    if not on:
        hcd_store16(r.device + 2, 1)
    elif r.event_idx:
        hcd_store16(r.device, r.last_avail | (0x8000 if r.avail_wrap else 0))
        hcd_store16_release(r.device + 2, 2)
    else:
        hcd_store16(r.device + 2, 0)


cdef inline void packed_ask_next_kick(vring_t *r) noexcept nogil:
    hcd_store16(r.device + 2, 0)


cdef inline void packed_unpop(vring_t *r, const chain_t *c) noexcept nogil:
    if r.last_avail >= c.slots:
        r.last_avail -= c.slots
    else:
        r.last_avail = <uint16_t>(r.last_avail + r.size - c.slots)
        r.avail_wrap = not r.avail_wrap
    if r.track != NULL:
        packed_record_unpop(r.track, c)
