"""Layers of a model whose weights stay as they are stored, and are widened for each use.

They are what every model's own forward pass runs on. The compiled forward takes their weights and packs them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import linear

from flowkv_engine.engine.stored import BFLOAT16, FLOAT16, FORMS, Form, Stored, widened

BLOCKS = "model.safetensors"
FORMS_KEY = "flowkv_forms"  # in the metadata of a file of blocks: which form each of the tensors has

_PIECE = 4096  # rows that are widened at a time, a part of a large head
STORED_FLOATS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


class StoredWeight(nn.Module):
    """A layer with one matrix."""

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.stored = stored

    @property
    def weight(self) -> Tensor:
        """In float32, made anew."""
        return torch.from_numpy(widened(self.stored))

    def release(self) -> None:
        """Forgets the weight, which has been packed."""
        self.stored = self.stored._replace(blocks=np.empty((0, self.stored.blocks.shape[1]), np.uint8))


class StoredLinear(StoredWeight):
    """`nn.Linear` over a stored weight [out features, in features], in the type of the states.

    `order` [in features]: the input that each stored column is for, if they are not in order.
    """

    def __init__(
        self, stored: Stored, bias: Tensor | None = None, order: NDArray[np.int64] | None = None
    ) -> None:
        super().__init__(stored)
        self.out_features, self.in_features = stored.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.order = order

    @property
    def weight(self) -> Tensor:
        """In float32, made anew."""
        weight = widened(self.stored)
        return torch.from_numpy(weight if self.order is None else weight[:, np.argsort(self.order)])

    def forward(self, states: Tensor) -> Tensor:
        if self.order is not None:
            states = states[..., torch.from_numpy(self.order).to(states.device)]
        pieces = (self.stored.rows(slice(n, n + _PIECE)) for n in range(0, self.out_features, _PIECE))
        out = torch.cat(
            [linear(states, torch.from_numpy(widened(each)).to(states)) for each in pieces], dim=-1
        )
        return out if self.bias is None else out + self.bias


class StoredEmbedding(StoredWeight):
    """`nn.Embedding` in float32 over a stored weight [vocab, hidden], times a number."""

    def __init__(self, stored: Stored, scale: float = 1.0) -> None:
        super().__init__(stored)
        self.num_embeddings, self.embedding_dim = stored.shape
        self.scalar_embed_scale = scale  # its name in `transformers`

    def forward(self, token_ids: Tensor) -> Tensor:
        rows = torch.from_numpy(widened(self.stored.rows(token_ids.flatten().numpy())))
        return rows.view(*token_ids.shape, self.embedding_dim) * self.scalar_embed_scale


class StoredExperts(nn.Module):
    """The experts of `transformers` in float32 over weights of 16 bits."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        # From `nn.Module`, which would widen it with the rest.
        self._hidden = (experts.requires_grad_(False),)

    @property
    def plain(self) -> Any:
        """The experts as they were."""
        return self._hidden[0]

    def forward(self, states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Experts `ids` and their `weights` [T, top k] of the rows of `states` [T, hidden]."""
        experts, out = self.plain, torch.zeros_like(states)

        def product(rows: Tensor, name: str, number: int) -> Tensor:
            weight = getattr(experts, name)[number].float()
            bias = getattr(experts, f"{name}_bias")[number].float() if experts.has_bias else None
            return linear(rows, weight.T if experts.is_transposed else weight, bias)

        for number in sorted(set(ids.flatten().tolist())):
            rows, places = torch.where(ids == number)
            gated = experts._apply_gate(product(states[rows], "gate_up_proj", number))
            made = product(gated, "down_proj", number)
            out.index_add_(0, rows, made * weights[rows, places, None])
        return out


def num_weights(module: nn.Module) -> int:
    """Of a model, those that are stored included."""
    total = sum(each.numel() for each in module.parameters())
    for each in module.modules():
        if isinstance(each, StoredWeight):
            total += math.prod(each.stored.shape)
        elif isinstance(each, StoredExperts):
            total += num_weights(each.plain)
    return total


def scale_of(embedding: nn.Module) -> float:
    """What it multiplies its rows by (Gemma)."""
    scale: float = getattr(embedding, "scalar_embed_scale", 1.0)
    return scale


def has_blocks(folder: Path) -> bool:
    """Whether the folder's weights are blocks, as `convert_gguf` writes them."""
    file = folder / BLOCKS
    return file.is_file() and bool(_forms_in(file))


def _forms_in(file: Path) -> dict[str, Form]:
    """Of the tensors that are blocks; none in a file of another making."""
    with safe_open(file, framework="pt") as tensors:
        names: dict[str, str] = json.loads((tensors.metadata() or {}).get(FORMS_KEY, "{}"))
    return {name: next(form for form in FORMS if form.name == has) for name, has in names.items()}


def blocks_as_floats(file: Path) -> dict[str, Tensor]:
    """The tensors of `file` that are blocks, with the shapes of what they hold, as tensors without values."""
    found = {}
    with safe_open(file, framework="pt") as tensors:
        for name, form in _forms_in(file).items():
            shape = Stored(form, tensors.get_tensor(name).numpy()).shape
            found[name] = torch.empty(shape, dtype=torch.float32, device="meta")
    return found


def load_blocks(module: nn.Module, file: Path, kept: Collection[Form]) -> None:
    """Fills a model with what `file` holds. Blocks of `kept` forms stay so, mapped from the file; others
    become parameters. A head without a tensor shares the embedding's.
    """
    forms = _forms_in(file)
    with safe_open(file, framework="pt") as tensors:
        for name in sorted(tensors.keys()):
            tensor = tensors.get_tensor(name)
            if name not in forms:
                place(module, name, tensor)
            elif forms[name] in kept:
                place(module, name, Stored(forms[name], tensor.numpy()))
            else:
                place(module, name, torch.from_numpy(widened(Stored(forms[name], tensor.numpy()))))
    tie_head(module)


def is_matrix(module: nn.Module, name: str) -> bool:
    """Whether a model's tensor `name` is the weight of a layer that can be a `StoredWeight`."""
    parent, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(module.get_submodule(parent), nn.Linear | nn.Embedding)


def place(
    module: nn.Module,
    name: str,
    weight: Tensor | Stored,
    order: NDArray[np.int64] | None = None,
    *,
    keeps_type: bool = False,
) -> None:
    """Makes `weight` the tensor `name` of a model; a layer's bias is there before its stored weight."""
    parent, _, leaf = name.rpartition(".")
    owner: Any = module.get_submodule(parent)
    if isinstance(weight, Tensor):
        dtype = weight.dtype if keeps_type else getattr(owner, leaf).dtype
        owner._parameters[leaf] = nn.Parameter(weight.to(dtype), requires_grad=False)
    elif isinstance(owner, nn.Embedding):
        module.set_submodule(parent, StoredEmbedding(weight, scale_of(owner)))
    else:
        module.set_submodule(parent, StoredLinear(weight, owner.bias, order))


def tie_head(module: nn.Module) -> None:
    """A head without a tensor of its own gets the embedding's."""
    causal_lm: Any = module
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    if causal_lm.config.tie_word_embeddings:
        if isinstance(embedding, StoredEmbedding):
            causal_lm.set_output_embeddings(StoredLinear(embedding.stored))
        else:
            head.weight = embedding.weight


def widen_embedding(module: nn.Module, dtype: torch.dtype) -> None:
    """Makes floats of a stored embedding; the head keeps what it shares with it."""
    owner: Any = module
    embedding = owner.get_input_embeddings()
    if isinstance(embedding, StoredEmbedding):
        weight = embedding.weight.to(dtype)
        floats: Any = nn.Embedding(len(weight), weight.shape[1], _weight=weight)
        floats.scalar_embed_scale = embedding.scalar_embed_scale
        owner.set_input_embeddings(floats)


def stored_floats(weight: Tensor) -> Stored:
    """A weight of 16-bit floats, as it is."""
    rows = weight.detach().contiguous().view(torch.uint8).numpy()
    return Stored(STORED_FLOATS[weight.dtype], rows)


def _is_experts(module: nn.Module) -> bool:
    return isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)


def keep_stored(module: nn.Module) -> None:
    """Turns the projections and the embedding of a model of 16-bit floats into layers that keep them.

    The others, norms and biases, become float32. Computed are then the numbers that a model in float32 has.
    """
    made: dict[int, Stored] = {}  # by the weight's memory: a head may share the embedding's

    def stored(weight: Tensor) -> Stored:
        if weight.data_ptr() not in made:
            made[weight.data_ptr()] = stored_floats(weight)
        return made[weight.data_ptr()]

    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.dtype in STORED_FLOATS:
                bias = None if child.bias is None else child.bias.detach().float()
                setattr(parent, name, StoredLinear(stored(child.weight), bias))
            elif isinstance(child, nn.Embedding) and child.weight.dtype in STORED_FLOATS:
                setattr(parent, name, StoredEmbedding(stored(child.weight), scale_of(child)))
            elif _is_experts(child) and child.gate_up_proj.dtype in STORED_FLOATS:
                setattr(parent, name, StoredExperts(child))
    module.float()
