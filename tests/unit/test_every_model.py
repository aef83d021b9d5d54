"""Every type of causal language model that `transformers` knows gives its tokens, or is refused at once.

What is held here is what README.md and docs/models.md say of the models that are served.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from flowkv_common.wire.messages import LayerKV
from flowkv_engine.engine import runner as engine_runner
from flowkv_engine.engine.attention import Span
from flowkv_engine.engine.batch import PackedBatch
from flowkv_engine.engine.dry_run import UnsupportedModel
from flowkv_engine.engine.model import LoadedModel
from flowkv_engine.engine.runner import Runner, SelfCheck
from tests.drive import BLOCK_SIZE, generate, load_tiny, make_pool, make_sequence
from tests.every_model import (
    PAGE,
    SERVED,
    SERVED_PARTS,
    VOCAB_SIZE,
    page_with,
    tiny_config,
    walk,
    why_refused,
)
from tests.oracle import check_identity
from tests.tiny_models import save_random

CHUNK = 64
NUM_OUTPUTS = 8
FULL = ["full_attention"] * 4
MIXED = ["sliding_attention", "full_attention"] * 2
WINDOW = Span(window=24)
# One of each kind of attention, position, mixture of experts and shape of cache. All others take a minute.
OFTEN = {"llama", "deepseek_v3", "gemma4_text", "opt"}


def random_model(folder: Path, model_type: str, **further: Any) -> LoadedModel:
    save_random(tiny_config(model_type, **further), folder)
    return load_tiny(folder)


def check_tokens(folder: Path, model: LoadedModel, lens: tuple[int, ...]) -> None:
    """Each prompt alone, in chunks, and then all of them at once."""
    rng = random.Random(0)
    num_blocks = [-(-(n + NUM_OUTPUTS) // BLOCK_SIZE) for n in lens]
    runner = Runner(model, make_pool(model, sum(num_blocks)), attention="auto")
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in lens]
    blocks = rng.sample(range(sum(num_blocks)), sum(num_blocks))
    tables = [[blocks.pop() for _ in range(n)] for n in num_blocks]
    alone = [make_sequence(prompt, table) for prompt, table in zip(prompts, tables, strict=True)]
    for sequence in alone:
        generate(runner, [sequence], NUM_OUTPUTS, chunk_tokens=CHUNK)
    together = [make_sequence(prompt, table) for prompt, table in zip(prompts, tables, strict=True)]
    generate(runner, together, NUM_OUTPUTS, chunk_tokens=CHUNK)
    for first, second in zip(alone, together, strict=True):
        assert first.output_ids == second.output_ids
        check_identity(folder, first.prompt_ids, first.output_ids)


@pytest.mark.skipif(
    not transformers.__version__.startswith("5.23."), reason="other versions have other types"
)
def test_every_type_is_served_or_refused_before_weights_are_read_and_the_page_tells(tmp_path: Path) -> None:
    said = walk(tmp_path)
    assert sorted(name for name, why in said.items() if why is None) == sorted(SERVED + SERVED_PARTS)
    for name, why in said.items():
        assert why is None or (f"({name})" in why and "\n" not in why)
    assert page_with(said) == PAGE.read_text(), "write it anew: python -m tests.every_model"


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.full) for name in SERVED]
)
def test_a_type_that_is_served_gives_the_tokens_of_transformers(tmp_path: Path, model_type: str) -> None:
    model = random_model(tmp_path / "m", model_type)
    assert model.card.max_model_len == 256
    check_tokens(tmp_path / "m", model, (3, 17, 100, 200))


@pytest.mark.parametrize(
    ("model_type", "further", "spans"),
    [
        ("gemma3_text", {"layer_types": MIXED}, [WINDOW, Span()] * 2),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, [Span(), *[WINDOW] * 3]),
        ("llama4_text", {"no_rope_layers": [1, 1, 1, 0]}, [*[Span(chunk=24)] * 3, Span()]),
        ("gpt_oss", {}, [WINDOW, Span()] * 2),
        ("mistral", {"sliding_window": 300}, [Span()] * 4),  # longer than the context
        # Their pools follow from what attention writes, not from what the config says of it.
        ("gpt_bigcode", {"multi_query": False}, [Span()] * 4),
        ("gpt_neox", {"num_key_value_heads": 2}, [Span()] * 4),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ("smollm3", {"use_sliding_window": True, "layer_types": MIXED}, [WINDOW, Span()] * 2),
                ("gemma2", {"attn_logit_softcapping": 2.0}, [WINDOW, Span()] * 2),
                ("llama4_text", {"layer_types": FULL}, [Span()] * 4),
                ("lfm2", {"layer_types": FULL}, [Span()] * 4),
                ("bert", {"is_decoder": True}, [Span()] * 4),
            )
        ),
    ],
)
def test_each_layer_sees_as_far_back_as_its_model_says(
    tmp_path: Path, model_type: str, further: dict[str, Any], spans: list[Span]
) -> None:
    model = random_model(tmp_path / "m", model_type, **further)
    assert model.spans == spans
    check_tokens(tmp_path / "m", model, (200, 3))


@pytest.mark.parametrize(
    ("model_type", "full"),
    [
        ("gemma4_text", LayerKV(1, 32)),
        pytest.param("gemma3n_text", LayerKV(2, 16), marks=pytest.mark.full),
    ],
)
def test_layers_that_read_what_others_have_written_keep_nothing(
    tmp_path: Path, model_type: str, full: LayerKV
) -> None:
    model = random_model(tmp_path / "m", model_type, layer_types=MIXED, num_kv_shared_layers=2)
    assert [layer.writer for layer in model.layers] == [0, 1, 0, 1]
    assert model.layout(16, "float32").each_layer == (LayerKV(2, 16), full)
    check_tokens(tmp_path / "m", model, (200, 3))


def test_queries_that_are_scaled_by_their_place_in_a_step_cut_the_context(tmp_path: Path) -> None:
    model = random_model(tmp_path / "m", "llama4_text", floor_scale=64, no_rope_layers=[1, 1, 1, 0])
    assert model.card.max_model_len == 63
    check_tokens(tmp_path / "m", model, (63 - NUM_OUTPUTS, 3))


@pytest.mark.parametrize(
    ("model_type", "further", "why"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "is not causal"),
        ("doge", {"is_moe": True}, "a mask of its own"),
        ("roberta", {"is_decoder": True}, "counts positions on from the id of its padding token"),
        ("xlm-roberta-xl", {"is_decoder": True}, "counts positions on from the id of its padding token"),
        ("granitemoehybrid", {"layer_types": ["attention"] * 4}, "a recurrent state"),
    ],
)
def test_a_form_that_is_not_computed_is_refused(
    tmp_path: Path, model_type: str, further: dict[str, Any], why: str
) -> None:
    assert why in (why_refused(tiny_config(model_type, **further), tmp_path) or "served")


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_a_node_refuses_to_serve_other_logits_than_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_size: int
) -> None:
    """Whatever the reason: here the model's own answer is that of another prompt."""
    model = random_model(tmp_path / "m", "llama")
    plain = engine_runner._plain_logits

    def of_others(module: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
        return plain(module, [[ids[0] ^ 1, *ids[1:]] for ids in prompts])

    monkeypatch.setattr(engine_runner, "_plain_logits", of_others)
    pool = make_pool(model, 20, block_size=block_size)
    with pytest.raises(UnsupportedModel, match="gives other logits than the model, by"):
        Runner(model, pool)


@pytest.mark.parametrize(
    ("dtype", "num_blocks"), [(torch.float32, 1), (torch.bfloat16, 8), (torch.float16, 8)]
)
def test_rounding_is_no_reason_to_refuse(tmp_path: Path, dtype: torch.dtype, num_blocks: int) -> None:
    folder = tmp_path / "m"
    save_random(tiny_config("qwen3_moe"), folder)
    model = load_tiny(folder, dtype)
    Runner(model, make_pool(model, num_blocks, dtype), attention="torch")


@pytest.mark.parametrize("block_size", [1, 4])
def test_small_blocks_are_no_reason_to_refuse_and_kernels_run_before_the_first_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_size: int
) -> None:
    """Compiling takes longer than a step may take."""
    num_logits: list[int] = []
    logits_of = Runner._logits

    def counted(runner: Runner, batch: PackedBatch) -> torch.Tensor:
        num_logits.append(len(batch.query_lens))
        return logits_of(runner, batch)

    monkeypatch.setattr(Runner, "_logits", counted)
    model = random_model(tmp_path / "m", "llama")
    for num_blocks, num_prompts in ((20, 2), (2, 1)):
        Runner(model, make_pool(model, num_blocks, block_size=block_size))
        assert num_logits == [num_prompts] * 2  # the prompts, and a step of decode
        num_logits.clear()


def test_the_check_leaves_the_models_attention_as_it_was(tmp_path: Path) -> None:
    model = random_model(tmp_path / "m", "gpt2")
    SelfCheck(model, make_pool(model, 2))
    module: Any = model.module
    assert module.config._attn_implementation == "flowkv"
