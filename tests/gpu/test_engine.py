"""The engine on a GPU: kernels against torch's attention, graphs against steps without, a node's pool."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch.nn.functional import linear

from flowkv_common.config import NodeSettings
from flowkv_common.wire.messages import PoolLayout
from flowkv_engine.engine.attention import Rule, TorchAttention, make_attention
from flowkv_engine.engine.batch import WorkItem, pack
from flowkv_engine.engine.forward import ModulesForward, make_forward
from flowkv_engine.engine.gpu import attention as attention_triton
from flowkv_engine.engine.gpu.linear import grouped
from flowkv_engine.engine.model import CPU
from flowkv_engine.engine.runner import Runner
from flowkv_engine.engine.stored import FORMS, GROUPED_FORMS, Q4_0, Q6_K, Form, widened
from flowkv_node import memory
from tests.drive import BLOCK_SIZE, GREEDY, generate, load_tiny, make_pool, make_sequence
from tests.stored_models import make_stored_model, random_weight
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.gpu
if torch.cuda.is_available():
    assert os.environ.get("TRITON_INTERPRET") != "1", "run `pytest -m gpu tests/gpu`"

CUDA = torch.device("cuda", 0)
CODES = [form for form in (*FORMS, *GROUPED_FORMS) if form.bits < 16]
# (tokens computed before, tokens of this step)
MIXED = [(12, 1), (0, 5), (11, 70), (0, 1), (1300, 1), (40, 24), (180, 230), (4000, 1)]
# So many that contexts of up to 1,024 tokens are not split.
MANY = [*MIXED, *((20 * number, 1) for number in range(1, 65))]


@pytest.mark.parametrize(("head_dim", "num_heads"), [(128, 32), (64, 9), (80, 12)])
@pytest.mark.parametrize("work", [MIXED, MANY], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn], ids=["kv as weights", "kv of e4m3"])
def test_attention_equals_torch(
    monkeypatch: pytest.MonkeyPatch,
    head_dim: int,
    num_heads: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None,
    work: list[tuple[int, int]],
) -> None:
    if work is MANY:
        monkeypatch.setattr(attention_triton, "MANY_PAIRS", 200)  # also of models with few KV heads
    num_kv_heads = num_heads // 4 if num_heads % 4 == 0 else num_heads // 3
    shape = (4096, 2, 2, 16, num_kv_heads, head_dim)
    pool = torch.randn(shape, generator=torch.manual_seed(0)).to(CUDA, kv_dtype or dtype)
    free = iter(torch.randperm(4096, generator=torch.manual_seed(1)).tolist())
    items = []
    for num_computed, num_tokens in work:
        num_all = num_computed + num_tokens
        sequence = make_sequence([0] * num_all, [next(free) for _ in range(-(-num_all // 16))])
        sequence.num_computed_tokens = num_computed
        items.append(WorkItem(sequence, num_tokens))
    batch = pack(items, 16)
    num_tokens = len(batch.token_ids)
    query, key, value = (
        torch.randn(num_tokens, heads, head_dim, device=CUDA, dtype=dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    pools, outs = (pool, pool.clone()), []
    for attention in (TorchAttention(pools[0].unbind(1)), make_attention("auto", pools[1].unbind(1))):
        attention.bind(batch)
        attention.write(1, key, value)
        outs.append(attention.attend(1, query, Rule(head_dim**-0.5)))
    assert torch.equal(*(each.view(torch.uint8) for each in pools))
    torch.testing.assert_close(outs[1], outs[0], atol=2e-2, rtol=2e-2)


def outputs(runner: Runner) -> list[list[int]]:
    sequences = [
        make_sequence([token * 7 % 512 for token in range(length)], list(range(first, first + 27)))
        for length, first in [(200, 0), (30, 27), (5, 54), (17, 81)]
    ]
    generate(runner, sequences, num_outputs=12, chunk_tokens=100)  # so steps get smaller
    return [sequence.output_ids for sequence in sequences]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mistral", "gpt2"])
def test_tokens_are_those_of_the_cpu(tmp_path: Path, arch: str) -> None:
    folder = make_tiny_model(tmp_path / "m", arch, seed=5)
    model = load_tiny(folder, device=CUDA)
    on_cpu = load_tiny(folder)
    expected = outputs(Runner(on_cpu, make_pool(on_cpu, 108)))
    runner = Runner(model, make_pool(model, 108), attention="auto", max_num_seqs=4)
    assert runner.attention.name == "triton"
    assert (runner._graphs is None) == (arch == "gpt2")  # which goes through its modules
    assert outputs(runner) == expected
    runner._graphs = None
    assert outputs(runner) == expected


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_prompts_have_the_log_probabilities_of_the_cpu(tmp_path: Path, arch: str) -> None:
    """In chunks, beside a sequence that decodes."""
    folder = make_tiny_model(tmp_path / "m", arch, seed=5)
    asked = msgspec.structs.replace(GREEDY, num_prompt_logprobs=2)
    told = []
    for device in (CPU, CUDA):
        model = load_tiny(folder, device=device)
        runner = Runner(model, make_pool(model, 54), attention="auto", max_num_seqs=4)
        prompt = make_sequence([token * 7 % 512 for token in range(200)], list(range(27)), asked)
        other = make_sequence([token * 5 % 512 for token in range(30)], list(range(27, 54)))
        entries = []
        for num_tokens in (96, 104):
            items = [WorkItem(other, other.num_new_tokens), WorkItem(prompt, num_tokens)]
            result = runner.run(pack(items, BLOCK_SIZE))
            assert result.sampled[0] is not None
            other.num_computed_tokens, prompt.num_computed_tokens = other.num_tokens, num_tokens
            other.output_ids.append(result.sampled[0].token_id)
            entries += result.prompt_logprobs[1]
        assert [entry.token_id for entry in entries] == prompt.prompt_ids[1:]
        told.append([(entry.logprob, *(value for _, value in entry.top)) for entry in entries])
    torch.testing.assert_close(torch.tensor(told[1]), torch.tensor(told[0]), atol=1e-2, rtol=0)


@pytest.mark.parametrize("form", CODES, ids=[form.name for form in CODES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_rows", [1, 16, 17, 500])
def test_a_product_with_stored_weights_is_that_of_their_floats(
    form: Form, dtype: torch.dtype, num_rows: int
) -> None:
    weight = random_weight(form, 333, 5)
    states = torch.randn(num_rows, weight.shape[1], generator=torch.manual_seed(0)).to(CUDA, dtype)
    floats = torch.from_numpy(widened(weight)).to(CUDA, dtype)
    expected = linear(states.double(), floats.double())
    got = grouped(weight, CUDA).multiply(states, None)
    atol = 2 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(got.double(), expected, atol=max(atol, 1e-5), rtol=0)


@pytest.mark.parametrize("form", [Q4_0, Q6_K], ids=["Q4_0", "Q6_K"])
def test_tokens_of_stored_weights_are_those_of_the_cpu(tmp_path: Path, form: Form) -> None:
    folder = make_stored_model(tmp_path / "m", [form])
    model = load_tiny(folder, device=CUDA)
    on_cpu = load_tiny(folder)
    expected = outputs(Runner(on_cpu, make_pool(on_cpu, 108)))
    runner = Runner(model, make_pool(model, 108), attention="auto", max_num_seqs=4)
    assert runner._graphs is not None
    assert outputs(runner) == expected


def test_a_pool_takes_its_share_of_the_memory() -> None:
    layout = PoolLayout(num_layers=8, block_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")
    settings = NodeSettings(model_path="m", device="cuda", gpu_memory_share=0.2)
    _, total = torch.cuda.mem_get_info(CUDA)
    with memory.make_pool(settings, layout, CUDA) as pool:
        assert pool.tensor.is_cuda
        assert 0 < pool.num_blocks * layout.block_bytes <= 0.2 * total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_the_flat_forward_equals_the_modules(tmp_path: Path, dtype: torch.dtype) -> None:
    """Wide rows and heads of 128. Judged beside what the modules in the same dtype are off from fp32."""
    config: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 3000,
        "num_attention_heads": 8,
        "head_dim": 128,
    }
    folder = make_tiny_model(tmp_path / "m", seed=5, initializer_range=0.05, **config)
    sequence = make_sequence([token * 7 % 512 for token in range(200)], list(range(25)))
    batch = pack([WorkItem(sequence, 200)], BLOCK_SIZE)
    token_ids, position_ids = (
        torch.from_numpy(array).to(CUDA) for array in (batch.token_ids, batch.position_ids)
    )
    places = torch.arange(200, device=CUDA)
    outs = []
    for kind, backend in [(torch.float32, "torch"), (dtype, "torch"), (dtype, "triton")]:
        model = load_tiny(folder, kind, CUDA)
        attention = make_attention(backend, make_pool(model, 25, kind))
        make = make_forward if backend == "triton" else ModulesForward
        forward = make(model.module, attention, model.spans)
        attention.bind(batch)
        outs.append(forward(token_ids, position_ids, places).float())
    exact, modules, flat = outs
    off = (modules - exact).norm() / exact.norm()
    assert 0 < off < 0.05
    assert (flat - exact).norm() / exact.norm() < 1.5 * off
