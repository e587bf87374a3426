# Requests: the scatter list of one chain, cursors through it, and its completion.
#
# Where both sides of a copy may be guest memory it is a memmove(3): a driver may let its buffers overlap.

cdef enum:
    FREE = 0
    INFLIGHT = 1
    TRAVELS = 2               # completed by another thread, on its way to the ring's owner
    WAITS = 3                 # completed, but IN_ORDER wants an older one first
    DONE = 4
    IOV_BATCH = 64
    READ_MOST = 16 << 20      # bytes that read() copies unless it is told how many


cdef class _Piece:
    """Exports one piece of guest memory as a buffer, and keeps its mapping alive for as long as a view exists."""

    cdef MemoryTable mem
    cdef void *p
    cdef Py_ssize_t n
    cdef bint readonly

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.p, self.n, self.readonly, flags)

    def __releasebuffer__(self, Py_buffer *view):
        pass


@cython.final
@cython.no_gc_clear
cdef class Request:
    """One request of a driver. See virtqueue.pyi for the contract of every method."""

    def __dealloc__(self):
        free(self.c.iov)

    cdef int live(self) except -1:
        if self.state != INFLIGHT:
            raise ValueError("the request is completed already")
        return 0

    @property
    def queue(self):
        return self.vq

    @property
    def readable(self):
        self.live()
        return self.r.left

    @property
    def writable(self):
        self.live()
        return self.w.left

    @property
    def readable_size(self):
        return self.c.out_size

    @property
    def writable_size(self):
        return self.c.in_size

    @property
    def completed(self):
        return self.state != INFLIGHT

    def hold(self):
        self.held = True

    # -- header fields

    cdef const char *header(self, uint64_t offset, uint64_t n, char *spare) except NULL:
        """``n`` (at most 8) readable bytes at ``offset``: in place where they lie in one piece, else in ``spare``."""
        cdef uint32_t i = 0
        cdef uint64_t have = 0, part
        if self.state != INFLIGHT:
            self.live()
        if offset + n > self.c.out_size or offset + n < offset:
            raise GuestError(f"the request has {self.c.out_size} readable bytes, its header goes on to {offset + n}")
        if offset + n <= self.c.iov[0].iov_len:
            return <const char *>self.c.iov[0].iov_base + offset
        while offset >= self.c.iov[i].iov_len:
            offset -= self.c.iov[i].iov_len
            i += 1
        while have < n:
            part = self.c.iov[i].iov_len - offset
            if part > n - have:
                part = n - have
            memcpy(spare + have, <char *>self.c.iov[i].iov_base + offset, part)
            have += part
            offset = 0
            i += 1
        return spare

    def u8(self, uint64_t offset):
        cdef char spare[8]
        return (<const uint8_t *>self.header(offset, 1, spare))[0]

    def u16(self, uint64_t offset):
        cdef char spare[8]
        cdef uint16_t v = hcd_le16(self.header(offset, 2, spare))
        return hcd_swap16(v) if self.vq.ring.swap else v

    def u32(self, uint64_t offset):
        cdef char spare[8]
        cdef uint32_t v = hcd_le32(self.header(offset, 4, spare))
        return hcd_swap32(v) if self.vq.ring.swap else v

    def u64(self, uint64_t offset):
        cdef char spare[8]
        cdef uint64_t v = hcd_le64(self.header(offset, 8, spare))
        return hcd_swap64(v) if self.vq.ring.swap else v

    # -- cursors

    cdef int slice(self, cursor_t *k, bint out, uint64_t n, iovec *to, int most) noexcept nogil:
        """Up to ``most`` pieces that cover ``n`` bytes from the cursor on, which stays; returns how many."""
        cdef iovec *iov = self.c.iov if out else self.c.iov + self.c.n_out
        cdef uint32_t i = k.i
        cdef uint64_t at = k.at, part
        cdef int filled = 0
        while n and filled < most:
            part = iov[i].iov_len - at
            if part > n:
                part = n
            to[filled].iov_base = <char *>iov[i].iov_base + at
            to[filled].iov_len = part
            filled += 1
            n -= part
            at = 0
            i += 1
        return filled

    cdef void advance(self, cursor_t *k, bint out, uint64_t n) noexcept nogil:
        cdef iovec *iov = self.c.iov if out else self.c.iov + self.c.n_out
        k.left -= n
        n += k.at
        while k.left and n >= iov[k.i].iov_len:
            n -= iov[k.i].iov_len
            k.i += 1
        k.at = n

    def skip(self, uint64_t nbytes):
        self.live()
        if nbytes > self.r.left:
            raise GuestError(f"the request has {self.r.left} readable bytes left, {nbytes} were to be skipped")
        self.advance(&self.r, True, nbytes)

    def read(self, int64_t nbytes=-1):
        cdef uint64_t n, have = 0
        cdef iovec piece
        self.live()
        if nbytes < 0 and self.r.left > READ_MOST:
            raise GuestError(f"the request has {self.r.left} readable bytes left, more than {READ_MOST} at once")
        n = self.r.left if nbytes < 0 or <uint64_t>nbytes > self.r.left else <uint64_t>nbytes
        cdef bytes out = PyBytes_FromStringAndSize(NULL, n)
        cdef char *to = out
        while have < n:
            self.slice(&self.r, True, n - have, &piece, 1)
            memcpy(to + have, piece.iov_base, piece.iov_len)
            self.advance(&self.r, True, piece.iov_len)
            have += piece.iov_len
        return out

    def write(self, data):
        cdef Py_buffer view
        cdef uint64_t n, have = 0
        cdef iovec piece
        self.live()
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            n = <uint64_t>view.len if <uint64_t>view.len < self.w.left else self.w.left
            while have < n:
                self.slice(&self.w, False, n - have, &piece, 1)
                memmove(piece.iov_base, <char *>view.buf + have, piece.iov_len)
                self.advance(&self.w, False, piece.iov_len)
                have += piece.iov_len
        finally:
            PyBuffer_Release(&view)
        return n

    def write_at(self, uint64_t offset, data):
        cdef Py_buffer view
        cdef uint64_t n, have = 0, part
        cdef uint32_t i = self.c.n_out
        self.live()
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            n = view.len
            if offset + n > self.c.in_size or offset + n < offset:
                raise GuestError(f"the request has {self.c.in_size} writable bytes, the answer goes on to {offset + n}")
            while have < n:
                if offset >= self.c.iov[i].iov_len:
                    offset -= self.c.iov[i].iov_len
                    i += 1
                    continue
                part = self.c.iov[i].iov_len - offset
                if part > n - have:
                    part = n - have
                memmove(<char *>self.c.iov[i].iov_base + offset, <char *>view.buf + have, part)
                have += part
                offset += part
        finally:
            PyBuffer_Release(&view)

    def copy_to(self, Request other, int64_t nbytes=-1):
        cdef uint64_t n, have = 0, part
        cdef iovec a, b
        self.live()
        other.live()
        n = self.r.left if nbytes < 0 or <uint64_t>nbytes > self.r.left else <uint64_t>nbytes
        if n > other.w.left:
            n = other.w.left
        while have < n:
            self.slice(&self.r, True, n - have, &a, 1)
            other.slice(&other.w, False, n - have, &b, 1)
            part = a.iov_len if a.iov_len < b.iov_len else b.iov_len
            memmove(b.iov_base, a.iov_base, part)
            self.advance(&self.r, True, part)
            other.advance(&other.w, False, part)
            have += part
        return n

    # -- between a file and guest memory

    def preadv(self, int fd, int64_t offset, int64_t nbytes=-1):
        return self.move(fd, offset, nbytes, False)

    def pwritev(self, int fd, int64_t offset, int64_t nbytes=-1):
        return self.move(fd, offset, nbytes, True)

    cdef move(self, int fd, int64_t offset, int64_t nbytes, bint out):
        """As pread(2) and pwrite(2), repeated until all is moved or the file ends; ``offset`` -1: once, in stream."""
        cdef iovec iov[IOV_BATCH]
        cdef cursor_t *k = &self.r if out else &self.w
        cdef uint64_t n, have = 0
        cdef ssize_t got
        cdef int pieces
        self.live()
        self.held = True           # what is in the middle of I/O is not completed behind its back
        n = k.left if nbytes < 0 or <uint64_t>nbytes > k.left else <uint64_t>nbytes
        while have < n:
            pieces = self.slice(k, out, n - have, iov, IOV_BATCH)
            with nogil:
                if offset < 0:
                    got = writev(fd, iov, pieces) if out else readv(fd, iov, pieces)
                elif out:
                    got = pwritev(fd, iov, pieces, offset + have)
                else:
                    got = preadv(fd, iov, pieces, offset + have)
            if got < 0 and errno == EINTR:
                continue
            if got < 0:
                self.held = False
                if errno == EFAULT:
                    raise GuestError("the guest memory of the request went away")
                raise OSError(errno, os.strerror(errno))
            self.advance(k, out, got)
            have += got
            if got == 0 or offset < 0:
                break
        self.held = False
        return have

    # -- views

    cdef list views(self, uint32_t start, uint32_t n, bint readonly):
        cdef _Piece piece
        cdef uint32_t i
        self.live()
        out = []
        for i in range(start, start + n):
            piece = _Piece.__new__(_Piece)
            piece.mem = self.mem
            piece.p = self.c.iov[i].iov_base
            piece.n = self.c.iov[i].iov_len
            piece.readonly = readonly
            out.append(memoryview(piece))
        return out

    def readable_views(self):
        return self.views(0, self.c.n_out, True)

    def writable_views(self):
        return self.views(self.c.n_out, self.c.n_in, False)

    # -- the end

    cpdef complete(self, int64_t written=-1):
        self.finish(written)

    cdef int finish(self, int64_t written) except -1:
        cdef Virtqueue q = self.vq
        if self.state != INFLIGHT:
            raise ValueError("the request is completed already")
        if written > <int64_t>self.c.in_size:
            raise ValueError(f"{written} bytes written into a request that has room for {self.c.in_size}")
        if not 0 <= self.op < q.n_ops or not 0 <= self.status < STATUSES:
            told = f"no operation {self.op} or no status {self.status}"
            self.op, self.status = 0, 1        # it can be completed as failed now
            raise ValueError(told)
        if written < 0:
            written = self.c.in_size - self.w.left
        if PyThread_get_thread_ident() == q.owner:
            return q.settle(self, written)
        self.state = TRAVELS
        self.result = written
        q.remote.append(self)
        if len(q.remote) == 1:
            q.scheduler.completions(q)
        return 0

    def __repr__(self):
        where = f"{self.vq.tag or 'queue'} {self.vq.index}" if self.vq is not None else "nowhere"
        return f"<Request of {where}: {self.c.out_size} readable, {self.c.in_size} writable bytes>"
