"""Attention over latents: one vector of a token for all heads, which is key and value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowkv_engine.engine import latents
from flowkv_engine.engine.attention import Rule, Span, make_attention
from flowkv_engine.engine.batch import WorkItem, pack
from flowkv_engine.engine.gpu import attention as attention_triton
from flowkv_engine.engine.gpu.attention import SplitKV
from flowkv_engine.engine.runner import Runner
from tests.drive import BLOCK_SIZE, generate, load_tiny, make_pool, make_sequence
from tests.every_model import tiny_config
from tests.oracle import check_identity
from tests.tiny_models import save_random

NUM_HEADS, DIM, NUM_BLOCKS = 20, 80, 32


@pytest.mark.parametrize("name", ["torch", "cpu", "triton"])
@pytest.mark.parametrize("rule", [Rule(0.1), Rule(0.1, Span(window=9))], ids=["all", "window"])
def test_heads_weigh_the_same_vectors(monkeypatch: pytest.MonkeyPatch, name: str, rule: Rule) -> None:
    """A chunk of a prompt and a step of decode whose context has several splits, on scattered blocks."""
    monkeypatch.setattr(attention_triton, "FEW", SplitKV(2, 1))
    torch.manual_seed(0)
    pool = torch.randn(NUM_BLOCKS, 1, BLOCK_SIZE, 1, DIM)
    blocks = torch.randperm(NUM_BLOCKS).tolist()
    items = []
    for num_computed, num_tokens in ((5, 4), (99, 1)):
        length = num_computed + num_tokens
        sequence = make_sequence([0] * length, [blocks.pop() for _ in range(-(-length // BLOCK_SIZE))])
        sequence.num_computed_tokens = num_computed
        items.append(WorkItem(sequence, num_tokens))
    batch = pack(items, BLOCK_SIZE)
    query, key = torch.randn(5, NUM_HEADS, DIM), torch.randn(5, 1, DIM)
    attention = make_attention(name, [pool])
    attention.bind(batch)
    attention.write(0, key, None)
    got = attention.attend(0, query, rule)
    assert torch.equal(pool.view(-1, DIM)[batch.slots], key[:, 0])
    rows = zip(query, batch.position_ids.tolist(), (0, 0, 0, 0, 1), strict=True)
    for row, (one, position, item) in enumerate(rows):
        context = pool[batch.block_tables[item]].view(-1, DIM)[: position + 1]
        seen = context[-rule.span.window :] if rule.span.window else context
        expected = (one @ seen.T * rule.scale).softmax(-1) @ seen
        torch.testing.assert_close(got[row], expected, atol=1e-5, rtol=0)


@pytest.mark.full
@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("attention", ["torch", "triton"])
def test_tokens_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, attention: str
) -> None:
    """Also after a prefix hit and a preemption: blocks that are there, and a prompt with its outputs."""
    monkeypatch.setattr(attention_triton, "FEW", SplitKV(2, 1))
    folder = tmp_path / "m"
    save_random(tiny_config(model_type), folder)
    model = load_tiny(folder)
    runner = Runner(model, make_pool(model, 16), attention=attention)
    first = make_sequence([token * 7 % 512 for token in range(30)], list(range(6)))
    generate(runner, [first], 6, chunk_tokens=12)
    check_identity(folder, first.prompt_ids, first.output_ids)
    hit = make_sequence(first.prompt_ids, [0, 1, 2, *range(6, 9)])
    hit.num_computed_tokens = 3 * BLOCK_SIZE
    preempted = make_sequence(first.prompt_ids, list(range(9, 15)))
    preempted.output_ids = first.output_ids[:3]
    generate(runner, [hit, preempted], 6)
    assert hit.output_ids == preempted.output_ids == first.output_ids


def test_a_models_own_attention_stays_as_it_was(tmp_path: Path) -> None:
    """So that logits can be compared with it."""
    folder = tmp_path / "m"
    save_random(tiny_config("deepseek_v3", num_hidden_layers=1), folder)
    module: Any = load_tiny(folder).module
    part = module.model.layers[0].self_attn
    given = torch.randn(1, 1, 3, 32), torch.randn(1, 1, 3, 16)
    plain = part.expand_kv(*given)
    latents.keep_latents(module)
    assert part.expand_kv(*given)[1] is None
    module.set_attn_implementation("eager")
    torch.testing.assert_close(part.expand_kv(*given), plain)
