"""A short look ahead: how many requests a split of the nodes serves in time, if what came lately comes again.

Requests are played first come first served: each prompt takes the prefill node that is free first, each
sequence the decode node with the shortest steps of those that have room: in a step within the ITL target, a
place, and blocks. The play begins with the work that is there now. A request that would get its first token
too late is refused. If it would on any node, an idle one takes it, and works on it when nothing else is to be
done, and from some time on before all else: as at the door, and at the nodes. While a node that serves both
sides has prompts, its steps have a chunk of them each: a sequence may miss the ITL target for that. Pure.

A play is long work, so it goes in slices.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby, product
from operator import attrgetter
from typing import Literal, NamedTuple

import msgspec

from flowkv_common.wire.nodes import expected_tokens
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.demand import OutputLengths, Window
from flowkv_scheduler.node_view import SHARED_ITL, NodeView, Speed, least_shared_chunk
from flowkv_scheduler.slices import Sliced

# How far it looks. A node that leaves a side works off its rest meanwhile.
HORIZON_S = 40.0
# A prompt that can't make its TTFT target is taken where it waits for no more than this part of it.
IDLE_WAIT = 0.05
# A sequence finds room beside chunks in steps of so much of the ITL target: it waits for a whole one of them
# before its second token, and short outputs don't make up for that.
CHUNK_ITL = 0.75
# So many requests that come and sequences that end are a slice, half a millisecond: asks wait for it.
EVENTS_PER_SLICE = 100

Side = Literal["prefill", "decode"]
Duty = Literal["prefill", "decode", "both"]
Duties = Mapping[str, Duty]  # by node id


class Job(msgspec.Struct, frozen=True, gc=False):
    """A request, as the reference node would see it."""

    at: float  # seconds from now
    prefill_s: float
    beside_s: float  # what its sequence adds to each step
    num_blocks: int
    num_output_tokens: float


class Queue(NamedTuple):
    """A prefill node, so many times slower than the reference. It is free of prompts in time at `free_at`.

    These interrupt the `late_s` of others that it has then. From `due_at` on they do no more. `node_id` is
    given if it decodes, too.
    """

    free_at: float
    slowness: float
    late_s: float = 0.0
    due_at: float = math.inf
    node_id: str = ""


class Decoder(msgspec.Struct, frozen=True, gc=False):
    """A decode node, or several as one. A step takes `base_s`, and `times` what its sequences add."""

    base_s: float
    times: float
    num_places: float
    num_blocks: float
    running: Sequence[Job] = ()
    from_s: float = 0.0  # it takes sequences from then on
    # While prompts wait, for `busy_s` from now on, a step takes `chunk_s` longer, and no less than `fill_s`.
    chunk_s: float = 0.0
    fill_s: float = 0.0
    busy_s: float = 0.0
    most_s: float = math.inf  # of a step without chunks: some leave time for prompts
    node_ids: Sequence[str] = ()  # that prefill, too

    def busy_step_s(self, decode_s: float) -> float:
        """A step with prompts in it that takes `decode_s` without."""
        return max(decode_s + self.chunk_s, self.fill_s)

    def longer(self, decode_s: float) -> float:
        """How many times longer than in whole steps prompts take in those that have so much of decoding."""
        step_s = self.busy_step_s(decode_s)
        return step_s / (step_s - decode_s)


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
        self._duties, self._window, self._lengths = duties, window, lengths
        self._goals, self._now = goals, now
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
        self._block_size = nodes[0].descriptor.layout.block_size
        self._prefill_now = self._prefill_nodes(duties)
        self.span_s = window.span_s
        self._jobs_by_share: dict[float, list[Job]] = {}
        # Made once: garbage of a thousand nodes would be collected in the middle of a slice.
        self._running: dict[str, list[Job]] | None = None
        self._known_decoders: dict[tuple[str, Duty], Decoder] = {}

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
        decoders = yield from self._decoders(duties, moved, busy_s)
        yield
        # When late prompts of now are due is not known: on the mean half of their time is over.
        due_at = self._goals.late_wait_s / 2
        queues = [
            Queue(
                free_at=busy_s if node.node_id in moved else node.prefill_wait_s,
                slowness=self._prompt_slowness(node, duties[node.node_id]),
                late_s=0.0 if node.node_id in moved else max(0.0, node.idle_wait_s - node.prefill_wait_s),
                due_at=due_at,
                node_id=node.node_id if duties[node.node_id] == "both" else "",
            )
            for node in self.nodes
            if duties[node.node_id] != "decode"
        ]
        if side == "prefill":
            queues += [Queue(0.0, 1.0)] * num_more
        yield
        if side == "decode":
            decoders += [self._decoder(self.nodes[0], 1.0)] * num_more
        decoders = fewer_decoders(decoders, self._window.stands_for)
        yield
        # A node that leaves prefill takes its prefix cache with it.
        num_now = self._prefill_now
        share = round(min(1.0, self._prefill_nodes(duties) / num_now), 3) if num_now else 1.0
        yield
        return (
            yield from served_in_time(
                (yield from self._jobs(share)),
                queues,
                decoders,
                self._goals,
                self._window.stands_for,
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
        window = self._window._replace(wanted=[one for one in wanted if one is not heaviest])
        return LookAhead(self.nodes, self._duties, window, self._lengths, self._goals, self._now)

    def _prefill_nodes(self, duties: Duties) -> float:
        """In reference nodes."""
        return sum(1 / slowness for name, slowness in self._slowness.items() if duties[name] != "decode")

    def _prompt_slowness(self, node: NodeView, duty: Duty) -> float:
        """Were there no sequences beside prompts. The node's decoder is known."""
        slowness = self._slowness[node.node_id]
        if duty != "both":
            return slowness
        shared = self._known_decoders[node.node_id, duty]
        return slowness * shared.longer(shared.base_s)

    def _decoders(self, duties: Duties, moved: Collection[str], busy_s: float) -> Sliced[list[Decoder]]:
        """Those that shall decode. What runs on a node that leaves is in nobody's way."""
        if self._running is None:
            self._running = yield from self._running_jobs()
        decoders: list[Decoder] = []
        for node in self.nodes:
            name, duty = node.node_id, duties[node.node_id]
            if duty != "prefill":
                decoder = self._known_decoders.get((name, duty))
                if decoder is None:
                    decoder = self._decoder(node, self._slowness[name], duty, self._running.get(name, ()))
                    self._known_decoders[name, duty] = decoder
                if name in moved:
                    decoder = msgspec.structs.replace(decoder, from_s=busy_s, busy_s=0.0)
                decoders.append(decoder)
                if len(decoders) % EVENTS_PER_SLICE == 0:
                    yield
        return decoders

    def _decoder(
        self, node: NodeView, slowness: float, duty: Duty = "decode", running: Sequence[Job] = ()
    ) -> Decoder:
        decoder = Decoder(
            base_s=slowness * self._decoding.base_s,
            times=slowness,
            num_places=node.report.max_num_seqs,
            num_blocks=node.descriptor.num_blocks,
            running=running,
        )
        if duty != "both":
            return decoder
        token_s = slowness * self._reference.prefill_token_s
        shared = msgspec.structs.replace(decoder, busy_s=node.prefill_wait_s, node_ids=(node.node_id,))
        if self._duties[node.node_id] == "both" and node.descriptor.role == "mixed":
            return msgspec.structs.replace(shared, chunk_s=node.chunk_tokens * token_s)
        shared_s = SHARED_ITL * self._goals.itl_s
        return msgspec.structs.replace(
            shared,
            chunk_s=least_shared_chunk(node.descriptor) * token_s,
            fill_s=shared_s,
            most_s=shared_s if node.descriptor.role == "prefill" else math.inf,
        )

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

    def _running_jobs(self) -> Sliced[dict[str, list[Job]]]:
        """Of nodes that have some, their sequences of now, which end evenly: every so manyth of all nodes."""
        jobs: dict[str, list[Job]] = {}
        stands_for, first, num_done = self._window.stands_for, 0, 0
        for node in self.nodes:
            if num_done >= EVENTS_PER_SLICE:
                yield
                num_done = 0
            num = node.num_sequences
            num_done += 1
            places = range(1 + first, num + 1, stands_for)
            if places:
                left, context = node.tokens_left / num, node.num_context_tokens / num
                beside_s = self._decoding.beside_s(1, round(context + left / 2))
                num_blocks = self._blocks(context + left)
                jobs[node.node_id] = [
                    Job(0.0, 0.0, beside_s, num_blocks, 2.0 * left * place / (num + 1)) for place in places
                ]
                num_done += len(places)
            first = (first - num) % stands_for
        return jobs

    def _blocks(self, num_tokens: float) -> int:
        return int(num_tokens / self._block_size) + 1


