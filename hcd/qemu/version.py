"""What an installed QEMU says of itself: its version, and the devices that it has."""

from __future__ import annotations

import re
import shutil
import subprocess

from hcd.errors import ConfigError
from hcd.qemu.devices import Version

__all__ = ["MILLISECONDS", "NEWEST", "devices_of", "find_qemu", "parse_version", "reconnect", "version_of"]

#: the first version that has ``reconnect-ms``; it deprecates ``reconnect``, which later ones no longer know
MILLISECONDS: Version = (9, 2)
#: what to write for where no QEMU can be asked
NEWEST: Version = (10, 2)

#: programs to ask, in this order, where nobody says which; the last one is Red Hat's
_PROGRAMS = {"pci": "qemu-system-x86_64", "mmio": "qemu-system-x86_64", "ccw": "qemu-system-s390x"}
_ELSEWHERE = "/usr/libexec/qemu-kvm"
_TIMEOUT = 30.0


def find_qemu(bus: str) -> str | None:
    """The installed QEMU that has machines with ``bus``; None without one."""
    return shutil.which(_PROGRAMS[bus]) or shutil.which(_ELSEWHERE)


def parse_version(text: str) -> Version:
    """(major, minor) of "7.2" or "7.2.22". ValueError says what was expected."""
    match = re.fullmatch(r"(\d{1,4})\.(\d{1,4})(?:\.\d+)*", text, re.ASCII)
    if match is None:
        raise ValueError(f'expected a version of QEMU such as 7.2, found "{text}"')
    return int(match[1]), int(match[2])


def version_of(program: str) -> Version:
    """The version of an installed QEMU. ConfigError when that program does not tell."""
    said = _ask(program, "--version")
    match = re.search(r"\bversion (\d+\.\d+)", said, re.ASCII)
    if match is None:
        raise ConfigError(f"{program}: --version does not name a version of QEMU")
    return parse_version(match[1])


def devices_of(program: str) -> frozenset[str]:
    """Names of every device that an installed QEMU can create."""
    machine = ("-machine", "none")  # where there is no default machine, as for ARM
    return frozenset(re.findall(r'^name "([^"]+)"', _ask(program, *machine, "-device", "help"), re.MULTILINE))


def reconnect(version: Version) -> str:
    """How this version spells a chardev that connects again after a second."""
    return "reconnect-ms=1000" if version >= MILLISECONDS else "reconnect=1"


def _ask(program: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [program, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT,
            errors="replace", check=False,
        )
    except OSError as exc:
        raise ConfigError(f"{program}: cannot be run: {exc.strerror}") from exc
    except subprocess.TimeoutExpired as exc:
        raise ConfigError(f"{program}: did not answer {' '.join(arguments)} within {_TIMEOUT:g} s") from exc
    if done.returncode:
        raise ConfigError(f"{program}: {' '.join(arguments)} failed: {(done.stderr.strip() or 'no reason given')}")
    return done.stdout
