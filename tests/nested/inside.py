"""Runs inside the guest: one hcd with a device that counts and one that answers, the lab on both; then the tests of
hcd.kvm, on another KVM than the host's.

Arguments: a directory for the results, rings, round trips. What the host compares is written there: ``lab.json``,
``lab.txt``, the daemon's ``metrics.txt``, and ``test_kvm.txt``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hcd.demo.hcd_process import HcdProcess
from hcd.lab.devices import configuration


def main(results: Path, rings: str, trips: str) -> int:
    with tempfile.TemporaryDirectory(prefix="hcd-", dir=results.parent) as name:
        directory = Path(name)
        text, sockets = configuration(directory)
        with HcdProcess.from_config(directory, text) as hcd:
            status = lab(results, [*sockets], str(hcd.metrics_at), rings, trips)
            (results / "metrics.txt").write_text(hcd.metrics().text)
        shutil.copy(hcd.log, results / "hcd.log")
    test_kvm = Path(__file__).parent.parent / "test_kvm.py"
    run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test_kvm)], results / "test_kvm.txt")
    return status


def lab(results: Path, sockets: list[Path], metrics: str, rings: str, trips: str) -> int:
    command = [sys.executable, "-m", "hcd", "lab", "--rings", rings, "--trips", trips]
    command += [f"--socket={socket}" for socket in sockets]
    command += [f"--metrics=unix:{metrics}", f"--json={results / 'lab.json'}"]
    return run(command, results / "lab.txt")


def run(command: list[str], log: Path) -> int:
    with log.open("wb") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        output.write(f"\nexit status {status}\n".encode())
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
