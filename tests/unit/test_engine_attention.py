from __future__ import annotations

import pytest
import torch

from flowkv_engine.engine.attention import Attention, Rule, Span, TorchAttention, make_attention
from flowkv_engine.engine.batch import PackedBatch, WorkItem, pack
from tests.drive import make_sequence

NUM_LAYERS, NUM_KV_HEADS, NUM_HEADS, HEAD_DIM, BLOCK_SIZE = 2, 2, 6, 16, 8
PLAIN = Rule(0.3)
SINKS = torch.linspace(-3, 3, NUM_HEADS)
RULES = {
    "plain": PLAIN,
    "window": Rule(0.3, Span(window=5)),
    "window beyond a tile": Rule(0.3, Span(window=200)),
    "chunk": Rule(0.3, Span(chunk=16)),
    "softcap": Rule(0.3, softcap=0.5),
    "sinks": Rule(0.3, sinks=SINKS),
    "all": Rule(0.3, Span(window=70), 0.5, SINKS),
}
# (tokens computed before, tokens of this step): decode, chunks, a prompt of one, long contexts.
MIXED = [(12, 1), (0, 5), (11, 7), (0, 1), (300, 1), (40, 24), (180, 230)]


def filled(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    shape = (128, NUM_LAYERS, 2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    return torch.randn(shape, generator=torch.manual_seed(seed)).to(dtype)


def batch_of(parts: list[tuple[int, int]]) -> PackedBatch:
    """Sequences that have got so far and go on by so much, on scattered blocks."""
    blocks = torch.randperm(128, generator=torch.manual_seed(1)).tolist()
    items = []
    for num_computed, num_tokens in parts:
        num_blocks = -(-(num_computed + num_tokens) // BLOCK_SIZE)
        sequence = make_sequence([0] * (num_computed + num_tokens), [blocks.pop() for _ in range(num_blocks)])
        sequence.num_computed_tokens = num_computed
        items.append(WorkItem(sequence, num_tokens))
    return pack(items, BLOCK_SIZE)


def states(batch: PackedBatch) -> list[torch.Tensor]:
    """Query, key and value of a step."""
    torch.manual_seed(2)
    size = len(batch.token_ids)
    return [torch.randn(size, heads, HEAD_DIM) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]


def attended(attention: Attention, batch: PackedBatch, rule: Rule = PLAIN) -> torch.Tensor:
    query, key, value = states(batch)
    attention.bind(batch)
    attention.write(1, key, value)
    return attention.attend(1, query, rule)


def sees(query: int, key: int, span: Span) -> bool:
    if span.window and key <= query - span.window:
        return False
    return key <= query and (not span.chunk or key // span.chunk == query // span.chunk)


@pytest.mark.parametrize("name", ["torch", "cpu"])
@pytest.mark.parametrize("part", MIXED)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_equals_plain_attention_over_the_whole_sequence(name: str, part: tuple[int, int], rule: Rule) -> None:
    pool = filled(torch.float32)
    batch = batch_of([part])
    out = attended(make_attention(name, pool.unbind(1)), batch, rule)
    num_computed, num_tokens = part
    length = num_computed + num_tokens
    context = pool[batch.block_tables[0], 1].transpose(0, 1).flatten(1, 2)[:, :length]
    keys, values = context.transpose(1, 2).repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1)
    scores = states(batch)[0].transpose(0, 1) @ keys.transpose(1, 2) * rule.scale
    if rule.softcap:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    places = range(num_computed, length)
    hidden = [[not sees(place, key, rule.span) for key in range(length)] for place in places]
    powers = scores.masked_fill(torch.tensor(hidden), -torch.inf).exp()  # [heads, tokens, context]
    sinks = torch.zeros(NUM_HEADS) if rule.sinks is None else rule.sinks.exp()
    expected = powers @ values / (powers.sum(-1) + sinks[:, None])[..., None]
    torch.testing.assert_close(out, expected.transpose(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_triton_equals_torch_by_every_rule(rule: Rule) -> None:
    batch = batch_of([(75, 1), (0, 5), (66, 7)])
    expected = attended(TorchAttention(filled(torch.float32).unbind(1)), batch, rule)
    attention = make_attention("triton", filled(torch.float32).unbind(1))
    torch.testing.assert_close(attended(attention, batch, rule), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float8_e4m3fn, marks=pytest.mark.full)],
)
@pytest.mark.parametrize("parts", [MIXED, [(300, 1), (7, 1), (0, 1), (256, 1)], [(0, 9), (30, 2)]])
@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_equals_torch(name: str, dtype: torch.dtype, parts: list[tuple[int, int]]) -> None:
    pools = filled(dtype), filled(dtype)
    batch = batch_of(parts)
    expected = attended(TorchAttention(pools[0].unbind(1)), batch)
    attention = make_attention(name, pools[1].unbind(1))
    torch.testing.assert_close(attended(attention, batch), expected, atol=1e-5, rtol=0)
    assert attention.name == name
    assert torch.equal(pools[0], pools[1])


@pytest.mark.parametrize("name", ["torch", "cpu", "triton"])
def test_writes_only_its_slots(name: str) -> None:
    pool, before = filled(torch.float32), filled(torch.float32)
    batch = batch_of([(3, 1), (0, 5)])
    attention = make_attention(name, pool.unbind(1))
    attended(attention, batch)
    changed = (pool != before).flatten(4).any(-1).nonzero().tolist()  # [block, layer, side, offset]
    slots = sorted(
        [slot // BLOCK_SIZE, 1, side, slot % BLOCK_SIZE] for slot in batch.slots for side in (0, 1)
    )
    assert sorted(changed) == slots


@pytest.mark.parametrize("name", ["torch", "cpu", "triton"])
def test_a_sequence_gets_the_same_alone_and_in_company(name: str) -> None:
    attention = make_attention(name, filled(torch.float32).unbind(1))
    alone, company = batch_of([(300, 1)]), batch_of([(300, 1), (9, 1), (70, 1)])
    attention.bind(alone)
    query = torch.randn(3, NUM_HEADS, HEAD_DIM, generator=torch.manual_seed(5))
    first = attention.attend(0, query[:1], PLAIN)
    attention.bind(company)
    torch.testing.assert_close(attention.attend(0, query, PLAIN)[:1], first, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_token_gets_the_same_bits_however_its_prompt_is_cut(rule: Rule) -> None:
    attention = make_attention("cpu", filled(torch.float32).unbind(1))
    query = torch.randn(430, NUM_HEADS, HEAD_DIM, generator=torch.manual_seed(5))
    attention.bind(batch_of([(0, 430)]))
    whole = attention.attend(0, query, rule)
    for start in (1, 191, 192, 300, 428):
        attention.bind(batch_of([(start, 430 - start)]))
        assert torch.equal(attention.attend(0, query[start:], rule), whole[start:])


def test_backends_are_chosen_by_name() -> None:
    assert make_attention("auto", filled(torch.float32).unbind(1)).name == "cpu"
    assert make_attention("auto", filled(torch.float16).unbind(1)).name == "torch"
    with pytest.raises(ValueError, match="float16"):
        make_attention("cpu", filled(torch.float16).unbind(1))
    with pytest.raises(ValueError, match="unknown attention 'flash': choose one of auto, torch, cpu, triton"):
        make_attention("flash", filled(torch.float32).unbind(1))


def test_triton_asks_for_a_gpu_unless_it_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_attention("triton", filled(torch.float32).unbind(1)).name == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="it has to be on a GPU"):
        make_attention("triton", filled(torch.float32).unbind(1))
