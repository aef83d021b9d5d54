from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.wire.messages import SamplingParams
from flowkv_decode.sequences import DecodeRole
from flowkv_engine.engine.batch import Sequence, WorkItem
from flowkv_node.steps import plan_chunks


def sequence(num_prompt: int, num_computed: int = 0, num_blocks: int = 0, num_output: int = 0) -> Sequence:
    return Sequence(
        transfer_id="r.0",
        gateway_id="g",
        prompt_ids=[1] * num_prompt,
        output_ids=[2] * num_output,
        sampling=SamplingParams(max_tokens=8),
        deadline=0.0,
        block_table=list(range(num_blocks)),
        num_computed_tokens=num_computed,
    )


def lengths(items: list[WorkItem]) -> list[int]:
    return [item.num_tokens for item in items]


def test_chunks_are_first_come_first_served() -> None:
    queue = [sequence(40), sequence(10), sequence(100)]
    assert lengths(plan_chunks(queue, 64, 16)) == [40, 10]
    assert lengths(plan_chunks(queue, 70, 16)) == [40, 10, 16]


def test_a_chunk_that_ends_no_prompt_ends_on_a_block_border() -> None:
    assert lengths(plan_chunks([sequence(100, num_computed=16)], 50, 16)) == [48]
    assert lengths(plan_chunks([sequence(100, num_computed=96)], 50, 16)) == [4]


@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(0, 12)), max_size=6),
    st.integers(16, 256),
)
def test_chunks_keep_to_the_cap_and_always_proceed(prompts: list[tuple[int, int]], cap: int) -> None:
    queue = [sequence(length, min(16 * done, (length - 1) // 16 * 16)) for length, done in prompts]
    items = plan_chunks(queue, cap, 16)
    assert sum(lengths(items)) <= cap
    assert bool(items) == bool(queue)
    assert [item.sequence for item in items] == queue[: len(items)]
    for item in items:
        end = item.sequence.num_computed_tokens + item.num_tokens
        assert end == item.sequence.num_tokens or end % 16 == 0


def role_with(*running: Sequence) -> DecodeRole:
    """Its batch is given: no node is asked for places or blocks."""
    node: Any = SimpleNamespace(settings=SimpleNamespace(block_size=16, max_num_seqs=64))
    role = DecodeRole(node)
    role._running = list(running)
    return role


def test_missing_blocks_include_the_newest_token() -> None:
    missing = role_with()._num_missing_blocks
    assert missing(sequence(16, num_blocks=1)) == 0
    assert missing(sequence(16, num_blocks=1, num_output=1)) == 1
    assert missing(sequence(40)) == 3


def test_preempted_sequences_are_prefilled_the_others_decoded() -> None:
    decoding = sequence(20, num_computed=20, num_blocks=2, num_output=1)
    preempted = sequence(20, num_computed=0, num_blocks=2, num_output=5)
    role = role_with(decoding, preempted)
    assert (role.sequences_to_decode(), role.sequences_to_prefill()) == ([decoding], [preempted])
    assert lengths(plan_chunks(role.sequences_to_prefill(), 16, 16)) == [16]
    assert plan_chunks(role.sequences_to_prefill(), 0, 16) == []
