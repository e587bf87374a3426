"""hcd and a plug-in as strangers install them: from wheels, into a clean virtual environment.

Nothing is downloaded: what hcd and the tools of a plug-in's author depend on is linked from the environment that runs
the tests, and nothing else of that environment is there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hcd import scaffold
from hcd.demo import jobs, packages

pytestmark = pytest.mark.guest  # builds, and boots a guest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
TOOLS = ("pytest", "mypy", "ruff", "setuptools", "wheel")
JOB = """
until_true 10 grep -q virtio_rng /sys/class/misc/hw_random/rng_available
say "text=$(head -c 64 /dev/hwrng | tr '\\n' '|')"
"""


@dataclass
class Environment:
    """A virtual environment, and a directory to work in."""

    bin: Path
    directory: Path

    @property
    def variables(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if key in ("HOME", "TMPDIR", "LANG", "HCD_CACHE")}
        path = f"{self.bin}:/usr/bin:/bin:/usr/sbin:/sbin"
        return kept | {"PATH": path, "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_CACHE_DIR": "1"}

    def run(self, command: str, timeout: float = 300) -> str:
        """A piece of shell; its output. The test fails where it fails."""
        done = subprocess.run(
            ["sh", "-e", "-c", command], cwd=self.directory, env=self.variables, timeout=timeout,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout

    @contextmanager
    def running(self, command: str) -> Iterator[None]:
        """A piece of shell that runs until it is told to end, and then ends well."""
        log = self.directory / "background.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["sh", "-e", "-c", f"exec {command}"], cwd=self.directory, env=self.variables,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )
        try:
            yield
        finally:
            process.terminate()
            status = process.wait(30)
        assert status == 0, log.read_text()


def closure(names: tuple[str, ...]) -> set[str]:
    """The distributions that ``names`` need here, themselves included."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        for text in distribution(name).requires or ():
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                todo.append(wanted.name)
    return found


def link_distributions(names: set[str], target: Path) -> None:
    """Make ``names``, and nothing else of this environment, importable from ``target``."""
    target.mkdir()
    for name in names:
        found = distribution(name)
        tops = {Path(file).parts[0] for file in found.files or () if not str(file).startswith("..")}
        for top in tops - {"__pycache__"}:
            (target / top).symlink_to(Path(str(found.locate_file(top))))


@pytest.fixture(scope="module")
def hcd_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hcd's wheel, built from what is under version control."""
    try:
        distribution("wheel")
    except PackageNotFoundError:
        pytest.skip("the package wheel is not installed here")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "hcd", "protocols", "pyproject.toml",
         "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    build(source, target, CFLAGS="-O0")  # what is tested is what is in it, not how fast it is
    (wheel,) = target.glob("hcd-*.whl")
    return wheel


def build(source: Path, target: Path, **variables: str) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "-w", str(target), str(source)], env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def environment(hcd_wheel: Path, short_dir: Path) -> Environment:
    """A clean environment with hcd's wheel and the tools of a plug-in's author."""
    place = short_dir / "venv"
    venv.create(place, with_pip=True)
    (site,) = (place / "lib").glob("python*/site-packages")
    wanted = closure(("trio", "construct", "prometheus-client", *TOOLS))
    link_distributions(wanted, short_dir / "linked")
    (site / "linked.pth").write_text(f"{short_dir}/linked\n")
    (place / "bin" / "ruff").symlink_to(Path(sys.executable).parent / "ruff")
    for tool in ("pytest", "mypy"):
        script = place / "bin" / tool
        script.write_text(f"#!/bin/sh\nexec {place}/bin/python -m {tool} \"$@\"\n")
        script.chmod(0o755)
    work = short_dir / "work"
    work.mkdir()
    made = Environment(place / "bin", work)
    made.run(f"pip install -q {hcd_wheel}")
    return made


