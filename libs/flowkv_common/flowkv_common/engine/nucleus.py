"""Draws one token by inverse CDF over descending probabilities, cut by top_k, then top_p, then min_p."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowkv_common.wire.messages import SamplingParams

PREFIX_LEN = 256  # the most likely tokens: nearly always enough, and far cheaper than sorting a vocabulary


def draw(logits: Tensor, sampling: SamplingParams, uniform: float) -> int:
    """The token at `uniform` in [0, 1) of the distribution of `logits` [vocab] (temperature is applied)."""
    logits = logits.float()
    log_total = logits.logsumexp(-1)
    vocab_size = len(logits)
    place = None
    length = min(PREFIX_LEN, vocab_size)
    while place is None:  # at most twice: the whole vocabulary always decides
        top = logits.topk(length)
        probabilities = (top.values - log_total).exp().double().cpu().numpy()
        place = _place(probabilities, vocab_size, sampling, uniform)
        length = vocab_size
    return int(top.indices[place])


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
