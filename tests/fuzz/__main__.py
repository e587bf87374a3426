"""``python -m tests.fuzz [TARGET ...] [--seconds N | --cases N] [--seed S]``; ``make fuzz`` runs all for a minute each.

A run prints its seed. ``--seed`` has it again, and what a failure prints (``--first``) has the one that failed again;
only what two threads do at once is left to chance.
"""

from __future__ import annotations

import argparse
import faulthandler
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tests.fuzz.codec import CodecFuzz
from tests.fuzz.devices import DeviceFuzz
from tests.fuzz.inflight import InflightFuzz
from tests.fuzz.rings import RingFuzz

#: a step that takes longer (seconds) hangs: every thread's stack is printed, and the run ends
HANG = 60
#: steps between two looks at the clock
BATCH = 20


class Target(Protocol):
    """One thing to be fuzzed."""

    name: str
    cases: int

    def run_one(self, number: int) -> None:
        """Step ``number`` of the run, which depends on it and the seed alone."""

    def describe(self) -> str: ...

    def close(self) -> None: ...


TARGETS: dict[str, Callable[[int], Any]] = {
    "codec": CodecFuzz,
    "rings": RingFuzz,
    "devices": DeviceFuzz,
    "inflight": InflightFuzz,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)}; all unless given")
    parser.add_argument("--seconds", type=float, default=60, help="for each target (60)")
    parser.add_argument("--cases", type=int, help="instead of a time, so many cases of each target")
    parser.add_argument("--seed", type=int, help="the same run again")
    parser.add_argument("--first", type=int, default=0, help="begin with this step of the run")
    options = parser.parse_args(arguments)
    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        parser.error(f"unknown target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    seed = secrets.randbits(32) if options.seed is None else options.seed
    names = options.targets or list(TARGETS)
    outcomes = [run(name, seed, options.seconds, options.cases, options.first) for name in names]
    return 0 if all(outcomes) else 1


def run(name: str, seed: int, seconds: float, cases: int | None, first: int) -> bool:
    """Fuzz one target; False when it failed."""
    target: Target = TARGETS[name](seed)
    began = time.monotonic()
    step = first
    print(f"{name}: seed {seed}", flush=True)
    try:
        while target.cases < cases if cases is not None else time.monotonic() - began < seconds:
            faulthandler.dump_traceback_later(HANG, exit=True)
            for _ in range(BATCH):
                target.run_one(step)
                step += 1
    except Exception:
        traceback.print_exc()
        print(f"{name}: FAILED after {target.cases} cases; again: "
              f"python -m tests.fuzz {name} --seed {seed} --first {step} --cases 1", flush=True)
        return False
    finally:
        faulthandler.cancel_dump_traceback_later()
    took = time.monotonic() - began
    print(f"{name}: {target.cases} cases in {took:.1f} s ({target.cases / took:.0f}/s), seed {seed}, "
          f"{step - first} steps; {target.describe()}", flush=True)
    target.close()
    return True


if __name__ == "__main__":
    sys.exit(main())