def test_a_plug_in_from_its_own_wheel_runs_beside_hcd(environment: Environment) -> None:
    """Installed from wheels alone; driven in captive mode."""
    source = scaffold.write("lamp", environment.directory)
    build(Path(source), environment.directory)
    environment.run("pip install -q hcd_lamp-0.1.0-py3-none-any.whl && rm -r hcd-lamp")
    assert "lamp: hands out" in environment.run("hcd devices")
    assert str(ROOT) not in environment.run("python -c 'import hcd.device as d; print(d.__file__)'")
    script = "import sys; from hcd.testing import Driver; print(Driver.open(sys.argv[1]).ask(room=3))"
    assert environment.run(f"hcd device lamp --text=abc -- python -c '{script}' {{socket}}") == "b'abc'\n"


def test_the_example_installs_from_its_own_wheel(environment: Environment, need: Callable[..., None]) -> None:
    """docs/examples/hcd-guestmem, as a stranger would build and install it; a front end uses it, metrics show it."""
    need("curl")
    source = environment.directory / "source"
    shutil.copytree(ROOT / "docs" / "examples" / "hcd-guestmem", source, ignore=shutil.ignore_patterns(".*", "build"))
    build(source, environment.directory)
    environment.run("pip install -q hcd_guestmem-1.0.0-py3-none-any.whl && rm -r source")
    assert "metrics=guestmem_bytes," in environment.run("hcd devices --dump guestmem")
    (environment.directory / "report.py").write_text(
        "import sys\n"
        "from hcd.testing import Driver\n"
        "with Driver.open(sys.argv[1], queues=3) as driver:\n"
        "    driver.ask((4).to_bytes(2, 'little') + (4711).to_bytes(8, 'little'), queue=2)\n"
    )
    (environment.directory / "report.sh").write_text(
        "python report.py $1 && exec curl --silent --unix-socket metrics.sock http://localhost/metrics\n"
    )
    said = environment.run(
        "hcd device guestmem --interval=0.01 --metrics=unix:metrics.sock -- sh report.sh {socket}"
    )
    assert 'hcd_device_guestmem_bytes{device="guestmem",kind="free"} 4711.0' in said


def test_the_commands_of_the_page_run_in_order(environment: Environment, need: Callable[..., None]) -> None:
    """docs/devices.md from the first to the last, with a real guest."""
    need("qemu-system-x86_64", "busybox", "curl", "apt-get", "dpkg")
    files = packages.guest_files("amd64")
    shutil.copy(files.kernel, environment.directory / "vmlinuz")
    tree = jobs.base_tree(files, (*jobs.PCI, *jobs.RNG))
    (environment.directory / "initrd.img").write_bytes(tree.cpio() + jobs.job_tree(JOB).cpio())
    said: dict[str, str] = {}
    commands = iter(COMMANDS)
    for command in commands:
        if command.rstrip().endswith("&"):
            with environment.running(command.rstrip().rstrip("&")):
                for later in commands:
                    said[later] = environment.run(later)
        else:
            said[command] = environment.run(command)
    assert expect(said, "--dump mydev")["distribution"] == "hcd-mydev"
    assert "3 passed" in output(said, "pytest && mypy")
    text = re.search(r"HCD: text=(.*)", output(said, "qemu-system-x86_64"))
    assert text is not None
    assert "hello from mydev|" in text[1]
    assert "hcd.toml: ok, 1 device" in output(said, "hcd check")
    assert output(said, "greeter.sock\") as driver") == "b'hello from a file'\n"
    assert 'op="read",status="ok"} 1' in output(said, "curl")
    assert output(said, "mydev --wrap=log").splitlines()[-1] == "[8, 8, 0]"
    assert output(said, "echo --ports").splitlines()[-1] == "1"


def output(said: dict[str, str], part: str) -> str:
    """What the one command said that contains ``part``."""
    (found,) = (text for command, text in said.items() if part in command)
    return found


def expect(said: dict[str, str], part: str) -> dict[str, str]:
    """Lines of key=value of that command."""
    return dict(line.split("=", 1) for line in output(said, part).splitlines())
