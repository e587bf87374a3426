# The port of a network device: out of its transmit queues into a switch, a packet file (tap) or a stream, and into its
# receive queues.

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

    cdef int transmit(self, Virtqueue queue, int fd, int header, bint stream) except -1:
        """Write what ``queue`` has to ``fd``; where a stream is blocked, what is left waits in the queue."""
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
                    sent = self.write_frame(fd, &f, header, stream)
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

    def send(self, Virtqueue queue not None, int fd, int header=0):
        if not 0 <= header <= HEADERS:
            raise ValueError(f"a header of {header} bytes")
        return self.transmit(queue, fd, header, False)

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
        return self.transmit(queue, fd, 4, True)

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
        q.stats.guest_error()
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
