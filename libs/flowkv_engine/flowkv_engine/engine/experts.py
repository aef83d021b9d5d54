"""The activation of an MLP, and mixtures of experts in torch: where a row goes, and what is made of it.

Rows are sorted by expert, and each expert multiplies its own: one grouped product for all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear


class Activation(NamedTuple):
    """`gate * sigmoid(gate * (slope + cubic * gate ** 2)) * (up + shift)`.

    Before that the gate is cut at `limit`, and up at both its ends.
    """

    slope: float
    cubic: float = 0.0
    limit: float = math.inf
    shift: float = 0.0

    def __call__(self, gates: Tensor, ups: Tensor) -> Tensor:
        floats = gates.float().clamp(max=self.limit)
        square = floats.square().clamp(max=1e30)  # finite, so that 0 times it is 0
        gated = floats * torch.sigmoid(floats * (self.slope + self.cubic * square))
        return gated.to(gates.dtype) * (ups.clamp(-self.limit, self.limit) + self.shift)


class Router(NamedTuple):
    """Which experts a row goes to: those of the highest scores, and a weight for each."""

    weight: Tensor  # [experts, hidden]: of a row's logits
    bias: Tensor | None  # [experts]
    top_k: int
    is_sigmoid: bool  # a score is the sigmoid of a logit; else the softmax over all
    correction: Tensor | None  # [experts], added to scores for the choice alone
    # Of groups of neighbours, by the sum of their two best, only some stay in the choice.
    num_groups: int
    num_kept_groups: int
    normalizes: bool  # the weights are the scores, or these divided by their sum
    scale: float  # of the weights

    def __call__(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """`states` [T, hidden] -> experts and weights [T, top k], the best first."""
        logits = linear(states, self.weight, self.bias).float()
        scores = logits.sigmoid() if self.is_sigmoid else logits.softmax(-1)
        keys = scores if self.correction is None else scores + self.correction
        if self.num_kept_groups < self.num_groups:
            groups = torch.stack(keys.chunk(self.num_groups, dim=1), dim=1)
            kept = groups.topk(2)[0].sum(-1).topk(self.num_kept_groups)[1]  # [T, kept]
            is_kept = torch.zeros(groups.shape[:2], dtype=torch.bool, device=keys.device)
            is_kept = is_kept.scatter(1, kept, torch.ones_like(kept, dtype=torch.bool))
            keys = groups.masked_fill(~is_kept.unsqueeze(-1), -math.inf).flatten(1)
        ids = keys.topk(self.top_k)[1]
        weights = scores.gather(1, ids)
        if self.normalizes:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids, weights * self.scale


class Experts(NamedTuple):
    """The experts of a layer, each a gated MLP."""

    router: Router
    gate_up: Tensor  # [experts, 2 * size, hidden]
    gate_up_bias: Tensor | None  # [experts, 2 * size]
    is_interleaved: bool  # gate and up take turns; else gate comes first
    down: Tensor  # [experts, hidden, size]
    down_bias: Tensor | None  # [experts, hidden]
    activation: Activation

    def halves(self, gate_up: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Gate and up of `gate_up`, whose dimension `dim` is theirs."""
        if self.is_interleaved:
            gates, ups = gate_up.unflatten(dim, (-1, 2)).unbind(dim + 1)  # type: ignore[no-untyped-call]
        else:
            gates, ups = gate_up.chunk(2, dim)
        return gates, ups

    def __call__(self, states: Tensor) -> Tensor:
        """What a row's experts make of it, weighed and added up: as `states` [T, hidden].

        Shapes don't depend on the routing, and no number is read on the host.
        """
        ids, weights = self.router(states)
        experts, order = ids.flatten().sort(stable=True)
        numbers = torch.arange(len(self.gate_up), device=ids.device)
        ends = torch.searchsorted(experts, numbers, right=True).int()

        def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            out = grouped_mm(rows, weight.transpose(1, 2), offs=ends)
            return out if bias is None else out + bias[experts]

        gate_up = product(states[order // ids.shape[1]], self.gate_up, self.gate_up_bias)
        gated = self.activation(*self.halves(gate_up, 1))
        made = product(gated, self.down, self.down_bias)
        made = torch.empty_like(made).index_copy(0, order, made).view(*ids.shape, made.shape[1])
        return (made * weights.unsqueeze(-1)).sum(1).to(states.dtype)
