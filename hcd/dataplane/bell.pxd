from libc.stdint cimport int64_t, uint32_t, uint64_t

from hcd.dataplane.stats cimport DoorbellStats, InterruptStats

cdef class Bell:
    cdef readonly str name
    cdef readonly int fd
    cdef DoorbellStats stats
    cdef public object handler    # (bell, count): what a ring is for
    cdef public object on_error   # (bell, exception): the handler raised
    cdef public object tag        # whatever the owner wants to find here again
    cdef uint64_t woken           # when the rings that are being handled woke us
    cdef bint answered            # an interrupt has answered them
    cdef Py_buffer memory         # where the guest stamps; memory.obj NULL without
    cdef const char *stamp
    cdef uint64_t last_stamp
    cdef uint32_t khz
    cdef int64_t offset

    cdef void observe_stamp(self, uint64_t woken) noexcept
    cdef uint64_t collect(self, uint64_t woken) except? 0xffffffffffffffff
    cdef int rung(self, uint64_t woken) except -1

cdef class Interrupt:
    cdef readonly str name
    cdef readonly int fd
    cdef readonly InterruptStats stats
    cdef public object on_signal  # (interrupt, bell that is answered or None, outcome): it was signalled

    cdef str send(self)
    cpdef bint signal(self, Bell answers=*) except? False
