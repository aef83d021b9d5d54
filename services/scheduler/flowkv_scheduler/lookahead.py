"""A short look ahead: how many requests a split of the nodes serves in time, if what came lately comes again.

Requests are played first come first served: each prompt takes the prefill node that is free first; all decode
nodes that can keep to the ITL target are one batch, which grows until that, the places or the blocks are used
up. The play begins with the work that is there now. A request that would get its first token too late is
refused, or if it would on any node, delays no prompt. Pure.

A play is long work, so it goes in slices.
"""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import product
from typing import Literal, NamedTuple

import msgspec

from flowkv_common.wire.nodes import expected_tokens
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.demand import OutputLengths, Window
from flowkv_scheduler.node_view import NodeView, Speed
from flowkv_scheduler.slices import Sliced

# How far it looks. A node that leaves a side works off its rest meanwhile.
HORIZON_S = 40.0
# A node that serves both sides is worth so much to each.
SHARED = 0.5
# A prompt that can't make its TTFT target is taken where it waits for no more than this part of it.
IDLE_WAIT = 0.05
# So many requests that come and sequences that end are a slice, a tenth of a millisecond: asks wait for it.
EVENTS_PER_SLICE = 200

Side = Literal["prefill", "decode"]
Duty = Literal["prefill", "decode", "both"]
Duties = Mapping[str, Duty]  # by node id


class Job(NamedTuple):
    """A request, as the reference node would see it."""

    at: float  # seconds from now
    prefill_s: float
    beside_s: float  # what its sequence adds to each step
    num_blocks: int
    num_output_tokens: float


class Batch(NamedTuple):
    """All decode nodes together."""

    num_nodes: float
    num_places: float
    num_blocks: float


def num_repeats(window: Window) -> int:
    """How often each request of the window comes within the horizon."""
    return max(1, math.ceil(HORIZON_S / window.period_s))


