# When a driver is interrupted in the middle of a batch (EVENT_IDX; at its end it always is).
#
# Early, it takes up what is done while the rest is served, and brings more before the device runs dry. What that costs
# depends on how deeply its processor sleeps: 1 us where it was only about to, 5 us (measured, in a VM) where it has to
# be fetched from HLT by an interrupt of its own. Ten requests take as long, so while interrupts are dear one more is put
# off until SPACING times the cost of the last has passed, or until what waits in the ring will take no longer than LEAD
# times that: the driver is about to be needed.
#
# One that is put off finds the driver fast asleep, so its cost says nothing about an early one. That is tried again
# every PROBE interrupts, and its cost counts until the next.
#
# The times are bounded by MOST_COST, for the thread may have lost its processor while it made the call. A packed ring
# does not tell how much waits: there, none is put off.

cdef enum:
    SPACING = 6
    LEAD = 3
    PROBE = 16
    MOST_COST = 8000          # ns


cdef class Pace:
    """How often one driver is interrupted early. Times in ns, of one clock."""

    cpdef bint holds(self, uint64_t now, uint64_t left):
        """Whether to put an early interrupt off; ``left``: how long what waits in the ring will take."""
        if now >= self.until or left <= LEAD * self.cost:
            return False
        self.put_off = True
        return True

    cpdef made(self, uint64_t began, uint64_t now):
        """The driver was interrupted, from ``began`` to ``now``."""
        if not self.put_off:
            self.cost = min(now - began, <uint64_t>MOST_COST)
            self.since = 0
        self.put_off = False
        self.since += 1
        self.until = now + SPACING * self.cost if self.since < PROBE else 0
