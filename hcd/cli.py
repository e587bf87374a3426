"""The command line.

Everything is imported where it is needed: a management layer probes ``--print-capabilities`` often, and a
probe needs neither trio nor prometheus_client. The conventions of ``hcd device`` are QEMU's:
vhost-user.rst, "Backend program conventions".
"""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from hcd import options as opt
from hcd.control import cli as control_cli
from hcd.errors import ConfigError, HcdError, PluginError

if TYPE_CHECKING:
    from hcd.config import DaemonConfig, DeviceSpec
    from hcd.device import DeviceBase, Option

__all__ = ["main"]

DEFAULT_CONFIG = "/etc/hcd/hcd.toml"

EX_FAILED = 1
EX_USAGE = 2
EX_CONFIG = 78  # sysexits.h; lets a service manager tell a bad configuration from a crash

_text = opt.for_argparse

#: commands in modules of their own, imported when they are used
_TOOLS = {
    "lab": ("hcd.lab.cli", "measure what each path out of a guest costs here"),
    "bench": ("hcd.bench.cli", "load a vhost-user back end (hcd bench --help)"),
    "doctor": ("hcd.doctor.cli", "look why a guest does not get its device"),
    "qemu-args": ("hcd.qemu.cli", "print QEMU's arguments for a configuration"),
}

