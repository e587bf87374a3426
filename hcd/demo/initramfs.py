"""A small file tree for a guest: busybox, kernel modules in the order in which they load, tools of the host.

The same tree becomes a cpio archive (QEMU's ``-initrd``) or a directory (user-mode Linux's hostfs). Nothing
of the host's running system is used apart from the tools that were asked for, with the libraries that ``ldd``
names.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from hcd.demo.packages import MissingToolError

__all__ = ["Tree", "module_order"]

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
_TRAILER = "TRAILER!!!"


def module_order(modules: Path, wanted: Iterable[str]) -> list[Path]:
    """The module files to insert, dependencies first. Modules that are built in are left out.

    ``modules`` is a /lib/modules/VERSION directory; depmod need not have run there: the dependencies are read
    from the ``depends=`` entry of each module. Raises FileNotFoundError for a name that the kernel does not
    know.
    """
    files = {_plain_name(path.name): path for path in modules.rglob("*.ko*")}
    builtin = {_plain_name(Path(line).name) for line in (modules / "modules.builtin").read_text().splitlines()}
    order: list[Path] = []

    def add(name: str) -> None:
        if name in builtin:
            return
        if name not in files:
            raise FileNotFoundError(f"kernel {modules.name} has no module {name}")
        path = files[name]
        if path in order:
            return
        for dependency in _dependencies(path):
            add(dependency)
        order.append(path)

    for name in wanted:
        add(_plain_name(name))
    return order


def _plain_name(filename: str) -> str:
    return filename.split(".", 1)[0].replace("-", "_")


def _module_bytes(path: Path) -> bytes:
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def _dependencies(path: Path) -> list[str]:
    found = _DEPENDS.search(_module_bytes(path))
    names = found.group(1).decode() if found else ""
    return [_plain_name(name) for name in names.split(",") if name]


@dataclass(frozen=True, slots=True)
class _Entry:
    mode: int
    data: bytes = b""
    mtime: int = 0


@dataclass(slots=True)
class Tree:
    """Files by their absolute path in the guest. Parent directories come by themselves."""

    entries: dict[str, _Entry] = field(default_factory=dict)

    def add_file(self, path: str, data: bytes, *, executable: bool = False, mtime: int = 0) -> None:
        """``mtime`` (seconds since 1970) matters to Python: a compiled module carries that of its source."""
        self._add(path, _Entry(stat.S_IFREG | (0o755 if executable else 0o644), data, mtime))

    def add_tree(self, source: Path, where: str = "", skip: Callable[[str], bool] = lambda _: False) -> None:
        """Everything below ``source``, to ``where``; ``skip`` gets each path, relative to ``source``."""
        for directory, names, files in os.walk(source):
            inner = Path(directory).relative_to(source)
            names[:] = [name for name in names if not skip(str(inner / name))]
            for name in [*names, *files]:
                self._add_from(Path(directory) / name, f"{where}/{inner / name}", skip(str(inner / name)))

    def _add_from(self, path: Path, target: str, skipped: bool) -> None:
        if skipped:
            return
        status = path.lstat()
        if path.is_symlink():
            self.add_link(target, os.readlink(path))
        elif path.is_dir():
            self.add_directory(target)
        else:
            executable = bool(status.st_mode & 0o100)
            self.add_file(target, path.read_bytes(), executable=executable, mtime=int(status.st_mtime))

    def add_link(self, path: str, target: str) -> None:
        self._add(path, _Entry(stat.S_IFLNK | 0o777, target.encode()))

    def add_directory(self, path: str) -> None:
        self._add(path, _Entry(stat.S_IFDIR | 0o755))

    def add_modules(self, modules: Path, wanted: Iterable[str]) -> None:
        """Put the modules under /modules, their load order into /modules/order."""
        order = module_order(modules, wanted)
        for path in order:
            self.add_file(f"/modules/{_plain_name(path.name)}.ko", _module_bytes(path))
        lines = "".join(f"{_plain_name(path.name)}\n" for path in order)
        self.add_file("/modules/order", lines.encode())

    def add_host_tool(self, name: str, package: str) -> None:
        """Copy a program of the host with its libraries; MissingToolError names ``package`` if it is absent."""
        found = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
        if found is None:
            raise MissingToolError(f"{name} is missing (Debian package {package})")
        self.add_file(f"/sbin/{name}", Path(found).read_bytes(), executable=True)
        for library in _libraries(found):
            self.add_file(str(library), library.read_bytes(), executable=True)

    def cpio(self) -> bytes:
        """The tree as a "newc" archive, padded so that the kernel takes another one behind it."""
        parts = [
            _cpio_record(number, path.lstrip("/"), entry)
            for number, (path, entry) in enumerate(sorted(self.entries.items()), start=1)
        ]
        parts.append(_cpio_record(0, _TRAILER, _Entry(0)))
        return b"".join(parts)

    def write_to(self, directory: Path) -> None:
        """Create the tree under ``directory``."""
        for path, entry in sorted(self.entries.items()):
            target = directory / path.lstrip("/")
            if stat.S_ISDIR(entry.mode):
                target.mkdir(parents=True, exist_ok=True)
            elif stat.S_ISLNK(entry.mode):
                target.symlink_to(entry.data.decode())
            else:
                target.write_bytes(entry.data)
                target.chmod(stat.S_IMODE(entry.mode))

    def _add(self, path: str, entry: _Entry) -> None:
        for parent in Path(path).parents:
            if str(parent) != "/":
                self.entries.setdefault(str(parent), _Entry(stat.S_IFDIR | 0o755))
        self.entries[path] = entry


def _libraries(program: str) -> list[Path]:
    """What the dynamic linker would load for ``program``, itself included; nothing for a static one."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", done.stdout)]


def _cpio_record(number: int, name: str, entry: _Entry) -> bytes:
    encoded = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (number, entry.mode, 0, 0, links, entry.mtime, len(entry.data), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08x" % value for value in fields)
    return _pad(header + encoded) + _pad(entry.data)


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
