"""The host: /dev/kvm, and what a process may hold."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path

from hcd.config import DeviceSpec
from hcd.device import Device
from hcd.doctor.findings import Finding, note, warning

__all__ = ["check_kvm", "check_limits"]

#: descriptors of one connection beside its queues: socket, back channel, alarm, eight regions of memory, the image
_EACH_DEVICE = 16
#: of the process itself: lanes, listeners, metrics, log
_PROCESS = 32
#: address space that a daemon wants for the memory of one guest at least
_GUEST = 4 << 30


def check_kvm(device: Path = Path("/dev/kvm"), cpuinfo: Path = Path("/proc/cpuinfo")) -> Iterator[Finding]:
    """The lab and fast guests need it; serving devices does not."""
    if not device.exists():
        yield note("kvm-missing", f"there is no {device}", "guests run under TCG; hcd lab does not run",
                   "modprobe kvm_intel or kvm_amd, or enable nested virtualization for this machine")
        return
    if not os.access(device, os.R_OK | os.W_OK):
        yield warning("kvm-denied", f"you may not use {device}",
                      f"uid {os.getuid()}, groups {sorted(os.getgroups())}; hcd lab and QEMU need it",
                      "add yourself to its group, usually: usermod -aG kvm USER, and log in again")
        return
    flags = _cpu_flags(cpuinfo)
    if flags and not flags & {"vmx", "svm"}:
        yield note("kvm-limited", f"{device} is there, but the processor shows neither VMX nor SVM",
                   "Linux kernels may not boot on it", "use -accel tcg where a guest hangs at its start")


def _cpu_flags(cpuinfo: Path) -> set[str]:
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def check_limits(
    devices: Iterable[tuple[DeviceSpec, Device]], pid: int | None, proc: Path = Path("/proc")
) -> Iterator[Finding]:
    """What the daemon (``pid``, or who asks) may hold, against what the devices need. It locks no memory."""
    whose, limits = _limits(pid, proc)
    pairs = list(devices)
    needed = _PROCESS + sum(_EACH_DEVICE + 3 * device.num_queues for _, device in pairs)
    files = limits.get("Max open files")
    if files is not None and files < needed:
        yield warning("limit-files", f"{len(pairs)} devices may need more descriptors than {whose} may have",
                      f"RLIMIT_NOFILE is {files}, about {needed} are needed",
                      "raise it: LimitNOFILE= in a drop-in of the unit, or ulimit -n")
    space = limits.get("Max address space")
    if space is not None and space < _GUEST * max(1, len(pairs)):
        yield warning("limit-memory", f"{whose} may not map much guest memory",
                      f"RLIMIT_AS is {space >> 20} MiB, and all memory of every connected guest is mapped",
                      "remove it: LimitAS=infinity in a drop-in of the unit, or ulimit -v unlimited")


def _limits(pid: int | None, proc: Path) -> tuple[str, dict[str, int]]:
    """Soft limits by their name in /proc; those that are unlimited are left out."""
    own = {"Max open files": resource.RLIMIT_NOFILE, "Max address space": resource.RLIMIT_AS}
    if pid is not None:
        try:
            lines = (proc / str(pid) / "limits").read_text().splitlines()
        except OSError:
            lines = []
        values = {name: line[len(name) :].split()[0] for name in own for line in lines if line.startswith(name)}
        if values:
            return f"the daemon (pid {pid})", {name: int(v) for name, v in values.items() if v.isdigit()}
    found = {name: resource.getrlimit(which)[0] for name, which in own.items()}
    return "a process like this one", {name: v for name, v in found.items() if v != resource.RLIM_INFINITY}
