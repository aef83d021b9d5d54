from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Phi3Config

from flowkv_common.errors import CannotStart
from flowkv_engine.engine.attention import Span
from flowkv_engine.engine.dry_run import UnsupportedModel
from flowkv_engine.engine.model import LoadedModel, eos_token_ids
from flowkv_engine.engine.positions import fix_positions
from flowkv_engine.engine.runner import Runner
from tests.drive import BLOCK_SIZE, generate, load_tiny, make_pool, make_sequence
from tests.oracle import check_identity
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


def check_tokens(model: LoadedModel, same: Path, num_tokens: int) -> None:
    """The answer to a prompt in chunks is what `transformers` makes of the folder `same`."""
    num_blocks = -(-num_tokens // BLOCK_SIZE) + 1
    sequence = make_sequence([token * 7 % 500 + 3 for token in range(num_tokens)], list(range(num_blocks)))
    generate(Runner(model, make_pool(model, num_blocks), attention="torch"), [sequence], 8, chunk_tokens=32)
    check_identity(same, sequence.prompt_ids, sequence.output_ids)


@pytest.mark.full
@pytest.mark.parametrize("arch", ["phi3", "llama"])
def test_longrope_has_the_factors_of_the_longest_sequence_that_is_served(tmp_path: Path, arch: str) -> None:
    rope: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [2.0, 3.0, 5.0, 8.0],
        "original_max_position_embeddings": 64,
    }
    config: dict[str, Any] = {"head_dim": 8, "rope_parameters": rope, "original_max_position_embeddings": 64}
    folder = make_tiny_model(tmp_path / "m", arch, **config)
    both = {**config, "rope_parameters": {**rope, "short_factor": rope["long_factor"]}}
    with_long = make_tiny_model(tmp_path / "long", arch, **both)
    model = load_tiny(folder)
    assert model.card.max_model_len == 256
    check_tokens(model, folder, 90)  # as `transformers`, which counts by the longest position
    check_tokens(model, with_long, 40)
    short = load_tiny(folder, longest=64)
    assert short.card.max_model_len == 64
    assert short.card.fingerprint != model.card.fingerprint
    check_tokens(short, folder, 40)


@pytest.mark.full
def test_dynamic_rope_is_served_up_to_the_length_where_it_begins_to_change(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    folder = make_tiny_model(tmp_path / "m", rope_parameters=rope)
    model = load_tiny(folder)
    assert model.card.max_model_len == 256
    check_tokens(model, folder, 248)
    with pytest.raises(CannotStart, match="serves 256 tokens at most"):
        load_tiny(folder, longest=257)


CONV = ["conv", "full_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.full
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_positions_that_the_user_gives_count_instead_of_the_configs(tmp_path: Path, field: str) -> None:
    """As model cards tell people to do: YaRN over the length that the model was trained with."""
    short = make_tiny_model(tmp_path / "short", "qwen3", max_position_embeddings=40)
    same = make_tiny_model(tmp_path / "same", "qwen3", max_position_embeddings=40, rope_parameters=YARN)
    overrides = json.dumps({field: YARN})
    model = load_tiny(short, overrides=overrides)
    assert model.card.max_model_len == load_tiny(same).card.max_model_len == 128
    assert model.card.fingerprint != load_tiny(short).card.fingerprint
    check_tokens(model, same, 100)


def test_longrope_has_one_set_of_factors() -> None:
    for max_len, factor in ((4096, 1.0), (4097, 2.0)):
        rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}
        rope |= {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
        config = Phi3Config(rope_parameters=rope)
        fix_positions(config, max_len)
        fixed = config.rope_parameters
        assert fixed["short_factor"] == fixed["long_factor"] == [factor] * 48


def test_a_length_that_the_user_gives_is_at_most_the_models(llama: Path) -> None:
    assert load_tiny(llama, overrides=json.dumps({"rope_scaling": YARN})).card.max_model_len == 256
    longer = json.dumps({"rope_scaling": {**YARN, "factor": 16.0}})
    assert load_tiny(llama, overrides=longer).card.max_model_len == 512
    assert load_tiny(llama, longest=100).card.max_model_len == 100
    with pytest.raises(CannotStart, match="FLOWKV_MAX_MODEL_LEN is 257, but .* serves 256 tokens at most"):
        load_tiny(llama, longest=257)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ("{", "is no JSON object"),
        ("[1]", "is no JSON object"),
        ("yarn", "is no JSON object"),
        (
            '{"max_len": 9, "rope_scale": {}}',
            "sets max_len, rope_scale, which .* llama don't have",
        ),
        ('{"rope_parameters": {"rope_type": "warp"}}', "RoPE of type warp, which transformers doesn't know"),
    ],
)
def test_overrides_without_effect_are_refused(llama: Path, overrides: str, why: str) -> None:
    with pytest.raises(CannotStart, match=why):
        load_tiny(llama, overrides=overrides)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "mamba"}, "recurrent state"),
        ({"model_type": "vit"}, "not a causal language model"),
        ({"model_type": "qwen3_next", "num_hidden_layers": 4}, "recurrent state"),
        ({"model_type": "lfm2", "num_hidden_layers": 2, "layer_types": CONV}, "convolutional state"),
        ({"model_type": "deepseek_v32", "num_hidden_layers": 2}, "an indexer picks the tokens"),
        ({"model_type": "falcon", "num_hidden_layers": 2}, "FalconForCausalLM .* its attention be replaced"),
        ({"model_type": "nemotron", "num_key_value_heads": 8}, "does not hand on"),
    ],
)
def test_what_cannot_be_served_is_refused_before_weights_are_read(
    tmp_path: Path, config: dict[str, Any], why: str
) -> None:
    with pytest.raises(UnsupportedModel, match=why):
        load_tiny(config_only(tmp_path / "model", **config))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "not a valid JSON file"),
        ('{"model_type": "no-such-model"}', "has model type `no-such-model`"),
        ('{"model_type": "llama", "rope_parameters": {"rope_type": "warp"}}', "RoPE of type warp, which"),
        ('{"model_type": "llama", "num_attention_heads": "many"}', "no config that transformers knows"),
    ],
)
def test_a_wrong_config_is_told_in_one_sentence(tmp_path: Path, content: str, why: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnsupportedModel, match=f"^{tmp_path} .*{why}") as caught:
        load_tiny(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_config_or_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="no config"):
        load_tiny(tmp_path)
    with pytest.raises(UnsupportedModel, match="holds no weights"):
        load_tiny(config_only(tmp_path / "model", model_type="llama"))


def test_an_unknown_load_format_is_refused(llama: Path) -> None:
    with pytest.raises(ValueError, match="FLOWKV_LOAD_FORMAT is 'npz'"):
        load_tiny(llama, load_format="npz")
