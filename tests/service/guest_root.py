"""The root of a Debian guest with systemd as its init, and hcd installed in it as ``make install`` does.

Debian's packages are unpacked, not installed: no maintainer script has run. What those would have done and a boot needs
is done here (the merged /usr, an identity of the machine) or by systemd itself (accounts, directories). The guest is an
archive in memory; its /init makes a mount of it, because a root that is none can take no service's private name space.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from hcd.demo import packages
from hcd.demo.initramfs import Tree

ROOT = Path(__file__).parents[2]
#: the Python that hcd was built for -> the release of Debian that has it
SUITES = {(3, 11): "bookworm", (3, 13): "trixie"}
PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"
#: usr-is-merged stands for usrmerge, which is a script in Perl; procps has /bin/kill
PACKAGES = ("systemd", "usr-is-merged", "coreutils", "procps", f"{PYTHON}-minimal", f"lib{PYTHON}-stdlib")
NEW = "/newroot"
MERGED = ("bin", "sbin", "lib", "lib64")
_NEEDLESS = re.compile(
    r"usr/share/(?!dbus-1|sysusers|base)|(usr/)?lib/udev|(usr/)?lib/systemd/(catalog|network)|(usr/)?lib/x86_64-linux-gnu/gconv|.*/(doc|man)/|var/cache"
)

INIT = f"""#!/bin/busybox sh
/bin/busybox mount -o bind {NEW} {NEW}
cd {NEW}
/bin/busybox mount -o move {NEW} /
exec /bin/busybox chroot . /lib/systemd/systemd
"""

#: what a guest without logins, clock or peripherals need not start
MASKED = (
    *("getty.target", "systemd-logind.service", "systemd-random-seed.service", "systemd-update-utmp.service"),
    *("systemd-update-utmp-runlevel.service", "systemd-pcrphase.service", "systemd-pcrphase-sysinit.service"),
    *("systemd-journal-flush.service", "systemd-binfmt.service", "proc-sys-fs-binfmt_misc.automount"),
    *("dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount"),
    *("systemd-ask-password-wall.path", "systemd-ask-password-console.path", "e2scrub_reap.service"),
    *("systemd-sysctl.service", "systemd-modules-load.service", "kmod-static-nodes.service"),
    *("modprobe@.service", "systemd-pstore.service", "systemd-firstboot.service", "ldconfig.service"),
)

FILES = {
    "/etc/machine-id": "00112233445566778899aabbccddeeff\n",
    "/etc/hostname": "guest\n",
    "/etc/fstab": "",
    "/etc/systemd/journald.conf.d/quick.conf": "[Journal]\nStorage=volatile\nRateLimitIntervalSec=0\n",
    "/etc/systemd/system.conf.d/quick.conf": "[Manager]\nDefaultTimeoutStopSec=20s\n",
}


def is_available() -> str:
    """Empty, or why there can be no such guest for the Python that runs this."""
    return "" if sys.version_info[:2] in SUITES else f"no release of Debian has {PYTHON}, for which hcd was built"


def debian() -> Path:
    """The unpacked packages, from the cache if they are there; their Python modules are compiled."""

    def compile_modules(tree: Path) -> None:
        library = tree / "usr" / "lib" / PYTHON
        subprocess.run([sys.executable, "-m", "compileall", "-q", "-x", "test", str(library)], check=False)

    suite = SUITES[sys.version_info[:2]]
    name = f"debian-{suite}-systemd"
    return packages.unpacked(name, lambda _: PACKAGES, suite=suite, whole=True, finish=compile_modules)


def stage(directory: Path) -> Path:
    """hcd installed below ``directory`` for /usr, with its dependencies."""
    settings = [f"DESTDIR={directory}", "PREFIX=/usr", "DEPS=no", f"INTERPRETER=/usr/bin/{PYTHON}"]
    done = subprocess.run(["make", "-C", str(ROOT), "install", *settings], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in dependencies("hcd"):
        for file in metadata.distribution(name).files or ():
            target = directory / "usr" / "lib" / "hcd" / file
            if ".." not in file.parts:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(str(file.locate()), target)
    return directory


def dependencies(name: str) -> set[str]:
    """The distributions that ``name`` needs to run, directly or not, as they are installed here."""
    found: set[str] = set()
    for line in metadata.requires(name) or ():
        needed, _, condition = line.partition(";")
        word = re.match(r"[\w.-]+", needed)
        if word is None or "extra" in condition or not _is_installed(word[0]):
            continue
        found |= {word[0], *dependencies(word[0])}
    return found


def _is_installed(name: str) -> bool:
    """One that a condition excludes (another system, an older Python) is not."""
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def archive(staged: Path, files: dict[str, str]) -> bytes:
    """The whole guest. ``files`` are more of them, by their path in the guest."""
    tree = Tree()
    guest = packages.guest_files("amd64")
    tree.add_file("/bin/busybox", guest.busybox.read_bytes(), executable=True)
    tree.add_file("/init", INIT.encode(), executable=True)
    for name in ("proc", "sys", "dev", "run", "tmp", "var/lib", "var/log", "etc", "root", "srv"):
        tree.add_directory(f"{NEW}/{name}")
    _add_debian(tree, debian())
    tree.add_tree(staged, NEW)
    for unit in MASKED:
        tree.add_link(f"{NEW}/etc/systemd/system/{unit}", "/dev/null")
    for path, text in {**FILES, **files}.items():
        tree.add_file(NEW + path, text.encode())
    return tree.cpio()


def _add_debian(tree: Tree, root: Path) -> None:
    """With /bin, /lib and the like below /usr, where newer packages have them already."""

    def needless(path: str) -> bool:
        return path in MERGED or _NEEDLESS.match(path) is not None

    tree.add_tree(root, NEW, needless)
    for name in MERGED:
        if (root / name).is_dir() and not (root / name).is_symlink():
            tree.add_tree(root / name, f"{NEW}/usr/{name}", lambda path, name=name: needless(f"{name}/{path}"))
        tree.add_link(f"{NEW}/{name}", f"usr/{name}")
