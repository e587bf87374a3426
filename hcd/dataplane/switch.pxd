from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from hcd.dataplane.stats cimport QueueStats
from hcd.dataplane.virtqueue cimport Request, Virtqueue, iovec

cdef enum:
    PEEK = 54                 # bytes of a frame that are looked at: Ethernet, IPv6 without options, ports
    WAYS = 8                  # entries of one set of the address table

ctypedef struct frame_t:      # one frame on its way, in pieces that are somebody else's memory
    const iovec *iov
    uint32_t n
    uint64_t skip             # bytes before the frame: the header of the sender's ring
    uint64_t size             # of the frame, from the destination address on
    uint32_t seen
    uint8_t head[54]          # private copy of its beginning, read once

ctypedef struct place_t:      # where copying stands in the pieces of a frame
    uint32_t i
    uint64_t at
    uint64_t left

ctypedef struct station_t:    # what the switch learned; 16 bytes
    uint64_t mac              # 0: free
    uint32_t seen             # second of its last frame
    uint32_t port             # index into Switch.slots

cdef class Receiver:
    cdef Virtqueue q
    cdef int index
    cdef uint32_t header
    cdef bint mergeable
    cdef bint swap

    cdef int gather(self, uint64_t need, bint whole_ring=*) except -100
    cdef int give_back(self, int n) except -1
    cdef Request oldest_of(self, int n)
    cdef void write_header(self, Request r, uint16_t buffers) noexcept
    cdef int finish(self, int n, uint64_t total, int op) except -1
    cdef int place(self, int n, const frame_t *f, int op) except -1

cdef class Port:
    cdef readonly str name
    cdef readonly bint up           # somebody is there to receive
    cdef readonly uint64_t drops    # frames for this port that were not delivered
    cdef uint32_t slot
    cdef Switch switch

    cdef int deliver(self, const frame_t *f) except -1

cdef class QueuePort(Port):
    cdef public uint64_t limit      # bytes of the largest frame that goes to the guest
    cdef int rx_op
    cdef int tx_op
    cdef list receivers
    cdef QueueStats counted         # of the receive queue that was there last
    cdef bytes rest                 # the end of a frame that a stream took half of

    cdef Receiver choose(self, const frame_t *f)
    cdef int offer(self, const frame_t *f) except -100
    cdef int count_drop(self, Receiver x) except -1
    cdef int write_frame(self, int fd, const frame_t *f, int header, bint stream) except -100
    cdef int transmit(self, Virtqueue queue, int fd, int header, bint stream) except -1

cdef class FramePort(Port):
    cdef object callback
    cdef bint complained

cdef class Switch:
    cdef readonly str name
    cdef readonly tuple ports
    cdef readonly uint64_t forwarded
    cdef readonly uint64_t flooded
    cdef readonly uint64_t filtered
    cdef uint32_t ageing
    cdef list slots
    cdef station_t *stations
    cdef uint32_t sets
    cdef int shift
    cdef uint64_t seed

    cdef station_t *set_of(self, uint64_t mac) noexcept nogil
    cdef void learn(self, uint64_t mac, uint32_t slot, uint32_t now) noexcept nogil
    cdef int find(self, uint64_t mac, uint32_t now) noexcept nogil
    cdef int forward(self, Port source, const frame_t *f, uint32_t now) except -1
