# When a driver is interrupted in the middle of a batch (EVENT_IDX; at its end it always is).
#
# Early, it takes up what is done while the rest is served, and brings more before the device runs dry. What that costs
# depends on how deeply its processor sleeps: 1 us where it was only about to, 5 us (measured, in a VM) where it has to
# be fetched from HLT by an interrupt of its own. Ten requests take as long, so the dearer interrupts are, the longer one
# more is put off: until SPACING times the cost has passed, or until what waits in the ring will take no longer than LEAD
# times that, because the driver is about to be needed.
#
# One that is put off finds the driver fast asleep, so its cost says nothing about an early one; nor does a single early
# one, as the driver slept long before it. So TRIES in a row are made early every PROBE interrupts, and the least of
# their costs counts until the next.
#
# The times are bounded by MOST_COST, for the thread may have lost its processor while it made the call. A packed ring
# does not tell how much waits: there, none is put off.

cdef enum:
    SPACING = 8
    LEAD = 3
    PROBE = 64
    TRIES = 4
    MOST_COST = 8000          # ns


cdef class Pace:
    """How often one driver is interrupted early. Times in ns, of one clock."""

    cpdef bint holds(self, uint64_t now, uint64_t left):
        """Whether to put an early interrupt off; ``left``: how long what waits in the ring will take."""
        return now < self.until and left > LEAD * self.cost

    cpdef made(self, uint64_t began, uint64_t now):
        """The driver was interrupted, from ``began`` to ``now``."""
        cdef uint64_t cost = min(now - began, <uint64_t>MOST_COST)
        if self.made_since < TRIES:
            self.cost = cost if self.made_since == 0 else min(cost, self.cost)
        self.made_since = (self.made_since + 1) % PROBE
        self.until = now + SPACING * self.cost if self.made_since >= TRIES else 0