def fewer_decoders(decoders: Sequence[Decoder], stands_for: int) -> list[Decoder]:
    """One for so many of the decode nodes, with the mean of what they are and all that runs on them.

    So together they do as much as that part of all. Nodes that come later are not put together with others.
    """
    if stands_for == 1:
        return list(decoders)
    chosen: list[Decoder] = []
    for from_s, alike in groupby(sorted(decoders, key=_from), key=_from):
        nodes = list(alike)
        num = max(1, round(len(nodes) / stands_for))
        for place in range(num):
            group = nodes[place * len(nodes) // num : (place + 1) * len(nodes) // num]
            chosen.append(
                Decoder(
                    base_s=sum(one.base_s for one in group) / len(group),
                    times=sum(one.times for one in group) / len(group) ** 2 * stands_for,
                    num_places=sum(one.num_places for one in group) / stands_for,
                    num_blocks=sum(one.num_blocks for one in group) / stands_for,
                    running=[job for one in group for job in one.running],
                    from_s=from_s,
                    chunk_s=sum(one.chunk_s for one in group) / len(group),
                    fill_s=sum(one.fill_s for one in group) / len(group),
                    busy_s=sum(one.busy_s for one in group) / len(group),
                    most_s=min(one.most_s for one in group),
                    node_ids=[node_id for one in group for node_id in one.node_ids],
                )
            )
    return chosen


_from = attrgetter("from_s")


def _fast_one(nodes: Sequence[NodeView], chosen: Sequence[NodeView], cost: Callable[[Speed], float]) -> Speed:
    """The speed of the last in the fastest quarter of `chosen`, or of all if there is none.

    The middle one may be fast on one side and slow on the other, and a node that moves is compared with both.
    """
    speeds = sorted((node.speed for node in chosen or nodes), key=cost)
    return speeds[(len(speeds) - 1) // 4]


class _Batch:
    """The sequences of one decode node: each step gives each of them a token.

    `too_slow`: the numbers of those that have ended, and were too slow for chunks of prompts beside them.
    """

    __slots__ = (
        "beside_s",
        "busy_until",
        "ends",
        "next_end",
        "node",
        "num_blocks",
        "now",
        "step_s",
        "tokens",
        "too_slow",
    )

    def __init__(self, node: Decoder) -> None:
        self.node = node
        # At `now` each sequence has got `tokens` since the play began. It ends at some.
        self.now = self.tokens = 0.0
        self.ends = [
            (job.num_output_tokens, job.beside_s, job.num_blocks, -1, math.inf) for job in node.running
        ]
        heapq.heapify(self.ends)
        self.too_slow: list[int] = []
        self.beside_s = sum(job.beside_s for job in node.running)
        self.num_blocks = sum(job.num_blocks for job in node.running)
        self.busy_until = node.busy_s
        self.step_s = self.next_end = 0.0
        self._go_on()

    def has_room(self, job: Job, now: float, itl_s: float) -> bool:
        """For one more sequence. A node without any takes it always."""
        node = self.node
        if not self.ends or now < node.from_s:
            return now >= node.from_s
        step_s = node.base_s + node.times * (self.beside_s + job.beside_s)
        fits = step_s <= itl_s if now >= self.busy_until else node.busy_step_s(step_s) <= CHUNK_ITL * itl_s
        return (
            fits
            and step_s <= node.most_s
            and len(self.ends) < node.num_places
            and self.num_blocks + job.num_blocks <= node.num_blocks
        )

    def add_sequence(self, number: int, job: Job, now: float, after_s: float, itl_s: float) -> None:
        """It has its place from now on, and gets its first token after so long."""
        self._pass_to(now)
        end = self.tokens + after_s / self.step_s + job.num_output_tokens
        in_time_until = now + after_s + job.num_output_tokens * itl_s
        heapq.heappush(self.ends, (end, job.beside_s, job.num_blocks, number, in_time_until))
        self.beside_s += job.beside_s
        self.num_blocks += job.num_blocks
        self._go_on()

    def longer(self) -> float:
        """How many times longer a prompt takes beside the sequences of now than beside none."""
        return self.node.longer(self._decode_s()) / self.node.longer(self.node.base_s)

    def add_prompts(self, now: float, begin: float, work_s: float) -> None:
        """For so long from `begin` on a chunk is in each step, on one of the nodes that this stands for."""
        self._pass_to(now)
        self.busy_until = max(self.busy_until, begin) + work_s / len(self.node.node_ids)
        self._go_on()

    def pass_next(self) -> None:
        """To the end of the next sequence, or of the chunks in its steps."""
        if self.now < self.busy_until == self.next_end:
            self._pass_to(self.busy_until)
        else:
            self.now = self.next_end
            self.tokens, beside_s, num_blocks, number, in_time_until = heapq.heappop(self.ends)
            self.beside_s -= beside_s
            self.num_blocks -= num_blocks
            if self.node.chunk_s and self.now > in_time_until:
                self.too_slow.append(number)
        self._go_on()

    def _decode_s(self) -> float:
        """A step without chunks."""
        return self.node.base_s + self.node.times * self.beside_s

    def _pass_to(self, now: float) -> None:
        self.tokens += (now - self.now) / self.step_s
        self.now = now

    def _go_on(self) -> None:
        self.step_s = self._decode_s()
        self.next_end = math.inf
        if self.now < self.busy_until:
            self.step_s = self.node.busy_step_s(self.step_s)
            self.next_end = self.busy_until
        if self.ends:
            self.next_end = min(self.next_end, self.now + (self.ends[0][0] - self.tokens) * self.step_s)


_next_end = attrgetter("next_end")


def _first_free(queues: list[Queue], now: float) -> Queue:
    """The node that is free first, with what it has late then; `queues` is a heap."""
    while queues:
        first = queues[0]
        if not first.late_s:
            return first
        begin = max(first.free_at, now)
        late_s = first.late_s - (begin - first.free_at)
        if late_s <= 0.0:
            return first._replace(late_s=0.0, due_at=math.inf)
        if begin < first.due_at:
            return first._replace(late_s=late_s)
        heapq.heapreplace(queues, first._replace(free_at=begin + late_s, late_s=0.0, due_at=math.inf))
    return Queue(math.inf, 1.0)


def _take_late(queues: list[Queue], now: float, idle_until: float, work_s: float, due_at: float) -> bool:
    """Give so much work of a late prompt to a node that is idle, or will be by then; False if none is."""
    if not queues or max(queues[0].free_at, now) >= idle_until:
        return False
    for place, one in enumerate(queues):
        begin = max(one.free_at, now)
        if begin < idle_until and one.late_s <= begin - one.free_at:
            queues[place] = one._replace(free_at=begin, late_s=work_s * one.slowness, due_at=due_at)
            heapq.heapify(queues)
            return True
    return False


def served_in_time(
    jobs: Sequence[Job],
    queues: Sequence[Queue],
    decoders: Sequence[Decoder],
    goals: Goals,
    stands_for: int = 1,
    periods: Sequence[float] = (0.0,),
) -> Sliced[list[bool]]:
    """For each job, whether it gets its first token within the TTFT target, has its place by then, and is not
    slowed over the ITL target.

    A prompt takes its prefill node for the time of all that it stands for. `decoders` are as many fewer.
    `periods`: all jobs come so much later, once for each.
    """
    ttft_s, idle_wait_s = goals.ttft_s, IDLE_WAIT * goals.ttft_s
    free_nodes = list(queues)
    heapq.heapify(free_nodes)
    # Nodes that can't keep to the ITL target are full, unless none can.
    able = [node for node in decoders if node.base_s <= goals.itl_s]
    itl_s = goals.itl_s if able else math.inf
    batches = [_Batch(node) for node in able or decoders]
    sharing = {node_id: batch for batch in batches for node_id in batch.node.node_ids}
    now, num_left = 0.0, EVENTS_PER_SLICE
    served = []
    for period_s, job in product(periods, jobs):
        at, place = job.at + period_s, None
        now = max(now, at)
        while batches:
            num_left -= 1
            if not num_left:
                yield
                num_left = EVENTS_PER_SLICE
            first = min(batches, key=_next_end)
            if first.next_end <= now:
                first.pass_next()
                continue
            step_s = math.inf
            for one in batches:
                if one.step_s < step_s and one.has_room(job, now, itl_s):
                    place, step_s = one, one.step_s
            if place is not None or first.next_end > at + ttft_s:
                break
            now = first.next_end
        queue = _first_free(free_nodes, now)
        beside = sharing.get(queue.node_id)
        wait_s, work_s = max(queue.free_at, now) - at, job.prefill_s * queue.slowness
        if beside is not None:
            work_s *= beside.longer()
        in_time = place is not None and wait_s + work_s <= ttft_s
        served.append(in_time)
        if place is None:
            continue
        if in_time:
            heapq.heapreplace(free_nodes, queue._replace(free_at=at + wait_s + stands_for * work_s))
            if beside is not None:
                beside.add_prompts(now, at + wait_s, stands_for * work_s)
        # Late on any node, it is taken where one is idle.
        elif job.prefill_s <= ttft_s or not _take_late(
            free_nodes, now, at + idle_wait_s, stands_for * job.prefill_s, at + goals.late_wait_s
        ):
            continue
        place.add_sequence(len(served) - 1, job, now, at + wait_s + work_s - now, goals.itl_s)
    for batch in batches:
        for number in batch.too_slow:
            served[number] = False
    return served
