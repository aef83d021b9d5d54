"""The window that fits is held against real messages at their longest."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.wire.limits import (
    MAX_PAYLOAD_BYTES,
    hashes_that_fit,
    ids_that_fit,
    payload_for,
    window_that_fits,
)
from flowkv_common.wire.messages import (
    DecodeRun,
    Message,
    NodeRef,
    PrefillRun,
    Reserve,
    Reserved,
    Run,
    SamplingParams,
    ScheduleRequest,
    TokenIds,
    decode,
    encode,
)

KIB = 1024
# Names as long as anyone makes them.
REF = NodeRef(node_id="n" * 250, incarnation="f" * 8)
NAME = "chatcmpl-" + "f" * 24 + "-127"
COMMON: dict[str, Any] = {"node": REF, "fingerprint": "f" * 64, "gateway_id": "gateway-" + "f" * 8}
RUN: dict[str, Any] = {
    **COMMON,
    "request_id": NAME,
    "attempt": 2,
    "epoch": 2**53,
    "deadline_in_s": 599.9999999999999,
}
# The longest that a request may ask for, and each number as long as it can be written.
SAMPLING = SamplingParams(
    max_tokens=2**31 - 1,
    seed=-(2**63),
    temperature=1.0000000000000002,
    top_p=0.9999999999999999,
    top_k=2**31 - 1,
    min_p=1.2345678901234567e-10,
    frequency_penalty=-1.2345678901234567e-10,
    presence_penalty=-1.2345678901234567e-10,
    repetition_penalty=1.2345678901234567e-10,
    logit_bias={4_000_000_000 + i: -1.2345678901234567e-10 for i in range(1024)},
    min_tokens=2**31 - 1,
    ignore_eos=True,
    num_logprobs=20,
)


def longest(window: int, block_size: int, max_payload: int) -> list[Message]:
    """Every message that grows with a sequence of `window` tokens, at its longest."""
    num_blocks = window // block_size + 1
    messages: list[Message] = []
    for num_output in {0, 1, window // 2, window - 1}:  # a retry late in the answer has all of it as output
        ids: dict[str, Any] = {
            "prompt_ids": TokenIds.of([2**32 - 1] * (window - num_output)),
            "output_ids": TokenIds.of([2**32 - 1] * num_output),
        }
        messages.append(PrefillRun(**RUN, **ids, decode=REF, sampling=SAMPLING))
        messages.append(DecodeRun(**RUN, **ids, prefill=REF, token="f" * 64, sampling=SAMPLING))
    hashes = ["f" * 32] * num_blocks
    messages.append(
        Reserve(
            **COMMON,
            transfer_id=f"{NAME}.2",
            prefill=REF,
            num_tokens=window,
            block_hashes=hashes,
            run_lengths=[1] * num_blocks,
            expires_in_s=30.000000000000004,
            again=True,
        )
    )
    runs = [Run(10_000_000, 1)] * num_blocks
    messages.append(
        Reserved(transfer_id=f"{NAME}.2", token="f" * 64, runs=runs, num_cached_blocks=num_blocks)
    )
    messages.append(
        ScheduleRequest(
            request_id=NAME,
            attempt=2,
            fingerprint="f" * 64,
            num_prompt_tokens=window,
            max_new_tokens=window,
            avoid=["n" * 250] * 4,
            block_hashes=hashes[: hashes_that_fit(max_payload)],
        )
    )
    return messages


@pytest.mark.parametrize("block_size", [1, 8, 16, 128])
@pytest.mark.parametrize("max_payload", [52 * KIB, 64 * KIB, 1024 * KIB, MAX_PAYLOAD_BYTES])
def test_at_the_edge_of_the_window_every_message_fits(max_payload: int, block_size: int) -> None:
    window = window_that_fits(max_payload, block_size)
    assert window > 0
    too_long = {
        type(message).__name__: len(encode(message))
        for message in longest(window, block_size, max_payload)
        if len(encode(message)) > max_payload
    }
    assert too_long == {}


@pytest.mark.parametrize("max_payload", [64 * KIB, 1024 * KIB, MAX_PAYLOAD_BYTES])
def test_little_room_is_given_away(max_payload: int) -> None:
    """All but a few KiB is used by the message that is the longest."""
    window = window_that_fits(max_payload, 16)
    sizes = [len(encode(message)) for message in longest(window, 16, max_payload)]
    assert max_payload - 12 * KIB < max(sizes) <= max_payload


@given(window=st.integers(1, 10_000_000), block_size=st.integers(1, 256))
def test_what_is_asked_of_the_server_is_enough_and_not_more(window: int, block_size: int) -> None:
    payload = payload_for(window, block_size)
    assert window_that_fits(payload, block_size) >= window
    assert window_that_fits(payload - 38, block_size) < window


@pytest.mark.parametrize("max_payload", [0, 8 * KIB, 48 * KIB])
def test_a_server_that_takes_next_to_nothing_has_no_window(max_payload: int) -> None:
    assert window_that_fits(max_payload, 16) == 0
    assert ids_that_fit(max_payload) == 0
    assert hashes_that_fit(max_payload) == 0


def test_the_windows_of_the_documentation() -> None:
    assert window_that_fits(1024 * KIB, 16) == 187_392
    assert window_that_fits(MAX_PAYLOAD_BYTES, 16) == 1_563_648


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_packed_ids_come_out_as_they_went_in(token_ids: list[int]) -> None:
    sent = encode(TokenIds.of(token_ids))
    got = decode(sent, TokenIds)
    assert got.unpack() == token_ids
    assert len(got) == got.count == len(token_ids)


def test_packed_ids_are_little_endian_and_their_number_is_plain() -> None:
    assert msgspec.json.decode(encode(TokenIds.of([1, 4093, 2**32 - 1]))) == {
        "count": 3,
        "packed": "AQAAAP0PAAD/////",
    }


@pytest.mark.parametrize(
    "ids", ['{"count":2,"packed":"AQAAAA=="}', '{"count":1}', '{"count":0,"packed":"AQ=="}']
)
def test_packed_ids_that_are_not_as_many_as_they_say_are_refused_by_name(ids: str) -> None:
    class Asked(msgspec.Struct):
        prompt_ids: TokenIds

    with pytest.raises(msgspec.ValidationError, match=r"token ids of 4 bytes - at `\$.prompt_ids`"):
        decode(f'{{"prompt_ids":{ids}}}'.encode(), Asked)
