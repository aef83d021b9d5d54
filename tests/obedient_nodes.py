"""A simple model of a cluster under a rebalancer: nodes obey at once, and report exactly what they have.

Each node runs steps of one chunk and a token for each sequence. Requests go to the prefill node that is free
first and the decode node with the fewest sequences. One that would be late is refused.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from flowkv_common.wire.messages import ModelCard
from flowkv_common.wire.nodes import (
    OutputForecast,
    SetPrefillCap,
    StepFit,
    length_class,
    serves_decode,
    serves_prefill,
)
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.demand import Demand, OutputLengths
from flowkv_scheduler.node_view import Work
from flowkv_scheduler.rebalance import Order, Rebalancer
from flowkv_scheduler.slices import at_once
from tests.described_nodes import BLOCK_SIZE, CAPS, MODEL, TOKEN_BUDGET, Described, cluster, node

TICK_S = 0.5
GOALS = Goals(ttft_s=4.0, itl_s=0.25)
FIT = StepFit(base_s=0.05, prefill_token_s=1e-3, attended_token_s=0.0, sequence_s=0.01, context_token_s=0.0)
NUM_BLOCKS = 4096
MAX_NUM_SEQS = 64
OTHER_MODEL = msgspec.structs.replace(MODEL, name="n", fingerprint="g")


class Mix(NamedTuple):
    """So many requests per second, evenly spaced, of these lengths in turn."""

    rate: float
    lengths: Sequence[tuple[int, int]]  # tokens of a prompt and of its output

    def between(self, since: float, until: float) -> Iterable[tuple[float, int, int]]:
        """When each comes, and its lengths."""
        for number in range(math.ceil(since * self.rate), math.ceil(until * self.rate)):
            yield number / self.rate, *self.lengths[number % len(self.lengths)]


class Life:
    def __init__(self, num_prompt_tokens: int, num_output_tokens: int) -> None:
        self.num_prompt_left = num_prompt_tokens
        self.num_context = num_prompt_tokens
        self.num_left = num_output_tokens
        self.decode: Node | None = None


class Node:
    def __init__(self, name: str, role: str, model: ModelCard = MODEL) -> None:
        self.name, self.role, self.model = name, role, model
        self.host: dict[str, Any] = {}  # what the descriptor says of it
        self.budget = CAPS[role]
        self.prompts: list[Life] = []
        self.sequences: list[Life] = []
        self.coming: list[Life] = []  # their prompts are not computed yet
        self.at = 0.0

    def queue_s(self) -> float:
        num_tokens = sum(one.num_prompt_left for one in self.prompts)
        beside_s = len(self.sequences) * FIT.sequence_s
        return num_tokens * FIT.prefill_token_s + math.ceil(num_tokens / self.budget) * (
            FIT.base_s + beside_s
        )

    def step_s(self, num_more: int = 0) -> float:
        num = len(self.sequences) + len(self.coming) + num_more
        chunk = min(self.budget, sum(one.num_prompt_left for one in self.prompts))
        return FIT.base_s + num * FIT.sequence_s + chunk * FIT.prefill_token_s

    def run_until(self, now: float) -> None:
        while self.at < now:
            room, chunk = self.budget, 0
            for one in self.prompts:
                part = min(one.num_prompt_left, room)
                one.num_prompt_left -= part
                room, chunk = room - part, chunk + part
            if not chunk and not self.sequences:
                self.at = now
                return
            num = len(self.sequences)
            self.at += FIT.base_s + chunk * FIT.prefill_token_s + num * FIT.sequence_s
            for one in self.sequences:
                one.num_context, one.num_left = one.num_context + 1, one.num_left - 1
            self.sequences = [one for one in self.sequences if one.num_left > 0]
            while self.prompts and not self.prompts[0].num_prompt_left:
                one = self.prompts.pop(0)
                assert one.decode is not None
                one.decode.coming.remove(one)
                one.decode.sequences.append(one)

    def described(self) -> Described:
        num_context = sum(one.num_context for one in self.sequences)
        num_left = sum(one.num_left for one in self.sequences)
        num_used = sum(one.num_context // BLOCK_SIZE + 1 for one in self.sequences)
        free = max(0, NUM_BLOCKS - num_used)
        coming = Work(
            num_sequences=len(self.coming),
            num_blocks=sum(one.num_context // BLOCK_SIZE + 1 for one in self.coming),
            context_tokens=sum(one.num_context for one in self.coming),
            output_tokens=float(sum(one.num_left for one in self.coming)),
        )
        described = node(
            self.name,
            self.role,
            num_blocks=NUM_BLOCKS,
            model=self.model,
            given=coming,
            max_prefill_tokens_per_step=self.budget,
            queued_prefill_tokens=sum(one.num_prompt_left for one in self.prompts),
            num_prompts=len(self.prompts),
            num_running=len(self.sequences),
            num_context_tokens=num_context,
            max_num_seqs=MAX_NUM_SEQS,
            step=FIT,
            free=free,
            forecast=OutputForecast(
                tokens_left=float(num_left),
                first_ends_in=float(min((one.num_left for one in self.sequences), default=0)),
                stop_rate=1 / 256,
            ),
        )
        return described._replace(descriptor=msgspec.structs.replace(described.descriptor, **self.host))


class Cluster:
    """Ticks every half second. `orders`: all that was said, and when."""

    def __init__(self, *nodes: Node, rebalancer: Rebalancer | None = None) -> None:
        self.nodes = list(nodes)
        self.rebalancer = rebalancer or Rebalancer(GOALS)
        self.now = 0.0
        self.orders: list[tuple[float, Order]] = []
        self.num_asked = 0
        self.num_lost = 0
        self.demands: defaultdict[str, Demand] = defaultdict(Demand)
        self.lengths: defaultdict[str, OutputLengths] = defaultdict(OutputLengths)
        self._known: dict[str, OutputForecast] = {}

    def play(self, mix: Mix, span_s: float, model: ModelCard = MODEL) -> list[Order]:
        return self.play_all({model.fingerprint: mix}, span_s)

    def play_all(self, mixes: dict[str, Mix], span_s: float) -> list[Order]:
        """Mixes of several models at once, by fingerprint: what was said."""
        for model, mix in mixes.items():
            self._learn_lengths(model, mix)
        num_before, until = len(self.orders), self.now + span_s
        while self.now < until:
            since, self.now = self.now, self.now + TICK_S
            for model, mix in mixes.items():
                for at, num_prompt, num_output in mix.between(since, self.now):
                    self._run_until(at)
                    self.ask(num_prompt, num_output, at, model)
            self._run_until(self.now)
            self.tick()
        return [order for _, order in self.orders[num_before:]]

    def tick(self) -> None:
        views = cluster(*(one.described() for one in self.nodes)).views()
        budgets = {one.name: one for one in self.nodes}
        for order in at_once(self.rebalancer.tick(views, self.demands, self.lengths, self.now)):
            self.orders.append((self.now, order))
            if isinstance(order, SetPrefillCap):
                budgets[order.node.node_id].budget = order.max_prefill_tokens_per_step

    def ask(self, num_prompt: int, num_output: int, at: float, model: str = MODEL.fingerprint) -> None:
        self.num_asked += 1
        self.demands[model].add_request(num_prompt, 0, num_output, at)
        leaving = self.rebalancer.leaving
        mine = [one for one in self.nodes if one.model.fingerprint == model]
        prefill = [
            one
            for one in mine
            if serves_prefill(one.budget, BLOCK_SIZE) and leaving.get(one.name) != "prefill"
        ]
        decode = [
            one
            for one in mine
            if serves_decode(one.budget, TOKEN_BUDGET) and leaving.get(one.name) != "decode"
        ]
        if prefill and decode:
            first, then = min(prefill, key=Node.queue_s), min(decode, key=Node.step_s)
            in_s = first.queue_s() + num_prompt * FIT.prefill_token_s
            if in_s <= GOALS.ttft_s and then.step_s(1) <= GOALS.itl_s:
                one = Life(num_prompt, num_output)
                one.decode = then
                first.prompts.append(one)
                then.coming.append(one)
                return
        self.num_lost += 1
        self.demands[model].add_loss(at)

    def _run_until(self, now: float) -> None:
        for one in self.nodes:
            one.run_until(now)

    def _learn_lengths(self, model: str, mix: Mix) -> None:
        """As if many outputs of the mix had been seen."""
        by_length: defaultdict[int, list[int]] = defaultdict(list)
        for num_prompt, num_output in mix.lengths:
            by_length[length_class(num_prompt)].append(num_output)
        known = OutputForecast(
            tokens_left=0.0,
            first_ends_in=0.0,
            stop_rate=0.0,
            by_length={
                key: (100.0 * len(outputs), 100.0 * sum(outputs)) for key, outputs in by_length.items()
            },
        )
        self.lengths[model].replace_forecast(self._known.get(model), known)
        self._known[model] = known


def four_nodes() -> list[Node]:
    return [Node(name, "prefill" if name[0] == "p" else "decode") for name in ("p0", "p1", "d0", "d1")]


def directions(orders: Iterable[Order]) -> list[tuple[str, str]]:
    """Each move once: which node, and where it goes, as "lent to decode"."""
    found: list[tuple[str, str]] = []
    newest: dict[str, str] = {}
    for order in orders:
        if isinstance(order, SetPrefillCap):
            name, reason = order.node.node_id, order.reason
            if newest.get(name) != reason:
                newest[name] = reason
                found.append((name, reason.partition(":")[0]))
    return found


def budgets(orders: Iterable[Order]) -> list[tuple[str, int]]:
    return [
        (order.node.node_id, order.max_prefill_tokens_per_step)
        for order in orders
        if isinstance(order, SetPrefillCap)
    ]
