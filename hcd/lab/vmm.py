"""The VMM of the experiment, a process of its own: ``python -m hcd.lab.vmm``.

It obeys requests on its standard input, a line of JSON each, and answers each with a line on its standard output:
``{"ok": ...}`` or ``{"error": "..."}``. A run that a hypervisor never ends cannot be helped from inside this process
alone: the run loop's timer kicks the vCPU, and whoever started the process kills it should that not be enough.

=========  ============================================  ====================================================
do         with                                          answers
=========  ============================================  ====================================================
host                                                     capabilities, tsc_khz, tsc_offset (null: not known)
attach     socket                                        device, doorbells, interrupts
exits      ring, count, timeout                          ticks, status, why
trips      ring, interrupt, count, timeout               ticks, status, why
=========  ============================================  ====================================================

A ``ring`` is ``{"device": ..., "doorbell": ...}``, or ``{"bare": ...}`` for what no device hears of: ``empty``, ``pio``
and ``mmio`` (answered here), ``hypercall``.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hcd_protocols.doorbell import DoorbellItem, InterruptItem, MemoryItem, Place

from hcd.errors import HcdError
from hcd.kvm.attach import Attached, Attachment
from hcd.kvm.vm import Kvm
from hcd.lab import code
from hcd.lab.machine import Machine, Result, Ring

__all__ = ["main"]

#: where nothing is registered
_BARE_PORT, _BARE_ADDRESS = 0x7F0, 0xC0000000
#: shared memory goes here unless the device asks for another place
_SHARED, _SHARED_STEP = 0xA0000000, 0x1000000
#: the guest writes by 32-bit registers
_WIDEST = 4

Request = Mapping[str, Any]


class _Vmm:
    def __init__(self, kvm: Kvm) -> None:
        self._kvm = kvm
        self._machine = Machine(kvm, hypercall=hypercall_instruction())
        self._attachments: dict[str, Attachment] = {}

    def close(self) -> None:
        for attachment in self._attachments.values():
            attachment.close()
        self._machine.vm.close()

    # -- requests

    def host(self, _: Request) -> Any:
        vcpu = self._machine.vcpu
        capabilities = {cap.name: value for cap, value in self._kvm.capabilities.items()}
        return {
            "capabilities": capabilities,
            "xen": self._kvm.xen_event_channels,
            "tsc_khz": vcpu.tsc_khz(),
            "tsc_offset": vcpu.tsc_offset(),
        }

    def attach(self, request: Request) -> Any:
        attachment = Attachment(
            self._machine.vm,
            request["socket"],
            name="hcd-lab",
            route_of=lambda _: self._machine.route,
            place=self._place,
            clock=self._machine.vcpu,
        )
        attachment.connect()
        self._attachments[attachment.device] = attachment
        return {
            "device": attachment.device,
            "doorbells": [_doorbell(one) for one in attachment.doorbells],
            "interrupts": [
                {"name": one.item.name, "error": one.error, "reason": one.reason}
                for one in attachment.items.values()
                if isinstance(one.item, InterruptItem)
            ],
        }

    def exits(self, request: Request) -> Any:
        return _result(self._machine.run_exits(self._ring(request["ring"]), request["count"], request["timeout"]))

    def trips(self, request: Request) -> Any:
        stamp = self._stamp(request["ring"])
        ring = self._ring(request["ring"])
        return _result(self._machine.run_trips(ring, request["count"], request["timeout"], stamp=stamp))

    # -- what they need

    def _place(self, _: MemoryItem) -> int:
        return _SHARED + len(self._attachments) * _SHARED_STEP

    def _ring(self, what: Request) -> Ring:
        if "bare" in what:
            return self._bare(what["bare"])
        item = self._item(what)
        value = item.datamatch or 0
        if item.place is Place.PIO:
            return Ring(code.write_port(item.address, value, item.width or _WIDEST))
        if item.place is Place.MMIO:
            if item.width > _WIDEST or item.address >> 32:
                raise HcdError("the tiny guest writes 4 bytes at most, below 4 GiB")
            return Ring(code.write_memory(item.address, value, item.width or _WIDEST))
        if item.place is Place.HYPERV:
            return self._machine.hyperv_event(item.address)
        raise HcdError("the tiny guest does not know Xen")

    def _bare(self, name: str) -> Ring:
        rings: Mapping[str, Callable[[], Ring]] = {
            "empty": lambda: Ring(b""),
            "pio": lambda: Ring(code.write_port(_BARE_PORT, 0, _WIDEST), answered_here=True),
            "mmio": lambda: Ring(code.write_memory(_BARE_ADDRESS, 0, _WIDEST), answered_here=True),
            "hypercall": self._machine.null_hypercall,
        }
        return rings[name]()

    def _item(self, what: Request) -> DoorbellItem:
        item = self._attachments[what["device"]].doorbell(what["doorbell"]).item
        assert isinstance(item, DoorbellItem)
        return item

    def _stamp(self, what: Request) -> int | None:
        """Where in the guest this doorbell's stamp goes, if it has one and the memory is there."""
        if "bare" in what:
            return None
        memory = self._attachments[what["device"]].memory
        offset = self._item(what).stamp
        return None if memory is None or offset is None else memory.address + offset


def hypercall_instruction() -> bytes:
    """The other vendor's faults, and KVM would have to patch it."""
    vendor = "AuthenticAMD", "HygonGenuine"
    cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace")
    return code.VMMCALL if any(name in cpuinfo for name in vendor) else code.VMCALL


def _doorbell(one: Attached) -> dict[str, Any]:
    item = one.item
    assert isinstance(item, DoorbellItem)
    return {
        "name": item.name,
        "place": item.place.name,
        "address": str(item),
        "width": item.width,
        "datamatch": item.datamatch,
        "stamp": item.stamp is not None,
        "error": one.error,
        "reason": one.reason,
    }


def _result(result: Result) -> dict[str, Any]:
    return {"ticks": list(result.ticks), "status": result.status, "why": result.why}


def main() -> int:
    if platform.machine() != "x86_64":
        print(json.dumps({"error": f"the tiny guest is one for x86-64, this is {platform.machine()}"}), flush=True)
        return 1
    try:
        kvm = Kvm()
        vmm = _Vmm(kvm)
    except HcdError as exc:
        print(json.dumps({"error": str(exc)}), flush=True)
        return 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started us decides; a terminal tells all of its group
    actions = {"host": vmm.host, "attach": vmm.attach, "exits": vmm.exits, "trips": vmm.trips}
    print(json.dumps({"ok": os.getpid()}), flush=True)
    try:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = {"ok": actions[request["do"]](request)}
            except (HcdError, KeyError) as exc:
                answer = {"error": str(exc)}
            print(json.dumps(answer), flush=True)
    finally:
        vmm.close()
        kvm.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
