"""hcd_protocols.kvm against the kernel's own headers: every ioctl number, capability, constant, size and offset."""

from __future__ import annotations

import ctypes
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hcd_protocols import kvm

STRUCTURES = [
    found
    for found in vars(kvm).values()
    if isinstance(found, type) and issubclass(found, ctypes.Structure) and not found.__name__.startswith(("_", "Run"))
] + [kvm.Run]


def c_name(structure: type[Any]) -> str:
    """UserspaceMemoryRegion -> struct kvm_userspace_memory_region"""
    return "struct kvm" + re.sub(r"(?=[A-Z])", "_", structure.__name__).lower()


def constants() -> Iterator[tuple[str, int]]:
    """Everything that has a number, by the name of its macro."""
    for enumeration, prefix in (
        (kvm.Ioctl, "KVM_"),
        (kvm.Cap, "KVM_CAP_"),
        (kvm.Exit, "KVM_EXIT_"),
        (kvm.IoeventfdFlag, "KVM_IOEVENTFD_FLAG_"),
        (kvm.IrqfdFlag, "KVM_IRQFD_FLAG_"),
        (kvm.RoutingType, "KVM_IRQ_ROUTING_"),
        (kvm.XenFlag, "KVM_XEN_HVM_CONFIG_"),
        (kvm.XenAttr, "KVM_XEN_ATTR_TYPE_"),
    ):
        for member in enumeration:
            yield f"{prefix}{member.name}", int(member)
    yield "KVM_API_VERSION", kvm.API_VERSION
    yield "KVM_HYPERV_CONN_ID_MASK", kvm.HYPERV_CONN_ID_MASK
    yield "KVM_HYPERV_EVENTFD_DEASSIGN", kvm.HYPERV_EVENTFD_DEASSIGN
    yield "KVM_VCPU_TSC_CTRL", kvm.VCPU_TSC_CTRL
    yield "KVM_VCPU_TSC_OFFSET", kvm.VCPU_TSC_OFFSET


def places(structure: type[Any], path: str = "") -> Iterator[tuple[str, int, int]]:
    """Each field, nested ones too: its path in C, offset and size."""
    anonymous = getattr(structure, "_anonymous_", ())
    for name, kind, *_ in structure._fields_:
        offset = getattr(structure, name).offset
        here = path if name in anonymous else f"{path}{name}"
        if name not in anonymous:
            yield here, offset, ctypes.sizeof(kind)
        if hasattr(kind, "_fields_"):
            inside = here if name in anonymous else f"{here}."
            yield from ((deeper, offset + more, size) for deeper, more, size in places(kind, inside))


def program() -> str:
    lines = [f'    printf("{name} %llu\\n", (unsigned long long){name});' for name, _ in constants()]
    for structure in STRUCTURES:
        c = c_name(structure)
        if structure is not kvm.Run:  # hcd maps as much of it as it uses
            lines.append(f'    printf("{c} %zu\\n", sizeof({c}));')
        lines += [
            f'    printf("{c}.{path} %zu+%zu\\n", offsetof({c}, {path}), sizeof((({c} *)0)->{path}));'
            for path, _, _ in places(structure)
        ]
    body = "\n".join(lines)
    return f"#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\nint main(void)\n{{\n{body}\n}}\n"


def expected() -> dict[str, str]:
    wanted = {name: str(value) for name, value in constants()}
    for structure in STRUCTURES:
        c = c_name(structure)
        if structure is not kvm.Run:
            wanted[c] = str(ctypes.sizeof(structure))
        wanted |= {f"{c}.{path}": f"{offset}+{size}" for path, offset, size in places(structure)}
    return wanted


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86-64")
def test_every_number_is_the_kernels(tmp_path: Path, need: Callable[..., None]) -> None:
    """A C program prints them from <linux/kvm.h>."""
    need("gcc")
    if not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("no /usr/include/linux/kvm.h (Debian package linux-libc-dev)")
    source = tmp_path / "abi.c"
    source.write_text(program())
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", tmp_path / "abi", source], check=True)
    printed = subprocess.run([tmp_path / "abi"], check=True, capture_output=True, text=True).stdout
    theirs = dict(line.rsplit(" ", 1) for line in printed.splitlines())
    ours = expected()
    assert len(ours) > 300
    assert {name: (ours[name], theirs.get(name)) for name in ours if ours[name] != theirs.get(name)} == {}


def test_arrays_follow_their_heads() -> None:
    """The kernel reads entries right behind the counted head."""
    for make, head, entry in (
        (kvm.irq_routing_type, kvm.IrqRouting, kvm.IrqRoutingEntry),
        (kvm.cpuid2_type, kvm.Cpuid2, kvm.CpuidEntry2),
        (kvm.msrs_type, kvm.Msrs, kvm.MsrEntry),
    ):
        made = make(3)
        assert made.entries.offset == ctypes.sizeof(head)
        assert ctypes.sizeof(made) == ctypes.sizeof(head) + 3 * ctypes.sizeof(entry)


def test_structures_show_their_fields() -> None:
    """An error message that prints one says what was asked."""
    assert "conn_id=5" in repr(kvm.HypervEventfd(conn_id=5, fd=3))
