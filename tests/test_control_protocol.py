"""The lines of the control socket, without a socket."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcd.control.protocol import CALLS, Call, CallError, Lines, LineTooLong, encode, parse_call


@given(st.lists(st.binary(max_size=30).filter(lambda data: b"\n" not in data)), st.integers(1, 7))
def test_lines_come_out_whole_however_they_are_cut(lines: list[bytes], size: int) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    cutter, found = Lines(100), []
    for at in range(0, len(stream), size):
        cutter.feed(stream[at : at + size])
        while (line := cutter.next_line()) is not None:
            found.append(line)
    assert found == [line.strip() for line in lines if line.strip()]


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_that_is_too_long_is_noticed_with_and_without_its_end(end: bytes) -> None:
    lines = Lines(10)
    lines.feed(b"x" * 10 + b"\n")
    assert lines.next_line() == b"x" * 10
    lines.feed(b"x" * 11 + end)
    with pytest.raises(LineTooLong):
        lines.next_line()


def test_a_message_is_one_line_of_ascii() -> None:
    line = encode({"name": "a\nb\x1b\u2028ü"})
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert line.isascii()
    assert b"\x1b" not in line
    assert json.loads(line) == {"name": "a\nb\x1b\u2028ü"}


def test_calls_have_a_name_arguments_and_perhaps_an_id() -> None:
    assert parse_call(b'{"call": "snapshot"}') == Call("snapshot")
    line = b'{"id": [1], "call": "resize", "device": "disk0", "size": 1024}'
    assert parse_call(line) == Call("resize", {"device": "disk0", "size": 1024}, [1])
    assert parse_call(b'{"call": "resize", "device": "disk0"}').arguments == {"device": "disk0"}


@pytest.mark.parametrize(
    ("line", "kind", "said"),
    [
        (b"hello", "request", "expected one JSON object a line"),
        (b"\xff\xfe", "request", "expected one JSON object a line"),
        (b"[" * 4000, "request", "expected one JSON object a line"),
        (b"[]", "request", '"call" is missing'),
        (b'{"call": 3}', "request", '"call" is missing'),
        (b'{"call": "explode"}', "unknown", 'there is no call "explode"; expected one of snapshot'),
        (b'{"call": "snapshot", "fast": true}', "request", '"fast" is not known; expected nothing'),
        (b'{"call": "resize"}', "request", '"device" is missing'),
        (b'{"call": "resize", "device": 3}', "request", '"device" is to be a string'),
        (b'{"call": "resize", "device": "d", "size": "1"}', "request", '"size" is to be an integer'),
        (b'{"call": "resize", "device": "d", "size": true}', "request", '"size" is to be an integer'),
    ],
)
def test_a_mistake_is_named(line: bytes, kind: str, said: str) -> None:
    with pytest.raises(CallError) as caught:
        parse_call(line)
    assert caught.value.kind == kind
    assert said in str(caught.value)


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
_KEYS = st.sampled_from(["call", "device", "size", "rate", "id", "x"])
_CALLS = st.dictionaries(_KEYS, _ANY | st.sampled_from(list(CALLS)))


@given(st.binary() | (_ANY | _CALLS).map(lambda value: json.dumps(value).encode()))
def test_any_line_is_a_call_or_refused(line: bytes) -> None:
    try:
        call = parse_call(line)
    except CallError:
        return
    allowed: Any = {key.strip("()") for key in CALLS[call.name]}
    assert set(call.arguments) <= allowed
