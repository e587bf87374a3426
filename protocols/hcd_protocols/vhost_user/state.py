"""What a connection remembers, and which event is legal in it.

Rings have two independent switches (vhost-user.rst "Ring states")::

                        SET_VRING_KICK (with NUM and ADDR known)
      STOPPED  ────────────────────────────────────────────────▶  DISABLED or RUNNING
               ◀────────────────────────────────────────────────
                 GET_VRING_BASE; NUM or BASE of a disabled ring

      DISABLED ──── SET_VRING_ENABLE 1, or SET_FEATURES without PROTOCOL_FEATURES ───▶ RUNNING
               ◀─── SET_VRING_ENABLE 0, RESET_OWNER, RESET_DEVICE (which also stops) ──

The text of the protocol starts a ring at its first kick; every large back end starts it when the kick
descriptor comes, and so does this one. User-mode Linux never stops a ring: it disables it, and later sets
it up anew.

``SessionState.check`` raises and changes nothing; ``apply`` changes and does not raise.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hcd_protocols.errors import ProtocolError
from hcd_protocols.vhost_user import events
from hcd_protocols.vhost_user.features import (
    QEMU_7_2_MASK,
    UNFILTERED,
    TransportFeature,
    missing_dependencies,
)
from hcd_protocols.vhost_user.messages import FrontendRequest, RequestSpec, describe

__all__ = ["RING_RULES", "Limits", "RingState", "SessionState", "VringState"]


class RingState(enum.Enum):
    STOPPED = "stopped"
    #: started, but disabled
    DISABLED = "disabled"
    #: started and enabled
    RUNNING = "running"


_R = FrontendRequest
_IDLE = frozenset({RingState.STOPPED, RingState.DISABLED})

#: In which states of its ring a request is legal. Requests that are not listed are legal in all.
RING_RULES: Mapping[FrontendRequest, frozenset[RingState]] = MappingProxyType(
    {
        _R.SET_VRING_NUM: _IDLE,
        _R.SET_VRING_BASE: _IDLE,
        _R.SET_VRING_ENDIAN: _IDLE,
    }
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the back end offers and bears."""

    features: int
    protocol_features: int
    num_queues: int
    max_mem_slots: int
    max_queue_size: int
    config_size: int


@dataclass(slots=True)
class VringState:
    """One ring as the protocol sees it. ``num`` is 0 and ``addr`` None until the front end sets them."""

    num: int = 0
    base: int = 0
    addr: events.SetVringAddr | None = None
    kicked: bool = False
    enabled: bool = False
    big_endian: bool = False

    def stop_if_started(self) -> None:
        """The ring is set up anew; a kick descriptor that came before the rest keeps its meaning."""
        if self.started:
            self.kicked = False

    def reset(self) -> None:
        self.num, self.base, self.addr = 0, 0, None
        self.kicked = self.enabled = self.big_endian = False

    @property
    def started(self) -> bool:
        return self.kicked and self.num > 0 and self.addr is not None

    @property
    def state(self) -> RingState:
        if not self.started:
            return RingState.STOPPED
        return RingState.RUNNING if self.enabled else RingState.DISABLED


