"""Chooses tokens: a pure function of seed, output index, logits, prompt and output ids.

So a request gets the same text whichever node samples, in whatever company, also after a retry.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowkv_common.engine.nucleus import draw
from flowkv_common.wire.parts import SamplingParams, TokenLogprob

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
    """One token per row of `logits` [n, vocab], any float dtype.

    `min_tokens` holds `eos_token_ids` back, and the request's own `stop_token_ids`.

    Raises FloatingPointError if a row has no finite maximum.
    """
    top = logits.max(dim=-1)  # NaN counts as the greatest, so the maximum shows any
    rows = [row for row, value in enumerate(top.values.tolist()) if not math.isfinite(value)]
    if rows:
        raise FloatingPointError(f"the logits of rows {rows} are not finite")
    adjusted = {
        row: states
        for row, input in enumerate(inputs)
        if (states := _adjusted(logits[row], input, eos_token_ids)) is not None
    }
    tokens = top.indices.tolist()
    for row, states in adjusted.items():
        tokens[row] = int(states.argmax())
    drawn = [row for row, input in enumerate(inputs) if input.sampling.temperature >= GREEDY_BELOW]
    if drawn:
        for row, token_id in zip(drawn, _draw(logits, adjusted, inputs, drawn), strict=True):
            tokens[row] = token_id
    return [
        Sampled(token_id, _logprob(logits, row, token_id, input.sampling.num_logprobs))
        for row, (token_id, input) in enumerate(zip(tokens, inputs, strict=True))
    ]


def _draw(
    logits: Tensor, adjusted: dict[int, Tensor], inputs: list[SampleInput], rows: list[int]
) -> list[int]:
    """Tokens of those `rows`, drawn together."""
    states = logits[rows].float()
    for place, row in enumerate(rows):
        if row in adjusted:
            states[place] = adjusted[row]
    samplings = [inputs[row].sampling for row in rows]
    temperatures = torch.tensor([sampling.temperature for sampling in samplings], device=states.device)
    uniforms = [_uniform(inputs[row].sampling.seed, inputs[row].output_index) for row in rows]
    return draw(states / temperatures.unsqueeze(1), samplings, uniforms)


def _uniform(seed: int, output_index: int) -> float:
    """A number in [0, 1) that depends on nothing else: counter-based, so no generator state has to travel."""
    philox = np.random.Philox(key=seed % 2**64, counter=output_index)
    return float(np.random.Generator(philox).random())


def _adjusted(raw: Tensor, input: SampleInput, eos_token_ids: list[int]) -> Tensor | None:
    """The row with penalties, bias and ends of text masked, as a new fp32 tensor; `None` if it has none."""
    sampling = input.sampling
    holds_stops_back = input.output_index < sampling.min_tokens
    if not (has_penalties(sampling) or sampling.logit_bias or holds_stops_back):
        return None
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
    if holds_stops_back:
        stops = {*eos_token_ids, *sampling.stop_token_ids}
        row[_index([token_id for token_id in stops if 0 <= token_id < len(row)], row)] = -torch.inf
    return row


def _penalize_repetition(row: Tensor, token_ids: list[int], penalty: float) -> None:
    """Makes seen tokens less likely, whatever the sign of their logit (in place)."""
    seen = _index(sorted(set(token_ids)), row)
    values = row[seen]
    row[seen] = torch.where(values < 0, values * penalty, values / penalty)


def _index(token_ids: list[int], row: Tensor) -> Tensor:
    return torch.tensor(token_ids, dtype=torch.int64, device=row.device)


def _logprob(logits: Tensor, row: int, token_id: int, num_top: int | None) -> TokenLogprob | None:
    """Log probabilities under the model itself, if asked for: before temperature, penalties and cuts."""
    if num_top is None:
        return None
    logprobs = logits[row].float().log_softmax(-1)
    top = logprobs.topk(min(num_top, len(logprobs)))
    return TokenLogprob(
        token_id=token_id,
        logprob=float(logprobs[token_id]),
        top=list(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    )
