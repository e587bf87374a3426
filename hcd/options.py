"""Values for the options that a device type declares (:class:`hcd.device.Option`).

Two ways in, one check: :func:`from_toml` takes what a TOML file holds, :func:`from_text` what the command
line holds. Both raise ValueError with "expected ..., found ..."; the caller knows where the value stood and
says so.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hcd.device import Option

__all__ = [
    "KINDS",
    "defaults",
    "describe",
    "did_you_mean",
    "find",
    "for_argparse",
    "from_text",
    "from_toml",
    "parse_size",
    "shown",
]

KINDS = ("str", "path", "int", "bool", "size", "fd", "float", "list")

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_TRUE = ("on", "yes", "true", "1")
_FALSE = ("off", "no", "false", "0")
_NOUNS = {
    "str": "a string",
    "path": "a path",
    "int": "an integer",
    "bool": "true or false",
    "size": 'a size in bytes such as 4096, "64M" or "1G"',
    "fd": "the number of an inherited file descriptor",
    "float": "a number",
    "list": "a string, or a list of strings",
}


def from_toml(option: Option, value: object) -> Any:
    """The value of ``option`` from a parsed TOML file. ValueError unless it has the right type and range."""
    expected = describe(option)
    kind = option.kind
    if kind in ("str", "path"):
        result: Any = value if isinstance(value, str) else None
    elif kind == "list":
        result = _as_list(value)
    elif kind == "bool":
        result = value if isinstance(value, bool) else None
    elif kind == "size" and isinstance(value, str):
        result = _or_none(parse_size, value)
    elif isinstance(value, bool):  # a bool is an int to Python, not to the operator
        result = None
    elif kind == "float":
        result = float(value) if isinstance(value, int | float) else None
    else:
        result = value if isinstance(value, int) else None
    return _checked(option, result, expected, value)


def from_text(option: Option, text: str) -> Any:
    """The value of ``option`` from one command-line string. ValueError as for :func:`from_toml`.

    A list is given by the option once for each item: this is the tuple of one.
    """
    kind = option.kind
    if kind in ("str", "path"):
        result: Any = text
    elif kind == "list":
        result = _as_list(text)
    elif kind == "bool":
        result = True if text.lower() in _TRUE else False if text.lower() in _FALSE else None
    elif kind == "size":
        result = _or_none(parse_size, text)
    elif kind == "float":
        result = _or_none(float, text)
    else:
        result = _or_none(_parse_int, text)
    return _checked(option, result, describe(option), text)


def parse_size(text: str) -> int:
    """Bytes from "4096", "64K", "64M", "1G" or "2T" (powers of 1024). ValueError otherwise."""
    match = re.fullmatch(r"([0-9]+)([KMGT]?)", text.strip().upper(), re.ASCII)
    if match is None:
        raise ValueError(f"not a size: {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def defaults(options: Iterable[Option]) -> dict[str, Any]:
    """What a device finds when nothing was given: every declared key with its default."""
    return {option.key: option.default for option in options}


def find(options: Sequence[Option], name: str) -> Option | None:
    """The option that ``name`` means; "-" and "_" are the same there."""
    key = name.replace("-", "_")
    return next((option for option in options if option.key == key), None)


def for_argparse(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """``convert`` for argparse, which drops the text of a ValueError."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from exc

    return converted


def describe(option: Option) -> str:
    """What a value of ``option`` must be, in words."""
    if option.choices:
        return "one of " + ", ".join(option.choices)
    noun = _NOUNS[option.kind]
    if option.minimum is not None and option.maximum is not None:
        return f"{noun} from {option.minimum} to {option.maximum}"
    if option.minimum is not None:
        return f"{noun} of at least {option.minimum}"
    if option.maximum is not None:
        return f"{noun} of at most {option.maximum}"
    return noun


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean "x"?' for the nearest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def _as_list(value: object) -> tuple[str, ...] | None:
    """The items, each a string that is not empty."""
    items: list[Any] = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else [None]
    return tuple(items) if all(isinstance(item, str) and item for item in items) else None


def _or_none(parse: Any, text: str) -> Any:
    try:
        return parse(text)
    except ValueError:
        return None


def _parse_int(text: str) -> int:
    if re.fullmatch(r"[+-]?[0-9]+", text, re.ASCII):
        return int(text)
    return int(text, 16) if re.fullmatch(r"0[xX][0-9a-fA-F]+", text, re.ASCII) else int("")


def _checked(option: Option, result: Any, expected: str, found: object) -> Any:
    if result is None or not _in_range(option, result):
        raise ValueError(f"expected {expected}, found {shown(found)}")
    return result


def _in_range(option: Option, value: Any) -> bool:
    if isinstance(value, str):
        if option.kind == "path" and not value:
            return False
        return "\0" not in value and (not option.choices or value in option.choices)
    if isinstance(value, tuple):
        return all("\0" not in item for item in value)
    if isinstance(value, bool):
        return True
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if option.kind in ("fd", "size") and value < 0:
        return False
    return (option.minimum is None or value >= option.minimum) and (option.maximum is None or value <= option.maximum)


def shown(value: object) -> str:
    """A value as TOML would write it, cut short."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
