"""How many nodes' worth of work each side has, and how many nodes it has. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from flowkv_scheduler.state import NodeView
from flowkv_scheduler.weighing import Goals

Side = Literal["prefill", "decode"]
SIDES: tuple[Side, Side] = ("prefill", "decode")

# A prefill node that computes for this part of the time has prompts wait about as long as they take.
FULL_PREFILL = 0.8
# What waits counts as work that should be done within so many goals.
BACKLOG_GOALS = 2.0


def other(side: str) -> Side:
    return "decode" if side == "prefill" else "prefill"


class Scores(NamedTuple):
    """Work in nodes: as many, each at its limit, would do it. A side of pressure 1 is at its limit."""

    prefill_work: float
    decode_work: float
    num_prefill: int
    num_decode: int

    def work(self, side: Side) -> float:
        return self.prefill_work if side == "prefill" else self.decode_work

    def num(self, side: Side) -> int:
        return self.num_prefill if side == "prefill" else self.num_decode

    def of(self, side: Side) -> float:
        """The side's pressure; infinite where nobody stands."""
        return self.work(side) / self.num(side) if self.num(side) else math.inf

    @property
    def worst(self) -> float:
        return max(self.of("prefill"), self.of("decode"))

    def after(self, to: Side) -> Scores:
        """With one node more on a side, and one less on the other, where the last one serves both."""
        num_left = max(1, self.num(other(to)) - 1)
        num = {to: self.num(to) + 1, other(to): num_left}
        return self._replace(num_prefill=num["prefill"], num_decode=num["decode"])

    def __str__(self) -> str:
        return (
            f"prefill {self.prefill_work:.2f} nodes' work on {self.num_prefill}, "
            f"decode {self.decode_work:.2f} on {self.num_decode}"
        )


def scores_of(nodes: Sequence[NodeView], goals: Goals, prefill_rate: float) -> Scores:
    """`prefill_rate`: seconds of prefill that came per second, lately."""
    backlog_s = sum(node.prefill_wait_s for node in nodes)
    return Scores(
        prefill_rate / FULL_PREFILL + backlog_s / (BACKLOG_GOALS * min(goals.ttft_s, goals.max_wait_s)),
        sum(decode_score(node, goals) for node in nodes),
        sum(node.may_prefill for node in nodes),
        sum(node.may_decode for node in nodes),
    )


def decode_score(node: NodeView, goals: Goals) -> float:
    """How far the node is from idle to its limit, in rhythm, room or places, whichever is nearest."""
    if node.num_sequences == 0:
        return 0.0
    one_s = node.speed.decode_step_s(1, 0)
    now_s = node.speed.decode_step_s(node.num_sequences, node.num_context_tokens)
    rhythm = (now_s - one_s) / (goals.itl_s - one_s) if goals.itl_s > one_s else 0.0
    blocks = node.report.blocks
    room = (blocks.leased + blocks.quarantined + node.given.num_blocks) / max(1, blocks.total)
    places = node.num_sequences / max(1, node.report.max_num_seqs)
    return max(rhythm, room, places)
