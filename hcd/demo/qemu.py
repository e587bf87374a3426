"""QEMU command lines: every way in which a guest can ring one of hcd's devices.

How the guest reaches the doorbell is chosen by a *bus*:

=========  ==========================================================  ====

bus        device in QEMU                                              path
=========  ==========================================================  ====

legacy     virtio-pci with ``disable-modern=on``: a port of I/O BAR 0   pio
modern     virtio-pci 1.x: an address in memory BAR 4                   mmio
pio        virtio-pci 1.x with ``modern-pio-notify=on``: I/O BAR 2      pio
mmio       virtio-mmio (machine microvm): register 0x50                 mmio
ccw        virtio-ccw (machine s390x): diagnose 0x500                   hypercall
=========  ==========================================================  ====


Guest memory is a shared memfd, as vhost-user requires.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hcd.demo.packages import GuestFiles, MissingToolError

__all__ = [
    "BUS_PATHS",
    "MACHINES",
    "Machine",
    "Vm",
    "accelerator",
    "any_device",
    "block",
    "chardev",
    "net",
    "rng",
    "share",
    "vsock",
]

#: bus -> the path by which its doorbells leave the guest
BUS_PATHS = {"legacy": "pio", "modern": "mmio", "pio": "pio", "mmio": "mmio", "ccw": "hypercall"}

#: they know only virtio 1.x, and say so by not having the properties
_MODERN_ONLY = ("vhost-user-rng", "vhost-user-test-device")
_PCI_PROPERTIES = {
    "legacy": ("disable-modern=on", "disable-legacy=off"),
    "modern": ("disable-legacy=on",),
    "pio": ("disable-legacy=on", "modern-pio-notify=on"),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine type of QEMU: its program and options, the guest's console, modules of its buses."""

    arch: str
    program: str
    package: str
    options: str
    console: str
    bus_modules: tuple[str, ...] = ()


MACHINES = {
    "q35": Machine("amd64", "qemu-system-x86_64", "qemu-system-x86", "q35", "ttyS0", ("virtio_pci",)),
    "pc": Machine("amd64", "qemu-system-x86_64", "qemu-system-x86", "pc", "ttyS0", ("virtio_pci",)),
    "microvm": Machine("amd64", "qemu-system-x86_64", "qemu-system-x86", "microvm", "ttyS0", ("virtio_mmio",)),
    "s390x": Machine("s390x", "qemu-system-s390x", "qemu-system-misc", "s390-ccw-virtio", "ttysclp0"),
}


def accelerator(arch: str = "amd64") -> str:
    """What ``-accel`` gets: $HCD_ACCEL, else "kvm" where it really runs guest kernels, else "tcg".

    A /dev/kvm without VMX or SVM behind it exists (page-table based hypervisors); Debian's kernels do not
    boot on it. So the processor's flags decide, not the file.
    """
    chosen = os.environ.get("HCD_ACCEL", "auto")
    if chosen != "auto":
        return chosen
    if arch != "amd64" or platform.machine() != "x86_64" or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    flags = Path("/proc/cpuinfo").read_text().split()
    return "kvm" if "vmx" in flags or "svm" in flags else "tcg"


