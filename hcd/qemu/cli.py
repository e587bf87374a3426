"""``hcd qemu-args CONFIG [DEVICE ...]``: the arguments that make QEMU use the devices of a configuration."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence

from hcd import config
from hcd import options as opt
from hcd.config import DeviceSpec
from hcd.errors import ConfigError
from hcd.qemu import libvirt, version
from hcd.qemu.arguments import device_arguments, machine_arguments, monitor_arguments
from hcd.qemu.devices import Version
from hcd.qemu.plugs import Plug, Wishes, make_plug, pluggable

__all__ = ["DESCRIPTION", "INTERMIXED", "add_arguments", "run"]

INTERMIXED = True

DESCRIPTION = (
    "Print the QEMU arguments for the devices of a configuration, one option a line: "
    "qemu-system-x86_64 $(hcd qemu-args hcd.toml) ... takes them as they are."
)
_checked = opt.for_argparse

DEFAULT_MEMORY = "1G"
MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config")
    parser.add_argument("device", nargs="*", help="names of devices; default: every one that QEMU can have")
    parser.add_argument("--qemu", metavar="PATH", help="the QEMU to write for; default: the one that is installed")
    parser.add_argument("--qemu-version", type=_checked(version.parse_version), metavar="X.Y", help="ask no QEMU")
    parser.add_argument("--memory", type=_checked(_memory), default=_memory(DEFAULT_MEMORY), metavar="SIZE",
                        help=f"of the guest; default {DEFAULT_MEMORY}")
    parser.add_argument("--machine", metavar="TYPE", help="default: QEMU's own; microvm for devices on mmio")
    parser.add_argument("--packed", action="store_true", help="offer packed rings")
    parser.add_argument("--queue-size", type=_checked(_ring), metavar="N", help="entries of a ring; default: QEMU's")
    parser.add_argument("--no-reconnect", action="store_true", help="end the device when hcd ends")
    parser.add_argument("--accel", choices=("auto", "kvm", "tcg"), default="auto",
                        help="what the machine will run on; auto: what this host can")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--libvirt", action="store_true", help="print libvirt's XML instead")
    how.add_argument("--json", action="store_true", help="print a JSON list of words instead")


def run(arguments: argparse.Namespace) -> int:
    loaded = config.load(arguments.config)
    specs = _chosen(loaded.devices, arguments.device)
    program, of = _which_qemu(arguments, specs)
    wishes = Wishes(
        version=of,
        packed=arguments.packed,
        queue_size=arguments.queue_size,
        reconnect=not arguments.no_reconnect,
        kvm=_kvm(arguments.accel),
    )
    plugs = [make_plug(spec, wishes) for spec in specs]
    if program is not None:
        _check_installed(program, plugs)
    if arguments.libvirt:
        print(libvirt.domain(plugs, of, kvm=wishes.kvm))
        return 0
    words = machine_arguments(plugs, arguments.memory, arguments.machine)
    for plug in plugs:
        words += device_arguments(plug, of)
    words += monitor_arguments(plugs)
    print(json.dumps(words) if arguments.json else _lines(words))
    return 0


def _chosen(specs: Sequence[DeviceSpec], names: Sequence[str]) -> list[DeviceSpec]:
    """The devices that were named, or all that QEMU can have."""
    known = {spec.name: spec for spec in specs}
    for name in names:
        if name not in known:
            raise ConfigError(f'no device "{name}" in the configuration{opt.did_you_mean(name, known)}')
    if names:
        return [known[name] for name in dict.fromkeys(names)]
    chosen = [spec for spec in specs if pluggable(spec)]
    for spec in specs:
        if spec not in chosen:
            print(f'hcd: "{spec.name}" is left out: type {spec.type} has raw doorbells, which QEMU does not serve',
                  file=sys.stderr)
    if not chosen:
        raise ConfigError("no device of the configuration is one for QEMU")
    return chosen


def _which_qemu(arguments: argparse.Namespace, specs: Sequence[DeviceSpec]) -> tuple[str | None, Version]:
    """The program to ask, if there is one to ask, and the version to write for."""
    if arguments.qemu_version is not None:
        return None, arguments.qemu_version
    buses = {spec.bus or "pci" for spec in specs}
    program = arguments.qemu or version.find_qemu("ccw" if "ccw" in buses else "pci")
    if program is None:
        print("hcd: no QEMU is installed here; written for a new one (see --qemu-version)", file=sys.stderr)
        return None, version.NEWEST
    return program, version.version_of(program)


def _check_installed(program: str, plugs: Sequence[Plug]) -> None:
    installed = version.devices_of(program)
    for plug in plugs:
        if plug.driver not in installed:
            raise ConfigError(f'"{plug.spec.name}": {program} has no device {plug.driver}')


def _kvm(accel: str) -> bool:
    return os.access("/dev/kvm", os.R_OK | os.W_OK) and _virtualizes() if accel == "auto" else accel == "kvm"


def _virtualizes() -> bool:
    """Some sandboxes have a /dev/kvm that boots no ordinary kernel, on processors without the extensions."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as info:
            flags = info.read().split()
    except OSError:
        return True
    return ("GenuineIntel" not in flags and "AuthenticAMD" not in flags) or "vmx" in flags or "svm" in flags


def _lines(words: Sequence[str]) -> str:
    """An option and its value a line, in the shell's spelling."""
    pairs = zip(words[::2], words[1::2], strict=True)
    return "\n".join(f"{shlex.quote(name)} {shlex.quote(value)}" for name, value in pairs)


def _memory(text: str) -> int:
    size = opt.parse_size(text)
    if size < MIB or size % MIB:
        raise ValueError(f'expected a size in whole MiB such as 512M, found "{text}"')
    return size


def _ring(text: str) -> int:
    size = int(text) if text.isascii() and text.isdigit() else 0
    if not 2 <= size <= 32768 or size & (size - 1):
        raise ValueError(f'expected a power of two from 2 to 32768, found "{text}"')
    return size
