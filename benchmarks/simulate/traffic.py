"""From a trace to the arrivals of one run: a window of it, at the wanted rate."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from benchmarks.simulate.node import ASKED_NEW_TOKENS
from benchmarks.traces import Request


def window(trace: Sequence[Request], num_requests: int, seed: int) -> list[Request]:
    """So many requests in a row, from a place that the seed draws; all in order if there are no more."""
    ordered = sorted(trace, key=lambda request: request.arrival_s)
    begin = random.Random(seed).randint(0, max(0, len(ordered) - num_requests))
    return ordered[begin : begin + num_requests]


def at_rate(requests: Sequence[Request], rate: float, seed: int) -> list[Request]:
    """The same requests at `rate` per second on average, bursts and lulls kept.

    Times are spread over a tick of the trace's clock (Mooncake's ticks each 3 s), and all are moved by an
    exponential jitter of one mean interval, so that two seeds differ also in detail.
    """
    draw = random.Random(seed)
    spread = _spread([request.arrival_s for request in requests], draw)
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
    """Prompts and answers no longer than the model and the clients' limit allow; the ends fall away.

    Raises `ValueError` if the limit, which answers may need, leaves nothing for a prompt.
    """
    if max_model_len <= ASKED_NEW_TOKENS:
        raise ValueError(f"{max_model_len} tokens: {ASKED_NEW_TOKENS} are kept for the answer, none is left")
    cut = []
    for request in requests:
        num_output = min(request.num_output_tokens, ASKED_NEW_TOKENS)
        num_prompt = min(request.num_prompt_tokens, max_model_len - ASKED_NEW_TOKENS)
        cut.append(request._replace(num_prompt_tokens=num_prompt, num_output_tokens=num_output))
    return cut


def _spread(arrivals: Sequence[float], draw: random.Random) -> list[float]:
    """Each somewhere in the tick of its clock: the usual time between two that differ."""
    distinct = sorted(set(arrivals))
    gaps = [following - at for at, following in pairwise(distinct)]
    tick_s = median(gaps) if gaps else 0.0
    room_s = dict(zip(distinct, (min(gap, tick_s) for gap in [*gaps, tick_s]), strict=True))
    return sorted(at + draw.random() * room_s[at] for at in arrivals)
