"""Messages as one line of text each."""

from __future__ import annotations

import struct

import pytest
from hcd_protocols.vhost_user import layouts
from hcd_protocols.vhost_user.messages import (
    BACKEND_REQUESTS,
    FLAG_NEED_REPLY,
    FRONTEND_REQUESTS,
    NO_FD,
    REPLY_FLAGS,
    VERSION,
    BackendRequest,
    FrontendRequest,
    build_message,
)
from hcd_protocols.vhost_user.text import message_text
from hypothesis import given
from hypothesis import strategies as st

R = FrontendRequest
U64 = layouts.U64


@pytest.mark.parametrize(
    ("message", "fds", "expected"),
    [
        (build_message(R.GET_FEATURES), 0, "GET_FEATURES"),
        (
            build_message(R.GET_FEATURES, U64.build(value=1 << 32 | 1 << 29 | 1), REPLY_FLAGS), 0,
            "GET_FEATURES 0x120000001 (EVENT_IDX|VERSION_1)",
        ),
        (build_message(R.SET_PROTOCOL_FEATURES, U64.build(value=9)), 0, "SET_PROTOCOL_FEATURES 0x9 (MQ|REPLY_ACK)"),
        (build_message(R.SET_FEATURES, bytes(8), VERSION | FLAG_NEED_REPLY), 0, "SET_FEATURES 0x0 need_reply"),
        (build_message(R.SET_FEATURES, U64.build(value=0), REPLY_FLAGS), 0, "SET_FEATURES ok"),
        (build_message(R.SET_OWNER, U64.build(value=1), REPLY_FLAGS), 0, "SET_OWNER failed status=0x1"),
        (build_message(R.GET_QUEUE_NUM, U64.build(value=4), REPLY_FLAGS), 0, "GET_QUEUE_NUM value=0x4"),
        (build_message(R.SET_VRING_KICK, U64.build(value=3)), 1, "SET_VRING_KICK index=3 fds=1"),
        (build_message(R.SET_VRING_CALL, U64.build(value=3 | NO_FD)), 0, "SET_VRING_CALL index=3 no fd"),
        (build_message(R.SET_VRING_NUM, struct.pack("<II", 1, 128)), 0, "SET_VRING_NUM index=1 num=128"),
        (
            build_message(R.GET_VRING_BASE, layouts.VRING_STATE.build(index=1, num=77), REPLY_FLAGS), 0,
            "GET_VRING_BASE index=1 num=77",
        ),
        (
            build_message(R.SET_VRING_ADDR, layouts.VRING_ADDR.build(
                index=0, flags=0, desc=0x1000, used=0x2000, avail=0x3000, log=0
            )), 0, "SET_VRING_ADDR index=0 flags=0 desc=0x1000 used=0x2000 avail=0x3000 log=0x0",
        ),
        (
            build_message(R.SET_CONFIG, layouts.CONFIG.build(offset=4, size=6, flags=0, data=b"secret")), 0,
            "SET_CONFIG offset=4 size=6 flags=0 data=<6 bytes>",
        ),
        (
            build_message(R.SET_MEM_TABLE, layouts.MEM_TABLE.build(nregions=1, regions=[
                {"guest_addr": 0, "size": 4096, "user_addr": 0x7F00, "mmap_offset": 0}
            ])), 1,
            "SET_MEM_TABLE nregions=1 regions=[{guest_addr=0x0 size=4096 user_addr=0x7f00 mmap_offset=0x0}] fds=1",
        ),
        (struct.pack("<III", 999, 1, 3) + b"abc", 0, "request 999 <3 bytes>"),
        (build_message(R.SET_VRING_NUM, b"ab"), 0, "SET_VRING_NUM <2 bytes>"),
    ],
)  # fmt: skip
def test_a_message_is_one_line(message: bytes, fds: int, expected: str) -> None:
    assert message_text(message, fds) == expected


def test_the_back_channel_has_requests_of_its_own() -> None:
    assert message_text(build_message(BackendRequest.CONFIG_CHANGE_MSG), back_channel=True) == "CONFIG_CHANGE_MSG"


@given(
    st.sampled_from([*FRONTEND_REQUESTS, *BACKEND_REQUESTS, 0, 77]),
    st.integers(0, 15), st.binary(max_size=400), st.booleans(),
)  # fmt: skip
def test_whatever_comes_can_be_shown_and_payload_is_not(number: int, flags: int, payload: bytes, back: bool) -> None:
    text = message_text(struct.pack("<III", number, flags, len(payload)) + payload, 2, back_channel=back)
    assert text.isprintable()
    assert text.isascii()
    assert message_text(payload[:11], back_channel=back)
