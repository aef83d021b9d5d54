"""Multi-head latent attention (MLA): the pool keeps what `transformers` makes keys and values from.

Of a token that is one latent for all heads, and one rotated part of its keys: 512 and 64 numbers in
DeepSeek V3. The model's `expand_kv` would turn them into keys and values of each head, by a matrix. Here
queries are multiplied by the matrix for keys instead, and what they get by that for values: then latents are
the one KV head of all, and are their own values. Sums are the same, in another order.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn


def keep_latents(model: nn.Module) -> None:
    """Makes each layer with MLA hand its latents to the attention function, and no values.

    Not where the attention is `transformers`' own, "eager": a model can be compared with itself.
    """
    part: Any
    for part in model.modules():
        if hasattr(part, "expand_kv") and hasattr(part, "kv_b_proj"):
            part.expand_kv = functools.partial(_join, part)


def _join(part: Any, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor | None]:
    """In the place of `part.expand_kv`. `latent` [1, 1, T, rank], `rotated` [1, 1, T, rotated dims]."""
    if part.config._attn_implementation == "eager":
        expanded: tuple[Tensor, Tensor] = type(part).expand_kv(part, latent, rotated)
        return expanded
    return torch.cat((latent, rotated), dim=-1), None


def absorb(part: Any, query: Tensor) -> Tensor:
    """`query` [T, num_heads, dim] for keys of each head -> for latents, [T, num_heads, rank + rotated]."""
    plain, rotated = torch.split(query, [part.qk_nope_head_dim, part.qk_rope_head_dim], dim=-1)
    of_keys, _ = _matrices(part)
    return torch.cat(((plain.transpose(0, 1) @ of_keys).transpose(0, 1), rotated), dim=-1)


def expand(part: Any, attended: Tensor) -> Tensor:
    """What is had of latents, [T, num_heads, rank + rotated] -> of values, [T, num_heads, v_head_dim]."""
    _, of_values = _matrices(part)
    latent = attended[..., : part.kv_lora_rank].transpose(0, 1)
    return (latent @ of_values.transpose(1, 2)).transpose(0, 1)


def _matrices(part: Any) -> tuple[Tensor, Tensor]:
    """From the latent to keys and values of each head: [num_heads, dim, rank], views of the weight."""
    sizes = [part.qk_nope_head_dim, part.v_head_dim]
    weight: Tensor = part.kv_b_proj.weight
    of_keys, of_values = torch.split(weight.view(-1, sum(sizes), weight.shape[1]), sizes, dim=1)
    return of_keys, of_values
