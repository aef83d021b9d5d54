"""Which nodes serve the gateway's own model: by the files of its folder, else by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowkv_common.errors import CannotStart
from flowkv_common.fingerprint import fingerprint, model_files
from flowkv_common.wire.messages import ModelCard, ModelFiles
from flowkv_gateway.cluster import OwnModel
from tests.gateway_support import write_tokenizer
from tests.tiny_models import make_tiny_model

ALL = ModelFiles(tokenizer="t", config="c", weights="w")
NO_WEIGHTS = ModelFiles(tokenizer="t", config="c")


def card(name: str = "m", files: ModelFiles = ALL) -> ModelCard:
    return ModelCard(
        name=name, fingerprint="f", max_model_len=64, vocab_size=8, eos_token_ids=[0], files=files
    )


@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        pytest.param(OwnModel(ALL), card(), id="same files"),
        pytest.param(OwnModel(ALL, "alias"), card(), id="an alias of the same weights"),
        pytest.param(OwnModel(NO_WEIGHTS, "m"), card(), id="no weights here, the same name"),
        pytest.param(OwnModel(NO_WEIGHTS), card("any"), id="no weights here, no name either"),
        pytest.param(OwnModel(ALL, "m"), card(files=NO_WEIGHTS), id="random weights there"),
        pytest.param(OwnModel(ModelFiles(tokenizer="t")), card(), id="a tokenizer alone"),
        pytest.param(OwnModel(ALL), card(files=ModelFiles(weights="w")), id="no tokenizer there"),
        pytest.param(
            OwnModel(ALL), card(files=ModelFiles("t", "edited", "w")), id="another config of the same weights"
        ),
    ],
)
def test_nodes_of_the_own_model(own: OwnModel, theirs: ModelCard) -> None:
    assert own.why_not(theirs) is None


@pytest.mark.parametrize(
    ("own", "theirs", "reason"),
    [
        pytest.param(OwnModel(ALL), card(files=ModelFiles("other", "c", "w")), "tokenizer.json", id="ids"),
        pytest.param(OwnModel(ALL, "m"), card(files=ModelFiles("t", "c", "tuned")), "weights", id="tuned"),
        pytest.param(
            OwnModel(NO_WEIGHTS), card(files=ModelFiles("t", "other", "w")), "config.json", id="size"
        ),
        pytest.param(OwnModel(NO_WEIGHTS, "m"), card("tuned"), "FLOWKV_MODEL_NAME='m'", id="by name alone"),
        pytest.param(
            OwnModel(ALL, "m"), card("n", NO_WEIGHTS), "called 'm'", id="random ones of another name"
        ),
    ],
)
def test_nodes_of_another_model(own: OwnModel, theirs: ModelCard, reason: str) -> None:
    assert reason in (own.why_not(theirs) or "")


def test_files_are_told_apart_by_content_wherever_they_lie(tmp_path: Path) -> None:
    one = write_tokenizer(make_tiny_model(tmp_path / "one"))
    copy = write_tokenizer(make_tiny_model(tmp_path / "copy"))
    tuned = write_tokenizer(make_tiny_model(tmp_path / "tuned", seed=1))
    assert model_files(one) == model_files(copy)
    assert all(model_files(one).__struct_fields__)
    assert OwnModel(model_files(one)).why_not(card(files=model_files(tuned))) == "its weights differ"
    same_but_for_weights = model_files(tuned)
    assert (same_but_for_weights.tokenizer, same_but_for_weights.config) == (
        model_files(one).tokenizer,
        model_files(one).config,
    )
    assert model_files(one, has_weights=False).weights == ""
    assert model_files(tmp_path) == ModelFiles()


def digests(folder: Path) -> tuple[str, str]:
    """What nodes compare before they hand KV over, and what a gateway compares."""
    return fingerprint(folder, "float32", has_weights=True), model_files(folder).weights


def folder_with(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, content in {"config.json": "{}", **files}.items():
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
    ],
)
@pytest.mark.parametrize(
    "stray",
    ["consolidated.safetensors", "adapter_model.safetensors", "pytorch_model-old.bin", "training_args.bin"],
)
def test_a_file_that_is_not_read_from_names_no_model(tmp_path: Path, name: str, stray: str) -> None:
    index = json.dumps({"weight_map": {"a": "one", "b": "two", "c": "one"}})
    files = {name: index, "one": "1"} if name.endswith(".json") else {name: "1"}
    shard = "two" if name.endswith(".json") else name
    one = digests(folder_with(tmp_path / "one", **files | {shard: "tuned once"}))
    assert all(one)
    assert digests(folder_with(tmp_path / "with", **files | {shard: "tuned once", stray: "x"})) == one
    tuned = digests(folder_with(tmp_path / "tuned", **files | {shard: "tuned more", stray: "x"}))
    assert set(tuned).isdisjoint(one)


def test_a_folder_without_a_shard_of_its_index_counts_as_one_without_weights(tmp_path: Path) -> None:
    index = {"model.safetensors.index.json": json.dumps({"weight_map": {"a": "one", "b": "two"}})}
    assert model_files(folder_with(tmp_path / "none", **index)).weights == ""
    assert model_files(folder_with(tmp_path / "some", **index, one="1")).weights == ""


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_cannot_be_read_is_named(tmp_path: Path, index: str) -> None:
    folder = folder_with(tmp_path / "m", **{"model.safetensors.index.json": index})
    with pytest.raises(CannotStart, match=r"model\.safetensors\.index\.json is no index of weights"):
        model_files(folder)
