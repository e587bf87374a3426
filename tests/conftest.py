"""Fixtures that many tests share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest


@pytest.fixture
def make_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Installs a distribution with device types, for this process; the returned directory does it for others.

    ``make_distribution("name", "1.0", {"type": "module:Class"}, {"module": "source"})``
    """

    def make(
        name: str, version: str, types: Mapping[str, str], modules: Mapping[str, str] | None = None
    ) -> Path:
        site = tmp_path / f"site-{name}"
        info = site / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [f"{type_} = {where}\n" for type_, where in types.items()]
        (info / "entry_points.txt").write_text("[hcd.devices]\n" + "".join(lines))
        for module, source in (modules or {}).items():
            (site / f"{module}.py").write_text(source)
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        return site

    return make
