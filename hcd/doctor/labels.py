"""SELinux and AppArmor: whether a guest of libvirt may connect to a socket.

Both deny without telling QEMU more than "Permission denied". What can be seen without their tools is looked at: modes
and labels in /proc and /sys, profiles in /etc/apparmor.d.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator
from pathlib import Path

from hcd.doctor.findings import Finding, note, warning

__all__ = ["check_apparmor", "check_selinux"]

_RULE = re.compile(r'^\s*(?:owner\s+)?"?(/[^"\s]+)"?\s+([a-zA-Z]+)\s*,')


def check_selinux(listener: int, root: Path = Path("/")) -> Iterator[Finding]:
    """``listener`` is the pid of who made the socket: what svirt may connect to is that process's type."""
    try:
        enforcing = (root / "sys/fs/selinux/enforce").read_text().strip() == "1"
    except OSError:
        return
    label = _read(root / "proc" / str(listener) / "attr/current")
    kind = label.split(":")[2] if label.count(":") >= 2 else label
    if not label or kind.startswith("svirt"):
        return
    find = warning if enforcing else note
    yield find(
        "selinux", f"SELinux {'denies' if enforcing else 'would deny'} guests of libvirt to connect to type {kind}",
        f"the daemon (pid {listener}) runs as {label}; guests run as svirt_t with categories of their own",
        "ausearch -m avc -c qemu shows denials (connectto); SELinuxContext= in a drop-in, or audit2allow -M hcd-local",
    )


def check_apparmor(qemu: int, socket_path: str, root: Path = Path("/")) -> Iterator[Finding]:
    """``qemu`` is the pid of a guest: its profile has to have the socket."""
    if _read(root / "sys/module/apparmor/parameters/enabled") != "Y":
        return
    label = _read(root / "proc" / str(qemu) / "attr/current")
    match = re.fullmatch(r"(libvirt-\S+) \((enforce|complain)\)", label)
    if match is None:
        return
    profiles = root / "etc/apparmor.d"
    files = [profiles / "libvirt" / f"{match[1]}{end}" for end in ("", ".files")]
    files += [profiles / "abstractions/libvirt-qemu", profiles / "local/abstractions/libvirt-qemu"]
    if any(_allows(file, socket_path) for file in files):
        return
    find = warning if match[2] == "enforce" else note
    yield find(
        "apparmor", f"the AppArmor profile of QEMU (pid {qemu}) does not name {socket_path}", label,
        f"add '{os.path.dirname(socket_path)}/*.sock rw,' to /etc/apparmor.d/local/abstractions/libvirt-qemu",
    )


def _allows(profile: Path, path: str) -> bool:
    """Whether a rule of ``profile`` lets ``path`` be written. AppArmor's "**" crosses directories, as fnmatch's "*"."""
    rules = map(_RULE.match, _read(profile).splitlines())
    return any(rule and "w" in rule[2] and fnmatch.fnmatchcase(path, rule[1].replace("**", "*")) for rule in rules)


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return ""