_LEVELS = ("debug", "info", "warning", "error")


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit status. Errors are lines on stderr."""
    try:
        status = _command(argv)
        sys.stdout.flush()
        return status
    except OSError as exc:
        if exc.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # the flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EX_FAILED if exc.errno == errno.EPIPE else _fail(f"cannot write: {exc.strerror}", EX_FAILED)


def _command(argv: Sequence[str]) -> int:
    try:
        if argv and argv[0] == "device":
            return _device(argv[1:])
        if argv and argv[0] in _TOOLS:
            return _tool(argv[0], argv[1:])
        arguments = _parser().parse_args(argv)
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
    except SystemExit as exc:  # argparse
        return exc.code if isinstance(exc.code, int) else EX_USAGE
    except HcdError as exc:
        return _fail(exc, EX_FAILED)
    except KeyboardInterrupt:
        return 130


def _fail(problem: object, status: int) -> int:
    for line in str(problem).splitlines():
        print(f"hcd: {line}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """One line for an error; the usage is a --help away."""

    def error(self, message: str) -> NoReturn:
        self.exit(EX_USAGE, f"hcd: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    def __call__(self, *_: object) -> NoReturn:
        from hcd.version import VERSION

        print(f"hcd {VERSION}")
        raise SystemExit(0)


def _parser() -> _Parser:
    parser = _Parser(prog="hcd", description="Serve devices to virtual machines over vhost-user.", allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="serve a configuration", allow_abbrev=False)
    run.add_argument("config", nargs="?", default=DEFAULT_CONFIG, help=f"default {DEFAULT_CONFIG}")
    _add_log_level(run)
    run.set_defaults(run=_run)
    check = commands.add_parser("check", help="say what is wrong with a configuration", allow_abbrev=False)
    check.add_argument("config")
    check.set_defaults(run=_check)
    devices = commands.add_parser("devices", help="list device types and their options", allow_abbrev=False)
    devices.add_argument("--dump", metavar="NAME", help="tell scripts about one type, as lines of key=value")
    devices.set_defaults(run=_devices)
    new = commands.add_parser("new-device", help="write a package with a device type to start from", allow_abbrev=False)
    new.add_argument("name", help="of the device type; the package is hcd-NAME, in a directory of that name")
    new.set_defaults(run=_new_device)
    control_cli.register(commands)
    commands.add_parser("device", help="serve one device (hcd device TYPE --help)", add_help=False)
    for name, (_, text) in _TOOLS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _add_log_level(parser: argparse.ArgumentParser, default: str = "info") -> None:
    parser.add_argument("--log-level", choices=_LEVELS, default=default, help=f"default {default}")


# -- tools


def _tool(name: str, words: Sequence[str]) -> int:
    """A module with ``DESCRIPTION``, ``add_arguments`` and ``run``; "command" is what stands after "--"."""
    module = importlib.import_module(_TOOLS[name][0])
    argv, command = _split(words)
    parser = _Parser(prog=f"hcd {name}", description=module.DESCRIPTION, allow_abbrev=False)
    parser.set_defaults(command=command)
    module.add_arguments(parser)
    # options between the words of a list need the other parser, which knows no subcommands
    parse = parser.parse_intermixed_args if getattr(module, "INTERMIXED", False) else parser.parse_args
    arguments = parse(argv)
    if command and not getattr(module, "TAKES_COMMAND", False):
        parser.error("it takes no command after --")
    status: int = module.run(arguments)
    return status


# -- run, check


def _run(arguments: argparse.Namespace) -> int:
    from hcd import config, log

    log.setup(arguments.log_level)
    try:
        loaded = config.load(arguments.config)
        from hcd import daemon

        daemon.run(loaded, load=lambda: config.load(arguments.config))
    except ConfigError as exc:
        return _fail(exc, EX_CONFIG)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from hcd import config

    try:
        loaded = config.load(arguments.config)
        problems = list(filter(None, map(_trial, loaded.devices)))
        if problems:
            raise ConfigError("\n".join(f"{arguments.config}: {problem}" for problem in problems))
    except ConfigError as exc:
        return _fail(exc, EX_CONFIG)
    count = len(loaded.devices)
    print(f"{arguments.config}: ok, {count} device{'s' if count != 1 else ''}")
    return 0


def _trial(spec: DeviceSpec) -> str:
    """What the type itself says of its options; nothing is opened."""
    from hcd import plugins

    try:
        plugins.create(spec.type, spec.name, spec.options)
    except (ConfigError, PluginError) as exc:
        return f'[[device]] "{spec.name}" options: {exc}'
    return ""


# -- devices


def _devices(arguments: argparse.Namespace) -> int:
    from hcd import plugins

    if arguments.dump is not None:
        from hcd.dump import dump

        print("\n".join(dump(arguments.dump)))
        return 0
    status = 0
    for name in plugins.names():
        try:
            cls = plugins.load(name)
        except (ConfigError, PluginError) as exc:  # the others are still worth listing
            status = _fail(exc, EX_FAILED)
            continue
        print(f"{name}: {cls.description}")
        for option in cls.options:
            print(f"    {_usage(option):28} {_help(option)}")
    return status


def _new_device(arguments: argparse.Namespace) -> int:
    from hcd import scaffold

    directory = scaffold.write(arguments.name)
    print(f"{directory}: {directory}/README.md says how to go on")
    return 0


def _usage(option: Option) -> str:
    if option.kind == "bool":
        return f"--{option.name}"
    value = "|".join(option.choices) if option.choices else option.kind.upper()
    return f"--{option.name}={value}"


def _help(option: Option) -> str:
    default = " ".join(option.default) if isinstance(option.default, tuple) else option.default
    shown = "" if default in (None, False, "") else f" (default {default})"
    return f"{option.help}{shown}"


# -- device


def _device(words: Sequence[str]) -> int:
    argv, command = _split(words)
    type_name = argv[0] if argv and not argv[0].startswith("-") else None
    if "--print-capabilities" in argv:
        type_name = type_name or next((word for word in argv if not word.startswith("-")), None)
        if type_name is None:
            return _fail("a device type is missing: hcd device TYPE --print-capabilities", EX_USAGE)
        return _print_capabilities(type_name)
    if type_name is None:
        return _device_help(argv)
    from hcd import log, plugins, sockets

    cls = plugins.load(type_name)
    arguments = _device_parser(type_name, cls, bool(command)).parse_args(argv[1:])
    log.setup(arguments.log_level)
    if command:
        return _captive(type_name, cls, arguments, command)
    kind = sockets.KINDS[cls.transport]
    inherited = sockets.adopt_fd(arguments.fd, kind) if arguments.fd is not None else None
    path = arguments.socket_path if inherited is None else sockets.local_path(inherited)
    from hcd import daemon  # trio, lanes and all: only now that there is something to run

    daemon.run(
        _device_config(type_name, cls, arguments, path),
        inherited=inherited,
        exit_on_disconnect=arguments.exit_on_disconnect,
    )
    return 0


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What belongs to hcd, and the command after "--"."""
    at = words.index("--") if "--" in words else len(words)
    return list(words[:at]), list(words[at + 1 :])


def _captive(type_name: str, cls: type[DeviceBase], arguments: argparse.Namespace, command: Sequence[str]) -> int:
    from hcd.captive import Captive

    if arguments.fd is not None or arguments.exit_on_disconnect:
        return _fail("--fd and --exit-on-disconnect do not go with a command after --", EX_USAGE)
    with Captive(command, arguments.socket_path) as captive:
        from hcd import daemon

        daemon.run(_device_config(type_name, cls, arguments, captive.socket), beside=captive.run)
    if captive.failure:
        return _fail(captive.failure, captive.status)
    return captive.status


def _print_capabilities(type_name: str) -> int:
    from hcd import plugins
    from hcd.device import Device

    cls = plugins.load(type_name)
    capabilities: dict[str, Any] = {"features": []}
    if issubclass(cls, Device):
        if cls.vhost_user_type:
            capabilities = {"type": cls.vhost_user_type}
        capabilities["features"] = list(cls.vhost_user_features)
    print(json.dumps(capabilities))
    return 0


