# What split and packed rings have in common: the errors of a driver, and the scatter list of a chain.

cdef enum:
    E_AVAIL_INDEX = 1
    E_HEAD
    E_NEXT
    E_LONG
    E_ORDER
    E_ZERO
    E_ADDRESS
    E_NESTED
    E_INDIRECT_NEXT
    E_INDIRECT_LENGTH
    E_INDIRECT_ADDRESS
    E_INDIRECT_OFF
    E_TOTAL
    E_ID
    E_MEMORY
    E_FULL
    E_PIECES

    NEXT = 1
    WRITE = 2
    INDIRECT = 4
    PACKED_AVAIL = 0x80
    PACKED_USED = 0x8000

ERRORS = {
    E_AVAIL_INDEX: "the available index moved by {a} in a ring of {b}",
    E_HEAD: "descriptor index {a} is outside a ring of {b}",
    E_NEXT: "next descriptor {a} is outside a table of {b}",
    E_LONG: "a chain is longer than the ring of {b} descriptors, or loops",
    E_ORDER: "a device-readable descriptor comes after a device-writable one",
    E_ZERO: "a descriptor has zero length",
    E_ADDRESS: "descriptor address {a:#x}, {b} bytes, is outside the guest memory that the front end shared",
    E_NESTED: "an indirect table holds an indirect descriptor",
    E_INDIRECT_NEXT: "an indirect descriptor has the NEXT flag",
    E_INDIRECT_LENGTH: "an indirect table of {a} bytes (a ring of {b} takes 16 bytes for each of 1 to {b} entries)",
    E_INDIRECT_ADDRESS: "indirect table at {a:#x}, {b} bytes, is outside the guest memory that the front end shared",
    E_INDIRECT_OFF: "an indirect descriptor, which was not negotiated",
    E_TOTAL: "a chain of more than 4 GiB",
    E_ID: "buffer id {a} is outside a ring of {b}",
    E_MEMORY: "no memory for a scatter list",
    E_FULL: "more descriptors are made available than the ring of {b} holds",
    E_PIECES: "a chain whose buffers lie across region borders again and again: more than {a} pieces",
}


ctypedef struct desc_t:
    uint64_t addr
    uint32_t len
    uint16_t flags            # split: flags, next; packed: id, flags -- see the readers
    uint16_t other


cdef inline int failed(vring_t *r, int code, uint64_t a, uint64_t b) noexcept nogil:
    r.error = code
    r.error_a = a
    r.error_b = b
    return -1


cdef inline uint16_t ring16(const vring_t *r, uint16_t v) noexcept nogil:
    return hcd_swap16(v) if r.swap else v


cdef int chain_grow(chain_t *c) noexcept nogil:
    cdef uint32_t room = c.room * 2 if c.room else 8
    cdef iovec *grown = <iovec *>realloc(c.iov, room * sizeof(iovec))
    if grown == NULL:
        return -1
    c.iov = grown
    c.room = room
    return 0


cdef int chain_add(vring_t *r, chain_t *c, MemoryTable mem, uint64_t addr, uint32_t length, bint write) noexcept nogil:
    """Append one descriptor's buffer, in as many pieces as regions that it spans.

    A chain has up to a ring of descriptors and a table of as many behind it. Buffers that don't overlap cross each
    border of a region once, which gives the most pieces that a sound chain can have; without a limit, one of a
    thousand descriptors over five hundred small regions takes 20 ms and 8 MB.
    """
    cdef uint64_t run = 0, left = length
    cdef uint32_t most = 2 * r.size + mem.n
    cdef char *host
    cdef uint32_t n
    if length == 0:
        return failed(r, E_ZERO, addr, 0)
    if not write and c.n_in:
        return failed(r, E_ORDER, 0, 0)
    if addr + left < addr:
        return failed(r, E_ADDRESS, addr, length)
    while left:
        host = mem.find(addr, left, &run)
        if host == NULL:
            return failed(r, E_ADDRESS, addr, left)
        n = c.n_out + c.n_in
        if n == most:
            return failed(r, E_PIECES, most, 0)
        if n == c.room and chain_grow(c) != 0:
            return failed(r, E_MEMORY, 0, 0)
        c.iov[n].iov_base = host
        c.iov[n].iov_len = run
        if write:
            c.n_in += 1
            c.in_size += run
        else:
            c.n_out += 1
            c.out_size += run
        addr += run
        left -= run
    if c.out_size + c.in_size > <uint64_t>0xffffffff:
        return failed(r, E_TOTAL, 0, 0)
    return 0


cdef inline int indirect_check(vring_t *r, uint32_t length) noexcept nogil:
    if not r.indirect:
        return failed(r, E_INDIRECT_OFF, 0, 0)
    if length == 0 or length % 16 or length / 16 > r.size:
        return failed(r, E_INDIRECT_LENGTH, length, r.size)
    return 0


cdef int table_entry(vring_t *r, MemoryTable mem, uint64_t table, uint32_t i, desc_t *d) noexcept nogil:
    """Copy entry ``i`` of an indirect table, once: the guest may change it behind our back, and a table that spans
    two regions is legal."""
    cdef uint64_t addr = table + <uint64_t>i * 16, run = 0
    cdef char *host
    cdef size_t have = 0
    while have < 16:
        host = mem.find(addr + have, 16 - have, &run)
        if host == NULL or addr + have < table:
            return failed(r, E_INDIRECT_ADDRESS, addr, 16)
        memcpy(<char *>d + have, host, run)
        have += run
    return 0


cdef inline bint need_event(uint16_t event, uint16_t new, uint16_t old) noexcept nogil:
    # virtio 1.3, 2.7.10: does the half-open interval (old, new] contain event + 1?
    return <uint16_t>(new - event - 1) < <uint16_t>(new - old)
