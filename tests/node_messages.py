"""What nodes are asked, for tests that care for a field or two of it; `changes` are the other fields."""

from __future__ import annotations

from typing import Any

import msgspec

from flowkv_common.wire.messages import (
    DecodeRun,
    NodeRef,
    PrefillRun,
    Reserve,
    SamplingParams,
    TokenIds,
    transfer_id,
)

FINGERPRINT = "f"
P, D = NodeRef(node_id="p", incarnation="1"), NodeRef(node_id="d", incarnation="1")


def prefill_run(prompt_ids: list[int], **changes: Any) -> PrefillRun:
    """A gateway asks `P`, which is to hand over to `D`."""
    plain = PrefillRun(
        request_id="r",
        attempt=0,
        epoch=1,
        node=P,
        fingerprint=FINGERPRINT,
        decode=D,
        gateway_id="g",
        prompt_ids=TokenIds.of(prompt_ids),
        output_ids=TokenIds.of([]),
        sampling=SamplingParams(max_tokens=8),
        deadline_in_s=60.0,
    )
    return msgspec.structs.replace(plain, **changes)


def reserve(num_tokens: int, request_id: str = "r", **changes: Any) -> Reserve:
    """`P` asks `D` for room."""
    plain = Reserve(
        transfer_id=transfer_id(request_id, 0),
        node=D,
        fingerprint=FINGERPRINT,
        prefill=P,
        gateway_id="g",
        num_tokens=num_tokens,
        block_hashes=[],
        run_lengths=[],
        expires_in_s=30.0,
    )
    return msgspec.structs.replace(plain, **changes)


def decode_run(prompt_ids: list[int], token: str, request_id: str = "r", **changes: Any) -> DecodeRun:
    """`P` hands over to `D`, into the reservation with this token; the prompt has given the output 7."""
    plain = DecodeRun(
        request_id=request_id,
        attempt=0,
        epoch=1,
        node=D,
        fingerprint=FINGERPRINT,
        prefill=P,
        token=token,
        gateway_id="g",
        prompt_ids=TokenIds.of(prompt_ids),
        output_ids=TokenIds.of([7]),
        sampling=SamplingParams(max_tokens=50, ignore_eos=True),
        deadline_in_s=60.0,
    )
    return msgspec.structs.replace(plain, **changes)
