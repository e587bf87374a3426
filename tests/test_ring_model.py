"""Both ring formats against a model of the driver: anything that driver and device may do, in any order.

The driver is the one of hcd.frontend, the device's side is ``Virtqueue``. Every combination of format, EVENT_IDX and
IN_ORDER is played, from the beginning of the indexes and from shortly before they wrap. The model knows which chains
are where, and who sleeps: no chain may be lost, doubled or answered with other bytes, and no side may sleep while the
other has something for it (virtio 1.3, 2.7.7 and 2.8.7).
"""

from __future__ import annotations

import enum
import itertools
import struct
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rings import Pair, make_pair

from hcd.dataplane.virtqueue import Request
from hcd.frontend.ring import DriverRing
from hcd.frontend.ring_packed import PackedRing
from hcd.frontend.ring_split import SplitRing

SHAPES = st.tuples(st.sampled_from((2, 1, 3)), st.booleans(), st.booleans())  # pieces, an answer, indirect
#: entries that a ring has behind it: none, some, and nearly as many as its indexes count
POSITIONS = st.sampled_from((0, 1, 5, 0x7FFE, 0xFFF0, 0xFFFD, 0xFFFF))


def wind(ring: DriverRing, pair: Pair, position: int) -> int:
    """Put a new ring to ``position`` laps and entries from its beginning, as if all had been used; its base."""
    if isinstance(ring, SplitRing):
        ring._next_avail = ring._published = ring._asked = ring._last_used = position & 0xFFFF
        ring.publish()
        pair.memory.write(ring.device + 2, (position & 0xFFFF).to_bytes(2, "little"))
        ring.used_event = (position - 1) & 0xFFFF
        return position & 0xFFFF
    assert isinstance(ring, PackedRing)
    laps, slot = divmod(position, ring.size)
    wrap = (laps + 1) & 1
    ring._next_avail, ring._avail_wrap, ring._next_used, ring._used_wrap = slot, wrap, slot, wrap
    for at in range(ring.size):
        lap = laps if at < slot else laps - 1
        used = (lap + 1) & 1 if lap >= 0 else 0
        ring.write_descriptor(at, 0, 0, 0, 0x8080 * used)
    half = slot | wrap << 15
    return half | half << 16


class At(enum.Enum):
    """Where a chain is."""

    ADDED = "the device cannot see it yet"
    PUBLISHED = "the device has not taken it"
    TAKEN = "by the device"
    DONE = "completed; the driver may not see it yet"
    SHOWN = "the driver can see it"


@dataclass
class Chain:
    """One chain on its way."""

    token: int
    data: bytes
    room: tuple[int, int] | None
    at: At = At.ADDED
    request: Request | None = None


