"""Turns a GGUF file into a model folder: config, tokenizer, and weights in the blocks that the file has.

What the file says is read as `transformers` reads it, names and order of rows included; only that it makes
floats of all weights is left out. Rows of the new file's tensors are the GGUF file's, byte for byte.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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

from flowkv_engine.engine.stored import FORMS
from flowkv_engine.engine.stored_modules import FORMS_KEY

_FORMS = {GGMLQuantizationType[form.name]: form for form in FORMS}


def convert_gguf(file: Path, folder: Path) -> None:
    """Writes the model in `file` to the new `folder`. Raises ValueError for one that can't be read."""
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config = AutoConfig.from_pretrained(**source)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tensors, forms = _tensors(file, config)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={FORMS_KEY: json.dumps(forms), "format": "pt"})
    config.architectures = [type(_empty(config)).__name__]
    config.dtype = "float32"  # that of the numbers that weights become
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation = GenerationConfig.from_model_config(config)
    generation.eos_token_id = tokenizer.eos_token_id
    generation.save_pretrained(folder)


def _empty(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _tensors(file: Path, config: Any) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The tensors by the model's names, and the forms of those that are blocks."""
    module = _empty(config)
    reader = GGUFReader(file)
    arch = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    processor = TENSOR_PROCESSORS.get(arch, TensorProcessor)(config=config.to_dict())
    names = get_gguf_hf_weights_map(module, processor)
    tensors: dict[str, NDArray[Any]] = {}
    forms: dict[str, str] = {}
    for tensor in reader.tensors:
        if (name := names.get(tensor.name)) is None:
            continue
        owner = module.get_submodule(name.rpartition(".")[0])
        form = _FORMS.get(tensor.tensor_type)
        if form is not None and name.endswith(".weight") and type(owner) in (nn.Linear, nn.Embedding):
            forms[name] = form.name
            data = tensor.data.view(np.uint8)
        else:
            data = dequantize(tensor.data, tensor.tensor_type)
        # Rows may be in another order than the model's.
        tensors[name] = np.ascontiguousarray(processor.process(weights=data, name=tensor.name).weights)
    return tensors, forms
