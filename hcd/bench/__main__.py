"""``make bench``: hcd's blk and qemu-storage-daemon side by side, and single measurements with ``--extra``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from hcd.bench import extra, results
from hcd.bench.backends import make_image
from hcd.bench.cases import choose
from hcd.bench.compare import Bench
from hcd.demo.hcd_process import HcdFailedError
from hcd.demo.packages import MissingToolError
from hcd.errors import HcdError
from hcd.frontend.errors import FrontendError
from hcd.options import parse_size

JSON, DOCS = Path("bench/results.json"), Path("docs/performance.md")


def main() -> int:
    arguments = _parser().parse_args()
    try:
        return _extra(arguments) if arguments.extra else _compare(arguments)
    except (HcdError, FrontendError, HcdFailedError, MissingToolError, TimeoutError) as exc:
        print(f"hcd bench: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hcd.bench", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one run; default 1")
    parser.add_argument("--cases", default="*", help="shell patterns, comma-separated: read-4k-*,*-direct; or extra's")
    parser.add_argument("--list", action="store_true", help="list the cases, measure nothing")
    parser.add_argument("--image-size", type=parse_size, default=256 << 20, metavar="BYTES", help="default 256M")
    parser.add_argument("--directory", help="where the image goes (ext4 or xfs); default /var/tmp")
    parser.add_argument("--extra", action="store_true", help="single measurements instead of the comparison")
    parser.add_argument("--json", type=Path, default=JSON, metavar="FILE", help=f"default {JSON}")
    parser.add_argument("--write-docs", action="store_true", help=f"put the table into {DOCS}")
    return parser


def _compare(arguments: argparse.Namespace) -> int:
    cases = choose(arguments.cases)
    if arguments.list:
        print("\n".join(case.name for case in cases))
        return 0
    with tempfile.TemporaryDirectory(prefix="hcd-bench-", dir=arguments.directory or "/var/tmp") as name:
        image = make_image(Path(name), arguments.image_size)
        with Bench(Path(name), image, say=_say) as bench:
            found = [bench.run(case, rounds=arguments.rounds, seconds=arguments.seconds) for case in cases]
    environment = results.environment(image)
    environment["rounds"] = f"{arguments.rounds} of {arguments.seconds:g} s each"
    text = results.table(environment, found)
    print(text, end="")
    results.write_json(arguments.json, environment, found, ())
    if arguments.write_docs:
        results.write_docs(DOCS, "comparison", text)
    return 0


# -- single measurements


def _extra(arguments: argparse.Namespace) -> int:
    chosen = extra.choose(arguments.cases)
    if arguments.list:
        print("\n".join(one.name for one in chosen))
        return 0
    with tempfile.TemporaryDirectory(prefix="hcd-bench-", dir=arguments.directory or "/tmp") as name:
        found = extra.run(chosen, Path(name), rounds=arguments.rounds, seconds=arguments.seconds, say=_say)
    environment = results.environment(None)
    text = results.extra_table(environment, found)
    print(text, end="")
    results.write_json(arguments.json, environment, (), found)
    if arguments.write_docs:
        results.write_docs(DOCS, "single measurements", text)
    return 0


def _say(text: str) -> None:
    print(f"hcd bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