class LookAhead:
    """Plays one window of requests over the nodes of a model, for any duties of theirs."""

    def __init__(
        self,
        nodes: Sequence[NodeView],
        duties: Duties,
        window: Window,
        lengths: OutputLengths,
        goals: Goals,
        now: float,
    ) -> None:
        """`duties` are those of now."""
        self.nodes = nodes
        self.num_repeats = num_repeats(window)
        self._window, self._lengths, self._goals, self._now = window, lengths, goals, now
        # Each side is told by nodes that do it. One that only prefills sees few steps that differ.
        self._reference = _fast_one(
            nodes,
            [node for node in nodes if duties[node.node_id] != "decode"],
            lambda one: one.prefill_token_s,
        )
        self._decoding = _fast_one(
            nodes, [one for one in nodes if duties[one.node_id] != "prefill"], lambda one: one.base_s
        )
        self._reference = msgspec.structs.replace(self._reference, chunk_base_s=self._decoding.base_s)
        # By what a node does now: what it has not done for long it can't tell.
        self._slowness = {
            node.node_id: node.speed.base_s / self._decoding.base_s
            if duties[node.node_id] == "decode"
            else node.speed.prefill_token_s / self._reference.prefill_token_s
            for node in nodes
        }
        self._decode_worth = {name: self._worth_within_itl(each) for name, each in self._slowness.items()}
        self._block_size = nodes[0].descriptor.layout.block_size
        self._prefill_now = self._prefill_nodes(duties)
        self.span_s = window.span_s
        self._jobs_by_share: dict[float, list[Job]] = {}
        self._running: list[Job] | None = None

    @property
    def num_played(self) -> int:
        return self.num_repeats * len(self._window.wanted)

    @property
    def num_distinct(self) -> int:
        """Requests that came: each of them is played several times."""
        return self._window.num_distinct

    def served(
        self,
        duties: Duties,
        moved: Collection[str] = (),
        busy_s: float = 0.0,
        more: tuple[Side, int] = ("prefill", 0),
    ) -> Sliced[list[bool]]:
        """For each request, whether it is served in time. Those `moved` take up their side after `busy_s`.

        `more`: with so many more reference nodes on a side.
        """
        side, num_more = more
        queues = [
            (
                busy_s if node.node_id in moved else node.prefill_wait_s,
                self._slowness[node.node_id] * (1.0 if duties[node.node_id] == "prefill" else 1.0 / SHARED),
            )
            for node in self.nodes
            if duties[node.node_id] != "decode"
        ]
        if side == "prefill":
            queues += [(0.0, 1.0)] * num_more
        yield
        later = self._batch(duties, num_more=num_more if side == "decode" else 0)
        yield
        now = self._batch(duties, without=moved) if moved else later
        yield
        # A node that leaves prefill takes its prefix cache with it.
        share = round(min(1.0, self._prefill_nodes(duties) / max(SHARED, self._prefill_now)), 3)
        yield
        jobs = yield from self._jobs(share)
        if self._running is None:
            self._running = yield from self._running_jobs()
        return (
            yield from served_in_time(
                jobs,
                fewer_queues(queues, self._window.stands_for),
                (now, later, busy_s),
                self._running,
                self._decoding.base_s,
                self._goals,
                [number * self._window.period_s for number in range(1, self.num_repeats + 1)],
            )
        )

    def without_heaviest(self) -> Sliced[LookAhead]:
        """The same without the request that takes the most time of nodes."""
        wanted = self._window.wanted
        heaviest = max(
            zip(wanted, (yield from self._jobs(1.0)), strict=True),
            key=lambda one: one[1].prefill_s + one[1].num_output_tokens * one[1].beside_s,
        )[0]
        others = copy.copy(self)
        others._window = self._window._replace(wanted=[one for one in wanted if one is not heaviest])
        others._jobs_by_share = {
            share: [job for job, one in zip(jobs, wanted, strict=True) if one is not heaviest]
            for share, jobs in self._jobs_by_share.items()
        }
        return others

    def _prefill_nodes(self, duties: Duties) -> float:
        """In reference nodes."""
        worth = {"prefill": 1.0, "both": SHARED, "decode": 0.0}
        return sum(worth[duties[name]] / slowness for name, slowness in self._slowness.items())

    def _worth_within_itl(self, slowness: float) -> float:
        """Of a decode node, in reference nodes: what its sequences may add to a step that is in time.

        It is 0 where an empty step takes too long already.
        """
        base_s, itl_s = self._decoding.base_s, self._goals.itl_s
        if itl_s <= base_s:  # on no node is a step in time
            return 1.0 / slowness
        return max(0.0, itl_s / slowness - base_s) / (itl_s - base_s)

    def _batch(self, duties: Duties, without: Collection[str] = (), num_more: int = 0) -> Batch:
        num_nodes = places = blocks = 0.0
        if num_more:
            num_nodes = float(num_more)
            places = num_nodes * self.nodes[0].report.max_num_seqs
            blocks = num_nodes * self.nodes[0].descriptor.num_blocks
        for node in self.nodes:
            duty = duties[node.node_id]
            within_itl = self._decode_worth[node.node_id]
            if node.node_id not in without and duty != "prefill" and within_itl:
                worth = 1.0 if duty == "decode" else SHARED
                num_nodes += worth * within_itl
                places += worth * node.report.max_num_seqs
                blocks += worth * node.descriptor.num_blocks
        part = 1.0 / self._window.stands_for
        return Batch(num_nodes * part, places * part, blocks * part)

    def _jobs(self, share: float) -> Sliced[list[Job]]:
        """The requests of the window. Of the tokens that were cached `share` still are."""
        jobs = self._jobs_by_share.get(share)
        if jobs is None:
            jobs = []
            reference, budget = self._reference, self.nodes[0].descriptor.token_budget
            for one in self._window.wanted:
                mean = self._lengths.mean_of(one.num_prompt_tokens)
                num_outputs = expected_tokens(one.max_new_tokens, 1.0 / mean)
                num_cached = int(share * one.num_cached_tokens)
                num_new = one.num_prompt_tokens - num_cached
                # Prompts that queue share their steps, so each pays for the part of the last that it fills.
                shared_s = reference.chunk_base_s * (1.0 - num_new / budget % 1.0)
                jobs.append(
                    Job(
                        at=one.at - self._now,
                        prefill_s=reference.prefill_s(num_new, num_cached, budget, 0.0) - shared_s,
                        beside_s=self._decoding.beside_s(1, round(one.num_prompt_tokens + num_outputs / 2)),
                        num_blocks=self._blocks(one.num_prompt_tokens + num_outputs),
                        num_output_tokens=num_outputs,
                    )
                )
                if len(jobs) % EVENTS_PER_SLICE == 0:
                    yield
            self._jobs_by_share[share] = jobs
        return jobs

    def _running_jobs(self) -> Sliced[list[Job]]:
        """The sequences of now; those of a node end evenly."""
        jobs: list[Job] = []
        stands_for, first, num_done = self._window.stands_for, 0, 0
        for node in self.nodes:
            if num_done >= EVENTS_PER_SLICE:
                yield
                num_done = 0
            num = node.num_sequences
            num_done += 1 + num // stands_for
            if num and self._decode_worth[node.node_id]:
                left, context = node.tokens_left / num, node.num_context_tokens / num
                beside_s = self._decoding.beside_s(1, round(context + left / 2))
                num_blocks = self._blocks(context + left)
                jobs += (
                    Job(0.0, 0.0, beside_s, num_blocks, 2.0 * left * place / (num + 1))
                    for place in range(1 + first, num + 1, stands_for)
                )
                first = (first - num) % stands_for
        return jobs

    def _blocks(self, num_tokens: float) -> int:
        return int(num_tokens / self._block_size) + 1


