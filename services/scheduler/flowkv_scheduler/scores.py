"""How hard each side is pressed: its work over what its nodes can do. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from flowkv_scheduler.view import NodeView
from flowkv_scheduler.weighing import Goals

Side = Literal["prefill", "decode"]
SIDES: tuple[Side, Side] = ("prefill", "decode")

# How busy a side may be for its goals: prompts queue long before a prefill node computes all the time, and
# a decode node at its limit takes nobody.
FULL_PREFILL = 0.8
FULL_DECODE = 0.9
# What a node that serves both sides is worth to each.
SHARED = 0.5


def other(side: str) -> Side:
    return "decode" if side == "prefill" else "prefill"


class Load(NamedTuple):
    """Of one side. Prefill is counted in prompt tokens per second, decode in nodes at their limit."""

    work: float
    capacity: float
    num_nodes: int

    @property
    def pressure(self) -> float:
        """0 is idle, 1 is as much as the goals allow; infinite where nobody stands."""
        return self.work / self.capacity if self.capacity > 0 else math.inf


class Scores(NamedTuple):
    """Both sides; and whether any node is fast enough for the inter-token goal, else all count as such."""

    prefill: Load
    decode: Load
    goals: Goals
    can_keep_rhythm: bool

    def of(self, side: Side) -> Load:
        return self.prefill if side == "prefill" else self.decode

    @property
    def worst(self) -> float:
        return max(self.prefill.pressure, self.decode.pressure)

    def capacity(self, node: NodeView, side: Side) -> float:
        """What the node adds to a side that has all of it."""
        if side == "prefill":
            return FULL_PREFILL / node.speed.prefill_token_s
        keeps_rhythm = node.speed.decode_step_s(1, 0) < self.goals.itl_s
        return FULL_DECODE if keeps_rhythm or not self.can_keep_rhythm else 0.0

    def shared_capacity(self, node: NodeView, side: Side) -> float:
        """What the node adds to a side, given that it may serve both."""
        return self.capacity(node, side) * (SHARED if node.may_prefill and node.may_decode else 1.0)

    def after(self, node: NodeView, to: Side) -> Scores:
        """With the node moved. The last one of a side goes on serving it."""
        away = other(to)
        gains, loses = self.of(to), self.of(away)
        is_last = loses.num_nodes == 1
        share = SHARED if is_last else 1.0
        gains = Load(gains.work, gains.capacity + share * self.capacity(node, to), gains.num_nodes + 1)
        capacity = loses.capacity - share * self.capacity(node, away)
        loses = Load(loses.work, capacity, loses.num_nodes - (not is_last))
        prefill, decode = (gains, loses) if to == "prefill" else (loses, gains)
        return self._replace(prefill=prefill, decode=decode)

    def eased_by(self, node: NodeView, to: Side, gain: float) -> bool:
        """Would moving it bring the worse pressure down to at most that part of itself?"""
        return self.after(node, to).worst < self.worst * gain

    def __str__(self) -> str:
        return (
            f"prefill {self.prefill.pressure:.2f} on {self.prefill.num_nodes}, "
            f"decode {self.decode.pressure:.2f} on {self.decode.num_nodes}"
        )


def scores_of(
    nodes: Sequence[NodeView], goals: Goals, prefill_rate: float, output_rate: float = 0.0
) -> Scores:
    """Tokens per second, lately: `prefill_rate` of prompts, `output_rate` of what these should bring.

    Prompts that wait are no sign of a want of prefill nodes: they may wait for room to decode. Those that
    have their pair count at their decode node already, as sequences that we gave it.
    """
    can_keep_rhythm = any(node.speed.decode_step_s(1, 0) < goals.itl_s for node in nodes)
    empty = Scores(Load(0.0, 0.0, 0), Load(0.0, 0.0, 0), goals, can_keep_rhythm)
    prefill = [empty.shared_capacity(node, "prefill") for node in nodes if node.may_prefill]
    decode = [empty.shared_capacity(node, "decode") for node in nodes if node.may_decode]
    decoding = max(sum(decode_score(node, goals) for node in nodes), _nodes_for(nodes, goals, output_rate))
    return empty._replace(
        prefill=Load(prefill_rate, sum(prefill), len(prefill)),
        decode=Load(decoding, sum(decode), len(decode)),
    )


def _nodes_for(nodes: Sequence[NodeView], goals: Goals, output_rate: float) -> float:
    """How many nodes at their limit produce so many tokens per second.

    What decodes now tells late what prompts will bring; as many as come are decoding in the end.
    """
    num_sequences = sum(node.num_sequences for node in nodes)
    context = sum(node.num_context_tokens for node in nodes) / max(1, num_sequences)
    rates = [_tokens_per_s(node, goals, context) for node in nodes if node.may_decode]
    return output_rate * len(rates) / sum(rates) if rates else 0.0


def _tokens_per_s(node: NodeView, goals: Goals, context: float) -> float:
    """With as many sequences of so many tokens each as the goal, the places and the pool allow."""
    each_s = node.speed.sequence_s + context * node.speed.context_token_s
    limits = [float(node.report.max_num_seqs), node.num_tokens_held / max(1.0, context)]
    if each_s > 0.0:
        limits.append((goals.itl_s - node.speed.base_s) / each_s)
    num = max(1.0, min(limits))
    return num / (node.speed.base_s + num * each_s)


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