class SessionState:
    """Negotiated features, rings and memory of one connection."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.features = 0
        self.protocol_features = 0
        self.status = 0
        self.vrings = tuple(VringState() for _ in range(limits.num_queues))
        self.regions: tuple[events.MemoryRegion, ...] = ()
        #: a request about features was seen: the front end did not come back from an earlier connection
        self.negotiating = False

    # -- what is legal

    def check_request(self, spec: RequestSpec) -> None:
        """ProtocolError unless what ``spec`` depends on was negotiated."""
        lacking = spec.offers & ~self.limits.features
        if lacking:
            raise ProtocolError(f"{spec.name} needs feature {lacking.name}, which was not offered")
        missing = spec.needs & ~self.protocol_features
        if missing:
            raise ProtocolError(f"{spec.name} needs protocol feature {missing.name}, which was not negotiated")

    def check(self, event: events.Event) -> None:
        """ProtocolError if ``event`` is illegal now."""
        if isinstance(event, events.VringEvent):
            self._check_ring(event)
        check = _CHECKS.get(type(event))
        if check:
            check(self, event)

    def _check_ring(self, event: events.VringEvent) -> None:
        if event.index >= len(self.vrings):
            raise ProtocolError(
                f"{describe(event.request)}: expected a ring below {len(self.vrings)}, got {event.index}"
            )
        rule = RING_RULES.get(event.request)
        state = self.vrings[event.index].state
        if rule and state not in rule:
            expected = " or ".join(sorted(one.value for one in rule))
            raise ProtocolError(
                f"{describe(event.request)}: expected ring {event.index} to be {expected}, it is {state.value}"
            )

    def check_negotiated(self, features: int, protocol_features: int) -> None:
        """ValueError if an earlier back end agreed on more than this one offers."""
        for what, agreed, offered in (
            ("features", features, self.limits.features | UNFILTERED),
            ("protocol features", protocol_features, self.limits.protocol_features),
        ):
            surplus = agreed & ~int(offered)
            if surplus:
                raise ValueError(f"{what} {surplus:#x} were agreed on, and are not offered any more")

    def _check_features(self, event: events.SetFeatures) -> None:
        surplus = event.features & ~int(self.limits.features | UNFILTERED)
        if surplus:
            raise ProtocolError(
                f"{describe(event.request)}: expected a part of {self.limits.features:#x}, "
                f"got {event.features:#x}: {surplus:#x} was not offered"
            )
        changed = (event.features ^ self.features) & ~int(TransportFeature.LOG_ALL)
        running = [i for i, ring in enumerate(self.vrings) if ring.state is RingState.RUNNING]
        if changed and running:
            raise ProtocolError(
                f"{describe(event.request)}: expected no change but LOG_ALL while ring {running[0]} "
                f"is running, got {event.features:#x} after {self.features:#x}"
            )

    def _check_protocol_features(self, event: events.SetProtocolFeatures) -> None:
        surplus = event.features & ~self.limits.protocol_features
        if surplus:
            raise ProtocolError(
                f"{describe(event.request)}: expected a part of {self.limits.protocol_features:#x}, "
                f"got {event.features:#x}: {surplus:#x} was not offered"
            )
        missing = missing_dependencies(event.features)
        if missing:
            raise ProtocolError(
                f"{describe(event.request)}: {missing[0].name} needs {missing[1].name}, which is missing"
            )

    def _check_num(self, event: events.SetVringNum) -> None:
        most, num = self.limits.max_queue_size, event.num
        packed = bool(self.features & TransportFeature.RING_PACKED)
        if not 1 <= num <= most or not (packed or num.bit_count() == 1):
            kind = "1" if packed else "a power of two, 1"
            raise ProtocolError(
                f"{describe(event.request)}: expected {kind} to {most} entries for ring {event.index}, got {num}"
            )

    def _check_table(self, event: events.SetMemTable) -> None:
        for position, region in enumerate(event.regions):
            _check_overlap(event.request, region, event.regions[:position])

    def _check_add(self, event: events.AddMemReg) -> None:
        if len(self.regions) >= self.limits.max_mem_slots:
            raise ProtocolError(
                f"{describe(event.request)}: expected at most {self.limits.max_mem_slots} memory regions, got one more"
            )
        _check_overlap(event.request, event.region, self.regions)

    def _check_remove(self, event: events.RemMemReg) -> None:
        if self._find(event.region) is None:
            region = event.region
            raise ProtocolError(
                f"{describe(event.request)}: expected a region of the table, got guest address "
                f"{region.guest_addr:#x}, size {region.size:#x}, user address {region.user_addr:#x}"
            )

    def _check_config(self, event: events.SetConfig) -> None:
        if event.offset + len(event.data) > self.limits.config_size:
            raise ProtocolError(
                f"{describe(event.request)}: expected bytes below {self.limits.config_size}, "
                f"got {len(event.data)} at {event.offset}"
            )

    def _check_inflight(self, event: events.GetInflightFd | events.SetInflightFd) -> None:
        queues, size = self.limits.num_queues, self.limits.max_queue_size
        if not (1 <= event.num_queues <= queues and 1 <= event.queue_size <= size):
            raise ProtocolError(
                f"{describe(event.request)}: expected 1 to {queues} queues of 1 to {size} entries, "
                f"got {event.num_queues} of {event.queue_size}"
            )

    # -- what changes

    def apply(self, event: events.Event) -> events.Event:
        """Remember ``event``, which was checked. Returns it, with what the connection knows better."""
        apply = _APPLY.get(type(event))
        if apply:
            return apply(self, event) or event
        return event

    def _apply_features(self, event: events.SetFeatures) -> None:
        if (event.features ^ self.features) & TransportFeature.RING_PACKED:
            # Sizes and addresses were meant for the other kind of ring.
            for ring in self.vrings:
                ring.num, ring.addr, ring.kicked = 0, None, False
        protocol = event.features & TransportFeature.PROTOCOL_FEATURES
        if protocol and not self.negotiating:
            # QEMU 7.2 leaves out all negotiation when rng and i2c devices come back to a restarted back
            # end, and goes on with what it had agreed on with the earlier one.
            self.protocol_features = self.limits.protocol_features & QEMU_7_2_MASK
        self.negotiating = True
        self.features = event.features
        if not protocol:
            for ring in self.vrings:
                ring.enabled = True

    def _apply_protocol_features(self, event: events.SetProtocolFeatures) -> None:
        self.negotiating = True
        self.protocol_features = event.features

    def _apply_num(self, event: events.SetVringNum) -> None:
        ring = self.vrings[event.index]
        ring.stop_if_started()
        ring.num = event.num

    def _apply_base(self, event: events.SetVringBase) -> None:
        ring = self.vrings[event.index]
        ring.stop_if_started()
        ring.base = event.base

    def _apply_addr(self, event: events.SetVringAddr) -> None:
        self.vrings[event.index].addr = event

    def _apply_get_base(self, event: events.GetVringBase) -> None:
        self.vrings[event.index].kicked = False

    def _apply_kick(self, event: events.SetVringKick | events.VringKick) -> None:
        self.vrings[event.index].kicked = True

    def _apply_enable(self, event: events.SetVringEnable) -> None:
        self.vrings[event.index].enabled = event.enable

    def _apply_endian(self, event: events.SetVringEndian) -> None:
        self.vrings[event.index].big_endian = event.big

    def _apply_status(self, event: events.SetStatus) -> None:
        self.status = event.status

    def _apply_table(self, event: events.SetMemTable) -> None:
        self.regions = event.regions

    def _apply_add(self, event: events.AddMemReg) -> None:
        self.regions += (event.region,)

    def _apply_remove(self, event: events.RemMemReg) -> events.Event | None:
        found = self._find(event.region)
        if found is None:
            return None
        self.regions = tuple(region for region in self.regions if region != found)
        return events.RemMemReg(found, need_reply=event.need_reply)

    def _apply_reset_owner(self, event: events.ResetOwner) -> None:
        for ring in self.vrings:
            ring.enabled = False

    def _apply_reset(self, event: events.ResetDevice) -> None:
        self.features = self.status = 0
        for ring in self.vrings:
            ring.reset()

    def undo(self, event: events.Event) -> None:
        """The back end could not take the memory of ``event``: forget it."""
        if isinstance(event, events.AddMemReg):
            self.regions = tuple(region for region in self.regions if region is not event.region)
        elif isinstance(event, events.SetMemTable) and self.regions is event.regions:
            self.regions = ()

    def _find(self, wanted: events.MemoryRegion) -> events.MemoryRegion | None:
        # The offset does not count: QEMU fills it in only when it adds.
        key = (wanted.guest_addr, wanted.size, wanted.user_addr)
        for region in self.regions:
            if (region.guest_addr, region.size, region.user_addr) == key:
                return region
        return None


def _check_overlap(
    request: FrontendRequest, region: events.MemoryRegion, others: tuple[events.MemoryRegion, ...]
) -> None:
    for other in others:
        begin = max(region.guest_addr, other.guest_addr)
        if begin < min(region.guest_addr + region.size, other.guest_addr + other.size):
            raise ProtocolError(
                f"{describe(request)}: expected regions that do not overlap, "
                f"got guest address {region.guest_addr:#x} size {region.size:#x} "
                f"beside {other.guest_addr:#x} size {other.size:#x}"
            )


_CHECKS: Mapping[type[events.Event], Callable[[SessionState, Any], None]] = MappingProxyType(
    {
        events.SetFeatures: SessionState._check_features,
        events.SetProtocolFeatures: SessionState._check_protocol_features,
        events.SetVringNum: SessionState._check_num,
        events.SetMemTable: SessionState._check_table,
        events.AddMemReg: SessionState._check_add,
        events.RemMemReg: SessionState._check_remove,
        events.SetConfig: SessionState._check_config,
        events.GetInflightFd: SessionState._check_inflight,
        events.SetInflightFd: SessionState._check_inflight,
    }
)

_APPLY: Mapping[type[events.Event], Callable[[SessionState, Any], events.Event | None]] = MappingProxyType(
    {
        events.SetFeatures: SessionState._apply_features,
        events.SetProtocolFeatures: SessionState._apply_protocol_features,
        events.SetVringNum: SessionState._apply_num,
        events.SetVringBase: SessionState._apply_base,
        events.SetVringAddr: SessionState._apply_addr,
        events.GetVringBase: SessionState._apply_get_base,
        events.GetVringBaseSkipDrain: SessionState._apply_get_base,
        events.SetVringKick: SessionState._apply_kick,
        events.VringKick: SessionState._apply_kick,
        events.SetVringEnable: SessionState._apply_enable,
        events.SetVringEndian: SessionState._apply_endian,
        events.SetStatus: SessionState._apply_status,
        events.SetMemTable: SessionState._apply_table,
        events.AddMemReg: SessionState._apply_add,
        events.RemMemReg: SessionState._apply_remove,
        events.ResetOwner: SessionState._apply_reset_owner,
        events.ResetDevice: SessionState._apply_reset,
    }
)
