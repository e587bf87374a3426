"""``hcd new-device``: what it writes works at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from hcd import scaffold
from hcd.cli import main
from hcd.errors import ConfigError

pytestmark = pytest.mark.long


ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "command",
    [
        ("pytest", "-q", "-p", "no:cacheprovider"),
        ("mypy", "--cache-dir=/dev/null"),
        ("ruff", "check", "--no-cache", "."),
    ],
)
@pytest.mark.parametrize("name", ["mydev", "two-lamps"])
def test_a_new_package_passes_its_own_tests_mypy_and_ruff(name: str, command: tuple[str, ...], tmp_path: Path) -> None:
    """Before anybody has changed a line."""
    run_in(scaffold.write(name, tmp_path), command)


def run_in(directory: str, command: Sequence[str]) -> None:
    environment = os.environ | {"MYPYPATH": f"{ROOT}:{ROOT}/protocols", "PYTHONPATH": f"{ROOT}:{ROOT}/protocols"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=directory, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", [("pytest", "-q", "-p", "no:cacheprovider"), ("mypy", "--cache-dir=/dev/null")])
def test_an_async_version_of_the_device_passes_the_same_tests(command: tuple[str, ...], tmp_path: Path) -> None:
    """One word makes it another lane's, and nothing else changes: not the tests, not their outcome."""
    directory = scaffold.write("mydev", tmp_path)
    source = Path(directory, "src", "hcd_mydev", "__init__.py")
    plain = source.read_text(encoding="utf-8")
    changed = plain.replace("    def process(", "    async def process(")
    assert changed != plain
    source.write_text(changed, encoding="utf-8")
    run_in(directory, command)


def test_the_command_says_where_the_package_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And writes nothing over what is there."""
    monkeypatch.chdir(tmp_path)
    assert main(["new-device", "mydev"]) == 0
    assert "hcd-mydev/README.md" in capsys.readouterr().out
    assert Path("hcd-mydev/src/hcd_mydev/__init__.py").exists()
    assert main(["new-device", "mydev"]) == 1
    assert capsys.readouterr().err == "hcd: cannot write hcd-mydev: File exists\n"


@pytest.mark.parametrize("name", ["", "My", "my_dev", "-x", "a--b", "../x", "1st", "x" * 41])
def test_a_name_that_cannot_be_one_is_refused(name: str, tmp_path: Path) -> None:
    """It becomes a module, a class and a word of the command line."""
    with pytest.raises(ConfigError, match="a device type is called something like"):
        scaffold.write(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_name_of_an_installed_type_is_refused(tmp_path: Path) -> None:
    """Two distributions with one type could not both be used."""
    with pytest.raises(ConfigError, match='"blk" is installed already'):
        scaffold.write("blk", tmp_path)


def test_the_device_has_thirty_lines() -> None:
    """A whole device, not an excerpt."""
    assert len(scaffold.files("mydev")["src/hcd_mydev/__init__.py"].splitlines()) <= 30


def test_no_place_to_write_is_said(tmp_path: Path) -> None:
    """As any mistake of the operator."""
    shutil.rmtree(tmp_path)
    with pytest.raises(ConfigError, match="No such file"):
        scaffold.write("mydev", tmp_path)
