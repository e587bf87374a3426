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


include "_frame.pxi"
include "_receiver.pxi"


cdef class Port:
    """An end of a cable."""

    cdef int deliver(self, const frame_t *f) except -1:
        self.drops += 1
        return 0

    def __repr__(self):
        return f"<{type(self).__name__} {self.name}>"


include "_queueport.pxi"


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
