"""The most requests that any scheduler could serve within both targets: a linear program over node-seconds.

Work is a fluid: a prompt is computed from its arrival until the TTFT target, its answer from then until its
last token is due, in any parts by any nodes. Each node may do both at any moment. Prefixes that came before
are cached everywhere, transfers take no time, the whole traffic is known. So the bound is above what can be
done.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from benchmarks.simulator.batch import step_s
from benchmarks.simulator.kinds import NodeKind
from benchmarks.simulator.run import SLOW_FACTOR, Machines
from flowkv.bench.traces import Request, Targets
from flowkv_common.wire.nodes import num_attended

# Of the time grid: a part of the TTFT target, and no more slots than this.
SLOTS_PER_TTFT = 4
MAX_SLOTS = 300


class Work(NamedTuple):
    """One half of a request: when it may be done, and the least seconds of a node that it takes.

    There are two lower bounds of these. Both hold, but their maximum over each request need not.
    `spread_s`: it takes at least so long, even if it has a node for itself.
    """

    begin_s: float
    end_s: float
    by_itl_s: float
    by_memory_s: float
    spread_s: float


def most_good(machines: Machines, requests: Sequence[Request], targets: Targets) -> float:
    """An upper bound of the requests that meet both targets. All nodes must be of one kind."""
    from scipy.optimize import linprog  # of the developers' extra
    from scipy.sparse import csr_array

    num_slow = machines.num_nodes // 2 if machines.slow_half else 0
    num_fast = machines.num_nodes - num_slow
    speed = num_fast + num_slow / SLOW_FACTOR
    # Slow nodes decode nothing in time if even their empty step is too long.
    can_slow_decode = SLOW_FACTOR * machines.kind.fit.base_s < targets.tpot_s
    works = [
        pair
        for pair in _works(machines.kind, requests, targets)
        if all(w.spread_s <= w.end_s - w.begin_s for w in pair)
    ]
    last_s = max((decode.end_s for _, decode in works), default=1.0)
    slot_s = max(targets.ttft_s / SLOTS_PER_TTFT, last_s / MAX_SLOTS)
    num_slots = int(last_s / slot_s) + 1

    # Columns: the share of each request that is served, then its parts in each slot of its two windows. Rows
    # of `parts`: each half of each request has all its parts, or its share. Of `slots`: what nodes can do.
    parts: list[tuple[int, int, float]] = []  # row, column, value
    slots: list[tuple[int, int, float]] = []
    most = [1.0] * len(works)
    for place, pair in enumerate(works):
        for half, work in enumerate(pair):
            row = 2 * place + half
            parts.append((row, place, -1.0))
            for slot in range(int(work.begin_s / slot_s), int(work.end_s / slot_s) + 1):
                inside_s = min(work.end_s, (slot + 1) * slot_s) - max(work.begin_s, slot * slot_s)
                column = len(most)
                most.append(min(1.0, inside_s / max(work.spread_s, 1e-9)))
                parts.append((row, column, 1.0))
                slots.append((slot, column, work.by_itl_s))
                slots.append((num_slots + slot, column, work.by_memory_s))
                if half:
                    slots.append((2 * num_slots + slot, column, work.by_itl_s))
    decode_speed = speed if can_slow_decode else num_fast
    limits = np.repeat([speed, speed, decode_speed], num_slots) * slot_s

    def matrix(entries: list[tuple[int, int, float]], num_rows: int) -> csr_array:
        rows, columns, values = zip(*entries, strict=True)
        return csr_array((values, (rows, columns)), shape=(num_rows, len(most)))

    if not works:
        return 0.0
    found = linprog(
        np.r_[-np.ones(len(works)), np.zeros(len(most) - len(works))],
        A_ub=matrix(slots, len(limits)),
        b_ub=limits,
        A_eq=matrix(parts, 2 * len(works)),
        b_eq=np.zeros(2 * len(works)),
        bounds=[(0.0, upper) for upper in most],
        method="highs",
    )
    assert found.status == 0, found.message
    return float(-found.fun)


def _works(kind: NodeKind, requests: Sequence[Request], targets: Targets) -> list[tuple[Work, Work]]:
    """Of each request the prompt and the answer.

    By ITL: steps with decoding sequences take at most the TPOT target on average, of which the base is lost.
    By memory: sequences that fit into the pool together share the base of a step.
    """
    fit = kind.fit
    num_tokens_held = kind.num_blocks * kind.layout.block_size
    useful_share = max(1e-9, 1.0 - fit.base_s / targets.tpot_s)
    block_size = kind.layout.block_size
    seen: dict[int, int] = {}  # blocks of each id
    works = []
    for request in requests:
        pieces = request.pieces(block_size)
        hits = takewhile(lambda piece: seen.get(piece[0], 0) >= piece[1], pieces)
        num_hits = min(sum(num for _, num in hits), (request.num_prompt_tokens - 1) // block_size)
        seen.update((key, max(num, seen.get(key, 0))) for key, num in pieces)
        num_cached = num_hits * block_size
        num_new = request.num_prompt_tokens - num_cached
        num_later = request.num_output_tokens - 1
        marginal_s = step_s(fit, num_new, num_attended(num_new, num_cached), 0, 0) - fit.base_s
        # Steps are full of prompts, but one prompt alone does not fill its last one.
        shared_s = marginal_s + fit.base_s * num_new / kind.token_budget
        alone_s = marginal_s + fit.base_s * -(-num_new // kind.token_budget)
        due_s = request.arrival_s + targets.ttft_s
        prefill = Work(request.arrival_s, due_s, shared_s, marginal_s, alone_s)
        mean_length = num_later / 2 + 1
        token_s = fit.sequence_s + fit.context_token_s * (request.num_prompt_tokens + mean_length)
        base_s = fit.base_s * (num_new + mean_length) / num_tokens_held
        decode = Work(
            request.arrival_s + alone_s,
            due_s + num_later * targets.tpot_s,
            num_later * token_s / useful_share,
            num_later * (token_s + base_s),
            num_later * (fit.base_s + token_s),
        )
        works.append((prefill, decode))
    return works
