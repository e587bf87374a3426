"""Fetch what a guest boots from: a Debian kernel with its modules, and a static busybox; or any other packages.

Packages come through apt with a private configuration (own state, own lists), so neither root nor the host's
package lists are needed, and a foreign architecture does not touch the host's dpkg. They are unpacked, not
installed, into the cache directory ($HCD_CACHE, else $XDG_CACHE_HOME/hcd, else ~/.cache/hcd) once; afterwards
no network is used.

Environment: HCD_DEBIAN_MIRROR (default http://deb.debian.org/debian), HCD_DEBIAN_SUITE (default bookworm).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Apt", "GuestFiles", "MissingToolError", "cache_directory", "guest_files", "unpacked"]

Progress = Callable[[str], None]

#: what to boot -> the package that depends on the newest kernel of that flavour. The cloud kernel is small; the full
#: one has what it leaves out: 9p, for one.
KERNEL_PACKAGES = {
    "amd64": "linux-image-cloud-amd64",
    "amd64-full": "linux-image-amd64",
    "s390x": "linux-image-s390x",
}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class MissingToolError(Exception):
    """A program or file of the host is missing; the message names it and the Debian package that has it."""


@dataclass(frozen=True, slots=True)
class GuestFiles:
    """An unpacked kernel and a static busybox of one architecture (Debian's name for it)."""

    arch: str
    kernel: Path
    modules: Path
    busybox: Path

    @property
    def release(self) -> str:
        """The kernel's version, as ``uname -r`` prints it."""
        return self.modules.name


def cache_directory() -> Path:
    """Where downloads live; it is created."""
    override = os.environ.get("HCD_CACHE")
    if override:
        path = Path(override)
    else:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hcd"
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


def guest_files(flavour: str = "amd64", *, progress: Progress = lambda _: None) -> GuestFiles:
    """The kernel and busybox of ``flavour`` (see KERNEL_PACKAGES), downloaded unless they are in the cache.

    Raises MissingToolError without apt, and RuntimeError with apt's words when the
    mirror cannot be reached.
    """
    arch = _arch(flavour)

    def choose(apt: Apt) -> list[str]:
        return [apt.dependency(KERNEL_PACKAGES[flavour]), "busybox-static"]

    return _locate(arch, unpacked(f"debian-{flavour}", choose, arch=arch, progress=progress))


def unpacked(
    name: str,
    choose: Callable[[Apt], Sequence[str]],
    *,
    arch: str = "amd64",
    suite: str = "",
    whole: bool = False,
    finish: Callable[[Path], None] = lambda _: None,
    progress: Progress = lambda _: None,
) -> Path:
    """The directory ``name`` of the cache, with the packages that ``choose`` names unpacked in it.

    ``whole``: with all that they depend on. ``finish`` gets the directory before it appears in the cache: what it
    does is done once too. ``suite`` is a release of Debian instead of HCD_DEBIAN_SUITE. Raises as
    :func:`guest_files`.
    """
    root = cache_directory() / name
    if root.is_dir():
        return root
    _check_tools()
    # Unpacked beside its final place, so that a download that breaks off leaves nothing that looks complete.
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f"{root.name}.") as scratch:
        work = Path(scratch)
        apt = Apt(arch, work / "apt", suite)
        progress(f"reading Debian's package list for {arch}")
        apt.run("apt-get", "update", "-q")
        names = choose(apt)
        progress(f"fetching {' and '.join(names)} ({arch})")
        tree = work / "root"
        for deb in apt.download(names, whole=whole):
            subprocess.run(["dpkg", "-x", str(deb), str(tree)], check=True, capture_output=True)
        finish(tree)
        _rename_unless_there(tree, root)
    return root


def _arch(flavour: str) -> str:
    """Debian's name of the architecture."""
    return flavour.partition("-")[0]


