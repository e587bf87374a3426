"""What the machine is, and what about it forbids conclusions."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Machine", "look", "warnings"]

_SPREAD = 1.25
_LOAD = 0.7


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts of this host. ``hypervisor`` is the one below us, "none" on hardware; ``module`` is KVM's own."""

    cpu: str
    cpus: int
    kernel: str
    hypervisor: str
    module: str
    assisted: bool
    clocksource: str
    tsc_flags: tuple[str, ...]
    load: float

    @property
    def table(self) -> dict[str, str]:
        return {
            "cpu": f"{self.cpu} ({self.cpus} online)",
            "kernel": self.kernel,
            "hypervisor below": self.hypervisor,
            "kvm module": self.module,
            "tsc": f"{', '.join(self.tsc_flags) or 'neither constant nor non-stop'}; clock source {self.clocksource}",
        }


def look(root: Path = Path("/")) -> Machine:
    """Read them; ``root`` is where /proc and /sys are."""
    cpuinfo = _cpuinfo(root / "proc/cpuinfo")
    flags = set(cpuinfo.get("flags", "").split())
    loaded = [name for name in ("kvm_intel", "kvm_amd", "kvm_pvm") if (root / "sys/module" / name).is_dir()]
    return Machine(
        cpu=cpuinfo.get("model name", platform.processor() or "unknown"),
        cpus=len(os.sched_getaffinity(0)),
        kernel=platform.release(),
        hypervisor=_hypervisor() if "hypervisor" in flags else "none",
        module=", ".join(loaded) or "built in, or unknown",
        assisted=bool(flags & {"vmx", "svm"}),
        clocksource=_read(root / "sys/devices/system/clocksource/clocksource0/current_clocksource") or "unknown",
        tsc_flags=tuple(sorted(flags & {"constant_tsc", "nonstop_tsc"})),
        load=os.getloadavg()[0],
    )


def warnings(machine: Machine, spreads: Mapping[str, float]) -> list[str]:
    """Reasons why the figures say little. ``spreads``: of each row, slowest over fastest round."""
    found = []
    if machine.hypervisor == "qemu":
        found.append("the processor is emulated by QEMU: what anything costs here means nothing")
    elif machine.hypervisor != "none":
        found.append(f"this host is itself a guest (of {machine.hypervisor}): exits are handled by two hypervisors")
    if not machine.assisted:
        found.append(
            "KVM works without VMX or SVM (page-table based): guests are partly interpreted, exits cost other things"
        )
    if len(machine.tsc_flags) < 2:
        found.append("the TSC is not said to be constant and non-stop: ticks may not be time")
    if machine.clocksource != "tsc":
        found.append(f"the kernel's clock source is {machine.clocksource}: it does not trust the TSC")
    if machine.cpus < 2:
        found.append("there is one processor: guest and hcd take turns, round trips include scheduling")
    if machine.load > _LOAD * machine.cpus:
        found.append(f"the machine was busy already (load {machine.load:.1f} on {machine.cpus} processors)")
    noisy = [f"{name} {spread:.2f}" for name, spread in spreads.items() if spread > _SPREAD]
    if noisy:
        found.append(f"noisy: medians of rounds differ, slowest over fastest: {', '.join(noisy)}")
    return found


def _cpuinfo(path: Path) -> dict[str, str]:
    """The first processor's lines."""
    first = _read(path).split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _hypervisor() -> str:
    """systemd knows the signatures of many; "unknown" without it."""
    tool = shutil.which("systemd-detect-virt")
    if tool is None:
        return "unknown"
    done = subprocess.run([tool, "--vm"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
