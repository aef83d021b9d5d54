"""The GPU path on the CPU: Triton's kernels are interpreted, and what a graph would replay is run again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from flowkv_engine.engine.attention import Rule, TorchAttention
from flowkv_engine.engine.batch import PackedBatch, WorkItem, pack
from flowkv_engine.engine.flat import flat_weights
from flowkv_engine.engine.forward import ModulesForward, make_forward
from flowkv_engine.engine.gpu import attention as attention_triton
from flowkv_engine.engine.gpu import forward as forward_triton
from flowkv_engine.engine.gpu.attention import (
    NUM_ROWS,
    SplitKV,
    Step,
    TritonAttention,
    query_tiles,
)
from flowkv_engine.engine.gpu.forward import (
    MAX_BATCH,
    GraphedSteps,
    Shape,
    TritonFlatForward,
    graph_shapes,
)
from flowkv_engine.engine.model import LoadedModel
from flowkv_engine.engine.runner import Runner
from tests.drive import BLOCK_SIZE, generate, load_tiny, make_pool, make_sequence
from tests.tiny_models import FLAT, make_tiny_model

NUM_BLOCKS = 64


def filled(
    head_dim: int, block_size: int, num_kv_heads: int = 2, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    shape = (NUM_BLOCKS, 2, 2, block_size, num_kv_heads, head_dim)
    return torch.randn(shape, generator=torch.manual_seed(0)).to(dtype)


@pytest.fixture
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted programs take a millisecond each. A split is a tile of keys at least."""
    monkeypatch.setattr(attention_triton, "FEW", SplitKV(2, 1))