def fewer_queues(
    queues: Sequence[tuple[float, float]], stands_for: int
) -> tuple[list[tuple[float, float]], float]:
    """One for so many of the prefill nodes, and how many nodes' time each of their prompts takes.

    So together they do as much as that part of all, were that half a node.
    """
    num = min(len(queues), max(1, round(len(queues) / stands_for)))
    chosen = [queues[(2 * place + 1) * len(queues) // (2 * num)] for place in range(num)]
    return chosen, num * stands_for / max(1, len(queues))


def _fast_one(nodes: Sequence[NodeView], chosen: Sequence[NodeView], cost: Callable[[Speed], float]) -> Speed:
    """The speed of the last in the fastest quarter of `chosen`, or of all if there is none.

    The middle one may be fast on one side and slow on the other, and a node that moves is compared with both.
    """
    speeds = sorted((node.speed for node in chosen or nodes), key=cost)
    return speeds[(len(speeds) - 1) // 4]


def served_in_time(
    jobs: Sequence[Job],
    queues: tuple[Sequence[tuple[float, float]], float],
    batches: tuple[Batch, Batch, float],
    running: Sequence[Job],
    step_base_s: float,
    goals: Goals,
    periods: Sequence[float] = (0.0,),
) -> Sliced[list[bool]]:
    """For each job, whether it gets its first token within the TTFT target, and has its place by then.

    `queues`: of each prefill node the seconds until it is free, and how many times slower it is than the
    reference; and the time of how many prompts each one takes there. `batches`: decode nodes now, later, and
    when "later" begins. `periods`: all jobs come so much later, once for each.
    """
    batch, later, later_s = batches
    free_nodes, num_each = list(queues[0]), queues[1]
    heapq.heapify(free_nodes)
    # The batch at `now`: each of its sequences has got `tokens` since the play began, and ends at some.
    now = tokens = 0.0
    ends = [(job.num_output_tokens, job.beside_s, job.num_blocks) for job in running]
    heapq.heapify(ends)
    all_beside_s = sum(job.beside_s for job in running)
    all_blocks = sum(job.num_blocks for job in running)
    ttft_s, idle_wait_s = goals.ttft_s, IDLE_WAIT * goals.ttft_s
    num_left = EVENTS_PER_SLICE
    served = []
    for period_s, (at, prefill_s, beside_s, num_blocks, num_output_tokens) in product(periods, jobs):
        at += period_s
        if at >= later_s:
            batch = later
        num_nodes, num_places, most_blocks = batch
        num_nodes = max(num_nodes, 1e-9)
        longest_s = (goals.itl_s - step_base_s) * num_nodes
        while True:
            num_left -= 1
            if not num_left:
                yield
                num_left = EVENTS_PER_SLICE
            step_s = step_base_s + all_beside_s / num_nodes
            if not ends:
                has_room = True
                break
            has_room = (
                all_beside_s + beside_s <= longest_s
                and len(ends) < num_places
                and all_blocks + num_blocks <= most_blocks
            )
            end_at = now + (ends[0][0] - tokens) * step_s
            if end_at > at and (has_room or end_at > at + ttft_s):
                break
            now = end_at
            tokens, ended_beside_s, ended_blocks = heapq.heappop(ends)
            all_beside_s -= ended_beside_s
            all_blocks -= ended_blocks
        if now < at:
            tokens += (at - now) / step_s
            now = at
        free_at, slowness = free_nodes[0] if free_nodes else (math.inf, 1.0)
        wait_s, work_s = max(free_at, now) - at, prefill_s * slowness
        in_time = has_room and wait_s + work_s <= ttft_s
        served.append(in_time)
        if in_time:
            heapq.heapreplace(free_nodes, (at + wait_s + num_each * work_s, slowness))
        # Late on any node, it is taken where one is idle. Prompts in time interrupt it.
        elif not (has_room and work_s > ttft_s and wait_s < idle_wait_s):
            continue
        all_beside_s += beside_s
        all_blocks += num_blocks
        num_steps = num_output_tokens + (at + wait_s + work_s - now) / step_s
        heapq.heappush(ends, (tokens + num_steps, beside_s, num_blocks))
    return served
