"""The dependency rules of the tree, checked on the syntax of every module (compiled ones by their import
lines).

1. ``hcd_protocols`` imports the standard library and construct.
2. ``hcd.dataplane``, ``hcd.doorbell`` and ``hcd.device`` import neither trio nor prometheus_client, not
even through
   other modules of hcd.
3. In-tree devices import only the public API, and no private name.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"hcd": ROOT / "hcd", "hcd_protocols": ROOT / "protocols" / "hcd_protocols"}
FORBIDDEN_IN_CORE = {"trio", "prometheus_client"}
CORE = ("hcd.dataplane", "hcd.doorbell", "hcd.device")
#: what a device may import of this project
DEVICE_API = (
    "hcd.device",
    "hcd.dataplane.blockfile",
    "hcd.dataplane.switch",
    "hcd_protocols.virtio",
    "hcd_protocols.errors",
)


@dataclass(frozen=True)
class Import:
    """``module`` is absolute; ``name`` is what is taken from it, "" for a plain import."""

    module: str
    name: str
    line: int
    typing_only: bool = False

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.module, f"{self.module}.{self.name}") if self.name else (self.module,)


def module_name(path: Path, root: Path) -> str:
    parts = [root.name, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    """Every module of both roots by name; a .pyx counts before the .pyi that describes it."""
    found: dict[str, Path] = {}
    for root in SOURCES.values():
        for suffix in ("pyi", "py", "pyx"):
            for path in sorted(root.rglob(f"*.{suffix}")):
                found[module_name(path, root)] = path
    return found


def python_imports(source: str, package: str) -> Iterator[Import]:
    tree = ast.parse(source)
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        hidden = id(node) in typing_only
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, "", node.lineno, hidden)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield Import(base, alias.name, node.lineno, hidden)


_CYTHON_IMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+import\s+(.+)|import\s+([\w.]+))")


def cython_imports(source: str) -> Iterator[Import]:
    """Run-time imports alone: a cimport binds at compile time."""
    for number, line in enumerate(source.splitlines(), 1):
        match = _CYTHON_IMPORT.match(line)
        if match is None:
            continue
        if match.group(3):
            yield Import(match.group(3), "", number)
        else:
            for name in re.findall(r"\w+", match.group(2).partition("#")[0]) or [""]:
                yield Import(match.group(1), name, number)


def imports_of(name: str, path: Path) -> list[Import]:
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".pyx":
        return list(cython_imports(source))
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    return list(python_imports(source, package))


def inside(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def protocol_faults(name: str, path: Path) -> list[str]:
    """Rule 1."""
    allowed = sys.stdlib_module_names | {"construct", "hcd_protocols"}
    banned = {"socket", "select", "selectors", "asyncio"}
    return [
        f"{name}:{one.line} imports {one.module}"
        for one in imports_of(name, path)
        if one.top not in allowed or one.top in banned
    ]


def reached(name: str, tree: dict[str, Path], seen: dict[str, str]) -> None:
    """All modules that importing ``name`` brings in, each with the module that did it."""
    if name not in tree:
        return
    for one in imports_of(name, tree[name]):
        if one.typing_only or tree[name].suffix == ".pyi":
            continue
        for target in one.targets:
            if target in tree or one.top in FORBIDDEN_IN_CORE:
                for parent in [target, *parents(target)]:
                    if parent not in seen:
                        seen[parent] = name
                        reached(parent, tree, seen)


def parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def core_faults(name: str, tree: dict[str, Path]) -> list[str]:
    """Rule 2."""
    seen: dict[str, str] = {}
    for start in [name, *parents(name)]:
        reached(start, tree, seen)
    return [f"{name} gets {module} from {by}" for module, by in seen.items() if module in FORBIDDEN_IN_CORE]


def device_faults(name: str, path: Path) -> list[str]:
    """Rule 3. The package of devices may import its own modules."""
    faults = []
    for one in imports_of(name, path):
        ours = one.top in SOURCES
        if ours and not any(inside(target, (*DEVICE_API, "hcd.devices")) for target in one.targets):
            faults.append(f"{name}:{one.line} imports {one.module}")
        if ours and any(part.startswith("_") for part in (*one.module.split("."), one.name)):
            faults.append(f"{name}:{one.line} imports the private {one.module}.{one.name}")
    return faults


TREE = modules()


@pytest.mark.parametrize("name", sorted(name for name in TREE if inside(name, ("hcd_protocols",))))
def test_protocols_import_the_standard_library_and_construct(name: str) -> None:
    assert protocol_faults(name, TREE[name]) == []


@pytest.mark.parametrize("name", sorted(name for name in TREE if inside(name, CORE)))
def test_the_core_needs_neither_trio_nor_prometheus(name: str) -> None:
    assert core_faults(name, TREE) == []


@pytest.mark.parametrize("name", sorted(name for name in TREE if inside(name, ("hcd.devices",))) or [""])
def test_devices_use_the_public_api(name: str) -> None:
    if name:
        assert device_faults(name, TREE[name]) == []


# -- the checks themselves can fail


def test_rule_1_finds_a_stranger(tmp_path: Path) -> None:
    module = tmp_path / "codec.py"
    module.write_text("import struct\nimport socket\nfrom trio import sleep\nfrom hcd.device import Device\n")
    assert protocol_faults("hcd_protocols.codec", module) == [
        "hcd_protocols.codec:2 imports socket",
        "hcd_protocols.codec:3 imports trio",
        "hcd_protocols.codec:4 imports hcd.device",
    ]


def test_rule_2_finds_trio_behind_two_modules_and_in_a_parent(tmp_path: Path) -> None:
    sources = {
        "hcd": "",
        "hcd.device": "from hcd import errors\n",
        "hcd.errors": "import hcd.lanes\nif TYPE_CHECKING:\n    import prometheus_client\n",
        "hcd.lanes": "def start():\n    import trio\n",
        "hcd.dataplane": "from prometheus_client import Counter\n",
        "hcd.dataplane.stats": "",
    }
    tree = {}
    for name, source in sources.items():
        tree[name] = tmp_path / f"{name}.py"
        tree[name].write_text(source)
    assert core_faults("hcd.device", tree) == ["hcd.device gets trio from hcd.lanes"]
    assert core_faults("hcd.errors", tree) == ["hcd.errors gets trio from hcd.lanes"]
    assert core_faults("hcd.dataplane.stats", tree) == ["hcd.dataplane.stats gets prometheus_client from hcd.dataplane"]


def test_rule_2_reads_cython(tmp_path: Path) -> None:
    module = tmp_path / "reactor.pyx"
    module.write_text("cimport cython\nfrom libc.stdint cimport uint64_t\nimport trio\nfrom os import close, read\n")
    assert [(one.module, one.name) for one in imports_of("hcd.dataplane.reactor", module)] == [
        ("trio", ""),
        ("os", "close"),
        ("os", "read"),
    ]


def test_rule_3_finds_private_names_and_private_modules(tmp_path: Path) -> None:
    module = tmp_path / "blk.py"
    module.write_text(
        "import os\n"
        "from hcd.device import Device\n"
        "from hcd_protocols.virtio import blk\n"
        "from hcd.device import _secret\n"
        "from hcd import doorbell\n"
        "from ..dataplane.virtqueue import Virtqueue\n"
    )
    assert device_faults("hcd.devices.blk", module) == [
        "hcd.devices.blk:4 imports the private hcd.device._secret",
        "hcd.devices.blk:5 imports hcd",
        "hcd.devices.blk:6 imports hcd.dataplane.virtqueue",
    ]
