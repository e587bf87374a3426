# cython: language_level=3, boundscheck=False, wraparound=False
"""The run loop of a VMM that answers writes in user space, without Python between the exits.

For the comparison that the lab makes: what a doorbell costs when a VMM has to be woken for it. In Python the loop itself
would be most of it.
"""

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<linux/kvm.h>" nogil:
    unsigned long KVM_RUN
    uint32_t KVM_EXIT_IO
    uint32_t KVM_EXIT_MMIO
    uint8_t KVM_EXIT_IO_OUT
    struct kvm_run_io:
        uint8_t direction
        uint16_t port
    struct kvm_run_mmio:
        uint8_t is_write
    struct kvm_run:
        uint32_t exit_reason
        kvm_run_io io
        kvm_run_mmio mmio


def answer_writes(int fd, size_t page, uint16_t end_port):
    """Run the vCPU ``fd``, whose shared page is at ``page``; take every write to a port or to memory and go on.

    Returns 0 at a write to ``end_port`` and at every other exit, or a negative errno: -EINTR after a kick.
    """
    cdef kvm_run *run = <kvm_run *>page
    cdef int result
    with nogil:
        while True:
            if ioctl(fd, KVM_RUN, 0) < 0:
                result = -errno
                break
            if run.exit_reason == KVM_EXIT_MMIO and run.mmio.is_write:
                continue
            if run.exit_reason == KVM_EXIT_IO and run.io.direction == KVM_EXIT_IO_OUT and run.io.port != end_port:
                continue
            result = 0
            break
    return result
