"""Run a program under the restrictions of a systemd unit, without systemd: ``confine.py UNIT DIRECTORY PROGRAM ...``

What can be had with system calls alone: the system call filter, only unix sockets, no memory that is writable and
executable, no capabilities and no way to get any, a network without interfaces, and a file system that is read-only
beside DIRECTORY. Needs root, and libseccomp for the filter. Exit status 77: it cannot be done here.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWNET = 0x00020000, 0x08000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
EQUAL, MASKED_EQUAL = 4, 7
AF_UNIX, PROT_WRITE, PROT_EXEC = 1, 2, 4
CANNOT = 77

libc = ctypes.CDLL(None, use_errno=True)


class MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


class Compare(ctypes.Structure):
    """struct scmp_arg_cmp"""

    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


def must(result: int, what: str) -> None:
    if result < 0:
        print(f"{what}: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        sys.exit(CANNOT)


def values(unit: Path, key: str) -> list[str]:
    lines = unit.read_text().splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{key}=")]


def expanded(word: str) -> set[str]:
    """The system calls that a word of SystemCallFilter= stands for."""
    if not word.startswith("@"):
        return {word}
    text = subprocess.check_output(["systemd-analyze", "syscall-filter", word], text=True)
    members = [line.strip() for line in text.splitlines()[1:]]
    return {call for member in members if member and not member.startswith("#") for call in expanded(member)}


def allowed(unit: Path) -> set[str]:
    calls: set[str] = set()
    for value in values(unit, "SystemCallFilter"):
        for word in value.removeprefix("~").split():
            calls = calls - expanded(word) if value.startswith("~") else calls | expanded(word)
    return calls


def isolate(directory: str) -> None:
    must(libc.unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC), "unshare")
    must(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "mount")
    must(libc.mount(directory.encode(), directory.encode(), None, MS_BIND, None), "mount")
    for path, attributes in ((b"/", MountAttr(set=MOUNT_ATTR_RDONLY)), (directory.encode(), MountAttr(clear=1))):
        size = ctypes.c_size_t(ctypes.sizeof(attributes))
        done = libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, path, AT_RECURSIVE, ctypes.byref(attributes), size)
        must(done, "mount_setattr")


def drop_capabilities() -> None:
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for capability in range(last + 1):
        must(libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0), "prctl")
    must(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def filter_calls(calls: set[str]) -> Callable[[], None]:
    """Prepare the filter; what is returned puts it into force."""
    try:
        seccomp = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        print(error, file=sys.stderr)
        sys.exit(CANNOT)
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(ctypes.c_uint32(REFUSE)))
    both = PROT_WRITE | PROT_EXEC
    narrowed = {
        "socket": [Compare(0, EQUAL, AF_UNIX, 0)],
        "mmap": [Compare(2, MASKED_EQUAL, both, bits) for bits in (0, PROT_WRITE, PROT_EXEC)],
        "mprotect": [Compare(2, MASKED_EQUAL, PROT_EXEC, 0)],
        "pkey_mprotect": [Compare(2, MASKED_EQUAL, PROT_EXEC, 0)],
    }
    for call in sorted(calls):
        number = seccomp.seccomp_syscall_resolve_name(call.encode())
        if number < 0:  # not on this machine
            continue
        for rule in narrowed.get(call, [None]):
            given = (0, None) if rule is None else (1, ctypes.byref(rule))
            done = seccomp.seccomp_rule_add_array(context, ctypes.c_uint32(ALLOW), number, *given)
            assert done == 0, (call, done)

    def load() -> None:
        assert seccomp.seccomp_load(context) == 0

    return load


def main(unit: str, directory: str, *program: str) -> None:
    load = filter_calls(allowed(Path(unit)))
    isolate(directory)
    drop_capabilities()
    load()
    os.execvp(program[0], program)


if __name__ == "__main__":
    main(*sys.argv[1:])
