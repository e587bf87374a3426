# Ethernet frames where they lie: in the pieces of a request, or in one piece of memory. What decides is looked at in a
# private copy of the beginning; the rest is copied once, to where it goes.

cdef inline uint64_t mac_at(const uint8_t *p) noexcept nogil:
    cdef uint64_t mac = 0
    memcpy(&mac, p, 6)
    return mac


cdef uint32_t peek(const iovec *iov, uint32_t n, uint8_t *to, uint32_t most) noexcept nogil:
    """Copy up to ``most`` bytes from the beginning of the pieces; returns how many there were."""
    cdef uint32_t i, have = 0
    cdef size_t part
    for i in range(n):
        part = iov[i].iov_len
        if part > most - have:
            part = most - have
        memcpy(to + have, iov[i].iov_base, part)
        have += <uint32_t>part
        if have == most:
            break
    return have


cdef int frame_of_request(Request r, uint32_t header, frame_t *f) noexcept:
    """0 when the readable part of ``r`` is a frame that needs nothing done to it; the driver's fault otherwise."""
    cdef uint8_t start[66]                  # HEADERS + PEEK
    cdef uint32_t have
    if r.c.out_size < header + ETHERNET or r.c.out_size > header + LARGEST:
        return -1
    have = peek(r.c.iov, r.c.n_out, start, header + PEEK)
    if start[0] & NEEDS_CSUM or start[1]:
        return -1
    f.iov = r.c.iov
    f.n = r.c.n_out
    f.skip = header
    f.size = r.c.out_size - header
    f.seen = have - header
    memcpy(f.head, start + header, f.seen)
    return 0


cdef int frame_of_bytes(const iovec *whole, frame_t *f) noexcept nogil:
    f.iov = whole
    f.n = 1
    f.skip = 0
    f.size = whole.iov_len
    if f.size < ETHERNET or f.size > LARGEST:
        return -1
    f.seen = peek(whole, 1, f.head, PEEK)
    return 0


cdef inline void begin(const frame_t *f, place_t *k) noexcept nogil:
    k.i = 0
    k.at = f.skip
    k.left = f.size
    while k.at >= f.iov[k.i].iov_len:
        k.at -= f.iov[k.i].iov_len
        k.i += 1


cdef inline void put(Request r, const char *p, uint64_t n) noexcept:
    """``n`` bytes, no more than there is room for, into the writable part of ``r``."""
    cdef iovec *to
    cdef uint64_t part
    while n:
        to = r.c.iov + r.c.n_out + r.w.i
        part = to.iov_len - r.w.at
        if part > n:
            part = n
        memcpy(<char *>to.iov_base + r.w.at, p, part)
        r.w.at += part
        r.w.left -= part
        p += part
        n -= part
        if r.w.at == to.iov_len and r.w.left:
            r.w.i += 1
            r.w.at = 0


cdef inline void fill(Request r, const frame_t *f, place_t *k) noexcept:
    """As much of the rest of the frame as ``r`` has room for."""
    cdef uint64_t n = k.left if k.left < r.w.left else r.w.left, part
    k.left -= n
    while n:
        part = f.iov[k.i].iov_len - k.at
        if part > n:
            part = n
        put(r, <const char *>f.iov[k.i].iov_base + k.at, part)
        k.at += part
        n -= part
        if k.at == f.iov[k.i].iov_len and (n or k.left):
            k.i += 1
            k.at = 0


cdef uint32_t flow_hash(const frame_t *f) noexcept nogil:
    """The same for all frames of one flow: their order is kept because they go to one receive queue."""
    cdef const uint8_t *p = <const uint8_t *>f.head
    cdef uint32_t h = 0x811c9dc5, i, start = 0, end = 12
    if f.seen >= 38 and p[12] == 8 and p[13] == 0 and p[14] == 0x45:
        start = 26
        # Fragments but the first have no ports: none of them counts them.
        end = 38 if (p[23] == 6 or p[23] == 17) and not (p[20] & 0x3f or p[21]) else 34
    elif f.seen >= 54 and p[12] == 0x86 and p[13] == 0xdd:
        start = 22
        end = 54
    for i in range(start, end):
        h = (h ^ p[i]) * 0x01000193
    return h ^ h >> 15
