"""Fixtures that many tests share."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest

from hcd.demo.hcd_process import HcdProcess, Resources
from hcd.testing.settle import settled_growth

# How long an example takes says something about the machine, and nothing about the code.
hypothesis.settings.register_profile("hcd", deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.load_profile("hcd")

#: no daemon of a test takes the default place of the control socket, no client looks there
os.environ["HCD_CONTROL"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first, guests last: what fails quickly is known quickly."""
    items.sort(key=lambda item: sum(bool(item.get_closest_marker(m)) * w for m, w in (("guest", 2), ("long", 1))))


def skip_or_fail(reason: str) -> None:
    """Skip the test; with HCD_REQUIRE=1 (continuous integration) nothing may be missing, so fail it."""
    if os.environ.get("HCD_REQUIRE") == "1":
        pytest.fail(f"{reason} (HCD_REQUIRE=1)")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def need() -> Callable[..., None]:
    """``need("qemu-img", ...)``: the test cannot run without these programs."""

    def check(*programs: str) -> None:
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        missing = [program for program in programs if shutil.which(program, path=path) is None]
        if missing:
            skip_or_fail(f"not installed: {', '.join(missing)}")

    return check


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory with a short path: the path of a unix socket has 107 bytes at most, pytest's are longer."""
    with tempfile.TemporaryDirectory(prefix="hcd-", ignore_cleanup_errors=True) as path:
        yield Path(path)


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fails a test that leaves descriptors, threads or guest memory behind in this process."""
    before = Resources()
    yield
    growth = settled_growth(before, Resources, seconds=5)
    assert not growth, f"the test left behind: {growth}"


@pytest.fixture
def expect_settled() -> Callable[[HcdProcess, Resources], None]:
    """``expect_settled(hcd, before)``: the daemon holds again what it held before, and nothing more."""

    def check(hcd: HcdProcess, before: Resources) -> None:
        growth = settled_growth(before, hcd.resources, seconds=5)
        assert not growth, f"hcd still holds: {growth}"

    return check


@pytest.fixture
def start_hcd(short_dir: Path) -> Iterator[Callable[..., HcdProcess]]:
    """Starts ``hcd run`` with ``[[device]]`` tables ("{dir}" is ``short_dir``) and waits until it listens.

    In the end each one is asked to stop: it must exit with 0, without a traceback in its log.
    """
    started: list[HcdProcess] = []

    def start(devices: str, *, daemon: str = "") -> HcdProcess:
        started.append(HcdProcess.from_config(short_dir, devices, daemon=daemon))
        return started[-1]

    try:
        yield start
        for hcd in started:
            if hcd.process.poll() is None:
                hcd.stop()
    finally:
        for hcd in started:
            hcd.kill()


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], list[OSError]]:
    """``scarce("package.module.select", "epoll")``: for that module alone ``select.epoll`` fails twice for want of
    descriptors, then there are some again. Returns the failures."""

    def make_scarce(place: str, maker: str) -> list[OSError]:
        failures: list[OSError] = []
        module = importlib.import_module(place.rpartition(".")[2])
        make = getattr(module, maker)

        def fail_twice(*arguments: object) -> object:
            if len(failures) == 2:
                return make(*arguments)
            failures.append(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
            raise failures[-1]

        monkeypatch.setattr(place, SimpleNamespace(**{**vars(module), maker: fail_twice}))
        return failures

    return make_scarce


@pytest.fixture
def make_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Installs a distribution with device types, for this process; the returned directory does it for others.

    ``make_distribution("name", "1.0", {"type": "module:Class"}, {"module": "source"})``
    """

    def make(name: str, version: str, types: Mapping[str, str], modules: Mapping[str, str] | None = None) -> Path:
        site = tmp_path / f"site-{name}"
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"  # "-" would end the name: "hcd" again
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
