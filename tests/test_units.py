"""The systemd units: correct, hardened, and installed where they belong."""

from __future__ import annotations

import os
import re
import site
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SYSTEMD = ROOT / "systemd"
UNITS = sorted(path.name for path in [*SYSTEMD.glob("*.service"), *SYSTEMD.glob("*.socket")])
#: systemd-analyze counts in tenths
MOST_EXPOSED = 15


def command(*words: object, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, words)), env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def settings(file: Path) -> dict[str, list[str]]:
    """Every setting of a unit, whatever its section, with all its values. Commented ones are none."""
    found: dict[str, list[str]] = {}
    for line in file.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith(("#", ";")):
            found.setdefault(key, []).append(value)
    return found


@pytest.fixture
def placed(tmp_path: Path) -> Path:
    """The units as they would be installed, with an hcd that exists."""
    program = tmp_path / "bin" / "hcd"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    directory = tmp_path / "units"
    directory.mkdir()
    for name in UNITS:
        (directory / name).write_text((SYSTEMD / name).read_text().replace("/usr/bin/hcd", str(program)))
    return directory


def verify(directory: Path) -> None:
    files = [directory / name.replace("@.", "@disk0.") for name in UNITS]
    text = command("systemd-analyze", "verify", "--man=no", *files, SYSTEMD_UNIT_PATH=f"{directory}:")
    assert text == "", "nothing to complain of"


def test_there_are_the_units_that_there_should_be() -> None:
    assert UNITS == ["hcd-metrics.socket", "hcd.service", "hcd@.service", "hcd@.socket"]


def test_systemd_finds_nothing_wrong(need: Callable[..., None], placed: Path) -> None:
    need("systemd-analyze")
    verify(placed)


def test_the_check_itself_finds_what_is_wrong(need: Callable[..., None], placed: Path) -> None:
    need("systemd-analyze")
    unit = placed / "hcd.service"
    unit.write_text(unit.read_text().replace("[Install]", "NoSuchSetting=1\n[Install]"))
    with pytest.raises(AssertionError, match="NoSuchSetting"):
        verify(placed)


@pytest.mark.parametrize("name", UNITS)
def test_each_unit_is_hardened(need: Callable[..., None], name: str) -> None:
    need("systemd-analyze")
    limit = f"--threshold={MOST_EXPOSED}"
    command("systemd-analyze", "security", "--offline=true", "--no-pager", limit, SYSTEMD / name)


@pytest.mark.parametrize("drop_in", sorted((SYSTEMD / "drop-ins").glob("*.conf")), ids=lambda path: path.stem)
def test_drop_ins_do_nothing_as_they_are_and_are_correct_when_put_to_use(
    need: Callable[..., None], placed: Path, drop_in: Path
) -> None:
    need("systemd-analyze")
    assert settings(drop_in) == {}
    assert "=" in drop_in.read_text()
    used = re.sub(r"^#([A-Z][A-Za-z]+=)", r"\1", drop_in.read_text(), flags=re.M)
    used = used.replace("/usr/bin/hcd", settings(placed / "hcd@.service")["ExecStart"][0].split()[0])
    if drop_in.stem == "notify-reload":  # systemd 252 does not know it
        version = int(command("systemd-analyze", "--version").split()[1])
        if version < 253:
            pytest.skip(f"systemd {version} has no notify-reload")
    target = placed / "hcd@.service.d"
    target.mkdir()
    (target / drop_in.name).write_text(used)
    verify(placed)
    (target / drop_in.name).write_text(used + "NoSuchSetting=1\n")  # it was read indeed
    with pytest.raises(AssertionError, match="NoSuchSetting"):
        verify(placed)


def test_the_two_services_differ_only_where_they_must() -> None:
    one, template = settings(SYSTEMD / "hcd.service"), settings(SYSTEMD / "hcd@.service")
    differing = {key for key in one.keys() | template.keys() if one.get(key) != template.get(key)}
    assert differing == {
        "Description", "After", "Before", "ConditionPathExists", "AssertPathExists", "Requires", "ExecStart",
        "RuntimeDirectory", "RuntimeDirectoryMode", "WantedBy", "Also",
    }


def test_accounts_and_directories_are_declared_correctly(need: Callable[..., None], tmp_path: Path) -> None:
    need("systemd-sysusers", "systemd-tmpfiles")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "group").write_text("")
    command("systemd-sysusers", f"--root={tmp_path}", SYSTEMD / "hcd.sysusers")
    assert re.search(r"^hcd:x:\d+:\d+:[^:]*:/var/lib/hcd:", (tmp_path / "etc" / "passwd").read_text(), flags=re.M)
    assert re.search(r"^kvm:", (tmp_path / "etc" / "group").read_text(), flags=re.M)
    if os.getuid() == 0:
        command("systemd-tmpfiles", "--create", f"--root={tmp_path}", SYSTEMD / "hcd.tmpfiles")
        made = (tmp_path / "run" / "hcd").stat()
        assert made.st_mode & 0o7777 == 0o2755
        groups = (tmp_path / "etc" / "group").read_text()
        assert f"kvm:x:{made.st_gid}:" in groups


@pytest.mark.parametrize("name", ["hcd.toml", "instance.toml"])
def test_the_example_configurations_are_correct(name: str) -> None:
    assert ": ok, 1 device" in command(sys.executable, "-m", "hcd", "check", SYSTEMD / name)


def test_the_example_of_an_instance_fits_its_units() -> None:
    example = (SYSTEMD / "instance.toml").read_text()
    assert settings(SYSTEMD / "hcd@.socket")["ListenStream"] == ["/run/hcd/%i.sock"]
    assert 'socket = "/run/hcd/disk0.sock"' in example
    assert settings(SYSTEMD / "hcd@.service")["RuntimeDirectory"] == ["hcd/%i"]
    assert '"unix:/run/hcd/disk0/' in example


def test_install_honours_destdir_and_prefix(need: Callable[..., None], tmp_path: Path) -> None:
    need("make", "gcc")
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("make install works from .venv")
    prefix = "/opt/hcd"
    command("make", "-C", ROOT, "install", f"DESTDIR={tmp_path}", f"PREFIX={prefix}", "DEPS=no")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["opt"]
    installed = tmp_path / "opt" / "hcd"
    for name in UNITS:
        text = (installed / "lib" / "systemd" / "system" / name).read_text()
        assert "/usr/bin/hcd" not in text
        assert "/usr/share" not in text
    service = settings(installed / "lib" / "systemd" / "system" / "hcd.service")
    assert service["ExecStart"] == [f"{prefix}/bin/hcd run /etc/hcd/hcd.toml"]
    for name in ("lib/sysusers.d/hcd.conf", "lib/tmpfiles.d/hcd.conf", "share/doc/hcd/operations.md",
                 "share/doc/hcd/hcd.toml", "share/hcd/monitoring/alerts.yml", "share/hcd/monitoring/dashboard.json"):
        assert (installed / name).stat().st_size
    launcher = installed / "bin" / "hcd"
    assert f'"{prefix}/lib/hcd"' in launcher.read_text()
    # what is staged runs once it stands where it belongs: here, under its staging root
    launcher.write_text(launcher.read_text().replace(f'"{prefix}/lib', f'"{installed}/lib'))
    packages = os.pathsep.join(site.getsitepackages())
    checked = command(launcher, "check", SYSTEMD / "hcd.toml", PYTHONPATH=packages)
    assert ": ok, 1 device" in checked
    where = command(launcher, "devices", PYTHONPATH=packages, PYTHONVERBOSE="1")
    assert str(installed / "lib" / "hcd" / "hcd" / "devices" / "blk.py") in where