@dataclass(slots=True)
class Vm:
    """A virtual machine to start. ``devices`` are arguments as ``block``, ``net`` and ``rng`` return them.

    ``qmp`` are sockets on which QEMU listens; each serves one client at a time, so hcd and a test want their
    own. ``accel`` and ``cpu`` replace what is chosen otherwise.
    """

    machine: str = "q35"
    accel: str = ""
    cpu: str = ""
    memory_mib: int = 256
    cpus: int = 1
    devices: list[str] = field(default_factory=list)
    qmp: Sequence[Path] = ()
    kernel_options: str = ""

    @property
    def kind(self) -> Machine:
        return MACHINES[self.machine]

    def command(self, files: GuestFiles, initrd: Path) -> list[str]:
        """The whole command line. MissingToolError when this QEMU is not installed."""
        kind = self.kind
        program = shutil.which(kind.program)
        if program is None:
            raise MissingToolError(f"{kind.program} is missing (Debian package {kind.package})")
        arguments = [program, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        arguments += ["-machine", f"{kind.options},memory-backend=ram", "-accel", self.accel or accelerator(kind.arch)]
        arguments += ["-cpu", self.cpu] if self.cpu else []
        arguments += ["-smp", str(self.cpus), "-m", f"{self.memory_mib}M"]
        arguments += ["-object", f"memory-backend-memfd,id=ram,size={self.memory_mib}M,share=on"]
        arguments += ["-chardev", "stdio,id=console,signal=off", *self._console()]
        for index, path in enumerate(self.qmp):
            arguments += ["-chardev", f"socket,id=qmp{index},path={path},server=on,wait=off"]
            arguments += ["-mon", f"chardev=qmp{index},mode=control"]
        arguments += [
            "-kernel",
            str(files.kernel),
            "-initrd",
            str(initrd),
            "-append",
            self._kernel_command_line(),
        ]
        return arguments + self.devices

    def _console(self) -> list[str]:
        if self.kind.arch == "s390x":
            return ["-device", "sclpconsole,chardev=console"]
        return ["-serial", "chardev:console"]

    def _kernel_command_line(self) -> str:
        words = [f"console={self.kind.console}", "rdinit=/init", "quiet", "panic=-1", "mitigations=off"]
        if self.kind.arch == "amd64":
            words += ["reboot=t", "no_timer_check", "tsc=reliable"]
        if self.machine == "microvm":
            words += _clock_words()
        return " ".join([*words, self.kernel_options]).strip()


def share(tag: str, directory: Path | str, *, writable: bool = False) -> list[str]:
    """A directory of the host that the guest mounts by ``tag`` (9p)."""
    access = "off" if writable else "on"
    backend = f"local,id={tag},path={directory},security_model=none,multidevs=remap,readonly={access}"
    return ["-fsdev", backend, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]


def _clock_words() -> list[str]:
    """microvm has only the PIT to measure the clock with, which fails on a busy host; the kernel then hangs.

    Under TCG the guest's TSC is the host's, so the host's frequency is the answer (a wrong one skews guest time).
    """
    found = re.search(r"^cpu MHz\s*: ([0-9.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return [f"tsc_early_khz={float(found.group(1)) * 1000:.0f}"] if found else []


def chardev(ident: str, socket: Path | str, *, reconnect: str = "") -> list[str]:
    """The connection to the back end that listens on ``socket``.

    ``reconnect``: how this QEMU spells that it is made again, see ``hcd.qemu.version.reconnect``.
    """
    return ["-chardev", ",".join(filter(None, ["socket", f"id={ident}-socket", f"path={socket}", reconnect]))]


def _device(name: str, ident: str, bus: str, properties: Sequence[str]) -> list[str]:
    """``name`` is the device's stem; its bus gives the suffix and properties."""
    suffix = {"mmio": "", "ccw": "-ccw"}.get(bus, "-pci")
    if suffix == "" and name in ("virtio-net", "vhost-user-vsock"):
        suffix = "-device"
    words = [f"{name}{suffix}", f"id={ident}", *properties]
    if bus in _PCI_PROPERTIES:
        known = _PCI_PROPERTIES[bus]
        words += [word for word in known if name not in _MODERN_ONLY or "legacy" not in word]
        words.append("romfile=")
    return ["-device", ",".join(words)]


def block(
    socket: Path | str,
    bus: str,
    *,
    ident: str = "disk0",
    queues: int = 1,
    packed: bool = False,
    reconnect: str = "",
    extra: Sequence[str] = (),
) -> list[str]:
    """A vhost-user block device on ``bus``."""
    properties = [f"chardev={ident}-socket", f"num-queues={queues}", *extra]
    if packed:
        properties.append("packed=on")
    return chardev(ident, socket, reconnect=reconnect) + _device("vhost-user-blk", ident, bus, properties)


def rng(socket: Path | str, bus: str, *, ident: str = "rng0") -> list[str]:
    """A vhost-user entropy device. QEMU has no legacy one: ValueError."""
    if bus == "legacy":
        raise ValueError("QEMU's vhost-user-rng has no legacy variant; bus 'pio' rings by port writes too")
    return chardev(ident, socket) + _device("vhost-user-rng", ident, bus, [f"chardev={ident}-socket"])


def vsock(socket: Path | str, bus: str, *, ident: str = "vsock0", reconnect: str = "") -> list[str]:
    """A vhost-user socket device. The guest's CID is what the back end says. QEMU refuses ``reconnect``."""
    connection = chardev(ident, socket, reconnect=reconnect)
    return connection + _device("vhost-user-vsock", ident, bus, [f"chardev={ident}-socket"])


def any_device(
    socket: Path | str,
    bus: str,
    virtio_id: int,
    *,
    queues: int,
    config_size: int = 0,
    ident: str = "any0",
    reconnect: str = "",
) -> list[str]:
    """Whatever listens on ``socket``, by QEMU's front end for any device (from 10.2 on, virtio 1 only).

    QEMU refuses ``reconnect``: it does not wait for a chardev that connects in the background.
    """
    told = [f"virtio-id={virtio_id}", f"num_vqs={queues}", f"config_size={config_size}"]
    properties = [f"chardev={ident}-socket", *told]
    connection = chardev(ident, socket, reconnect=reconnect)
    return connection + _device("vhost-user-test-device", ident, bus, properties)


def scsi(
    socket: Path | str, bus: str, *, ident: str = "scsi0", queues: int = 1, reconnect: str = ""
) -> list[str]:
    """A SCSI host on a vhost-user device; ``queues`` counts those for commands. ``reconnect``: QEMU >= 8.2."""
    properties = [f"chardev={ident}-socket", f"num_queues={queues}"]
    return chardev(ident, socket, reconnect=reconnect) + _device("vhost-user-scsi", ident, bus, properties)


def net(
    socket: Path | str,
    bus: str,
    *,
    ident: str = "net0",
    mac: str = "",
    queues: int = 1,
    packed: bool = False,
) -> list[str]:
    """A virtio network card on a vhost-user netdev; ``queues`` counts pairs."""
    arguments = chardev(ident, socket)
    arguments += ["-netdev", f"vhost-user,id={ident}-peer,chardev={ident}-socket,queues={queues}"]
    properties = [f"netdev={ident}-peer"]
    if mac:
        properties.append(f"mac={mac}")
    if queues > 1:
        properties.append("mq=on")
    if bus in _PCI_PROPERTIES:
        # QEMU 7.2 without KVM reaches for an irqfd table that it does not have as soon as a vhost-user
        # network card uses MSI-X, and dies of SIGSEGV (virtio_pci_vector_unmask). Without vectors the card
        # interrupts by INTx.
        properties.append(f"vectors={2 * queues + 2 if accelerator() == 'kvm' else 0}")
    if packed:
        properties.append("packed=on")
    return arguments + _device("virtio-net", ident, bus, properties)
