"""How much KV a node may have in flight follows from its pool, unless it is set."""

from __future__ import annotations

from typing import Any

from flowkv_common.config import NodeSettings
from flowkv_common.wire.messages import PoolLayout
from flowkv_node.handoffs import handoff_bytes

GIB = 1 << 30
LLAMA_8B = PoolLayout(num_layers=32, block_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")
SMOLLM = PoolLayout(num_layers=30, block_size=16, num_kv_heads=3, head_dim=64, dtype="float32")


def allowed(layout: PoolLayout, pool_bytes: int, **settings: Any) -> int:
    return handoff_bytes(NodeSettings(model_path="", **settings), layout, pool_bytes // layout.block_bytes)


def test_long_prompts_follow_each_other_on_a_gpu() -> None:
    """As compose sets it up: a prompt of 8,000 tokens moves while others compute."""
    prompt = (8000 // 16 + 1) * LLAMA_8B.block_bytes
    for pool, num_prompts in ((50 * GIB, 12), (20 * GIB, 5)):
        in_flight = allowed(LLAMA_8B, pool, token_budget=2048)
        assert in_flight // prompt == num_prompts
        assert in_flight <= pool / 4  # the rest is for those who decode


def test_in_a_small_pool_the_count_is_the_bound_for_prompts_of_a_step() -> None:
    a_step = 512 // 16 * SMOLLM.block_bytes
    assert allowed(SMOLLM, GIB) == 16 * a_step
    assert allowed(SMOLLM, 8 * a_step) == 16 * a_step
    assert allowed(SMOLLM, 8 * a_step, max_handoffs=3, token_budget=500) == 3 * a_step


def test_what_is_set_is_used() -> None:
    assert allowed(LLAMA_8B, 50 * GIB, max_handoff_bytes=1 << 29) == 1 << 29
