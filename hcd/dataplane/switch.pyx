# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""A learning Ethernet switch among virtqueues, callbacks and files.

Theory of operation.

* All ports of a switch belong to one thread, the reactor's. A transmit queue that gets a turn is drained in C: each
  chain is taken, its addresses are looked at in a private copy, and its payload is copied once, from the sender's
  memory straight into the receiver's buffers. The budget of a turn holds here as for every queue.
* Between rings the virtio header is made new: it is 10 or 12 bytes long and little- or big-endian, as each driver
  negotiated (virtio 1.3, 5.1.6.1). No offload is offered, so a frame that asks for one is the driver's fault; on the
  receiving side all is zero but the number of buffers.
* Receive buffers stay in the ring until there is a frame for them: receive queues are passive. A frame that is larger
  than a buffer takes several where MRG_RXBUF allows; they become visible to the driver together, as it expects. If
  they do not suffice they are put back, as if nothing had been, and the frame is dropped.
* A slow or hostile receiver costs its senders nothing: no waiting, drops are counted where they happen.
* The address table is set-associative: 8 entries for each hash value, the hash seeded at random. A guest that sends
  from invented addresses displaces its own entries before those of others.
"""

import logging
import os

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.ref cimport PyObject
from libc.errno cimport EAGAIN, EFAULT, EINTR, EIO, ENOBUFS, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from hcd.dataplane._atomics cimport hcd_now, hcd_swap16
from hcd.dataplane.stats cimport QueueStats
from hcd.dataplane.virtqueue cimport Request, Virtqueue, iovec

from hcd.errors import GuestError

cdef extern from "<sys/uio.h>" nogil:
    ssize_t readv(int fd, const iovec *iov, int n)
    ssize_t writev(int fd, const iovec *iov, int n)

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void *buf, size_t n)

cdef enum:
    ETHERNET = 14
    LARGEST = 65550           # behind the header (virtio 1.3, 5.1.6.3.1: buffers of 65562 hold any packet)
    PIECES = 256              # of one system call
    HEADERS = 12
    LATE = 32                 # completions that a driver waits for at most, if they can be shown

    NEEDS_CSUM = 1            # header flags, 5.1.6
    F_MRG_RXBUF = 15
    F_VERSION_1 = 32

    # what became of a frame, or of the search for buffers
    DELIVERED = 1
    NO_BUFFERS = 0
    TOO_LARGE = -1
    DOWN = -2
    BAD_BUFFER = -3

    # what became of a frame for a file
    SENT = 1
    LOST = 0
    BLOCKED = -1

MIN_FRAME = ETHERNET
MAX_FRAME = LARGEST

log = logging.getLogger("hcd.switch")


cdef inline uint32_t header_of(uint64_t features) noexcept nogil:
    return 12 if features & (<uint64_t>1 << F_MRG_RXBUF | <uint64_t>1 << F_VERSION_1) else 10


cdef inline uint32_t seconds() noexcept nogil:
    return <uint32_t>(hcd_now() / 1000000000)


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


@cython.final
cdef class Receiver:
    """One receive queue, and how its driver wants frames."""

    def __cinit__(self, int index, Virtqueue q not None):
        self.q = q
        self.index = index
        self.header = header_of(q.feature_bits)
        self.mergeable = (q.feature_bits >> F_MRG_RXBUF) & 1
        self.swap = q.ring.swap

    cdef int gather(self, uint64_t need, bint whole_ring=False) except -100:
        """Take buffers that hold ``need`` bytes, as few as do; they are the newest requests in flight. Returns how
        many, or NO_BUFFERS, TOO_LARGE or BAD_BUFFER, and none is taken then. ``whole_ring``: a ring full of buffers
        is enough in any case."""
        cdef Request r = self.q.take()
        cdef uint64_t room
        cdef int n = 1
        if r is None:
            return NO_BUFFERS
        room = r.c.in_size
        if room < self.header + <uint64_t>ETHERNET and not (self.mergeable and room >= self.header):
            # It never holds a frame, and would stand in the way of those behind it.
            r.status = 1
            r.finish(0)
            guest_error(self.q, f"a receive buffer of {room} bytes, too small for any frame")
            return BAD_BUFFER
        while room < need:
            if not self.mergeable or n >= <int>self.q.ring.size:
                if whole_ring:
                    break
                self.give_back(n)
                return TOO_LARGE
            r = self.q.take()
            if r is None:
                self.give_back(n)
                return NO_BUFFERS
            room += r.c.in_size
            n += 1
        return n

    cdef int give_back(self, int n) except -1:
        while n:
            self.q.unpop(<Request>self.q.newest)
            n -= 1
        return 0

    cdef Request oldest_of(self, int n):
        cdef PyObject *p = self.q.newest
        while n > 1:
            p = (<Request>p).older
            n -= 1
        return <Request>p

    cdef void write_header(self, Request r, uint16_t buffers) noexcept:
        cdef char header[12]
        memset(header, 0, 12)
        if self.swap:
            buffers = hcd_swap16(buffers)
        memcpy(header + 10, &buffers, 2)
        put(r, header, self.header)

    cdef int finish(self, int n, uint64_t total, int op) except -1:
        """Complete the newest ``n`` requests, into which ``total`` bytes were written one after the other."""
        cdef Request r = self.oldest_of(n), following
        cdef uint64_t part
        self.q.corked = n > 1
        try:
            while n:
                n -= 1
                following = <Request>r.newer if n else None
                part = r.c.in_size if r.c.in_size < total else total
                total -= part
                r.op = op
                r.finish(<int64_t>part)
                r = following
        finally:
            self.q.corked = False
        if self.q.ring.unpublished >= LATE:
            self.q.flush_now()
        return 0

    cdef int place(self, int n, const frame_t *f, int op) except -1:
        """Put the frame into the newest ``n`` requests and complete them."""
        cdef Request r
        cdef place_t k
        cdef int i
        begin(f, &k)
        if n == 1:
            r = <Request>self.q.newest
            self.write_header(r, 1)
            fill(r, f, &k)
            r.op = op
            return r.finish(<int64_t>(self.header + f.size))
        r = self.oldest_of(n)
        self.write_header(r, <uint16_t>n)
        for i in range(n):
            fill(r, f, &k)
            if i + 1 < n:
                r = <Request>r.newer
        return self.finish(n, self.header + f.size, op)


cdef class Port:
    """An end of a cable."""

    cdef int deliver(self, const frame_t *f) except -1:
        self.drops += 1
        return 0

    def __repr__(self):
        return f"<{type(self).__name__} {self.name}>"


cdef class QueuePort(Port):
    """The queues of a network device. See switch.pyi for the contract of every method."""

    def __init__(self, str name, *, uint64_t limit=LARGEST, int rx_op=0, int tx_op=0):
        self.name = name
        self.limit = limit
        self.rx_op = rx_op
        self.tx_op = tx_op
        self.receivers = []

    # -- receive queues

    def start(self, int index, Virtqueue queue not None):
        self.stop(queue)
        queue.ring.passive = True
        self.receivers.append(Receiver(index, queue))
        self.counted = queue.stats
        self.up = True

    def stop(self, Virtqueue queue not None):
        self.receivers = [x for x in self.receivers if (<Receiver>x).q is not queue]
        self.up = bool(self.receivers)

    cdef Receiver choose(self, const frame_t *f):
        cdef Py_ssize_t n = PyList_GET_SIZE(self.receivers), i, first
        cdef Receiver x
        if n == 1:
            x = <Receiver>PyList_GET_ITEM(self.receivers, 0)
            return x if x.q.ring.running else None
        if n == 0:
            return None
        first = flow_hash(f) % n
        for i in range(n):
            x = <Receiver>PyList_GET_ITEM(self.receivers, (first + i) % n)
            if x.q.ring.running:
                return x
        return None

    cdef int count_drop(self, Receiver x) except -1:
        cdef QueueStats stats = self.counted if x is None else x.q.stats
        self.drops += 1
        if stats is not None:
            stats.c.drops += 1
        return 0

    cdef int offer(self, const frame_t *f) except -100:
        """To the guest. DELIVERED, or why not; nothing is counted."""
        cdef Receiver x = self.choose(f)
        cdef int n
        if x is None:
            return DOWN
        if f.size > self.limit:
            return TOO_LARGE
        n = x.gather(x.header + f.size)
        if n <= 0:
            return n
        x.place(n, f, self.rx_op)
        return DELIVERED

    cdef int deliver(self, const frame_t *f) except -1:
        if self.offer(f) != DELIVERED:
            self.count_drop(self.choose(f))
        return 0

    # -- into a switch

    def drain(self, Virtqueue queue not None):
        cdef Request r
        cdef frame_t f
        cdef int taken = 0
        cdef uint32_t header = header_of(queue.feature_bits), now = seconds()
        while queue.budget > 0:
            r = None                        # so that the queue can use the object again
            r = queue.take()
            if r is None:
                break
            queue.budget -= 1
            taken += 1
            r.op = self.tx_op
            if frame_of_request(r, header, &f) != 0:
                refuse(r)
            else:
                if self.switch is not None:
                    self.switch.forward(self, &f, now)
                else:
                    queue.stats.c.drops += 1
                r.finish(0)
        return taken

    def inject(self, frame):
        send_bytes(self, frame)

    # -- into a file, and out of it

    cdef int write_frame(self, int fd, const frame_t *f, int header, bint stream) except -100:
        cdef iovec iov[PIECES]
        cdef uint8_t start[12]
        cdef place_t k
        cdef uint64_t total = f.size + header, part
        cdef ssize_t done
        cdef int n = 1
        memset(start, 0, HEADERS)
        if stream:
            for part in range(4):
                start[part] = <uint8_t>(f.size >> (24 - 8 * part))
        iov[0].iov_base = start
        iov[0].iov_len = header
        begin(f, &k)
        while k.left:
            if n == PIECES:
                return LOST
            part = f.iov[k.i].iov_len - k.at
            if part > k.left:
                part = k.left
            iov[n].iov_base = <char *>f.iov[k.i].iov_base + k.at
            iov[n].iov_len = part
            n += 1
            k.left -= part
            k.at = 0
            k.i += 1
        while True:
            done = writev(fd, iov, n)
            if done >= 0 or errno != EINTR:
                break
        if done == <ssize_t>total:
            return SENT
        if done < 0:
            return write_failed(stream)
        if not stream:
            return LOST
        self.rest = tail(iov, n, <uint64_t>done)
        return SENT

    def send(self, Virtqueue queue not None, int fd, int header=0):
        cdef Request r
        cdef frame_t f
        cdef int taken = 0, sent
        cdef uint32_t own = header_of(queue.feature_bits)
        if not 0 <= header <= HEADERS:
            raise ValueError(f"a header of {header} bytes")
        while queue.budget > 0:
            r = None
            r = queue.take()
            if r is None:
                break
            queue.budget -= 1
            taken += 1
            r.op = self.tx_op
            if frame_of_request(r, own, &f) != 0:
                refuse(r)
                continue
            sent = LOST
            try:
                sent = self.write_frame(fd, &f, header, False)
            finally:
                sent_or_lost(r, sent)
        return taken

    def receive(self, int index, int fd, int header=0, int most=64):
        """Read frames from ``fd`` straight into receive queue ``index``. Returns how many, and whether the guest has
        no buffers for more."""
        cdef Receiver x = None, each
        cdef int taken = 0, n
        if not 0 <= header <= HEADERS:
            raise ValueError(f"a header of {header} bytes")
        for each in self.receivers:
            if each.index == index and each.q.ring.running:
                x = each
        if x is None:
            return 0, True
        while taken < most:
            n = x.gather(x.header + self.limit, True)
            if n == NO_BUFFERS:
                return taken, True
            if n == BAD_BUFFER:
                taken += 1
                continue
            if not read_frame(self, x, n, fd, header):
                break
            taken += 1
        return taken, False

    @property
    def blocked(self):
        return self.rest is not None

    def send_stream(self, Virtqueue queue not None, int fd):
        cdef Request r
        cdef frame_t f
        cdef int taken = 0, sent
        cdef uint32_t own = header_of(queue.feature_bits)
        while queue.budget > 0 and self.rest is None:
            r = None
            r = queue.take()
            if r is None:
                break
            r.op = self.tx_op
            if frame_of_request(r, own, &f) != 0:
                refuse(r)
            else:
                sent = LOST
                try:
                    sent = self.write_frame(fd, &f, 4, True)
                finally:
                    if sent != BLOCKED:
                        sent_or_lost(r, sent)
                if sent == BLOCKED:
                    queue.unpop(r)
                    self.rest = b""
                    break
            queue.budget -= 1
            taken += 1
        return taken

    def put_stream(self, frame, int fd):
        cdef Py_buffer view
        cdef iovec whole
        cdef frame_t f
        if self.rest is not None:
            raise ValueError("the stream is blocked")
        PyObject_GetBuffer(frame, &view, PyBUF_SIMPLE)
        try:
            whole.iov_base = view.buf
            whole.iov_len = view.len
            if frame_of_bytes(&whole, &f) != 0:
                raise ValueError(f"a frame of {view.len} bytes; expected {ETHERNET} to {LARGEST}")
            if self.write_frame(fd, &f, 4, True) == BLOCKED:
                self.rest = len(frame).to_bytes(4, "big") + bytes(frame)
        finally:
            PyBuffer_Release(&view)

    def flush_stream(self, int fd):
        cdef ssize_t done
        if self.rest is None:
            return True
        if self.rest:
            done = write(fd, <const char *>self.rest, len(self.rest))
            if done < 0:
                if errno in (EAGAIN, EINTR):
                    return False
                raise OSError(errno, os.strerror(errno))
            self.rest = self.rest[done:]
        if self.rest:
            return False
        self.rest = None
        return True

    def forget_stream(self):
        self.rest = None

    def feed(self, data):
        cdef Py_buffer view
        cdef uint64_t at = 0, size
        cdef const uint8_t *p
        cdef iovec whole
        cdef frame_t f
        cdef int outcome
        cdef bint starved = False
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            while at + 4 <= <uint64_t>view.len:
                p = <const uint8_t *>view.buf + at
                size = <uint64_t>p[0] << 24 | <uint64_t>p[1] << 16 | <uint64_t>p[2] << 8 | p[3]
                if size < ETHERNET or size > LARGEST:
                    raise ValueError(f"a frame of {size} bytes; expected {ETHERNET} to {LARGEST}")
                if at + 4 + size > <uint64_t>view.len:
                    break
                whole.iov_base = <void *>(p + 4)
                whole.iov_len = size
                frame_of_bytes(&whole, &f)
                outcome = self.offer(&f)
                if outcome == NO_BUFFERS:
                    starved = True
                    break
                if outcome != DELIVERED:
                    self.count_drop(self.choose(&f))
                at += 4 + size
        finally:
            PyBuffer_Release(&view)
        return at, starved


cdef int write_failed(bint stream) except -100:
    if errno == EAGAIN and stream:
        return BLOCKED
    if errno == EFAULT or (not stream and errno in (EAGAIN, ENOBUFS, EIO)):
        return LOST                         # guest memory went away; a full queue, an interface that is down
    raise OSError(errno, os.strerror(errno))


cdef int sent_or_lost(Request r, int sent) except -1:
    if sent != SENT:
        r.vq.stats.c.drops += 1
        r.status = 1
    return r.finish(0)


cdef int refuse(Request r) except -1:
    """The driver sent what is no frame, or asked for an offload that was not negotiated."""
    cdef Virtqueue q = r.vq
    cdef uint64_t size = r.c.out_size
    q.stats.c.drops += 1
    r.status = 1
    r.finish(0)
    return guest_error(q, f"{size} bytes to send are no frame with its header, or ask for an offload that was not "
                          "negotiated")


cdef int guest_error(Virtqueue q, str why) except -1:
    """Tell of a mistake of the driver; whoever listens counts it."""
    if q.on_error is None:
        q.stats.c.guest_errors += 1
    else:
        q.on_error(q, GuestError(why))
    return 0


cdef bytes tail(const iovec *iov, int n, uint64_t done):
    """What is behind the first ``done`` bytes of the pieces."""
    cdef int i
    parts = []
    for i in range(n):
        if done >= iov[i].iov_len:
            done -= iov[i].iov_len
            continue
        parts.append((<const char *>iov[i].iov_base + done)[:iov[i].iov_len - done])
        done = 0
    return b"".join(parts)


cdef bint read_frame(QueuePort port, Receiver x, int n, int fd, int header) except -1:
    """Read one frame into the newest ``n`` requests; False when there is none. It is dropped where they are too
    small for it, which one byte too many tells."""
    cdef iovec iov[PIECES]
    cdef char start[12]
    cdef char spill
    cdef Request r = x.oldest_of(n)
    cdef uint64_t room = 0, whole = 0, skip = x.header, size
    cdef uint32_t piece
    cdef int pieces = 1, i
    cdef ssize_t got
    iov[0].iov_base = start
    iov[0].iov_len = header
    for i in range(n):
        whole += r.c.in_size
        for piece in range(r.c.n_out, r.c.n_out + r.c.n_in):
            if skip >= r.c.iov[piece].iov_len:
                skip -= r.c.iov[piece].iov_len
                continue
            if pieces == PIECES - 1:
                break
            iov[pieces].iov_base = <char *>r.c.iov[piece].iov_base + skip
            iov[pieces].iov_len = r.c.iov[piece].iov_len - skip
            room += iov[pieces].iov_len
            pieces += 1
            skip = 0
        if i + 1 < n:
            r = <Request>r.newer
    iov[pieces].iov_base = &spill
    iov[pieces].iov_len = 1
    pieces += 1
    while True:
        got = readv(fd, iov, pieces)
        if got >= 0 or errno != EINTR:
            break
    if got <= 0:
        x.give_back(n)
        if got < 0 and errno != EAGAIN and errno != EFAULT:
            raise OSError(errno, os.strerror(errno))
        return False
    if got < header + ETHERNET or got - header > <ssize_t>room or got - header > <ssize_t>port.limit:
        x.give_back(n)
        port.count_drop(x)
        return True
    size = x.header + <uint64_t>(got - header)
    while n > 1:                            # put back what the frame did not need
        r = <Request>x.q.newest
        whole -= r.c.in_size
        if whole < size:
            break
        x.q.unpop(r)
        n -= 1
    x.write_header(x.oldest_of(n), <uint16_t>n)
    x.finish(n, size, port.rx_op)
    return True


cdef int send_bytes(Port port, data) except -1:
    cdef Py_buffer view
    cdef iovec whole
    cdef frame_t f
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        whole.iov_base = view.buf
        whole.iov_len = view.len
        if frame_of_bytes(&whole, &f) != 0:
            raise ValueError(f"a frame of {view.len} bytes; expected {ETHERNET} to {LARGEST}")
        if port.switch is not None:
            port.switch.forward(port, &f, seconds())
    finally:
        PyBuffer_Release(&view)
    return 0


cdef class FramePort(Port):
    """Bytes in, bytes out."""

    def __init__(self, str name, callback):
        self.name = name
        self.callback = callback
        self.up = True

    cdef int deliver(self, const frame_t *f) except -1:
        cdef bytes out = PyBytes_FromStringAndSize(NULL, f.size)
        cdef char *to = out
        cdef place_t k
        cdef uint64_t part
        begin(f, &k)
        while k.left:
            part = f.iov[k.i].iov_len - k.at
            if part > k.left:
                part = k.left
            memcpy(to, <char *>f.iov[k.i].iov_base + k.at, part)
            to += part
            k.left -= part
            k.at = 0
            k.i += 1
        try:
            self.callback(out)
        except Exception:
            # The sender is another device: what goes wrong here is not its fault.
            self.drops += 1
            if not self.complained:
                self.complained = True
                log.exception("port %s: its callback failed; said once", self.name)
        return 0

    def send(self, frame):
        send_bytes(self, frame)


cdef class Switch:
    """A learning Ethernet switch. See switch.pyi."""

    def __init__(self, str name="", *, double ageing=300.0, int size=4096):
        cdef uint32_t sets = 1
        if not WAYS <= size <= 1 << 20:
            raise ValueError(f"a table of {size} addresses")
        self.shift = 64
        while sets * WAYS < <uint32_t>size:
            sets *= 2
            self.shift -= 1
        self.name = name
        self.ageing = <uint32_t>ageing
        self.ports = ()
        self.slots = []
        self.sets = sets
        self.seed = int.from_bytes(os.urandom(8), "little")
        free(self.stations)
        self.stations = <station_t *>calloc(sets * WAYS, sizeof(station_t))
        if self.stations == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.stations)

    def add(self, Port port not None):
        """Plug ``port`` in. ValueError when it is in a switch already."""
        if port.switch is not None:
            raise ValueError(f"port {port.name} is in switch {port.switch.name} already")
        if None in self.slots:
            port.slot = self.slots.index(None)
            self.slots[port.slot] = port
        else:
            port.slot = len(self.slots)
            self.slots.append(port)
        port.switch = self
        self.ports = (*self.ports, port)

    def remove(self, Port port not None):
        """Pull ``port`` out and forget what was learned behind it. Harmless when it is not in."""
        cdef uint32_t i
        if port.switch is not self:
            return
        for i in range(self.sets * WAYS):
            if self.stations[i].port == port.slot:
                self.stations[i].mac = 0
        self.slots[port.slot] = None
        port.switch = None
        self.ports = tuple(p for p in self.ports if p is not port)

    def addresses(self):
        cdef uint32_t i, now = seconds()
        out = {}
        for i in range(self.sets * WAYS):
            if self.stations[i].mac and now - self.stations[i].seen <= self.ageing:
                out[int(self.stations[i].mac).to_bytes(6, "little")] = self.slots[self.stations[i].port]
        return out

    cdef station_t *set_of(self, uint64_t mac) noexcept nogil:
        cdef uint64_t h = (mac ^ self.seed) * <uint64_t>0x9e3779b97f4a7c15
        return self.stations + WAYS * (h >> self.shift if self.sets > 1 else 0)

    cdef void learn(self, uint64_t mac, uint32_t slot, uint32_t now) noexcept nogil:
        cdef station_t *s = self.set_of(mac)
        cdef station_t *victim = NULL
        cdef int i, rank, best = -1
        for i in range(WAYS):
            if s[i].mac == mac:
                s[i].port = slot
                s[i].seen = now
                return
        for i in range(WAYS):
            rank = 0
            if s[i].mac == 0 or now - s[i].seen > self.ageing:
                rank = 2
            elif s[i].port == slot:
                rank = 1
            if rank > best or (rank == best and now - s[i].seen > now - victim.seen):
                best = rank
                victim = s + i
        victim.mac = mac
        victim.port = slot
        victim.seen = now

    cdef int find(self, uint64_t mac, uint32_t now) noexcept nogil:
        """The slot of the port behind which ``mac`` was seen lately, or -1."""
        cdef station_t *s = self.set_of(mac)
        cdef int i
        for i in range(WAYS):
            if s[i].mac == mac:
                return <int>s[i].port if now - s[i].seen <= self.ageing else -1
        return -1

    cdef int forward(self, Port source, const frame_t *f, uint32_t now) except -1:
        cdef uint64_t sender = mac_at(f.head + 6)
        cdef int slot
        cdef Port port
        if sender and not f.head[6] & 1:
            self.learn(sender, source.slot, now)
        if not f.head[0] & 1:
            slot = self.find(mac_at(f.head), now)
            if slot >= 0:
                port = <Port>PyList_GET_ITEM(self.slots, slot)
                if port is source:
                    self.filtered += 1
                    return 0
                self.forwarded += 1
                return port.deliver(f)
        self.flooded += 1
        for port in self.ports:
            if port is not source and port.up:
                port.deliver(f)
        return 0
