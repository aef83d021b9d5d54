"""How much nodes and sides have to do: 0 is idle, 1 is at the goal. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from flowkv_scheduler.state import NodeView
from flowkv_scheduler.weighing import Goals

Side = Literal["prefill", "decode"]
SIDES: tuple[Side, Side] = ("prefill", "decode")


def other(side: str) -> Side:
    return "decode" if side == "prefill" else "prefill"


class Scores(NamedTuple):
    """Mean over the nodes of each side; infinite where a side has none."""

    prefill: float
    decode: float
    num_prefill: int
    num_decode: int

    def of(self, side: Side) -> float:
        return self.prefill if side == "prefill" else self.decode

    def num(self, side: Side) -> int:
        return self.num_prefill if side == "prefill" else self.num_decode

    def without_one(self, side: Side) -> float:
        """Of the side with a node less, its work spread over the others. The last one stays in part."""
        num = self.num(side)
        return self.of(side) * num / (num - 1) if num > 1 else self.of(side)

    def __str__(self) -> str:
        return (
            f"prefill {self.prefill:.2f} on {self.num_prefill}, decode {self.decode:.2f} on {self.num_decode}"
        )


def scores_of(nodes: Sequence[NodeView], goals: Goals) -> Scores:
    prefill = [prefill_score(node, goals) for node in nodes if node.may_prefill]
    decode = [decode_score(node, goals) for node in nodes if node.may_decode]
    return Scores(_mean(prefill), _mean(decode), len(prefill), len(decode))


def prefill_score(node: NodeView, goals: Goals) -> float:
    """1 where prompts wait for half of what is allowed: of the time to the first token, or of what the door
    admits, whichever is less."""
    return node.prefill_wait_s / (min(goals.ttft_s, goals.max_wait_s) / 2)


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


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else math.inf
