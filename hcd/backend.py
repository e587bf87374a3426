"""The back end of one session: the one object that joins guest memory, queues, doorbells and device.

It lives on its device's lane and does what the front end's messages ask for; reading messages, answering them and
waiting are the transport's. Theory of operation (vhost-user.rst, "Ring states"; facts on front ends):

* A ring is *started* by SET_VRING_KICK once its size and addresses are known, and *enabled* by SET_VRING_ENABLE (or
  by SET_FEATURES without PROTOCOL_FEATURES). Either may come first. When both hold the ring is scanned at once: kicks
  get lost across a reconnect, and one that came while the ring was disabled was not read.
* QEMU hands over kick eventfds whose value is 1 although nobody rang; others hand over 0 and their first ring is
  real. So the value is read from fdinfo before the message is answered: at least 1 means that exactly one is
  spurious.
* GET_VRING_BASE stops a ring: no new requests, those in flight are waited for (by the transport, with a limit), then
  the ring is let go.
* A region that records requests in flight comes before the rings that it is for, or at least before they are enabled.
  Where the front end keeps it, its record says where a ring stands: what SET_VRING_BASE said may be older (and QEMU's
  is, after this process was killed). Unless GET_VRING_BASE stopped the ring with nothing in flight: then the front end
  knows, and may begin another ring. A record that hcd keeps itself counts only where a ring goes on.
* Every fd that a message brought is owned here from the moment of the call, also when the call fails.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from weakref import WeakSet

from hcd_protocols.vhost_user.features import TransportFeature

from hcd.dataplane.memory import MemoryTable, describe_mode
from hcd.dataplane.stats import DoorbellStats
from hcd.dataplane.virtqueue import Inflight, Request, Virtqueue
from hcd.device import Handle
from hcd.doorbell import Doorbell
from hcd.errors import DeviceError, GuestError, ProtocolError, shown
from hcd.host import DeviceHost, RingState

__all__ = ["Backend", "eventfd_count"]

#: where a ring begins that the driver has just made, split and packed
_NEW_RINGS = frozenset({0, 0x8000, 0x80008000})


@dataclass(slots=True)
class _Vring:
    """One queue and what the front end said of it."""

    queue: Virtqueue
    num: int = 0
    addresses: tuple[int, int, int] | None = None  # desc, avail, used, in the front end's address space
    base: int = 0
    big_endian: bool = False
    kick: int = -1
    spurious: bool = False
    call: int = -1
    err: int = -1
    enabled: bool = False
    active: bool = False  # the device was told that the queue runs
    resume: bool = False  # hcd's own record of requests in flight holds for the next start
    left_at: int | None = None  # or for one at this base, where it stopped with requests left
    watch: Handle | None = None
    on_drained: list[Callable[[], None]] = field(default_factory=list)


class Backend:
    """The back end of one connection to ``host``. Everything here is for the lane's thread."""

    def __init__(self, host: DeviceHost) -> None:
        self.host = host
        self.device = host.device
        self.memory = MemoryTable()
        self.features = 0
        #: eventfd that is signalled when the front end truncates its memory under us
        self.alarm = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.inflight: Inflight | None = None
        self._own_inflight = False
        self._tables: WeakSet[MemoryTable] = WeakSet()  # also those that requests in flight keep: they go with us
        self._given_up: WeakSet[MemoryTable] = WeakSet()  # those of requests that outlived the drain
        self._replaced: list[MemoryTable] = []  # see release_memory
        self._doomed: list[MemoryTable] = []
        self._vrings = [self._make_vring(index, bell) for index, bell in enumerate(host.doorbells)]

    def _make_vring(self, index: int, doorbell: Doorbell) -> _Vring:
        host = self.host
        queue = host.lane.queue_type(index, doorbell.stats, host.queue_stats[index], self.device.max_queue_size)
        queue.device = self.device
        queue.tag = host.spec.name
        queue.handler = self.device.process
        queue.on_error = self._on_error
        queue.on_drained = self._on_drained
        queue.set_limit(host.limit)
        host.lane.attach(queue)
        host.wrapping.attach(queue)

        def follow(bell: Doorbell) -> None:
            queue.set_doorbell(bell.stats)

        doorbell.on_change = follow
        return _Vring(queue)

    # -- what it is

    @property
    def queues(self) -> list[Virtqueue]:
        return [vring.queue for vring in self._vrings]

    def rings(self) -> list[RingState]:
        """How each ring stands. Any thread."""
        return [
            RingState(
                index=vring.queue.index,
                size=vring.queue.size if vring.queue.is_started else vring.num,
                packed=bool(self.features & TransportFeature.RING_PACKED),
                started=vring.queue.is_started,
                enabled=vring.enabled,
                draining=bool(vring.on_drained),
                broken=vring.queue.broken,
            )
            for vring in self._vrings
        ]

    # -- negotiation

    def set_features(self, features: int, *, enable_all: bool) -> None:
        """The driver acknowledged ``features``; ``enable_all``: no PROTOCOL_FEATURES, so rings need no ENABLE."""
        self.features = features
        self.host.negotiated(features)
        self.device.connect(features)
        if enable_all:
            for vring in self._vrings:
                vring.enabled = True
                self._update(vring)

    # -- memory

    def set_memory(self, table: MemoryTable) -> None:
        """Use ``table`` from now on; rings that run take it over. :meth:`release_memory` is due then."""
        self._replaced.append(self.memory)
        self.memory = table
        self._tables.add(table)
        table.set_alarm(self.alarm)
        for vring in self._vrings:
            vring.queue.set_memory(table)
            self._update(vring)

    @property
    def has_old_memory(self) -> bool:
        return bool(self._replaced or self._doomed)

    def release_memory(self) -> None:
        """Take away memory that requests were given up in, and unmap what nobody uses any more.

        Not on the lane, whose devices would all wait: it takes some 70 ms for each GiB that was touched. Not while
        another method runs.
        """
        for table in self._doomed:
            table.revoke()
        self._doomed.clear()
        self._replaced.clear()

    # -- requests in flight

    def set_inflight(self, area: Inflight, *, own: bool = False, resume: bool = False) -> None:
        """Record the requests in flight in ``area``, which belongs to the back end from now on.

        ``own``: it is not the front end's. Then a ring that starts begins its record anew, at the base that the front
        end gives, unless ``resume`` says that it goes on where the last process left it; that holds once for each.
        ProtocolError, and nothing has changed, when a ring is running or the region is too small for the rings.
        """
        try:
            self._check_inflight(area)
        except BaseException:
            area.close()
            raise
        idle = [vring for vring in self._vrings if vring.queue.is_started]
        for vring in idle:
            vring.queue.stop()
        self._release_inflight()
        self.inflight, self._own_inflight = area, own
        area.set_alarm(self.alarm)
        for vring in self._vrings:
            vring.resume, vring.left_at = resume, None
        for vring in idle:
            self._update(vring)

    def begin_anew(self, index: int) -> None:
        """Ring ``index`` did not run when the last process ended: its record does not hold for the next start."""
        self._vrings[index].resume = False

    def _check_inflight(self, area: Inflight) -> None:
        if self.features & TransportFeature.RING_PACKED and not area.holds_packed:
            raise ProtocolError(f"the in-flight region has {area.size} bytes, too few for packed rings")
        for vring in self._vrings:
            if vring.queue.is_started and (vring.enabled or vring.queue.inflight):
                raise ProtocolError(f"SET_INFLIGHT_FD comes while queue {vring.queue.index} runs")

    def _release_inflight(self) -> None:
        if self.inflight is not None:
            self.inflight.set_alarm(-1)
            self.inflight.close()
            self.inflight = None

    def _start(self, vring: _Vring, desc: int, avail: int, used: int) -> None:
        queue, base = vring.queue, vring.base
        resume = not self._own_inflight or vring.resume or base == vring.left_at
        area = self.inflight
        if area is not None and vring.num > area.queue_size:
            # On virtio-mmio QEMU lets drivers choose up to 1024 entries, and makes the region for queue-size of them.
            self.host.rare_log.warning(
                (queue.index, "region"), "queue %d: a ring of %d entries and an in-flight region for %d: its requests "
                "are not recorded, a crash of hcd would lose them", queue.index, vring.num, area.queue_size,
            )
            area = None
        queue.set_inflight(area, resume)
        queue.start(self.features, vring.num, desc, avail, used, base, vring.big_endian)
        vring.resume, vring.left_at = False, None
        if queue.recovered:
            self.host.rare_log.log(
                logging.INFO, (queue.index, "recovered"), "queue %d: %d requests were in flight when the last back end "
                "ended; they are served now", queue.index, queue.recovered,
            )

    # -- vrings

    def set_num(self, index: int, num: int) -> None:
        self._vrings[index].num = num

    def set_base(self, index: int, base: int) -> None:
        self._vrings[index].base = base

    def set_endian(self, index: int, big: bool) -> None:
        self._vrings[index].big_endian = big

    def set_addresses(self, index: int, desc: int, avail: int, used: int) -> None:
        """Addresses in the front end's address space. QEMU sends them again to a running ring; they may not move."""
        vring = self._vrings[index]
        if vring.queue.is_started and vring.addresses != (desc, avail, used):
            raise ProtocolError(f"SET_VRING_ADDR moves queue {index} while it runs")
        vring.addresses = (desc, avail, used)
        self._update(vring)

    def set_enable(self, index: int, enable: bool) -> None:
        vring = self._vrings[index]
        vring.enabled = enable
        self._update(vring)

    def set_kick(self, index: int, fd: int | None, *, spurious: bool | None = None) -> bool:
        """The eventfd of the doorbell. Returns whether its value counts one ring that nobody rang.

        ``spurious`` says so where it is known; None: it is new, and QEMU's are that when they are not 0.
        """
        if fd is None:
            raise ProtocolError(f"SET_VRING_KICK brings no eventfd for queue {index}: rings without a doorbell are "
                                "not offered")
        vring = self._vrings[index]
        try:
            count = eventfd_count(fd)
            if count is None:
                kind = describe_mode(os.fstat(fd).st_mode)
                raise ProtocolError(f"the kick fd of queue {index} is {kind}; expected an eventfd")
            os.set_blocking(fd, False)
        except BaseException:
            os.close(fd)
            raise
        self._release_kick(vring)
        vring.kick, vring.spurious = fd, count >= 1 if spurious is None else spurious
        vring.queue.set_kick(fd, vring.spurious)
        self._update(vring)
        return vring.spurious

    def set_call(self, index: int, fd: int | None) -> None:
        vring = self._vrings[index]
        if fd is not None:
            _prepare_signal(fd, f"call fd of queue {index}")
        vring.queue.set_call(-1 if fd is None else fd)
        _close(vring.call)
        vring.call = -1 if fd is None else fd

    def set_err(self, index: int, fd: int | None) -> None:
        vring = self._vrings[index]
        if fd is not None:
            _prepare_signal(fd, f"err fd of queue {index}")
        vring.queue.set_err(-1 if fd is None else fd)
        _close(vring.err)
        vring.err = -1 if fd is None else fd

    def _update(self, vring: _Vring) -> None:
        """Bring the queue, its watch and the device to what the front end's state asks for."""
        queue = vring.queue
        if not queue.is_started and vring.num and vring.addresses and vring.kick >= 0 and self.memory.regions:
            desc, avail, used = vring.addresses
            queue.set_memory(self.memory)
            self._start(vring, desc, avail, used)
        queue.set_enabled(vring.enabled)
        if queue.running and not vring.active:
            vring.active = True
            self.device.start_queue(queue)
        elif vring.active and not vring.enabled:
            self._deactivate(vring)
        if queue.running:
            if vring.watch is None:
                vring.watch = self.host.lane.watch_kick(queue)
            self.host.lane.schedule(queue)

    def _deactivate(self, vring: _Vring) -> None:
        """Stop looking at the kick fd, and let the device give back what it holds."""
        if vring.watch is not None:
            vring.watch.cancel()
            vring.watch = None
        if vring.active:
            vring.active = False
            self.host.call_device(self.device.stop_queue, vring.queue)

    def _release_kick(self, vring: _Vring) -> None:
        if vring.watch is not None:
            vring.watch.cancel()
            vring.watch = None
        if vring.kick >= 0:
            vring.queue.read_kick()  # rings that nobody read yet are counted
            vring.queue.set_kick(-1)
            _close(vring.kick)
            vring.kick = -1

    def owe_interrupt(self, index: int) -> None:
        """The process before this one may have died before it interrupted the driver: :meth:`set_call` does it."""
        self._vrings[index].queue.owe_interrupt()

    # -- stopping

    def is_idle_but_started(self, index: int) -> bool:
        """Whether ring ``index`` is started and disabled: setting it up again stops it first."""
        vring = self._vrings[index]
        return vring.queue.is_started and not vring.enabled

    def begin_stop(self, index: int, on_drained: Callable[[], None]) -> bool:
        """Take no more requests from queue ``index``. True: it is empty now; else ``on_drained`` will be called."""
        vring = self._vrings[index]
        vring.queue.halt()
        self._deactivate(vring)
        vring.queue.take_remote()
        self._fail_lost(vring.queue)
        if vring.queue.inflight == 0:
            return True
        vring.on_drained.append(on_drained)
        return False

    def _fail_lost(self, queue: Virtqueue) -> None:
        """Nothing will complete a request that the handler forgot; without this its guest waits for ever."""
        if lost := queue.lost():
            queue.stats.handler_errors += len(lost)
            self.host.rare_log.error((queue.index, "lost"), "queue %d: %s never completed %d requests; they are "
                                     "failed now", queue.index, type(self.device).__name__, len(lost))
        for request in lost:
            self._fail(request, 1)

    def finish_stop(self, index: int) -> int:
        """Let the ring go; returns its base. Requests still in flight are given up: :meth:`release_memory` is due."""
        vring = self._vrings[index]
        vring.on_drained.clear()
        left, waiting = vring.queue.inflight, vring.queue.waiting
        age = vring.queue.stats.oldest_ns() / 1e9
        self._release_kick(vring)
        base = vring.queue.stop(told=True) if vring.queue.is_started else vring.base
        # A base where new rings begin as well says nothing about which of them comes next.
        vring.left_at = base if (left or waiting) and base not in _NEW_RINGS else None
        self.host.lane.forget(vring.queue)
        self.host.lane.attach(vring.queue)
        vring.base = base
        if left:
            self._give_up(vring, left, age)
        self._doom_given_up()
        return base

    def _give_up(self, vring: _Vring, left: int, age: float) -> None:
        """``left`` requests, the oldest ``age`` seconds old, outlived the drain: their memory is taken away, everybody
        else gets a twin of it."""
        self.host.rare_log.error(
            (vring.queue.index, "given up"), "queue %d: %d requests did not end within %g s, the oldest has been there "
            "for %.1f s; they are given up, their late answers go nowhere",
            vring.queue.index, left, self.host.drain_timeout, age,
        )
        vring.queue.stats.handler_errors += left
        self.set_memory(self.memory.twin())
        self._given_up |= self._tables - {self.memory}

    def _doom_given_up(self) -> None:
        """Once no other ring has requests in flight, which may still use it; at the end of the session in any case."""
        if not any(one.queue.is_started and one.queue.inflight for one in self._vrings):
            self._doomed += self._given_up
            self._given_up.clear()

    def _on_drained(self, queue: Virtqueue) -> None:
        vring = self._vrings[queue.index]
        waiting, vring.on_drained = vring.on_drained, []
        for callback in waiting:
            callback()

    def reset(self) -> None:
        """RESET_DEVICE, or status 0 of a reset: rings disabled, the device as after ``open``; memory stays."""
        for vring in self._vrings:
            vring.enabled = False
            self._update(vring)
        self.host.call_device(self.device.disconnect)

    def begin_close(self, on_drained: Callable[[], None]) -> int:
        """The front end is gone: take no more requests. Returns how many queues still have some in flight, each of
        which calls ``on_drained`` once."""
        return sum(not self.begin_stop(vring.queue.index, on_drained) for vring in self._vrings)

    def close(self) -> None:
        """Release everything: rings, fds, and with :meth:`release_memory`, which is due then, memory. Requests still in
        flight lose theirs."""
        for vring in self._vrings:
            self._let_go(vring)
        for doorbell in self.host.doorbells:
            doorbell.on_change = None
        self.host.call_device(self.device.disconnect)
        for table in self._tables:
            table.set_alarm(-1)
        self._doomed += self._tables
        self._release_inflight()
        _close(self.alarm)
        self.memory = MemoryTable()

    def _let_go(self, vring: _Vring) -> None:
        host, queue = self.host, vring.queue
        vring.on_drained.clear()
        self._release_kick(vring)
        if queue.is_started:
            queue.stop()
        host.lane.forget(queue)
        queue.set_call(-1)
        queue.set_err(-1)
        _close(vring.call)
        _close(vring.err)
        vring.call = vring.err = -1
        queue.set_doorbell(DoorbellStats())
        queue.set_memory(MemoryTable())
        queue.set_inflight(None)
        # Methods of ours would be a cycle, which an idle daemon never collects. A handler in trio ends after this.
        queue.on_error = lambda _, error: host.device_failed("process(), cancelled with its session,", error)
        queue.on_drained = None
        if queue.inflight:
            host.rare_log.warning(
                (queue.index, "late"), "queue %d: %d requests were in flight when the front end went away; their late "
                "answers go nowhere", queue.index, queue.inflight,
            )

    # -- errors of guests and handlers

    def _on_error(self, queue: Virtqueue, error: Exception) -> None:
        """The handler of ``queue`` raised, or its ring is broken."""
        host = self.host
        request = queue.unfinished()
        if request is None and not queue.broken and queue.stalled():
            request = queue.pop()  # the handler would fail over it again, and the driver never hear of it
        status = 1
        if queue.broken:
            host.rare_log.error(
                (queue.index, "broken"), "queue %d: %s; the driver broke its ring, no more requests are taken "
                "from it until it is set up again", queue.index, queue.broken,
            )
        elif isinstance(error, DeviceError):
            status = error.status
            host.rare_log.log(logging.INFO, (queue.index, "device"), "queue %d: %s", queue.index, error)
        elif isinstance(error, GuestError):
            queue.stats.guest_errors += 1
            host.rare_log.warning((queue.index, "guest"), "queue %d: bad request of the driver: %s", queue.index, error)
        else:
            queue.stats.handler_errors += 1
            if host.rare_log.error((queue.index, type(error).__name__), "queue %d: the handler of %s failed: %s",
                                   queue.index, type(self.device).__name__, shown(error)):
                host.log.debug("queue %d", queue.index, exc_info=error)
            host.trace_once(error)
        if request is not None:
            self._fail(request, status)
        # When the exception is gone, so is what it alone referred to: requests that the handler held when it failed.
        host.lane.post(lambda: self._fail_dropped(queue))

    def _fail_dropped(self, queue: Virtqueue) -> None:
        for request in queue.lost() if queue.is_started else ():
            self._fail(request, 1)

    def _fail(self, request: Request, status: int) -> None:
        """End ``request`` as failed, whatever the device makes of it."""
        request.status = request.status or 1
        self.host.call_device(self.device.fail_request, request, status)
        while not request.completed:
            with suppress(ValueError):  # once, for an operation that the device does not have
                request.complete(0)


def eventfd_count(fd: int) -> int | None:
    """The value of eventfd ``fd`` as the kernel tells it without reading it (proc(5), fdinfo); None: no eventfd."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
        for line in info:
            if line.startswith("eventfd-count:"):
                return int(line.split()[1], 16)
    return None


def _prepare_signal(fd: int, name: str) -> None:
    """Make ``fd`` fit to be signalled without ever blocking: an eventfd, or the pipe or socket of user-mode Linux."""
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)) and eventfd_count(fd) is None:
            raise ProtocolError(f"the {name} is {describe_mode(mode)}; expected an eventfd")
        os.set_blocking(fd, False)
    except BaseException:
        os.close(fd)
        raise


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
