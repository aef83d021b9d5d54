from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from flowkv_engine.engine.fetch import resolve_model, served_name
from flowkv_engine.engine.stored import FORMS, Form
from tests.drive import load_tiny
from tests.gateway_support import write_tokenizer
from tests.oracle import load_reference
from tests.stored_models import random_blocks

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, VOCAB = 256, 512, 8, 2, 2, 64
NORMS = {"attn_norm", "ffn_norm"}
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "attn_v": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}


def write_gguf(
    file: Path, *, arch: str = "llama", num_parts: int = 1, has_tokenizer: bool = True, merge: str = "A B"
) -> Path:
    """A Llama whose weights have all forms in turn, as llama.cpp's converter writes one."""
    writer = GGUFWriter(file, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(VOCAB)
    if num_parts > 1:
        writer.add_uint16("split.count", num_parts)
    if has_tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([*(chr(ord("!") + n) for n in range(VOCAB - 1)), "AB"])
        writer.add_token_merges([merge])
        writer.add_eos_token_id(3)
        writer.add_bos_token_id(2)
        writer.add_chat_template("{{ messages[0].content }}")
    random = np.random.default_rng(0)
    add(writer, "token_embd.weight", FORMS[3], (VOCAB, HIDDEN))
    for layer in range(LAYERS):
        for name in sorted(NORMS):
            norm = random.standard_normal(HIDDEN).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.{name}.weight", norm)
        for place, (name, shape) in enumerate(SHAPES.items()):
            add(writer, f"blk.{layer}.{name}.weight", FORMS[(place + 7 * layer) % len(FORMS)], shape)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add(writer: GGUFWriter, name: str, form: Form, shape: tuple[int, int]) -> None:
    blocks = random_blocks(form, *shape, seed=len(name))
    if form.name == "F16":
        writer.add_tensor(name, blocks.view(np.float16))
    else:
        writer.add_tensor(name, blocks, raw_dtype=GGMLQuantizationType[form.name])


def test_a_file_becomes_a_folder_with_its_blocks_and_the_numbers_of_transformers(tmp_path: Path) -> None:
    """Rows of queries and keys are in another order there."""
    file = write_gguf(tmp_path / "tiny.gguf")
    folder = resolve_model(str(file), tmp_path / "cache")
    assert resolve_model(str(tmp_path), tmp_path / "cache") == folder
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    ours = load_reference(folder)
    for (name, tensor), other in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    with safe_open(folder / "model.safetensors", framework="np") as tensors:
        assert tensors.get_tensor("model.embed_tokens.weight").dtype == np.uint8
    assert (folder / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    card = load_tiny(folder).card
    assert (card.eos_token_ids, card.name) == ([3], served_name(str(file)))


def test_a_tokenizer_beside_the_file_counts_more_than_its_own(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    file = write_gguf(tmp_path / "tiny.gguf", has_tokenizer=False)
    with pytest.raises(ValueError, match=r"can't be read .*: put the model's tokenizer\.json"):
        resolve_model(str(file), cache)
    write_tokenizer(tmp_path)
    folder = resolve_model(str(file), cache)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5000])


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


def replace(file: Path) -> None:
    file.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, r"is damaged or not complete \(.+\): fetch it again$"),
        (cut_short, r"is damaged or not complete \(.+\): fetch it again$"),
        (replace, "is not a GGUF file: give one that llama.cpp reads, a folder of transformers, or a name"),
        (lambda file: write_gguf(file, arch="rwkv7"), r"holds a model \(rwkv7\) that .* not supported yet"),
        (lambda file: write_gguf(file, num_parts=3), "is one part of several: join them with llama.cpp's"),
        # At this one `tokenizers` panics: that is no Exception.
        (lambda file: write_gguf(file, merge="AB C"), r"can't be read .*: put the model's tokenizer\.json"),
    ],
    ids=["cut", "cut in its header", "foreign", "architecture", "part", "merges"],
)
def test_a_file_that_cannot_be_used_is_told_of_in_a_sentence(
    tmp_path: Path, damage: Callable[[Path], object], told: str
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    damage(file)
    with pytest.raises(ValueError, match=told) as raised:
        resolve_model(str(file), tmp_path / "cache")
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "cache").glob("*/config.json"))


def test_of_several_files_in_a_folder_one_is_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"several GGUF files \(a.gguf, b.gguf\): give the path of one"):
        resolve_model(str(tmp_path), tmp_path / "cache")
