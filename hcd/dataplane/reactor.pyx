# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The reactor: one thread that runs the plain handlers of all devices of the process.

Theory of operation.

* The loop has three states. *Working*: queues are ready; each gets one turn (at most a budget of requests), then fds,
  posted work and the rings whose kicks are suppressed are looked at, then the next round. *Polling*: nothing is ready, but rings were busy a moment ago;
  they are looked at in a loop without the GIL, with their kicks suppressed. *Sleeping*: kicks are enabled again, the
  rings looked at once more (a request may have slipped in), then epoll waits, as long as it takes.
* Polling costs a core and saves the kick of the guest and the wake-up of this thread. How long it goes on follows
  what happens: work that came within ``poll_us`` of going idle doubles the window, a longer gap halves it, down to
  nothing. An idle daemon sleeps.
* A raw doorbell (``Bell``) has no ring to poll: its handler is called as soon as its fd is found readable.
* Everything that happens to a queue or a watch happens on this thread; ``post`` and ``completions`` are the two
  doors from outside.
* A handler that raises, raises to ``queue.on_error``; the loop goes on. A handler that takes long delays all devices
  of the process: ``on_slow`` is told.
"""

import collections
import heapq
import logging
import os
import time

from cpython.pythread cimport PyThread_get_thread_ident
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, realloc

from hcd.dataplane._atomics cimport hcd_flag_load, hcd_flag_store, hcd_now, hcd_relax
from hcd.dataplane.bell cimport Bell
from hcd.dataplane.virtqueue cimport Virtqueue, nudge_end, ring_has_work, vring_t
from hcd.errors import contained
from hcd.turns import check_turn

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        void *ptr
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int ep, int op, int fd, epoll_event *event)
    int epoll_wait(int ep, epoll_event *events, int most, int timeout)
    int EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CLOEXEC
    uint32_t EPOLLIN

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *buf, size_t n)
    ssize_t write(int fd, const void *buf, size_t n)

cdef enum:
    EVENTS = 64
    SPINS = 16                # looks at the rings between two looks at the fds, while polling
    SMALLEST_WINDOW = 4000    # ns

LONGEST_SLEEP = 1e6          # seconds; epoll_wait takes an int of milliseconds

log = logging.getLogger("hcd.reactor")


cdef inline bint wants_turn(vring_t *r) noexcept nogil:
    return r.running and not r.passive and ring_has_work(r)


cdef class Watch:
    """An fd that the reactor waits on."""

    def cancel(self):
        """Stop waiting; reactor thread only. Before the fd is closed."""
        if not self.live:
            return
        self.live = False
        del self.reactor.watches[self.fd]
        if epoll_ctl(self.reactor.ep, EPOLL_CTL_DEL, self.fd, NULL) != 0:
            self.reactor.watch_anew(self)
        else:
            self.reactor.gone.append(self)   # epoll may have reported it already, to the dispatch that is under way


cdef inline int wait_on(int ep, Watch w):
    cdef epoll_event event
    event.events = EPOLLIN
    event.data.ptr = <void *>w
    return epoll_ctl(ep, EPOLL_CTL_ADD, w.fd, &event)


cdef class Timer:
    """A callback that is due at some time."""

    def cancel(self):
        """Harmless when it was called already. Reactor thread only."""
        if self.callback is not None:
            self.callback = None
            self.reactor.cancelled += 1
            self.reactor.drop_cancelled()


cdef class Reactor:
    """One loop, run by :meth:`run` on a thread of its own. ``poll_us`` 0 turns polling off."""

    def __cinit__(self, double poll_us=32, double slow_ms=50):
        self.ep = epoll_create1(EPOLL_CLOEXEC)
        if self.ep < 0:
            raise OSError(errno, os.strerror(errno))
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.posts = collections.deque()
        self.completed = []
        self.timers = []
        self.ready = []
        self.dirty = []
        self.awake = []
        self.watches = {}
        self.gone = []
        self.lost = []
        self.poll_ns = <uint64_t>(poll_us * 1000)
        self.slow_ns = <uint64_t>(slow_ms * 1e6)
        self.watch(self.wake_fd, None)

    def __dealloc__(self):
        free(self.rings)

    # -- doors from outside: any thread

    def post(self, callback):
        """Call ``callback`` on the reactor's thread soon. Any thread."""
        self.posts.append(callback)
        self.wake()

    def completions(self, Virtqueue q):
        """Requests of ``q`` were completed by another thread. Called with the GIL held, by any thread."""
        self.completed.append(q)
        self.wake()

    def stop(self):
        """End :meth:`run` soon. Any thread."""
        self.stopping = True
        self.wake()

    cdef int wake(self) except -1:
        cdef uint64_t one = 1
        if not hcd_flag_load(&self.posted):
            hcd_flag_store(&self.posted, 1)
            write(self.wake_fd, &one, 8)
        return 0

    # -- fds, timers, queues: the reactor's thread

    def watch(self, int fd, callback):
        """Call ``callback`` whenever ``fd`` is readable or in error. Returns a handle with ``cancel()``."""
        return self.add(fd, callback, None)

    def watch_bell(self, Bell bell not None):
        """Call the handler of ``bell`` whenever it is rung."""
        cdef Watch w = self.add(bell.fd, None, None)
        w.bell = bell
        return w

    def handle_bell(self, Bell bell not None):
        """Call the handler of ``bell`` with the rings that are there, if any, as when they wake us."""
        self.ring(bell, hcd_now())

    def watch_kick(self, Virtqueue q not None):
        """Read the kick eventfd of ``q`` whenever it is rung, and give the queue a turn."""
        return self.add(q.kick_fd, None, q)

    cdef Watch add(self, int fd, callback, Virtqueue q):
        cdef Watch w = Watch.__new__(Watch)
        w.reactor = self
        w.fd = fd
        w.queue = q
        w.callback = callback
        w.live = True
        if wait_on(self.ep, w) != 0:
            w.live = False
            raise OSError(errno, f"cannot wait on fd {fd}: {os.strerror(errno)}")
        closed, self.watches[fd] = self.watches.get(fd), w
        if closed is not None:            # another file has its number now
            (<Watch>closed).live = False
            self.watch_anew(closed)
        return w

    cdef int watch_anew(self, Watch closed) except -1:
        """The fd of ``closed`` was closed before its watch was cancelled. A mistake, of which nobody else shall notice:
        where another process has the file, epoll reports it for ever, and nobody can tell it not to. Another one takes
        its place."""
        cdef int ep = epoll_create1(EPOLL_CLOEXEC)
        cdef Watch w
        if ep < 0:
            self.lost.append(closed)      # it must stay where epoll thinks that it is
            return 0
        for w in self.watches.values():
            wait_on(ep, w)                # may be closed as well
        os.dup2(ep, self.ep, False)
        os.close(ep)
        self.gone.append(closed)
        return self.wake()                # this may be another thread: one waits with the old one

    def call_later(self, double seconds, callback):
        """Call ``callback`` once, ``seconds`` from now. Devices that are being opened call this on another thread."""
        cdef Timer t = Timer.__new__(Timer)
        t.reactor = self
        t.callback = callback
        self.timer_seq += 1
        heapq.heappush(self.timers, (time.monotonic() + seconds, self.timer_seq, t))
        if PyThread_get_thread_ident() != self.thread:
            self.wake()        # it sleeps until a timer that is due later, or for ever
        return t

    def set_poll_us(self, double poll_us):
        """Poll for at most so long from now on."""
        self.poll_ns = <uint64_t>(poll_us * 1000)
        if self.window > self.poll_ns:
            self.window = self.poll_ns

    def schedule(self, Virtqueue q not None):
        """Give ``q`` a turn although nobody rang: it was just started, or its device has something for it."""
        self.mark(q, hcd_now(), False)

    def flush_later(self, Virtqueue q not None):
        """``q`` has completions that its driver does not see yet."""
        self.dirty.append(q)

    def forget(self, Virtqueue q not None):
        """``q`` is stopped: don't look at it any more."""
        if q.awake:
            q.awake = False
            self.awake.remove(q)
            self.list_rings()
        if q.ready:
            q.ready = False
            if q in self.ready:
                self.ready.remove(q)
        if q in self.dirty:
            self.dirty.remove(q)

    cdef int list_rings(self) except -1:
        cdef Virtqueue q
        cdef vring_t **grown
        cdef int i = 0
        if <int>len(self.awake) > self.room:
            grown = <vring_t **>realloc(self.rings, 2 * len(self.awake) * sizeof(vring_t *))
            if grown == NULL:
                raise MemoryError
            self.rings = grown
            self.room = 2 * len(self.awake)
        for q in self.awake:
            self.rings[i] = &q.ring
            i += 1
        return 0

    cdef int mark(self, Virtqueue q, uint64_t woken, bint by_ring) except -1:
        if q.ready:
            # A ring that comes while the queue waits for its turn: the earlier cause stands, but a ring is a ring.
            if by_ring and not q.ready_by_ring:
                q.ready_by_ring = True
                q.ready_woken = woken
            return 0
        q.ready = True
        q.ready_woken = woken
        q.ready_by_ring = by_ring
        self.ready.append(q)
        return 0

    cdef int rouse(self, Virtqueue q) except -1:
        """From now on ``q`` is polled, until the reactor sleeps."""
        if not q.awake:
            q.awake = True
            self.awake.append(q)
            self.list_rings()
        return 0

    # -- the loop

    def run(self):
        """Run until :meth:`stop`. The calling thread is the reactor's thread."""
        self.thread = PyThread_get_thread_ident()
        self.idle_since = hcd_now()
        while not self.stopping:
            self.beats += 1
            if hcd_flag_load(&self.posted):
                self.run_posted()
            if self.timers:
                self.run_timers()
            if self.dirty:
                self.flush_dirty()
            if self.gone:
                self.gone.clear()      # before it sleeps: they keep queues alive
            if self.ready:
                self.round()
            elif not self.poll():
                self.sleep()
        self.run_posted()
        self.flush_dirty()
        nudge_end()

    cdef int round(self) except -1:
        """One turn for every queue that is ready, then a look at the fds, and at the rings that nobody kicks now."""
        cdef Virtqueue q
        queues, self.ready = self.ready, []
        for q in queues:
            if q.ready:
                q.ready = False
                self.turn(q)
        self.flush_dirty()
        self.idle_since = hcd_now()
        self.look(0, self.idle_since)      # a queue that always has work would keep the others from being polled
        return self.collect(0)

    cdef int look(self, int first, uint64_t now) except -1:
        """Mark what has work of the rings that are awake."""
        cdef int i
        for i in range(first, <int>len(self.awake)):
            if wants_turn(self.rings[i]):
                self.mark(<Virtqueue>self.awake[i], now, False)
        return 0

    cdef int turn(self, Virtqueue q) except -1:
        cdef uint64_t began = hcd_now(), took
        cdef bint by_ring = q.ready_by_ring
        if not q.ring.running:
            return 0
        q.disable_kicks()
        if not q.ring.passive:
            self.rouse(q)
        q.begin_turn(q.ready_woken, by_ring)
        try:
            left = q.handler(q)
            if left is not None or q.stalled():
                check_turn(q, left)
        except BaseException as e:
            self.turn_failed(q, contained(e))
        q.end_turn()
        if wants_turn(&q.ring):
            self.mark(q, q.ready_woken, False)
        took = hcd_now() - began
        if took > self.slow_ns and self.on_slow is not None:
            self.on_slow(q, took)
        return 0

    cdef int turn_failed(self, Virtqueue q, error) except -1:
        try:
            q.on_error(q, error)
        except BaseException:      # whatever it is, the others are served on
            log.exception("the end of a failed turn of queue %s %d", q.tag, q.index)
        return 0

    cdef int ring(self, Bell bell, uint64_t woken) except -1:
        cdef uint64_t began = hcd_now(), took
        try:
            bell.rung(woken)
        except BaseException:
            log.exception("doorbell %s failed", bell.name)
        took = hcd_now() - began
        if took > self.slow_ns and self.on_slow is not None:
            self.on_slow(bell, took)
        return 0

    cdef int flush_dirty(self) except -1:
        cdef Virtqueue q
        while self.dirty:
            queues, self.dirty = self.dirty, []
            for q in queues:
                q.flush_now()
        return 0

    cdef int run_posted(self) except -1:
        cdef Virtqueue q
        hcd_flag_store(&self.posted, 0)
        queues, self.completed = self.completed, []
        for q in queues:
            q.take_remote()
        while True:
            try:
                callback = self.posts.popleft()
            except IndexError:
                return 0
            self.call(callback)

    cdef int run_timers(self) except -1:
        cdef Timer t
        cdef double now = time.monotonic()
        while self.timers and self.timers[0][0] <= now:
            t = heapq.heappop(self.timers)[2]
            if t.callback is None:
                self.cancelled -= 1
                continue
            callback, t.callback = t.callback, None
            self.call(callback)
        return 0

    cdef int drop_cancelled(self) except -1:
        """A timer that is cancelled stays in the heap, but never are there more of these than of others: a guest may
        have hours' worth of them made and cancelled."""
        cdef Timer t
        if 2 * self.cancelled > len(self.timers):
            self.timers[:] = [entry for entry in self.timers if (<Timer>entry[2]).callback is not None]
            heapq.heapify(self.timers)
            self.cancelled = 0
        return 0

    cdef int call(self, callback) except -1:
        try:
            callback()
        except BaseException as e:
            if self.on_error is not None:
                self.on_error(e)
            else:
                log.exception("a callback of the reactor failed")
        return 0

    cdef int gap_ended(self, uint64_t now) except -1:
        """Work came: the length of the gap before it decides how long the next poll goes on."""
        cdef uint64_t gap = now - self.idle_since
        if gap <= self.poll_ns:
            self.window = self.window * 2 if self.window else SMALLEST_WINDOW
            if self.window > self.poll_ns:
                self.window = self.poll_ns
        else:
            self.window = self.window / 2
            if self.window < SMALLEST_WINDOW:
                self.window = 0
        return 0

    cdef int poll(self) except -1:
        """Look at the rings that were busy lately; 1 when something came, 0 when it is time to sleep."""
        cdef epoll_event events[EVENTS]
        cdef uint64_t now = 0, deadline = self.idle_since + self.window
        cdef int n = <int>len(self.awake), i, found = -1, fds = 0, spins = 0
        cdef Virtqueue q
        if n == 0 or self.window == 0:
            return 0
        for q in self.awake:
            if q.n_inflight:
                return 0           # other threads serve requests: spinning would take their processor
        with nogil:
            while True:
                for i in range(n):
                    if wants_turn(self.rings[i]):
                        found = i
                        break
                if found >= 0 or hcd_flag_load(&self.posted):
                    break
                spins += 1
                if spins % SPINS == 0:
                    fds = epoll_wait(self.ep, events, EVENTS, 0)
                    if fds > 0:
                        break
                    now = hcd_now()
                    if now >= deadline:
                        break
                hcd_relax()
        if found >= 0:
            now = hcd_now()
            self.gap_ended(now)
            self.look(found, now)
            return 1
        if fds > 0:
            self.dispatch(fds, &events[0])
            return 1
        return hcd_flag_load(&self.posted)

    cdef int sleep(self) except -1:
        """Enable kicks, look once more, and wait for an fd."""
        cdef Virtqueue q
        cdef double wait
        cdef int timeout = -1
        for q in self.awake:
            if not q.ring.passive and q.enable_kicks():
                self.mark(q, hcd_now(), False)
        if self.ready:
            self.gap_ended(hcd_now())
            return 0
        for q in self.awake:
            q.awake = False
        self.awake.clear()
        if hcd_flag_load(&self.posted) or self.stopping:
            return 0
        if self.timers:
            wait = self.timers[0][0] - time.monotonic()
            timeout = 0 if wait <= 0 else <int>(min(wait, LONGEST_SLEEP) * 1000) + 1
        self.sleeps += 1
        return self.collect(timeout)

    cdef int collect(self, int timeout) except -1:
        """Wait for fds, at most ``timeout`` ms (-1: as long as it takes), and handle them."""
        cdef epoll_event events[EVENTS]
        cdef int n
        with nogil:
            n = epoll_wait(self.ep, events, EVENTS, timeout)
        if n < 0:
            if errno == EINTR:
                return 0
            raise OSError(errno, f"epoll_wait: {os.strerror(errno)}")
        if n:
            self.dispatch(n, &events[0])
        return 0

    cdef int dispatch(self, int n, void *reported) except -1:
        cdef epoll_event *events = <epoll_event *>reported
        cdef uint64_t now = hcd_now(), value
        cdef Watch w
        cdef int i
        for i in range(n):
            w = <Watch>events[i].data.ptr
            if not w.live:
                continue
            if w.queue is not None:
                if w.queue.read_kick():
                    self.gap_ended(now)
                    self.mark(w.queue, now, True)
                elif w.queue.ring.running:
                    self.mark(w.queue, now, False)
            elif w.bell is not None:
                self.ring(w.bell, now)
            elif w.callback is not None:
                self.call(w.callback)
            else:
                read(self.wake_fd, &value, 8)
        return 0

    def close(self):
        """Release the reactor's fds, after :meth:`run` has returned."""
        self.close_fds()

    cdef int close_fds(self) except -1:
        if self.ep >= 0:
            os.close(self.ep)
            os.close(self.wake_fd)
            self.ep = self.wake_fd = -1
        self.watches.clear()
        return 0
