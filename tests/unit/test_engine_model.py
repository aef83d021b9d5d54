from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from flowkv_engine.engine.attention import Span
from flowkv_engine.engine.dry_run import UnsupportedModel
from flowkv_engine.engine.model import eos_token_ids
from tests.drive import load_tiny
from tests.tiny_models import make_tiny_model


def config_only(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama")


def test_card_and_layout(llama: Path) -> None:
    model = load_tiny(llama)
    assert (model.card.name, model.card.max_model_len, model.card.vocab_size) == ("llama", 256, 512)
    assert model.card.eos_token_ids == [2]
    layout = model.layout(16, "bfloat16")
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.block_size) == (3, 2, 16, 16)
    assert layout.block_bytes == 3 * 2 * 16 * 2 * 16 * 2


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({"generation_config": {"eos_token_id": [5, 7]}, "config": {"eos_token_id": 2}}, [5, 7, 2]),
        ({"generation_config": {"eos_token_id": 5}, "tokenizer_config": {"eos_token": "<|im_end|>"}}, [5, 9]),
        ({"config": {"eos_token_id": 9}, "tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}}, [9]),
        ({"special_tokens_map": {"eos_token": "<|im_end|>"}, "config": {"eos_token_id": [3]}}, [3, 9]),
        ({"tokenizer_config": {"eos_token": "end"}}, [11]),  # an ordinary token of the vocabulary
        ({"tokenizer_config": {"eos_token": "unheard of"}, "config": {"eos_token_id": 3}}, [3]),
        ({"generation_config": {"eos_token_id": 5}}, [5]),  # not also the 2 that Llama's type defaults to
        ({"config": {"text_config": {"eos_token_id": 4}}}, [4]),
        ({"config": {"eos_token_id": -1}, "generation_config": {"eos_token_id": 9999}}, []),
        ({}, [2]),  # nobody says: the default of the type
    ],
)
def test_every_end_of_text_counts(llama: Path, tmp_path: Path, files: dict[str, Any], eos: list[int]) -> None:
    tokenizer = {"added_tokens": [{"id": 9, "content": "<|im_end|>"}], "model": {"vocab": {"end": 11}}}
    for name, fields in {"tokenizer": tokenizer, **files}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(fields))
    assert eos_token_ids(tmp_path, AutoConfig.from_pretrained(llama)) == eos


@pytest.mark.parametrize(
    "files",
    [
        {"special_tokens_map": "{bad"},
        {"special_tokens_map": "[]"},
        {"generation_config": "\x00"},
        {"generation_config": '{"eos_token_id": "</s>"}'},
        {"generation_config": '{"eos_token_id": [[2]]}'},
        {"tokenizer_config": '{"eos_token": "</s>"}', "tokenizer": '{"model": 1}'},
        {"tokenizer_config": '{"eos_token": "</s>"}', "tokenizer": '{"added_tokens": [{"id": 9}]}'},
        {"tokenizer_config": '{"eos_token": "</s>"}', "tokenizer": '{"model": {"vocab": {"</s>": "9"}}}'},
    ],
)
def test_a_file_that_names_no_end_of_text_in_a_readable_way_is_named_before_weights_are_read(
    tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:

    def read(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read)
    folder = make_tiny_model(tmp_path / "model")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content)
    with pytest.raises(UnsupportedModel) as caught:
        load_tiny(folder)
    assert str(caught.value).startswith(
        f"{folder / list(files)[-1]}.json does not say which token ends a text: "
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tokenizer",
    [
        "{}",
        '{"model": null, "added_tokens": null}',
        '{"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["</s>", -1.5]]}}',
    ],
)
def test_a_tokenizer_without_such_a_token_adds_none(tmp_path: Path, tokenizer: str) -> None:
    folder = make_tiny_model(tmp_path / "model")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "other": Infinity}')
    (folder / "tokenizer.json").write_text(tokenizer)
    assert load_tiny(folder).card.eos_token_ids == [2]


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map"])
def test_ids_are_not_read_where_only_the_text_counts(tmp_path: Path, name: str) -> None:
    folder = make_tiny_model(tmp_path / "model")
    content = '{"eos_token": "</s>", "eos_token_id": "9", "text_config": "t"}'
    (folder / f"{name}.json").write_text(content)
    (folder / "tokenizer.json").write_text('{"added_tokens": [{"id": 7, "content": "</s>"}]}')
    assert load_tiny(folder).card.eos_token_ids == [2, 7]


def test_the_card_has_every_end_of_text(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert load_tiny(folder).card.eos_token_ids == [5, 7, 2]


def test_fingerprint_names_content_and_dtype(llama: Path, tmp_path: Path) -> None:
    fingerprint = load_tiny(llama).card.fingerprint
    assert load_tiny(make_tiny_model(tmp_path / "copy")).card.fingerprint == fingerprint
    others = {
        load_tiny(make_tiny_model(tmp_path / "other", seed=1)).card.fingerprint,
        load_tiny(llama, dtype=torch.bfloat16).card.fingerprint,
        load_tiny(llama, load_format="dummy").card.fingerprint,
    }
    assert len(others | {fingerprint}) == 4


def test_dummy_weights_do_not_depend_on_the_generator(llama: Path) -> None:
    first = load_tiny(llama, load_format="dummy").module.state_dict()
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    second = load_tiny(llama, load_format="dummy").module.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["model.embed_tokens.weight"].std() > 0


@pytest.mark.parametrize(
    ("arch", "config", "window"),
    [
        ("mistral", {"sliding_window": 32}, 32),
        ("mistral", {"sliding_window": None}, 0),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 32}, 0),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, 32),
        ("qwen3", {"layer_types": ["full_attention"] * 3, "sliding_window": 32}, 0),
    ],
)
def test_a_layer_has_the_window_that_its_config_says(
    tmp_path: Path, arch: str, config: dict[str, Any], window: int
) -> None:
    model = load_tiny(make_tiny_model(tmp_path / "m", arch, **config))
    assert model.spans[-1] == Span(window)
    assert model.card.max_model_len == 256


def test_rope_that_changes_with_the_batch_limits_the_length(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    config: dict[str, Any] = {"head_dim": 8, "rope_parameters": rope, "original_max_position_embeddings": 64}
    folder = make_tiny_model(tmp_path / "m", "phi3", **config)
    assert load_tiny(folder).card.max_model_len == 64


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "mamba"}, "recurrent state"),
        ({"model_type": "vit"}, "not a causal language model"),
        ({"model_type": "deepseek_v3", "num_hidden_layers": 2}, "MLA"),
        ({"model_type": "qwen3_next", "num_hidden_layers": 4}, "recurrent state"),
        ({"model_type": "falcon", "num_hidden_layers": 2}, "FalconForCausalLM .* its attention be replaced"),
        ({"model_type": "nemotron", "num_key_value_heads": 8}, "does not hand on"),
        ({"model_type": "no-such-model"}, "no config that transformers knows"),
    ],
)
def test_what_cannot_be_served_is_refused_before_weights_are_read(
    tmp_path: Path, config: dict[str, Any], why: str
) -> None:
    with pytest.raises(UnsupportedModel, match=why):
        load_tiny(config_only(tmp_path / "model", **config))


def test_a_folder_without_config_or_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="no config"):
        load_tiny(tmp_path)
    with pytest.raises(UnsupportedModel, match="holds no weights"):
        load_tiny(config_only(tmp_path / "model", model_type="llama"))


def test_an_unknown_load_format_is_refused(llama: Path) -> None:
    with pytest.raises(ValueError, match="FLOWKV_LOAD_FORMAT is 'npz'"):
        load_tiny(llama, load_format="npz")
