"""Turns a GGUF file into a model folder: config, tokenizer, and weights in the blocks that the file has.

What the file says is read as `transformers` reads it, names and order of rows included; only that it makes
floats of all weights is left out. Rows of the new file's tensors are the GGUF file's, byte for byte.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from flowkv_common.errors import first_line
from flowkv_engine.engine.stored import FORMS
from flowkv_engine.engine.stored_modules import FORMS_KEY

_FORMS = {GGMLQuantizationType[form.name]: form for form in FORMS}


def convert_gguf(file: Path, folder: Path, tokenizer_files: list[Path]) -> None:
    """Writes the model in `file` to the new `folder`, with these tokenizer files or else the file's own.

    Raises ValueError, with a sentence that says what to do, for a file that can't be used.
    """
    reader = _open(file)
    arch = str(_field(reader, "general.architecture"))
    if _field(reader, "split.count", 1) > 1:
        raise ValueError(
            f"{file} is one part of several: join them with llama.cpp's llama-gguf-split --merge"
        )
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with _read_once(reader):
        try:
            config = AutoConfig.from_pretrained(**source)
            module = _empty(config)
            tensors, forms = _tensors(reader, module, arch)
        except Exception as error:  # of libraries that check little
            raise ValueError(
                f"{file} holds a model ({arch}) that can't be read from GGUF ({first_line(error)}): take "
                "its folder of transformers"
            ) from error
        tokenizer = None
        if not tokenizer_files:
            try:
                tokenizer = AutoTokenizer.from_pretrained(**source)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a panic of `tokenizers` is no Exception
                raise ValueError(
                    f"the tokenizer in {file} can't be read ({first_line(error)}): put the model's "
                    "tokenizer.json and tokenizer_config.json beside it"
                ) from error
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={FORMS_KEY: json.dumps(forms), "format": "pt"})
    config.architectures = [type(module).__name__]
    config.dtype = "float32"  # that of the numbers that weights become
    config.save_pretrained(folder)
    generation = GenerationConfig.from_model_config(config)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        generation.eos_token_id = tokenizer.eos_token_id
    for each in tokenizer_files:
        shutil.copy(each, folder)
    generation.save_pretrained(folder)


class _Reader(GGUFReader):  # type: ignore[misc]
    data: NDArray[Any]

    def _get(self, *args: Any, **kwargs: Any) -> Any:
        self.data = self.data.view(np.ndarray)  # a slice of a memmap takes three times as long
        return super()._get(*args, **kwargs)


def _open(file: Path) -> GGUFReader:
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(
                f"{file} is not a GGUF file: give one that llama.cpp reads, a folder of transformers, or a "
                "name on a hub"
            )
    try:
        return _Reader(file)
    except Exception as error:  # of numpy: the reader takes what lengths it finds
        raise ValueError(
            f"{file} is damaged or not complete ({first_line(error)}): fetch it again"
        ) from error


def _field(reader: GGUFReader, name: str, default: Any = "unknown") -> Any:
    field = reader.get_field(name)
    return default if field is None else field.contents()


@contextlib.contextmanager
def _read_once(reader: GGUFReader) -> Iterator[None]:
    """`transformers` opens a file for the config and again for the tokenizer: it gets `reader`, at once."""
    opened_by, gguf.GGUFReader = gguf.GGUFReader, lambda file: reader
    try:
        yield
    finally:
        gguf.GGUFReader = opened_by


def _empty(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _tensors(reader: GGUFReader, module: Any, arch: str) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The tensors by the model's names, and the forms of those that are blocks."""
    processor = TENSOR_PROCESSORS.get(arch, TensorProcessor)(config=module.config.to_dict())
    # Without its parts: each of them would be looked at again, for seconds, under the names that they have.
    whole = SimpleNamespace(config=module.config, state_dict=module.state_dict, named_children=tuple)
    names = get_gguf_hf_weights_map(whole, processor)
    tensors: dict[str, NDArray[Any]] = {}
    forms: dict[str, str] = {}
    for tensor in reader.tensors:
        if (name := names.get(tensor.name)) is None:
            continue
        owner = module.get_submodule(name.rpartition(".")[0])
        form = _FORMS.get(tensor.tensor_type)
        is_matrix = type(owner) is nn.Linear or isinstance(owner, nn.Embedding)
        if form is not None and name.endswith(".weight") and is_matrix:
            forms[name] = form.name
            data = tensor.data.view(np.uint8)
        else:
            data = dequantize(tensor.data, tensor.tensor_type)
        # Rows may be in another order than the model's.
        tensors[name] = np.ascontiguousarray(processor.process(weights=data, name=tensor.name).weights)
    return tensors, forms