class RingModel:
    """See the module's text. The methods of steps take what is drawn for them, and make sense of it in any state."""

    def __init__(self, *, packed: bool, event_idx: bool, in_order: bool) -> None:
        self.packed, self.event_idx, self.in_order = packed, event_idx, in_order
        self.pair = make_pair(packed=packed, event_idx=event_idx, in_order=in_order)
        self.chains: list[Chain] = []  # in the order of add
        self.stale: list[Request] = []  # of rings that were
        self.number = 0
        self.driver_sleeps = self.device_sleeps = False

    def end(self) -> None:
        """Whatever happened: everything that was added comes back, even while requests of earlier rings do not."""
        self.publish()
        while self.which(At.PUBLISHED):
            self.take(64)
            self.complete_all_newest_first()
        self.complete_all_newest_first()
        self.show()
        self.collect()
        assert not self.chains
        for request in self.stale:
            request.complete(0)
        assert self.pair.queue.inflight == 0
        self.pair.close()

    def which(self, *places: At) -> list[Chain]:
        return [chain for chain in self.chains if chain.at in places]

    def new_ring(self, size: int, position: int) -> None:
        kind = PackedRing if self.packed else SplitRing
        self.pair.ring.close()
        self.pair.ring = kind(self.pair.memory, size, event_idx=self.event_idx, in_order=self.in_order)
        self.pair.start(wind(self.pair.ring, self.pair, position))
        self.driver_sleeps = self.device_sleeps = False

    # -- set-up

    def begin(self, size: int, position: int) -> None:
        self.pair.queue.stop()
        self.new_ring(size if self.packed else 1 << size.bit_length() - 1, position)

    def stop_and_go_on(self) -> None:
        """GET_VRING_BASE and SET_VRING_BASE."""
        if self.which(At.TAKEN):
            return
        self.show()
        self.pair.start(self.pair.queue.stop())
        self.device_sleeps = False

    def reset(self, size: int, position: int) -> None:
        """The driver forgets everything and makes a new ring; what the device holds then is of no use to anybody."""
        self.stale += [chain.request for chain in self.which(At.TAKEN) if chain.request is not None]
        self.chains.clear()
        self.pair.queue.stop()
        self.new_ring(size if self.packed else 1 << size.bit_length() - 1, position)

    def complete_what_is_stale(self) -> None:
        if self.stale:
            self.stale.pop().complete(0)

    # -- the driver

    def submit(self, shapes: list[tuple[int, bool, bool]], show: bool) -> None:
        for shape in shapes:
            self.add(*shape)
        if show:
            self.publish()

    def add(self, pieces: int, answer: bool, indirect: bool) -> None:
        ring = self.pair.ring
        if (1 if indirect else pieces + answer) > ring.free or pieces + answer > ring.size:
            return
        data = struct.pack("<I", self.number) * pieces
        self.number += 1
        source, _ = self.pair.put(data)
        room = self.pair.room(16) if answer else None
        readable = [(source + 4 * i, 4) for i in range(pieces)]
        token = ring.add(readable, [room] if room else [], indirect)
        self.chains.append(Chain(token, data, room))

    def publish(self) -> None:
        fresh = self.which(At.ADDED)
        assert self.pair.ring.publish() == len(fresh)
        for chain in fresh:
            chain.at = At.PUBLISHED
        needed = self.pair.ring.kick_needed()
        assert needed or not fresh or not self.device_sleeps, "the device sleeps, and the driver need not ring"
        if needed:
            self.device_sleeps = False
            self.pair.queue.disable_kicks()

    def collect(self) -> None:
        for used in self.pair.ring.used():
            chain = next(chain for chain in self.chains if chain.token == used.token)
            assert chain.at in (At.DONE, At.SHOWN)
            assert chain is self.chains[0] or not self.in_order
            self.chains.remove(chain)
            expected = chain.data if chain.room else b""
            assert used.written == len(expected)
            if chain.room:
                assert self.pair.memory.read(chain.room[0], used.written) == expected
        assert not self.which(At.SHOWN), "a chain was lost"

    def driver_goes_to_sleep(self) -> None:
        self.pair.calls()
        self.driver_sleeps = not self.pair.ring.enable_interrupts()
        assert not self.driver_sleeps or not self.which(At.SHOWN)

    def driver_stays_awake(self) -> None:
        self.pair.ring.disable_interrupts()
        self.driver_sleeps = False

    # -- the device

    def take(self, count: int) -> None:
        waiting = self.which(At.PUBLISHED)
        requests = self.pair.queue.pop_many(count)
        assert len(requests) == min(count, len(waiting))
        for request, chain in zip(requests, waiting, strict=False):
            assert request.read() == chain.data
            chain.at, chain.request = At.TAKEN, request

    def serve(self, count: int, order: list[int], show: bool) -> None:
        """A turn: some are taken, some completed, in any order."""
        self.take(count)
        for which in order:
            if self.which(At.TAKEN):
                self.complete(which)
        if show:
            self.show()

    def complete(self, which: int) -> None:
        taken = self.which(At.TAKEN)
        chain = taken[which % len(taken)]
        assert chain.request is not None
        chain.request.complete(chain.request.write(chain.data))
        chain.at, chain.request = At.DONE, None

    def complete_all_newest_first(self) -> None:
        for _ in self.which(At.TAKEN):
            self.complete(len(self.which(At.TAKEN)) - 1)

    def put_back(self) -> None:
        for newest in self.which(At.TAKEN, At.DONE, At.SHOWN)[-1:]:
            if newest.at is At.TAKEN and newest.request is not None:
                request, newest.request = newest.request, None
                self.pair.queue.unpop(request)
                newest.at = At.PUBLISHED

    def show(self) -> None:
        """A turn ends: what is done becomes visible, with IN_ORDER up to the oldest that is not."""
        self.pair.queue.flush()
        shown = self.which(At.DONE)
        if self.in_order and (taken := self.which(At.TAKEN)):
            shown = [chain for chain in shown if self.chains.index(chain) < self.chains.index(taken[0])]
        for chain in shown:
            chain.at = At.SHOWN
        if shown and self.driver_sleeps:
            assert self.pair.calls() >= 1, "the driver sleeps, and nobody woke it"
            self.driver_sleeps = False

    def device_goes_to_sleep(self) -> None:
        self.device_sleeps = not self.pair.queue.enable_kicks()
        assert self.device_sleeps != bool(self.which(At.PUBLISHED)), "it may sleep, and there is work"
        if not self.device_sleeps:
            self.pair.queue.disable_kicks()


#: (method, what it is called with)
STEPS = st.one_of(
    st.tuples(st.just("submit"), st.lists(SHAPES, min_size=1, max_size=6), st.booleans()),
    st.tuples(st.just("serve"), st.integers(1, 8), st.lists(st.integers(0, 63), max_size=8), st.booleans()),
    st.tuples(st.sampled_from(
        ("publish", "collect", "show", "driver_goes_to_sleep", "driver_stays_awake", "device_goes_to_sleep", "put_back",
         "stop_and_go_on", "complete_all_newest_first", "complete_what_is_stale")
    )),
    st.tuples(st.just("reset"), st.sampled_from((13, 8, 16, 3, 2, 1)), POSITIONS),
)


@pytest.mark.parametrize("in_order", [False, True], ids=["any-order", "in-order"])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@settings(max_examples=150, database=None)
@given(position=POSITIONS, program=st.lists(STEPS, min_size=15, max_size=60))
def test_driver_and_device_do_what_they_may(
    packed: bool, event_idx: bool, in_order: bool, position: int, program: list[tuple[Any, ...]]
) -> None:
    model = RingModel(packed=packed, event_idx=event_idx, in_order=in_order)
    model.begin(16, position)
    for step, *drawn in program:
        getattr(model, step)(*drawn)
        assert model.pair.queue.broken == ""
    model.end()


@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_the_indexes_wrap_once_and_again(packed: bool, event_idx: bool) -> None:
    """More than 2^17 chains through one ring, in batches of changing size, with both sides asleep in between."""
    pair = make_pair(packed=packed, event_idx=event_idx, size=256)
    data = pair.put(b"data")
    done = 0
    for batch in itertools.cycle((1, 255, 2, 128, 256, 31)):
        assert not pair.queue.enable_kicks()
        assert not pair.ring.enable_interrupts()
        for _ in range(batch):
            pair.ring.add([data], [])
        pair.ring.publish()
        assert pair.ring.kick_needed()
        pair.queue.disable_kicks()
        requests = pair.queue.pop_many(batch + 1)
        assert len(requests) == batch
        pair.queue.complete_many(reversed(requests), 0)
        pair.queue.flush()
        assert pair.calls() >= 1
        assert len(pair.ring.used()) == batch
        done += batch
        if done > 1 << 17:
            break
    pair.close()
