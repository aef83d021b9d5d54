"""Draws one token by inverse CDF over descending probabilities, cut by top_k, then top_p, then min_p."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from flowkv_common.wire.parts import SamplingParams

PREFIX_LEN = 256  # the most likely tokens: nearly always enough, and far cheaper than sorting a vocabulary
GROUP_SIZE = 16  # tokens of which only the greatest is looked at first


def draw(logits: Tensor, samplings: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """Per row of `logits` [n, vocab] (temperature is applied) the token at its uniform number in [0, 1).

    A row gets the same token in any company.
    """
    logits = logits.float()
    peaks = logits.amax(-1, keepdim=True)
    # In double precision, so that the order of the sum, which hangs on the number of rows, does not show.
    totals = (logits - peaks).exp_().sum(-1, keepdim=True, dtype=torch.float64).log_()
    log_totals = (peaks + totals).float()  # [n, 1]
    vocab_size = logits.shape[1]
    tokens = [-1] * len(logits)
    rows, length = list(range(len(logits))), min(PREFIX_LEN, vocab_size)
    while rows:  # at most twice: the whole vocabulary always decides
        values, token_ids = _most_likely(logits[rows], length)
        probabilities = (values - log_totals[rows]).exp_().double().cpu().numpy()
        places = [
            _place(mine, vocab_size, samplings[row], uniforms[row])
            for row, mine in zip(rows, probabilities, strict=True)
        ]
        known = [n for n, place in enumerate(places) if place is not None]
        chosen = token_ids[known, [place for place in places if place is not None]].tolist()
        for n, token_id in zip(known, chosen, strict=True):
            tokens[rows[n]] = token_id
        rows = [row for row, place in zip(rows, places, strict=True) if place is None]
        length = vocab_size
    return tokens


def _most_likely(logits: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Values and ids of the `length` greatest of each row of `logits` [n, vocab], in descending order.

    They all lie in the `length` groups with the greatest maxima: only those have to be sorted.
    """
    num_rows, vocab_size = logits.shape
    if vocab_size <= GROUP_SIZE * length:
        top = logits.topk(length)
        return top.values, top.indices
    padded = pad(logits, (0, -vocab_size % GROUP_SIZE), value=-torch.inf)
    groups = padded.view(num_rows, -1, GROUP_SIZE)
    best = groups.amax(-1).topk(length).indices.unsqueeze(-1)  # [n, length, 1]
    top = groups.gather(1, best.expand(-1, -1, GROUP_SIZE)).flatten(1).topk(length)
    chosen = best.squeeze(-1).gather(1, top.indices // GROUP_SIZE)
    return top.values, chosen * GROUP_SIZE + top.indices % GROUP_SIZE


def _place(
    probabilities: NDArray[np.float64], vocab_size: int, sampling: SamplingParams, uniform: float
) -> int | None:
    """Where the draw falls in the descending `probabilities`; `None` if it takes more of them to tell."""
    cumulative = probabilities.cumsum()
    num_kept = _num_kept(probabilities, cumulative, vocab_size, sampling)
    if num_kept is not None:
        cumulative = cumulative[:num_kept]
        target = uniform * cumulative[-1]
    elif sampling.top_k == 0 and sampling.top_p >= 1 and sampling.min_p <= 0 and uniform < cumulative[-1]:
        target = uniform  # nothing is cut, so the probabilities add up to 1
    else:
        return None
    # The last place with any probability, in case rounding has put the target at the very end.
    last = cumulative.searchsorted(cumulative[-1])
    return min(int(cumulative.searchsorted(target, side="right")), int(last))


def _num_kept(
    probabilities: NDArray[np.float64],
    cumulative: NDArray[np.float64],
    vocab_size: int,
    sampling: SamplingParams,
) -> int | None:
    """How many of the most likely tokens stay in the draw; `None` if the cut lies behind what is known."""
    length = len(cumulative)
    top_k = sampling.top_k if 0 < sampling.top_k < vocab_size else vocab_size
    if top_k <= length:
        num_kept, mass = top_k, cumulative[top_k - 1]
    elif sampling.top_k == 0:
        num_kept, mass = vocab_size, 1.0
    else:
        return None  # top_p is a part of what top_k leaves
    if sampling.top_p < 1:
        num_kept = min(num_kept, int(cumulative.searchsorted(sampling.top_p * mass)) + 1)
    if sampling.min_p > 0:
        num_likely = int((probabilities >= sampling.min_p * probabilities[0]).sum())
        if num_likely < length:
            num_kept = min(num_kept, num_likely)
    return num_kept if num_kept <= length else None
