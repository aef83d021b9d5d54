"""Requests as lengths and arrival times: read from a trace, a window of them, at any rate."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

from flowkv_common.errors import CannotStart

# Mooncake's trace names each 512 tokens of a prompt by one id.
TOKENS_PER_HASH_ID = 512
# The max_tokens of simulated clients. Until an answer ends, nothing else is known of its length.
ASKED_NEW_TOKENS = 2048
# Token ids that stand for text in every tokenizer used here.
TOKEN_IDS = range(1000, 30_000)
# An id of a trace, and how many full blocks of its 512 tokens a prompt has: all but for the prompt's end.
Piece = tuple[int, int]


class Request(NamedTuple):
    """Requests that begin with equal `hash_ids` share a prefix of 512 tokens per id; some traces have no ids.

    `arrival_s` counts from the first request. `max_tokens` is what the client asks for, at least the answer.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()
    arrival_s: float = 0.0
    max_tokens: int = ASKED_NEW_TOKENS

    def pieces(self, block_size: int) -> list[Piece]:
        """The full blocks of the prompt that `hash_ids` name, in order."""
        per_id = TOKENS_PER_HASH_ID // block_size
        num_blocks = min(self.num_prompt_tokens // block_size, len(self.hash_ids) * per_id)
        ids = self.hash_ids[: -(-num_blocks // per_id)]
        return [(key, min(per_id, num_blocks - per_id * place)) for place, key in enumerate(ids)]

    def block_hashes(self, block_size: int) -> list[str]:
        """One hash for each block of `pieces`."""
        return hashes_of(self.pieces(block_size))


class Targets(NamedTuple):
    """What users are to see, in seconds. A request is good when it is served within both."""

    ttft_s: float
    tpot_s: float

    def are_met(self, ttft_s: float | None, tpot_s: float) -> bool:
        return ttft_s is not None and ttft_s <= self.ttft_s and tpot_s <= self.tpot_s


def hashes_of(pieces: Sequence[Piece]) -> list[str]:
    """One hash for each block, of 32 hex digits as on the wire."""
    return [f"{key:08x}{place:08x}" * 2 for key, num_blocks in pieces for place in range(num_blocks)]


def tokens_of(hash_ids: Sequence[int], num_tokens: int) -> list[int]:
    """The tokens of a prompt that begins with these ids: equal ids give equal tokens."""
    ids = hash_ids[: -(-num_tokens // TOKENS_PER_HASH_ID)]
    drawn = [token for key in ids for token in random.Random(key).choices(TOKEN_IDS, k=TOKENS_PER_HASH_ID)]
    return drawn[:num_tokens]


def read_trace(path: Path) -> list[Request]:
    """Mooncake's JSON lines or Azure's CSV. Raises CannotStart for anything else."""
    readers = {".jsonl": _read_mooncake, ".csv": _read_azure}
    if path.suffix not in readers:
        raise CannotStart(f"{path}: neither .jsonl (Mooncake) nor .csv (Azure)")
    try:
        with path.open(newline="") as lines:
            requests = list(readers[path.suffix](lines))
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise CannotStart(f"{path}: {error!r}") from error
    if not requests:
        raise CannotStart(f"{path}: no requests")
    return requests


def _read_mooncake(lines: Iterator[str]) -> Iterator[Request]:
    for record in map(json.loads, lines):
        num_output = max(1, record["output_length"])
        hash_ids = tuple(record["hash_ids"])
        yield Request(record["input_length"], num_output, hash_ids, record["timestamp"] / 1e3)


def _read_azure(lines: Iterator[str]) -> Iterator[Request]:
    began: datetime | None = None
    for row in csv.DictReader(lines):
        at = datetime.fromisoformat(row["TIMESTAMP"])
        began = began or at
        num_prompt, num_output = int(row["ContextTokens"]), max(1, int(row["GeneratedTokens"]))
        yield Request(num_prompt, num_output, (), (at - began).total_seconds())


def window(trace: Sequence[Request], num_requests: int, seed: int) -> list[Request]:
    """So many requests in a row, from a place that the seed draws; all in order if there are no more."""
    ordered = sorted(trace, key=lambda request: request.arrival_s)
    begin = random.Random(seed).randint(0, max(0, len(ordered) - num_requests))
    return ordered[begin : begin + num_requests]


def at_rate(requests: Sequence[Request], rate: float, seed: int) -> list[Request]:
    """The same requests at `rate` per second on average, bursts and lulls kept.

    Times are spread over a tick of the trace's clock (3 s in Mooncake's), and each is moved by an exponential
    jitter of one mean interval, so that two seeds differ in detail.
    """
    draw = random.Random(seed)
    distinct = sorted({request.arrival_s for request in requests})
    gaps = [following - at for at, following in pairwise(distinct)]
    tick_s = median(gaps) if gaps else 0.0  # the usual time between two that differ
    room_s = dict(zip(distinct, (min(gap, tick_s) for gap in [*gaps, tick_s]), strict=True))
    spread = sorted(request.arrival_s + draw.random() * room_s[request.arrival_s] for request in requests)
    span_s = max(spread[-1] - spread[0], 1e-9)
    scale = (len(requests) - 1) / span_s / rate if len(requests) > 1 else 0.0
    arrivals = [(at - spread[0]) * scale + draw.expovariate(rate) for at in spread]
    timed = [request._replace(arrival_s=at) for request, at in zip(requests, arrivals, strict=True)]
    return sorted(timed, key=lambda request: request.arrival_s)


def own_rate(requests: Sequence[Request]) -> float:
    """Requests per second, as the trace has them."""
    first, last = requests[0].arrival_s, requests[-1].arrival_s
    return (len(requests) - 1) / (last - first) if last > first else 1.0


def cut_to(requests: Sequence[Request], max_model_len: int) -> list[Request]:
    """Prompts and answers no longer than the model and `ASKED_NEW_TOKENS` allow; the ends fall away.

    Raises CannotStart if the room kept for answers leaves nothing for a prompt.
    """
    if max_model_len <= ASKED_NEW_TOKENS:
        raise CannotStart(f"{max_model_len} tokens: {ASKED_NEW_TOKENS} are kept for the answer, none is left")
    return [
        request._replace(
            num_prompt_tokens=min(request.num_prompt_tokens, max_model_len - ASKED_NEW_TOKENS),
            num_output_tokens=min(request.num_output_tokens, ASKED_NEW_TOKENS),
        )
        for request in requests
    ]
