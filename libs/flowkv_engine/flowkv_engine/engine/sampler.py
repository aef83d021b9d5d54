"""Chooses tokens from logits: penalties, temperature, the cuts of top_k, top_p and min_p, log probabilities.

A token is drawn by inverse CDF over the descending probabilities, cut by top_k, then top_p, then min_p. It
depends on the row's logits and its request's parameters alone, never on other rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from flowkv_common.errors import BadRequest
from flowkv_common.wire.messages import GREEDY_BELOW, SamplingParams, TokenLogprob
from flowkv_engine.engine.grammar import Masks, Matcher

PREFIX_LEN = 256  # the most likely tokens: nearly always enough, and far cheaper than sorting a vocabulary
GROUP_SIZE = 16  # tokens of which only the greatest is looked at first


@dataclass(frozen=True, slots=True)
class SampleInput:
    """All that the choice of one token depends on, apart from the logits.

    The ids are needed only where `sampling` asks for penalties; the output's also where it has a grammar or
    bad words.
    """

    sampling: SamplingParams
    output_index: int
    prompt_ids: list[int]
    output_ids: list[int]
    matcher: Matcher | None = None  # of the sequence's grammar
    is_drafted: bool = False  # the last of `output_ids` is a guess; without it, it is the input before


class Sampled(NamedTuple):
    """One chosen token; with its log probability where the request asked for it.

    `ends_grammar`: nothing may come after it. `error`: why its grammar allows no token, and this one is none.
    """

    token_id: int
    logprob: TokenLogprob | None
    ends_grammar: bool = False
    error: BadRequest | None = None


def has_penalties(sampling: SamplingParams) -> bool:
    """Whether the choice depends on the tokens of prompt and output."""
    return (
        sampling.repetition_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
    )


def depends_on_output(sampling: SamplingParams) -> bool:
    """Whether the choice depends on the output's tokens so far."""
    return has_penalties(sampling) or bool(sampling.bad_words)


def sample(
    logits: Tensor, inputs: list[SampleInput], eos_token_ids: list[int], masks: Masks | None = None
) -> list[Sampled]:
    """One token per row of `logits` [n, vocab], any float dtype; one that `masks` allow.

    Until `min_tokens` outputs, `eos_token_ids` and the request's `stop_token_ids` are masked, and always
    tokens that are not among its `allowed_token_ids` or would end one of its `bad_words`: in this order of
    rank, allowed ones first, each as far as anything is left. Raises `FloatingPointError` if a row has no
    finite maximum.
    """
    allowed = masks.apply(logits) if masks else logits
    tokens, maxima = _greatest(allowed)
    if rows := [row for row, value in enumerate(maxima) if not math.isfinite(value)]:
        raise FloatingPointError(f"the logits of rows {rows} are not finite")
    adjusted: dict[int, Tensor] = {}
    for row, input in enumerate(inputs):
        if (states := _adjusted(allowed[row], input, eos_token_ids)) is not None:
            adjusted[row] = states
            tokens[row] = int(states.argmax())

    drawn = [row for row, input in enumerate(inputs) if input.sampling.temperature >= GREEDY_BELOW]
    if drawn:
        scaled = allowed[drawn].float()
        for place, row in enumerate(drawn):
            if row in adjusted:
                scaled[place] = adjusted[row]
        temperatures = [inputs[row].sampling.temperature for row in drawn]
        scaled = scaled / torch.tensor(temperatures, device=scaled.device).unsqueeze(1)
        for row, token_id in zip(drawn, _draw(scaled, [inputs[row] for row in drawn]), strict=True):
            tokens[row] = token_id

    asked = {
        row: num_top
        for row, input in enumerate(inputs)
        if (num_top := input.sampling.num_logprobs) is not None
    }
    found: dict[int, TokenLogprob] = {}
    if asked:
        rows = list(asked)
        entries = logprobs(logits[rows], [tokens[row] for row in rows], list(asked.values()))
        found = dict(zip(rows, entries, strict=True))
    return [Sampled(token_id, found.get(row)) for row, token_id in enumerate(tokens)]


def logprobs(
    logits: Tensor, token_ids: list[int], nums_top: list[int], *, ranked: bool = False
) -> list[TokenLogprob]:
    """Of a token per row of `logits` [n, vocab], and of so many of the best; if `ranked` with its rank.

    They are the model's own: before temperature, penalties and cuts. Raises `FloatingPointError` if a row is
    not finite.
    """
    logits, num_top = logits.float(), min(max(nums_top), logits.shape[1])
    chosen = logits.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1))  # [n, 1]
    totals = logits.logsumexp(-1, keepdim=True)
    values = (chosen - totals).squeeze(1).tolist()
    if rows := [row for row, value in enumerate(values) if math.isnan(value)]:
        raise FloatingPointError(f"the logits of rows {rows} are not finite")
    ranks = (1 + (logits > chosen).sum(-1)).tolist() if ranked else [0] * len(values)
    best = _most_likely(logits, num_top) if num_top else None
    top_ids = best[1].tolist() if best else [[]] * len(values)
    top_values = (best[0] - totals).tolist() if best else [[]] * len(values)
    return [
        TokenLogprob(
            token_id=token_id,
            logprob=value,
            top=list(zip(top_ids[row][:num], top_values[row][:num], strict=True)),
            rank=rank,
        )
        for row, (token_id, value, num, rank) in enumerate(
            zip(token_ids, values, nums_top, ranks, strict=True)
        )
    ]


