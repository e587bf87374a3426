"""``hcd bench``: arguments, and what is printed."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from hcd.bench import blk, net
from hcd.errors import ConfigError, HcdError
from hcd.frontend.errors import FrontendError
from hcd.options import parse_size

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = "Load any vhost-user back end and say what it did and what it cost."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``hcd bench``."""
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    _add_blk(kinds.add_parser("blk", help="block requests", allow_abbrev=False))
    _add_net(kinds.add_parser("net", help="frames", allow_abbrev=False))


def _add_blk(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--socket", required=True, metavar="PATH", help="where the back end listens")
    parser.add_argument("--depth", type=_count, default=32, metavar="N", help="in flight per queue; default 32")
    parser.add_argument("--queues", type=_count, default=1, metavar="N", help="default 1")
    parser.add_argument("--size", type=_size, default=4096, metavar="BYTES", help="of a request; default 4K")
    parser.add_argument("--rw", choices=tuple(blk.RW), default="read", help="default read")
    parser.add_argument("--span", type=_size, default=0, metavar="BYTES", help="of the disk; default all of it")
    parser.add_argument("--verify", action="store_true", help="write the span first, check what is read; DESTROYS DATA")
    _add_common(parser, 0)
    parser.set_defaults(case=blk.BlkCase, load=blk.run, table=_blk_table, bad=("errors", "mismatches"))


def _add_net(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--socket", required=True, metavar="PATH", help="the port that sends")
    parser.add_argument("--peer", default="", metavar="PATH", help="the port where frames come out (a second device)")
    parser.add_argument("--duplex", action="store_true", help="send from --peer too")
    parser.add_argument("--depth", type=_count, default=128, metavar="N", help="frames on their way; default 128")
    parser.add_argument("--size", type=_size, default=64, metavar="BYTES", help="of a frame; default 64")
    parser.add_argument("--verify", action="store_true", help="check every byte of every frame")
    _add_common(parser, 256)
    parser.set_defaults(case=net.NetCase, load=net.run, table=_net_table, bad=("wrong",))


def _add_common(parser: argparse.ArgumentParser, ring_size: int) -> None:
    shown = ring_size or "as large as needed"
    parser.add_argument("--seconds", type=_seconds, default=3.0, metavar="S", help="default 3")
    parser.add_argument("--ring-size", type=_count, default=ring_size, metavar="N", help=f"entries; default {shown}")
    parser.add_argument("--packed", action="store_true", help="packed rings instead of split ones")
    parser.add_argument("--no-event-idx", dest="event_idx", action="store_false", help="plain notification flags")
    parser.add_argument("--poll", action="store_true", help="look at the rings all the time, never sleep")
    parser.add_argument("--pin", type=_cpu, metavar="CPU", help="run on this processor alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Run one load; 0 unless the back end failed requests or changed data."""
    _pin(arguments.pin)
    try:
        case = arguments.case(**{one.name: getattr(arguments, one.name) for one in fields(arguments.case)})
        result = asdict(arguments.load(case))
    except (FrontendError, TimeoutError, MemoryError, ValueError) as exc:
        raise HcdError(f"{arguments.socket}: {exc}") from exc
    except HcdError as exc:
        raise HcdError(f"{arguments.socket}: {exc}") from exc
    if arguments.json:
        print(json.dumps({"case": asdict(case), **_finite(result)}))
    else:
        print(arguments.table(result), end="")
    bad = {key: result[key] for key in arguments.bad if result[key]}
    if bad:
        raise HcdError(f"{arguments.socket}: " + ", ".join(f"{count} {key}" for key, count in bad.items()))
    return 0


def _pin(cpu: int | None) -> None:
    if cpu is None:
        return
    try:
        os.sched_setaffinity(0, {cpu})
    except OSError as exc:
        raise ConfigError(f"--pin {cpu}: {exc.strerror}") from exc


def _finite(result: dict[str, Any]) -> dict[str, Any]:
    """JSON has no nan."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in result.items()}


# -- tables


def _blk_table(result: dict[str, Any]) -> str:
    return _lines(
        ("requests/s", f"{result['per_second']:,.0f}"),
        ("latency p50 p99 p99.9", _latencies(result)),
        ("longest gap", f"{result['longest_gap'] * 1e3:.1f} ms"),
        ("kicks per request", f"{result['kicks_per_request']:.4f}"),
        ("calls per request", f"{result['calls_per_request']:.4f}"),
        *_costs(result, "requests"),
        ("errors", str(result["errors"])),
        ("mismatches", str(result["mismatches"])),
    )


def _net_table(result: dict[str, Any]) -> str:
    return _lines(
        ("frames/s sent", f"{result['sent_per_second']:,.0f}"),
        ("frames/s received", f"{result['received_per_second']:,.0f}"),
        ("dropped", str(result["dropped"])),
        ("latency p50 p99 p99.9", _latencies(result)),
        ("kicks per frame", f"{result['kicks_per_frame']:.4f}"),
        ("calls per frame", f"{result['calls_per_frame']:.4f}"),
        *_costs(result, "frames"),
        ("out of order or changed", str(result["wrong"])),
        ("of somebody else", str(result["strangers"])),
    )


def _costs(result: dict[str, Any], what: str) -> list[tuple[str, str]]:
    """Of the back end; nothing where its process cannot be looked at."""
    cpu, memory = result["cpu_per_million"], result["peak_memory"]
    rows = [] if math.isnan(cpu) else [(f"back end: CPU s per million {what}", f"{cpu:.3f}")]
    return rows + ([("back end: peak memory", f"{memory / (1 << 20):.1f} MiB")] if memory else [])


def _latencies(result: dict[str, Any]) -> str:
    return " ".join(f"{result[key] * 1e6:.1f}" for key in ("p50", "p99", "p999")) + " us"


def _lines(*rows: tuple[str, str]) -> str:
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:{width}}  {value}\n" for name, value in rows)


# -- arguments


def _argument(convert: Callable[[str], Any], good: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    def converted(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not good(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")
        return value

    return converted


_count = _argument(int, lambda n: 1 <= n <= 32768, "a number from 1 to 32768")
_size = _argument(parse_size, lambda n: 0 < n < 1 << 62, "bytes such as 4096, 64K or 1G")
_seconds = _argument(float, lambda s: 0 < s <= 86400, "seconds above 0")
_cpu = _argument(int, lambda n: 0 <= n < 8192, "the number of a processor")