@pytest.fixture
def is_many(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> bool:
    """Whether any batch counts as one that fills a GPU by itself."""
    if request.param:
        monkeypatch.setattr(attention_triton, "MANY_PAIRS", 1)
        monkeypatch.setattr(attention_triton, "MANY", SplitKV(2, 100))
    return bool(request.param)


@pytest.mark.usefixtures("few_splits", "is_many")
@pytest.mark.parametrize("is_many", [False, True], indirect=True)
@pytest.mark.parametrize(
    ("head_dim", "block_size", "num_heads"),
    [  # one query per KV head; dimensions that are no power of 2; many queries per KV head
        (80, 4, 2),
        pytest.param(64, 16, 6, marks=pytest.mark.full),
        pytest.param(24, 16, 32, marks=pytest.mark.full),
    ],
)
def test_heads_of_any_size(head_dim: int, block_size: int, num_heads: int) -> None:
    blocks = iter(torch.randperm(NUM_BLOCKS, generator=torch.manual_seed(1)).tolist())
    items = []
    for num_computed, num_tokens in [(150, 1), (21, 10), (0, 3), (20, 1)]:
        table = [next(blocks) for _ in range(-(-(num_computed + num_tokens) // block_size))]
        sequence = make_sequence([0] * (num_computed + num_tokens), table)
        sequence.num_computed_tokens = num_computed
        items.append(WorkItem(sequence, num_tokens))
    batch = pack(items, block_size)
    query = torch.randn(15, num_heads, head_dim)
    outs = []
    for attention in (
        TorchAttention(filled(head_dim, block_size).unbind(1)),
        TritonAttention(filled(head_dim, block_size).unbind(1)),
    ):
        attention.bind(batch)
        outs.append(attention.attend(1, query, Rule(0.2)))
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=0)


def test_of_an_empty_place_nothing_is_read_or_written() -> None:
    pool = filled(16, 8)
    pool[0] = torch.nan  # where its table points
    before = pool.clone()
    attention = TritonAttention(pool.unbind(1))
    rows = torch.tensor([0, 10**8], dtype=torch.int32)  # far behind the memory of the step
    tables = torch.tensor([[3, 4], [0, 0]], dtype=torch.int32)
    lens = torch.tensor([6, 0], dtype=torch.int32)
    no_tiles = torch.full((2, 3), -1, dtype=torch.int32)
    attention.step = Step(torch.tensor([3 * 8 + 5, -1]), tables, lens, rows, lens, no_tiles)
    states = torch.randn(2, 2, 16)
    attention.write(1, states, states)
    assert torch.equal(pool[3, 1, 0, 5], states[0])
    pool[3, 1, :, 5] = before[3, 1, :, 5]
    assert torch.equal(torch.nan_to_num(pool), torch.nan_to_num(before))
    assert torch.isfinite(attention.attend(1, torch.randn(2, 4, 16), Rule(0.2))[0]).all()


def test_tiles_cover_every_query_of_prompts_once_the_last_first() -> None:
    lens = torch.tensor([1, 2 * NUM_ROWS + 1, 1, 2, NUM_ROWS], dtype=torch.int32)
    assert query_tiles(lens.numpy()).T.tolist() == [
        [4, 0],
        [3, 0],
        [1, 2 * NUM_ROWS],
        [1, NUM_ROWS],
        [1, 0],
    ]
    assert query_tiles(lens[:1].numpy()).shape == (2, 0)


MIXTURES = {"mixtral", "qwen3_moe", "gpt_oss", "glm4_moe", "minimax_m2"}


@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("qwen3", {}),
        ("glm4", FLAT["glm4"]),  # with biases
        *(pytest.param(arch, {}, marks=pytest.mark.full) for arch in ("llama", "qwen2", "mistral")),
        *(pytest.param(*each, marks=pytest.mark.full) for each in FLAT.items() if each[0] != "glm4"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of a gate far below 0, which becomes 0
@torch.inference_mode()
def test_the_flat_forward_equals_the_modules(tmp_path: Path, arch: str, config: dict[str, Any]) -> None:
    """A prompt, and steps of decode that attend to what it wrote; not all places are sampled."""
    model = load_tiny(make_tiny_model(tmp_path / "m", arch, seed=3, **config))
    pools = make_pool(model, 8), make_pool(model, 8)
    plain, attention = TorchAttention(pools[0]), TritonAttention(pools[1])
    modules, flat = (
        ModulesForward(model.module, plain, model.spans),
        make_forward(model.module, attention, model.spans),
    )
    assert isinstance(flat, TritonFlatForward)
    assert flat.can_be_recorded == (arch not in MIXTURES)  # in float32
    sequence = make_sequence([token * 7 % 512 for token in range(20)], [5, 2, 7])
    for num_tokens, places in [(18, [4, 17]), (1, [0]), (1, [])]:
        batch = pack([WorkItem(sequence, num_tokens)], BLOCK_SIZE)
        sequence.num_computed_tokens += num_tokens
        outs = []
        for forward, backend in ((modules, plain), (flat, attention)):
            backend.bind(batch)
            rows = (torch.from_numpy(batch.token_ids), torch.from_numpy(batch.position_ids))
            outs.append(forward(*rows, torch.tensor(places, dtype=torch.int64)))
            last, *others = range(num_tokens - 1, -1, -1)
            pieces = [torch.tensor([last]), torch.tensor(others, dtype=torch.int64)]
            outs.append(torch.cat([logits.clone() for logits in forward.in_pieces(*rows, pieces)]))
        torch.testing.assert_close(outs[2:], outs[:2], atol=1e-4, rtol=0)
        torch.testing.assert_close(pools[1], pools[0], atol=1e-4, rtol=0, equal_nan=True)


@pytest.mark.usefixtures("few_splits")
@pytest.mark.full
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_tokens_are_those_of_torch(tmp_path: Path, arch: str) -> None:
    """Chunks, mixed batches and decode, through the flat forward and the modules."""
    model = load_tiny(make_tiny_model(tmp_path / "m", arch, seed=5))
    outputs = []
    for attention in ("torch", "triton"):
        runner = Runner(model, make_pool(model, 16), attention=attention)
        assert runner.attention.name == attention
        sequences = [
            make_sequence([token * 7 % 512 for token in range(length)], list(range(first, first + 5)))
            for length, first in [(30, 0), (5, 5), (17, 10)]
        ]
        generate(runner, sequences, num_outputs=4, chunk_tokens=12)
        outputs.append([sequence.output_ids for sequence in sequences])
    assert outputs[0] == outputs[1]


def again(work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """In the place of a recorded graph: like one it runs once at once, and sees only its inputs later."""
    work()
    return work


def batch_of(*items: tuple[int, int]) -> PackedBatch:
    """Of each item (tokens computed before, tokens of this step), all that it has but for one of -1."""
    made = []
    for number, (num_computed, num_tokens) in enumerate(items):
        num_all = num_computed + abs(num_tokens) + (num_tokens < 0)
        ids = [(number + token) * 11 % 512 for token in range(num_all)]
        sequence = make_sequence(ids, list(range(4 * number, 4 * number + 4)))
        sequence.num_computed_tokens = num_computed
        made.append(WorkItem(sequence, abs(num_tokens)))
    return pack(made, BLOCK_SIZE)


def record_again(model: LoadedModel, pool: Sequence[torch.Tensor], max_num_blocks: int) -> GraphedSteps:
    weights = flat_weights(model.module, model.spans)
    assert weights is not None
    return GraphedSteps(
        TritonFlatForward(weights, TritonAttention(pool)),
        max_num_seqs=3,
        token_budget=16,
        max_num_blocks=max_num_blocks,
        record=again,
    )


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_triton, "TOKEN_SIZES", (4, 8, 16, 32))


@pytest.mark.usefixtures("few_splits", "few_tokens")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # places left over compute with what they find
@torch.inference_mode()
def test_a_step_in_a_larger_graph_is_the_same_step(tmp_path: Path) -> None:
    model = load_tiny(make_tiny_model(tmp_path / "m", seed=5))
    pool, plain_pool = make_pool(model, 32), make_pool(model, 32)
    for layer, plain_layer in zip(pool, plain_pool, strict=True):
        plain_layer.copy_(layer.normal_(generator=torch.manual_seed(3)))
    plain = TorchAttention(plain_pool)
    modules = ModulesForward(model.module, plain, model.spans)
    graphed = record_again(model, pool, 4)
    torch.testing.assert_close(pool, plain_pool, atol=0, rtol=0)  # recording wrote nothing
    steps = [  # a larger one leaves its numbers behind
        ((4, 4), [(8, 1), (15, 1), (2, 1), (11, 1)]),
        ((1, 1), [(3, 1)]),
        ((16, 8), [(0, 9), (12, 1), (3, 3)]),
        ((8, 4), [(0, 5)]),
        ((4, 4), [(12, 1), (1, 1), (9, 1)]),
        ((16, 8), [(5, 1), (2, -4), *[(3, 1)] * 4]),
        ((8, 4), [(5, 1), (2, -4)]),
        ((8, 4), [(5, -1), (7, 1), (0, 5)]),
        ((8, 4), [(6, -2), (6, -1), (4, -5)]),
        ((2, 2), [(4, 1), (4, 1)]),
    ]
    for shape, items in steps:
        batch = batch_of(*items)
        assert graphed.shape_of(batch) == shape
        plain.bind(batch)
        expected = modules(
            torch.from_numpy(batch.token_ids),
            torch.from_numpy(batch.position_ids),
            torch.from_numpy(batch.logits_indices),
        )
        torch.testing.assert_close(graphed.run(batch, Shape(*shape)), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(pool, plain_pool, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("few_splits", "few_tokens")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@torch.inference_mode()
def test_what_no_graph_was_recorded_for_has_no_shape(tmp_path: Path) -> None:
    model = load_tiny(make_tiny_model(tmp_path / "m"))
    graphed = record_again(model, make_pool(model, 32), 2)
    assert graphed.shape_of(batch_of((2, 1), (2, 1)))
    assert not graphed.shape_of(batch_of(*[(2, 1)] * 5))  # items, of decode alone
    assert graphed.shape_of(batch_of((0, 16)))
    assert not graphed.shape_of(batch_of((0, 8), (0, 9)))  # tokens
    assert graphed.shape_of(batch_of((0, 2), *[(2, 1)] * 7))
    assert not graphed.shape_of(batch_of((0, 2), *[(2, 1)] * 8))  # items, beside a prompt
    assert not graphed.shape_of(batch_of((2 * BLOCK_SIZE, 1)))  # blocks


OTHER_GPUS = [
    (90, "bf16", "floats"),
    (80, "fp32", "floats"),
    (80, "bf16", "codes"),
    (90, "bf16", "codes"),
    (80, "fp32", "codes"),
]


@pytest.mark.parametrize(
    ("capability", "dtype", "stores"),
    [(80, "bf16", "floats"), *(pytest.param(*each, marks=pytest.mark.full) for each in OTHER_GPUS)],
)
def test_kernels_compile_for_gpus(tmp_path: Path, capability: int, dtype: str, stores: str) -> None:
    """A100, H100. Shared memory stays within the 99 KiB that every GPU since the A10 has."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("triton_compiler.py")), str(capability)]
    done = subprocess.run(
        [*command, dtype, stores],
        env=environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    products = [line[0] for line in lines if line[0] == "multiply_groups"]
    assert (len(products) > 10) == (stores == "codes")
    assert [line[0] for line in lines[: len(lines) - len(products)]] == [
        "write_kv",
        "attend_latents",
        "attend_prompts",
        "attend_splits",
        "merge_splits",
        "add_and_norm",
        "gate",
        "rotate_and_write",
        # Of a layer with a window, sinks and a cap on scores:
        "attend_latents",
        "attend_prompts",
        "attend_splits",
        "merge_splits",
    ]
    assert all(int(num_bytes) > 0 and int(shared) <= 99 << 10 for _, num_bytes, shared in lines)


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1]), (3, [1, 2, 4]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 16])]
)
def test_graphs_of_decode_are_recorded_for_a_few_sizes(most: int, sizes: list[int]) -> None:
    found = [shape for shape in graph_shapes(most, 64) if not shape.has_prompts]
    assert found == [(size, size) for size in sizes]


def test_steps_with_prompts_have_graphs_up_to_the_token_budget() -> None:
    # With room for prompts beside all that decode, up to a limit.
    assert graph_shapes(2, 100) == [(1, 1), (2, 2), (64, 32), (128, 64)]
    assert graph_shapes(200, 200)[-2:] == [(192, 96), (256, 96)]
    assert graph_shapes(1, 10_000)[-1] == (1024, 96)
    assert [shape.has_prompts for shape in graph_shapes(1, 10)] == [False, True]


def test_beyond_the_largest_graph_steps_run_without_one() -> None:
    assert max(shape.num_items for shape in graph_shapes(10_000, 10)) == MAX_BATCH