def _adjusted(raw: Tensor, input: SampleInput, eos_token_ids: list[int]) -> Tensor | None:
    """The row with penalties, bias and bans applied, as a new fp32 tensor; `None` if unchanged."""
    sampling = input.sampling
    # A mask has left them out already, but where a grammar allows nothing else.
    masks_stops = input.output_index < sampling.min_tokens and input.matcher is None
    bad = _ends_of_bad_words(sampling.bad_words, input.output_ids)
    is_bound = bool(bad or sampling.allowed_token_ids)
    if not (has_penalties(sampling) or sampling.logit_bias or masks_stops or is_bound):
        return None
    row = raw.float().clone()
    if sampling.repetition_penalty != 1:  # makes seen tokens less likely, whatever the sign of their logit
        seen = _index({*input.prompt_ids, *input.output_ids}, row)
        values, penalty = row[seen], sampling.repetition_penalty
        row[seen] = torch.where(values < 0, values * penalty, values / penalty)
    if input.output_ids and (sampling.frequency_penalty or sampling.presence_penalty):
        counts = Counter(input.output_ids)
        penalties = [sampling.frequency_penalty * n + sampling.presence_penalty for n in counts.values()]
        row[_index(counts, row)] -= torch.tensor(penalties, device=row.device)
    for token_id in _known(sampling.logit_bias, row):
        row[token_id] += sampling.logit_bias[token_id]
    if sampling.allowed_token_ids:
        banned = torch.ones_like(row, dtype=torch.bool)
        banned[_index(_known(sampling.allowed_token_ids, row), row)] = False
        row = _without(row, banned)
    if masks_stops:
        row = _without(row, _index(_known({*eos_token_ids, *sampling.stop_token_ids}, row), row))
    if bad:
        row = _without(row, _index(_known(bad, row), row))
    return row


def _ends_of_bad_words(bad_words: list[list[int]], output_ids: list[int]) -> set[int]:
    """The tokens that would complete one of the words after this output."""
    num_output = len(output_ids)
    return {word[-1] for word in bad_words if word and output_ids[num_output + 1 - len(word) :] == word[:-1]}


def _without(row: Tensor, banned: Tensor) -> Tensor:
    """The row with the `banned` (ids or a mask) at minus infinity; as it is if that would leave nothing."""
    rest = row.clone()
    rest[banned] = -torch.inf
    return rest if math.isfinite(float(rest.max())) else row


def _known(token_ids: Iterable[int], row: Tensor) -> list[int]:
    """Those that have a logit: an unknown one must not cost the batch its step."""
    return [token_id for token_id in token_ids if 0 <= token_id < len(row)]


def _index(token_ids: Iterable[int], row: Tensor) -> Tensor:
    return torch.tensor(list(token_ids), dtype=torch.int64, device=row.device)


def _greatest(logits: Tensor) -> tuple[list[int], list[float]]:
    """The greatest of each row of `logits` [n, vocab], the first of equals, and its logit.

    NaN counts as the greatest, so the maximum shows any.
    """
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        rows = logits.numpy()  # over ten times as fast as torch
        token_ids = rows.argmax(axis=-1)
        return token_ids.tolist(), rows[np.arange(len(rows)), token_ids].tolist()
    top = logits.max(dim=-1)
    return top.indices.tolist(), top.values.tolist()


def _draw(logits: Tensor, inputs: list[SampleInput]) -> list[int]:
    """A token per row of `logits` [n, vocab], to which temperature is applied."""
    highest = logits.amax(-1, keepdim=True)
    # In double precision, so that the order of the sum, which depends on the number of rows, does not show.
    totals = (logits - highest).exp_().sum(-1, keepdim=True, dtype=torch.float64).log_()
    log_totals = (highest + totals).float()  # [n, 1]
    vocab_size = logits.shape[1]
    tokens = [-1] * len(logits)
    rows, length = list(range(len(logits))), min(PREFIX_LEN, vocab_size)
    while rows:  # at most twice: the whole vocabulary always decides
        values, token_ids = _most_likely(logits[rows], length)
        probabilities = (values - log_totals[rows]).exp_().double().cpu().numpy()
        places = [
            _place(mine, vocab_size, inputs[row]) for row, mine in zip(rows, probabilities, strict=True)
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


def _place(probabilities: NDArray[np.float64], vocab_size: int, input: SampleInput) -> int | None:
    """Where the draw falls in the descending `probabilities`; `None` if it takes more of them to tell."""
    sampling, length, cumulative = input.sampling, len(probabilities), probabilities.cumsum()
    # Counter-based: the number depends on seed and place alone, so no generator state has to travel.
    philox = np.random.Philox(key=sampling.seed % 2**64, counter=input.output_index)
    uniform = float(np.random.Generator(philox).random())  # in [0, 1)

    top_k = sampling.top_k if 0 < sampling.top_k < vocab_size else vocab_size
    if top_k <= length:
        num_kept, mass = top_k, cumulative[top_k - 1]
    elif sampling.top_k == 0:
        num_kept, mass = vocab_size, 1.0
    else:
        return None  # top_p is a share of what top_k leaves
    if sampling.top_p < 1:
        num_kept = min(num_kept, int(cumulative.searchsorted(sampling.top_p * mass)) + 1)
    if sampling.min_p > 0:
        num_likely = int((probabilities >= sampling.min_p * probabilities[0]).sum())
        if num_likely < length:
            num_kept = min(num_kept, num_likely)

    if num_kept <= length:
        cumulative = cumulative[:num_kept]
        target = uniform * cumulative[-1]
    elif sampling.top_k == 0 and sampling.top_p >= 1 and sampling.min_p <= 0 and uniform < cumulative[-1]:
        target = uniform  # nothing is cut, so the probabilities add up to 1
    else:
        return None
    # The last place with any probability, in case rounding has put the target at the very end.
    last = cumulative.searchsorted(cumulative[-1])
    return min(int(cumulative.searchsorted(target, side="right")), int(last))
