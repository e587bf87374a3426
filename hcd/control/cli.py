"""The commands that talk to a running daemon: status, doorbells, top, trace, reload, resize.

Exit status: 0 all is well; 1 something is wrong, or was refused; 2 a mistake on the command line; 3 no daemon answers;
4 not permitted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from hcd import options as opt

__all__ = ["EX_DENIED", "EX_NO_DAEMON", "EX_WRONG", "register"]

EX_WRONG = 1
EX_NO_DAEMON = 3
EX_DENIED = 4

Run = Callable[[argparse.Namespace], int]


def register(commands: Any) -> None:
    """Add the commands to the parser of ``hcd``."""
    status = _add(commands, "status", _status, "what a running daemon serves, to whom, and what is wrong")
    status.add_argument("device", nargs="*", help="only these")
    _add_json(status)
    doorbells = _add(commands, "doorbells", _doorbells, "every doorbell: path, rings, how quickly they are answered")
    _add_json(doorbells)
    live = _add(commands, "top", _top, "what each device does just now, the busiest first; q ends it")
    live.add_argument("--interval", type=_seconds, default=2.0, metavar="SECONDS", help="between frames, default 2")
    live.add_argument("--once", action="store_true", help="one frame, of the next second")
    trace = _add(commands, "trace", _trace, "messages and requests of a device, live, without what is in them")
    trace.add_argument("device")
    trace.add_argument("--rate", type=_rate, metavar="N", help="requests a second that are shown at most, default 500")
    trace.add_argument("--json", action="store_true", help="for programs: an object a line")
    _add(commands, "reload", _reload, "have a running daemon read its configuration again, and say what came of it")
    resize = _add(commands, "resize", _resize, "let the guest of a running daemon see that a disk has grown")
    resize.add_argument("device")
    resize.add_argument(
        "size", nargs="?", type=_size,
        help='bytes, or "64M", "1G": make the image file so large; without, the size that it has by now',
    )


def _add(commands: Any, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    made.add_argument(
        "--control", metavar="PATH", help="control socket of the daemon, or the name of an instance of hcd@.service"
    )
    made.set_defaults(run=lambda arguments: _guarded(run, arguments))
    return made


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs: the whole snapshot, see docs/operations.md")


def _size(text: str) -> int:
    return int(_number(text, "size"))


def _seconds(text: str) -> float:
    return float(_number(text, "float", 0, 86400)) or 0.1


def _rate(text: str) -> int:
    return int(_number(text, "int", 1, 100_000))


def _number(text: str, kind: str, least: int | None = None, most: int | None = None) -> Any:
    from hcd.device import Option

    try:
        return opt.from_text(Option("value", kind, "", minimum=least, maximum=most), text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def _guarded(run: Run, arguments: argparse.Namespace) -> int:
    """``run``, with its failures as lines and statuses."""
    from hcd.control.client import NoDaemonError
    from hcd.control.protocol import CallError

    try:
        return run(arguments)
    except NoDaemonError as error:
        return _fail(error, EX_DENIED if error.denied else EX_NO_DAEMON)
    except CallError as error:
        return _fail(error, EX_DENIED if error.kind == "permission" else EX_WRONG)


def _fail(problem: object, status: int) -> int:
    for line in str(problem).splitlines():
        print(f"hcd: {line}", file=sys.stderr)
    return status


# -- views


def _status(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from hcd.control.client import take_snapshot
    from hcd.control.protocol import CallError
    from hcd.control.snapshot import to_json
    from hcd.views.problems import find_problems
    from hcd.views.status import status

    snapshot = take_snapshot(arguments.control)
    if arguments.device:
        known = [device.name for device in snapshot.devices]
        for name in arguments.device:
            if name not in known:
                raise CallError("unknown", f'there is no device "{name}"; expected one of {", ".join(known)}')
        snapshot = replace(snapshot, devices=[one for one in snapshot.devices if one.name in arguments.device])
    problems = find_problems(snapshot)
    if arguments.json:
        print(json.dumps({**to_json(snapshot), "wrong": problems}, indent=2))
    else:
        print("\n".join(status(snapshot)))
    return EX_WRONG if problems else 0


def _doorbells(arguments: argparse.Namespace) -> int:
    from hcd.control.client import take_snapshot
    from hcd.control.snapshot import to_json
    from hcd.views.doorbells import doorbells

    snapshot = take_snapshot(arguments.control)
    if arguments.json:
        devices = to_json(snapshot)["devices"]
        listed = [{"device": device["name"], **bell} for device in devices for bell in device["doorbells"]]
        print(json.dumps(listed, indent=2))
    else:
        print("\n".join(doorbells(snapshot)))
    return 0


def _top(arguments: argparse.Namespace) -> int:
    from hcd.control.live import run_top

    return run_top(arguments.control, interval=arguments.interval, once=arguments.once)


def _trace(arguments: argparse.Namespace) -> int:
    from hcd.control.live import run_trace

    return run_trace(arguments.control, arguments.device, rate=arguments.rate, as_json=arguments.json)


# -- commands


def _reload(arguments: argparse.Namespace) -> int:
    from hcd.control.client import LONG_PATIENCE, connect

    with connect(arguments.control) as client:
        outcome = client.call("reload", LONG_PATIENCE)
    print(f"reloaded: {outcome['text']}")
    for note in outcome["notes"]:
        print(note)
    return 0


def _resize(arguments: argparse.Namespace) -> int:
    from hcd.control.client import LONG_PATIENCE, connect

    given = {} if arguments.size is None else {"size": arguments.size}
    with connect(arguments.control) as client:
        done = client.call("resize", LONG_PATIENCE, device=arguments.device, **given)
    print(_resized(done))
    return 0


def _resized(done: dict[str, Any]) -> str:
    grown = f'{done["device"]}: {done["after"]} bytes'
    if done["before"] == done["after"]:
        return f"{grown}, as before"
    grown += f', {done["before"]} before'
    if done["told"]:
        return f"{grown}; the front end is told"
    return f"{grown}; the front end cannot be told, the guest sees it when it restarts" if done["connected"] else grown
