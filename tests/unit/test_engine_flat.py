from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flowkv_engine.engine.attention import Attention, Span, TorchAttention, make_attention
from flowkv_engine.engine.batch import PackedBatch, Sequence, WorkItem, pack
from flowkv_engine.engine.cpu.forward import CpuFlatForward
from flowkv_engine.engine.flat import flat_weights
from flowkv_engine.engine.forward import FlatForward, Forward, ModulesForward, make_forward
from flowkv_engine.engine.model import LoadedModel
from tests.drive import BLOCK_SIZE, load_tiny, make_pool, make_sequence
from tests.tiny_models import ARCHITECTURES, FLAT, FLAT_OFTEN, make_tiny_model


def make_flat(module: nn.Module, attention: Attention, spans: list[Span]) -> FlatForward:
    weights = flat_weights(module, spans)
    assert weights is not None
    return FlatForward(weights, attention)


def packed() -> PackedBatch:
    """Two prompts, of which the second is not the last chunk."""
    prompts = [[token * 7 % 512 for token in range(20)], [token * 5 % 512 for token in range(33)]]
    sequences = [make_sequence(prompts[0], [4, 1, 2]), make_sequence(prompts[1], [3, 0, 7, 5])]
    return pack([WorkItem(sequences[0], 20), WorkItem(sequences[1], 30)], BLOCK_SIZE)


@torch.inference_mode()
def logits(
    make: Callable[[nn.Module, Attention, list[Span]], Forward],
    model: LoadedModel,
    batch: PackedBatch,
    places: list[int],
) -> torch.Tensor:
    attention = TorchAttention(make_pool(model, num_blocks=8))
    forward = make(model.module, attention, model.spans)
    attention.bind(batch)
    rows = (torch.from_numpy(batch.token_ids), torch.from_numpy(batch.position_ids))
    return forward(*rows, torch.tensor(places, dtype=torch.int64))


@pytest.mark.parametrize(
    ("arch", "config"),
    [
        *((arch, {}) for arch in ARCHITECTURES),
        *(pytest.param(*each, marks=pytest.mark.full) for each in FLAT.items()),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
        ),
    ],
)
def test_equals_the_modules(tmp_path: Path, arch: str, config: dict[str, Any]) -> None:
    model = load_tiny(make_tiny_model(tmp_path / "m", arch, seed=3, **config))
    batch = packed()
    places = list(range(50))
    expected = logits(ModulesForward, model, batch, places)
    got = logits(make_flat, model, batch, places)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    # The modules go on working on the fused weights, which are not held twice.
    torch.testing.assert_close(logits(ModulesForward, model, batch, places), expected)


def test_fused_weights_are_shared_with_the_modules(tmp_path: Path) -> None:
    model = load_tiny(make_tiny_model(tmp_path / "m"))
    make_flat(model.module, TorchAttention(make_pool(model, num_blocks=1)), model.spans)
    attention = model.module.get_submodule("model.layers.1.self_attn")
    storages = {getattr(attention, name).weight.untyped_storage().data_ptr() for name in ("q_proj", "v_proj")}
    assert len(storages) == 1


def test_no_logits_where_none_are_asked_for(tmp_path: Path) -> None:
    model = load_tiny(make_tiny_model(tmp_path / "m"))
    assert logits(make_flat, model, packed(), []).shape == (0, 512)


@pytest.mark.parametrize(("arch", "config"), [("gpt2", {}), ("llama", {"hidden_act": "gelu"})])
def test_other_models_have_none(tmp_path: Path, arch: str, config: dict[str, Any]) -> None:
    model = load_tiny(make_tiny_model(tmp_path / "m", arch, **config))
    assert flat_weights(model.module, model.spans) is None


@pytest.mark.parametrize(
    ("arch", "config"),
    [
        *((arch, {}) for arch in ARCHITECTURES),
        *(
            pytest.param(*each, marks=[pytest.mark.full] * (each[0] not in FLAT_OFTEN))
            for each in FLAT.items()
        ),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"vocab_size": 509}),  # no whole number of vectors
    ],
)
@torch.inference_mode()
def test_compiled_equals_the_modules(tmp_path: Path, arch: str, config: dict[str, Any]) -> None:
    model = load_tiny(make_tiny_model(tmp_path / "m", arch, seed=3, **config))
    batch = packed()
    places = list(range(50))
    expected = logits(ModulesForward, model, batch, places)
    attention = make_attention("cpu", make_pool(model, num_blocks=8))
    forward = make_forward(model.module, attention, model.spans)
    assert isinstance(forward, CpuFlatForward)
    attention.bind(batch)
    rows = (torch.from_numpy(batch.token_ids), torch.from_numpy(batch.position_ids))
    got = forward(*rows, torch.tensor(places))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


ONE_OF_EACH = ["llama", "glm4_moe", pytest.param("gpt_oss", marks=pytest.mark.full)]


@pytest.mark.parametrize("arch", ONE_OF_EACH)
@torch.inference_mode()
def test_a_decoding_sequence_has_the_same_logits_alone_and_in_company(tmp_path: Path, arch: str) -> None:
    """To the bit: what is drawn from them must not depend on who else is in the batch."""
    model = load_tiny(make_tiny_model(tmp_path / "m", arch, seed=3, **FLAT.get(arch, {})))
    attention = make_attention("cpu", make_pool(model, num_blocks=64, fill=0.1))
    forward = make_forward(model.module, attention, model.spans)
    sequences = [make_sequence([token] * (9 * token), [token, 9 + token, 20]) for token in (1, 2)]
    for sequence in sequences:
        sequence.num_computed_tokens = sequence.num_tokens - 1

    def last_logits(*these: Sequence) -> torch.Tensor:
        batch = pack([WorkItem(sequence, 1) for sequence in these], BLOCK_SIZE)
        attention.bind(batch)
        rows = (torch.from_numpy(batch.token_ids), torch.from_numpy(batch.position_ids))
        return forward(*rows, torch.arange(len(these)))[-1].clone()

    assert torch.equal(last_logits(sequences[0]), last_logits(sequences[1], sequences[0]))


@pytest.mark.parametrize("arch", ONE_OF_EACH)
@torch.inference_mode()
def test_a_prompt_has_the_same_logits_however_it_is_cut_and_in_company(tmp_path: Path, arch: str) -> None:
    """To the bit: the layers know no difference between many rows and few."""
    model = load_tiny(make_tiny_model(tmp_path / "m", arch, seed=3, **FLAT.get(arch, {})))
    prompt = [token * 7 % 512 for token in range(70)]

    def last_logits(*sizes: int, company: int) -> torch.Tensor:
        attention = make_attention("cpu", make_pool(model, num_blocks=64))
        forward = make_forward(model.module, attention, model.spans)
        sequence = make_sequence(prompt, list(range(9)))
        other = make_sequence([5] * 200, list(range(9, 40)))
        for size in sizes:
            items = [WorkItem(sequence, size), *([WorkItem(other, company)] if company else [])]
            batch = pack(items, BLOCK_SIZE)
            attention.bind(batch)
            rows = (torch.from_numpy(batch.token_ids), torch.from_numpy(batch.position_ids))
            logits = forward(*rows, torch.tensor([size - 1]))
            for item in items:
                item.sequence.num_computed_tokens += item.num_tokens
        return logits[0].clone()

    whole = last_logits(70, company=0)
    assert torch.equal(last_logits(33, 37, company=0), whole)
    assert torch.equal(last_logits(2, 60, 8, company=50), whole)