def _locate(arch: str, root: Path) -> GuestFiles:
    kernels = sorted((root / "boot").glob("vmlinuz-*"))
    if not kernels:
        raise FileNotFoundError(f"{root}/boot has no kernel; remove {root} and try again")
    release = kernels[-1].name.removeprefix("vmlinuz-")
    modules = _first_existing(root / "lib/modules" / release, root / "usr/lib/modules" / release)
    return GuestFiles(arch, kernels[-1], modules, _first_existing(root / "bin/busybox", root / "usr/bin/busybox"))


def _first_existing(*candidates: Path) -> Path:
    """Debian moved /bin and /lib under /usr; both layouts are in use."""
    return next((path for path in candidates if path.exists()), candidates[0])


def _check_tools() -> None:
    for tool, package in (("apt-get", "apt"), ("dpkg", "dpkg")):
        if shutil.which(tool) is None:
            raise MissingToolError(f"{tool} is missing (Debian package {package})")
    if not KEYRING.exists():
        raise MissingToolError(f"{KEYRING} is missing (Debian package debian-archive-keyring)")


def _rename_unless_there(source: Path, target: Path) -> None:
    """Two test runs may fetch at once: the first one wins, the second uses its result."""
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise


class Apt:
    """apt with its state in ``directory``, for one architecture. The host's proxies still apply."""

    def __init__(self, arch: str, directory: Path, suite: str = "") -> None:
        for sub in ("state/lists/partial", "cache/archives/partial", "parts"):
            (directory / sub).mkdir(parents=True)
        (directory / "status").touch()
        mirror = os.environ.get("HCD_DEBIAN_MIRROR", "http://deb.debian.org/debian")
        suite = suite or os.environ.get("HCD_DEBIAN_SUITE", "bookworm")
        (directory / "sources.list").write_text(f"deb [arch={arch} signed-by={KEYRING}] {mirror} {suite} main\n")
        config = directory / "apt.conf"
        config.write_text(
            f'APT::Architecture "{arch}";\n'
            f'#clear APT::Architectures;\nAPT::Architectures {{ "{arch}"; }};\n'
            f'Dir::State "{directory}/state";\nDir::State::status "{directory}/status";\n'
            f'Dir::Cache "{directory}/cache";\n'
            f'Dir::Etc::sourcelist "{directory}/sources.list";\nDir::Etc::sourceparts "{directory}/parts";\n'
            f'Dir::Etc::preferencesparts "{directory}/parts";\n'
            "#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n"
            'Acquire::Languages "none";\nAPT::Sandbox::User "root";\n'
            # A mirror that is behind, or a clock that is ahead, has the packages all the same, and they are signed.
            'Acquire::Check-Valid-Until "false";\n'
        )
        self._archives = directory / "cache" / "archives"
        # APT_CONFIG is read before apt.conf.d, command-line options after it: the host must not win.
        self._options = ["-c", str(config)]
        self._env = {**os.environ, "APT_CONFIG": str(config), "LC_ALL": "C"}

    def run(self, program: str, *arguments: str, cwd: Path | None = None) -> str:
        command = [program, *self._options, *arguments]
        done = subprocess.run(command, env=self._env, cwd=cwd, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join([program, *arguments])} failed:\n{done.stderr.strip()}")
        return done.stdout

    def download(self, names: Sequence[str], *, whole: bool) -> list[Path]:
        """Fetch packages; ``whole``: with what they depend on, as if nothing were installed yet."""
        if whole:
            self.run("apt-get", "install", "-q", "-y", "--download-only", "--no-install-recommends", *names)
        else:
            self.run("apt-get", "download", "-q", *names, cwd=self._archives)
        return sorted(self._archives.glob("*.deb"))

    def dependency(self, package: str) -> str:
        """The first package that ``package`` depends on: the versioned kernel behind a meta package."""
        for line in self.run("apt-cache", "depends", package).splitlines():
            kind, _, name = line.strip().partition(" ")
            if kind == "Depends:" and name.startswith("linux-image-"):
                return name
        raise RuntimeError(f"{package} depends on no kernel")
