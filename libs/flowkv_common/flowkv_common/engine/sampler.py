"""Chooses tokens: a pure function of seed, output index, logits, prompt and output ids.

So a request gets the same text whichever node samples, in whatever company, also after a retry.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowkv_common.engine.nucleus import draw
from flowkv_common.wire.messages import SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5  # a lower temperature would overflow, and is greedy in all but name


@dataclass(frozen=True, slots=True)
class SampleInput:
    """All that the choice of one token depends on, apart from the logits.

    The ids are needed only where `sampling` asks for penalties.
    """

    sampling: SamplingParams
    output_index: int
    prompt_ids: list[int]
    output_ids: list[int]


class Sampled(NamedTuple):
    """One chosen token; with its log probability where the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None


def has_penalties(sampling: SamplingParams) -> bool:
    """Whether the choice depends on the tokens so far."""
    return (
        sampling.repetition_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
    )


def sample(logits: Tensor, inputs: list[SampleInput], eos_token_ids: list[int]) -> list[Sampled]:
    """One token per row of `logits` [n, vocab], any float dtype. `min_tokens` holds `eos_token_ids` back.

    Raises FloatingPointError if a row has no finite maximum.
    """
    top = logits.max(dim=-1)  # NaN counts as the greatest, so the maximum shows any
    if not torch.isfinite(top.values).all():
        rows = (~torch.isfinite(top.values)).nonzero().flatten().tolist()
        raise FloatingPointError(f"the logits of rows {rows} are not finite")
    best = top.indices.tolist()
    return [_sample_row(logits[row], best[row], input, eos_token_ids) for row, input in enumerate(inputs)]


def _sample_row(raw: Tensor, best: int, input: SampleInput, eos_token_ids: list[int]) -> Sampled:
    sampling = input.sampling
    row = _adjusted(raw, input, eos_token_ids)
    if sampling.temperature >= GREEDY_BELOW:
        token_id = draw(row / sampling.temperature, sampling, _uniform(sampling.seed, input.output_index))
    else:
        token_id = best if row is raw else int(row.argmax())
    if sampling.num_logprobs is None:
        return Sampled(token_id, None)
    return Sampled(token_id, _logprob(raw, token_id, sampling.num_logprobs))


def _uniform(seed: int, output_index: int) -> float:
    """A number in [0, 1) that depends on nothing else: counter-based, so no generator state has to travel."""
    philox = np.random.Philox(key=seed % 2**64, counter=output_index)
    return float(np.random.Generator(philox).random())


def _adjusted(raw: Tensor, input: SampleInput, eos_token_ids: list[int]) -> Tensor:
    """The row with penalties, bias and the mask on EOS, as a new fp32 tensor; `raw` itself if it has none."""
    sampling = input.sampling
    holds_eos_back = input.output_index < sampling.min_tokens
    if not (has_penalties(sampling) or sampling.logit_bias or holds_eos_back):
        return raw
    row = raw.float().clone()
    if sampling.repetition_penalty != 1:
        _penalize_repetition(row, [*input.prompt_ids, *input.output_ids], sampling.repetition_penalty)
    if input.output_ids and (sampling.frequency_penalty or sampling.presence_penalty):
        counts = Counter(input.output_ids)
        penalties = [sampling.frequency_penalty * n + sampling.presence_penalty for n in counts.values()]
        row[_index(list(counts), row)] -= torch.tensor(penalties, device=row.device)
    for token_id, bias in sampling.logit_bias.items():
        if 0 <= token_id < len(row):  # an unknown token has no logit: it must not cost the batch its step
            row[token_id] += bias
    if holds_eos_back:
        row[_index(eos_token_ids, row)] = -torch.inf
    return row


def _penalize_repetition(row: Tensor, token_ids: list[int], penalty: float) -> None:
    """Makes seen tokens less likely, whatever the sign of their logit (in place)."""
    seen = _index(sorted(set(token_ids)), row)
    values = row[seen]
    row[seen] = torch.where(values < 0, values * penalty, values / penalty)


def _index(token_ids: list[int], row: Tensor) -> Tensor:
    return torch.tensor(token_ids, dtype=torch.int64, device=row.device)


def _logprob(raw: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """Log probabilities under the model itself: before temperature, penalties and cuts."""
    logprobs = raw.float().log_softmax(-1)
    top = logprobs.topk(min(num_top, len(logprobs)))
    return TokenLogprob(
        token_id=token_id,
        logprob=float(logprobs[token_id]),
        top=list(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    )