def _device_help(argv: Sequence[str]) -> int:
    from hcd import plugins

    if "--help" in argv or "-h" in argv:
        print("usage: hcd device TYPE (--socket-path=PATH | --fd=FD) [--OPTION=VALUE ...]")
        print(f"types: {', '.join(plugins.names())}; hcd device TYPE --help has the options of one")
        return 0
    return _fail("a device type must follow: hcd device TYPE ... (hcd devices lists them)", EX_USAGE)


def _device_parser(type_name: str, cls: type[DeviceBase], captive: bool = False) -> _Parser:
    from hcd import config, wrappers

    parser = _Parser(
        prog=f"hcd device {type_name}",
        description=cls.description,
        epilog="With -- COMMAND at the end, the command is run beside the device, {socket} in it being the socket's "
        "path; hcd ends with it and passes its exit status on.",
        allow_abbrev=False,
    )
    where = parser.add_mutually_exclusive_group(required=not captive)
    where.add_argument("--socket-path", type=_text(config.check_socket), metavar="PATH", help="listen here")
    where.add_argument("--fd", type=_text(_fd), help="an inherited unix socket, listening or connected")
    parser.add_argument("--name", type=_text(config.check_name), default=type_name, help=f"default {type_name}")
    parser.add_argument("--path", type=_text(config.parse_path), help="auto, pio, mmio, hypercall or direct")
    parser.add_argument("--bus", type=_text(config.check_bus), help="pci, mmio or ccw")
    parser.add_argument("--qmp", type=_text(config.check_qmp), metavar="PATH", help="QMP socket of the front end")
    parser.add_argument(
        "--wrap", type=_text(lambda text: wrappers.parse_text(text, cls)), action="append", default=[],
        metavar="WRAPPER",
        help="run under log or error:OPTION=VALUE,...; again for more, the first one outermost",
    )
    parser.add_argument("--metrics", type=_text(config.parse_address), metavar="ADDR", help="HOST:PORT or unix:PATH")
    parser.add_argument("--control", type=_text(config.check_socket), metavar="PATH", help="socket for hcd status")
    parser.add_argument("--poll-us", type=_text(_poll_us), default=config.DEFAULT_POLL_US, metavar="US")
    parser.add_argument(
        "--drain-timeout", type=_text(_seconds), default=config.DEFAULT_DRAIN_TIMEOUT, metavar="SECONDS"
    )
    parser.add_argument("--exit-on-disconnect", action="store_true", help="end when the front end has gone")
    parser.add_argument("--print-capabilities", action="store_true", help="print what QEMU may ask, and exit")
    _add_log_level(parser, "warning" if captive else "info")
    own = parser.add_argument_group(f"options of type {type_name}")
    for option in cls.options:
        _add_option(own, option)
    return parser


def _add_option(group: argparse._ArgumentGroup, option: Option) -> None:
    bare: dict[str, Any] = {"nargs": "?", "const": True} if option.kind == "bool" else {}
    if option.kind == "list":
        bare = {"action": "extend"}
    group.add_argument(
        f"--{option.name}",
        dest=f"option {option.key}",  # apart from our own names
        type=_text(lambda text: opt.from_text(option, text)),
        default=None if option.kind == "list" else option.default,  # to a default the items would be added
        metavar=option.kind.upper(),
        help=_help(option).replace("%", "%%"),
        **bare,
    )


def _device_config(type_name: str, cls: type[DeviceBase], arguments: argparse.Namespace, path: str) -> DaemonConfig:
    from hcd.config import DaemonConfig, DeviceSpec
    from hcd.control.settings import ControlSpec

    given = vars(arguments)
    spec = DeviceSpec(
        name=arguments.name,
        type=type_name,
        socket=path,
        path=arguments.path,
        bus=arguments.bus,
        qmp=arguments.qmp,
        options={option.key: _given(option, given[f"option {option.key}"]) for option in cls.options},
        wrap=tuple(arguments.wrap),
    )
    control = None if arguments.control is None else ControlSpec(arguments.control)
    return DaemonConfig((spec,), arguments.metrics, arguments.poll_us, arguments.drain_timeout, control)


def _given(option: Option, value: Any) -> Any:
    if option.kind != "list":
        return value
    return option.default if value is None else tuple(value)


def _fd(text: str) -> int:
    return int(opt.from_text(_number("fd", "fd"), text))


def _poll_us(text: str) -> int:
    return int(opt.from_text(_number("poll-us", "int", 1_000_000), text))


def _seconds(text: str) -> float:
    return float(opt.from_text(_number("drain-timeout", "float", 3600), text))


def _number(name: str, kind: str, most: int | None = None) -> Option:
    from hcd.device import Option

    return Option(name, kind, "", minimum=0, maximum=most)
