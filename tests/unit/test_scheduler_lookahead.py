"""Playing requests over a split of the nodes, against naive models of a queue and of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from flowkv_common.wire.nodes import OutputForecast, StepFit, length_class
from flowkv_scheduler.cluster import WAIT_FACTOR, Goals
from flowkv_scheduler.demand import Demand, OutputLengths
from flowkv_scheduler.lookahead import (
    CHUNK_ITL,
    Decoder,
    Duties,
    Job,
    LookAhead,
    Queue,
    fewer_decoders,
    served_in_time,
)
from flowkv_scheduler.node_view import Work
from flowkv_scheduler.slices import at_once
from tests.described_nodes import Described, cluster, node

GOALS = Goals(ttft_s=4.0, itl_s=0.25)
BASE_S = 0.05
FIT = StepFit(BASE_S, prefill_token_s=1e-3, attended_token_s=0.0, sequence_s=0.01, context_token_s=0.0)
ENDLESS = Decoder(BASE_S, 1e-9, num_places=1e9, num_blocks=1e9)
ONE = Decoder(BASE_S, 1.0, num_places=3.0, num_blocks=10.0)


def job(at: float = 0.0, prefill_s: float = 0.0, outputs: float = 10.0, **changes: Any) -> Job:
    return replace(Job(at, prefill_s, 0.01, 1, outputs), **changes)


def in_time(jobs: Sequence[Job], queues: Sequence[tuple[float, ...]], *decoders: Decoder) -> list[bool]:
    """Each of `queues`: the first fields of a `Queue`."""
    prefill_nodes = [Queue._make([*one, *Queue(0.0, 1.0)[len(one) :]]) for one in queues]
    return at_once(served_in_time(jobs, prefill_nodes, decoders or (ENDLESS,), GOALS))


# --- prefill: a queue -----------------------------------------------------------------------------


times = st.floats(0.0, 20.0)


@settings(deadline=None)
@given(st.lists(st.tuples(times, st.floats(0.01, 4.0)), max_size=12), st.floats(0.0, 6.0))
def test_one_prefill_node_is_a_queue(asked: list[tuple[float, float]], free_at: float) -> None:
    """First come first served. A prompt that would be late delays no other."""
    jobs = [job(at, prefill_s) for at, prefill_s in sorted(asked)]
    expected, free = [], free_at
    for one in jobs:
        begin = max(free, one.at)
        # Not at the edge, where the order of sums decides.
        assume(abs(begin + one.prefill_s - one.at - GOALS.ttft_s) > 1e-6)
        expected.append(begin + one.prefill_s - one.at <= GOALS.ttft_s)
        if expected[-1]:
            free = begin + one.prefill_s
    assert in_time(jobs, [(free_at, 1.0)]) == expected


@settings(deadline=None)
@given(
    st.lists(st.tuples(times, st.floats(0.01, 3.0)), max_size=12),
    st.lists(st.tuples(st.floats(0.0, 6.0), st.sampled_from([1.0, 2.0, 3.5])), min_size=2, max_size=4),
)
def test_a_prompt_takes_the_prefill_node_that_is_free_first(
    asked: list[tuple[float, float]], queues: list[tuple[float, float]]
) -> None:
    jobs, free = [job(at, prefill_s) for at, prefill_s in sorted(asked)], [list(one) for one in queues]
    expected = []
    for one in jobs:
        first = min(free)
        begin, work_s = max(first[0], one.at), one.prefill_s * first[1]
        assume(abs(begin + work_s - one.at - GOALS.ttft_s) > 1e-6)
        expected.append(begin + work_s - one.at <= GOALS.ttft_s)
        if expected[-1]:
            first[0] = begin + work_s
    assert in_time(jobs, queues) == expected


def test_without_a_prefill_node_nothing_is_served() -> None:
    assert in_time([job(), job(1.0)], []) == [False, False]


def test_a_prompt_that_no_node_computes_in_time_is_taken_by_an_idle_one() -> None:
    """As at the door. Where none is idle, or none has room to decode it, it is refused."""
    giant, small = job(0.0, prefill_s=10.0), job(1.0, prefill_s=0.5)
    assert in_time([giant, small], [(0.0, 1.0)]) == [False, True]
    one_place = replace(ONE, num_places=1.0)
    assert in_time([giant, small], [(0.0, 1.0)], one_place) == [False, False]
    assert in_time([giant, small], [(1.0, 1.0)], one_place) == [False, True]


def test_a_late_prompt_is_interrupted_by_others_until_it_is_due() -> None:
    """Half of each second is left for it. From 48 s on the rest of its 40 s is computed without a pause."""
    giant = job(0.0, prefill_s=40.0)
    small = [job(float(at), prefill_s=0.5) for at in range(1, 70)]
    served = in_time([giant, *small], [(0.0, 1.0)])[1:]
    late = [one.at for one, is_served in zip(small, served, strict=True) if not is_served]
    assert WAIT_FACTOR * GOALS.ttft_s == 48.0
    # 1 s before the first of them, and 47 half seconds: of 15.5 s that are left 3.5 may be waited for.
    assert late == [float(at) for at in range(48, 60)]
    # Two nodes: the other one does all there is.
    assert all(in_time([giant, *small], [(0.0, 1.0), (0.0, 1.0)])[1:])


quarters = st.integers(0, 400).map(lambda number: number / 4)


@settings(deadline=None)
@given(
    st.lists(st.tuples(quarters, st.sampled_from([0.5, 1.5, 3.75, 6.0, 30.0])), max_size=40),
    st.sampled_from([(0.0, 0.0), (2.0, 0.0), (0.0, 12.0), (2.5, 40.0)]),
)
def test_late_prompts_take_what_is_left_of_a_node(
    asked: list[tuple[float, float]], at_first: tuple[float, float]
) -> None:
    """Beside a node that works for a quarter of a second at a time, on what is in time if there is any."""
    backlog, late = at_first
    due, now, expected = 24.0, 0.0, list[bool]()
    jobs = [job(at, prefill_s) for at, prefill_s in sorted(asked)]
    for one in jobs:
        while now < one.at:
            if backlog:
                backlog -= 0.25
            else:
                late = max(0.0, late - 0.25)
            now += 0.25
        if late and now + backlog >= due:
            backlog, late = backlog + late, 0.0
        expected.append(backlog + one.prefill_s <= GOALS.ttft_s)
        if expected[-1]:
            backlog += one.prefill_s
        elif one.prefill_s > GOALS.ttft_s and not backlog and not late:
            late, due = one.prefill_s, now + 48.0
    assert in_time(jobs, [(at_first[0], 1.0, at_first[1], 24.0)]) == expected


# --- decode: a batch on each node -----------------------------------------------------------------


class Running:
    def __init__(self, job: Job, waits_steps: float = 0.0, number: int = -1, first_at: float = 0.0) -> None:
        self.job = job
        self.left = waits_steps + job.num_output_tokens
        self.number, self.first_at = number, first_at


class NaiveNode:
    """Each step gives each sequence a token. It takes longer for each, and while it is busy for a chunk.

    Between two ends all steps of a kind take as long, so they are passed at once.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.running = [Running(one) for one in decoder.running]
        self.busy_s = decoder.busy_s  # from now on

    def decode_s(self) -> float:
        return self.decoder.base_s + self.decoder.times * sum(one.job.beside_s for one in self.running)

    def chunk_s(self, decode_s: float) -> float:
        """What the sequences leave of a full step, but never too little."""
        return max(self.decoder.fill_s - decode_s, self.decoder.chunk_s)

    def busy_step_s(self) -> float:
        return self.decode_s() + self.chunk_s(self.decode_s())

    def step_s(self) -> float:
        return self.busy_step_s() if self.busy_s > 0 else self.decode_s()

    def steps_within(self, seconds: float) -> float:
        busy_s = min(seconds, self.busy_s)
        return busy_s / self.busy_step_s() + (seconds - busy_s) / self.decode_s()

    def end_in(self) -> float:
        left = min((one.left for one in self.running), default=math.inf)
        if left <= self.steps_within(self.busy_s):
            return left * self.busy_step_s()
        return self.busy_s + (left - self.steps_within(self.busy_s)) * self.decode_s()

    def pass_s(self, seconds: float) -> None:
        num_steps = self.steps_within(seconds)
        for one in self.running:
            one.left -= num_steps
        self.busy_s = max(0.0, self.busy_s - seconds)


class NaivePrefill:
    def __init__(self, queue: Queue, shared: NaiveNode | None) -> None:
        self.free_at, self.slowness, self.shared = queue.free_at, queue.slowness, shared

    def work_s(self, job: Job) -> float:
        work_s = job.prefill_s * self.slowness
        if self.shared is None:
            return work_s
        # `slowness` has what its steps cost beside none: there are as many more as a chunk is smaller.
        base_s, decode_s = self.shared.decoder.base_s, self.shared.decode_s()
        alone, beside = self.shared.chunk_s(base_s), self.shared.chunk_s(decode_s)
        return work_s * (alone / beside) * (decode_s + beside) / (base_s + alone)


class NaiveNodes:
    """`nearest`: how near two figures have come whose order decides."""

    def __init__(self, decoders: Sequence[Decoder], queues: Sequence[Queue] = (Queue(0.0, 1.0),)) -> None:
        able = [one for one in decoders if one.base_s <= GOALS.itl_s]
        self.itl_s = GOALS.itl_s if able else math.inf
        self.now = 0.0
        self.nodes = [NaiveNode(one) for one in able or decoders]
        by_id = {node_id: node for node in self.nodes for node_id in node.decoder.node_ids}
        self.prefill = [NaivePrefill(queue, by_id.get(queue.node_id)) for queue in queues]
        self.nearest = math.inf
        self.in_time: list[bool] = []

    def change_in(self) -> float:
        """Until the next end of a sequence, or of chunks."""
        ends = [node.end_in() for node in self.nodes]
        chunks = [node.busy_s for node in self.nodes if node.busy_s > 0]
        return min([*ends, *chunks], default=math.inf)

    def pass_until(self, when: float) -> None:
        while self.is_before(self.now + self.change_in(), when):
            self.pass_to_change()
        self._pass_s(when - self.now)

    def pass_to_change(self) -> None:
        self._pass_s(self.change_in())
        for each in self.nodes:
            for one in each.running:
                if one.left <= 1e-9 and one.number >= 0 and each.decoder.chunk_s:
                    in_time_until = one.first_at + one.job.num_output_tokens * GOALS.itl_s
                    if not self.is_before(self.now, in_time_until):
                        self.in_time[one.number] = False
            each.running = [one for one in each.running if one.left > 1e-9]

    def _pass_s(self, seconds: float) -> None:
        for each in self.nodes:
            each.pass_s(seconds)
            if each.busy_s < 1e-9:
                each.busy_s = 0.0
        self.now += seconds

    def is_before(self, one: float, another: float) -> bool:
        self.nearest = min(self.nearest, abs(one - another))
        return one <= another

    def has_room(self, node: NaiveNode, job: Job) -> bool:
        together = [job, *(one.job for one in node.running)]
        decode_s = node.decoder.base_s + node.decoder.times * sum(one.beside_s for one in together)
        fits = (
            self.is_before(decode_s + node.chunk_s(decode_s), CHUNK_ITL * self.itl_s)
            if node.busy_s > 0
            else self.is_before(decode_s, self.itl_s)
        )
        return self.now >= node.decoder.from_s and (
            not node.running
            or (
                fits
                and self.is_before(decode_s, node.decoder.most_s)
                and len(together) <= node.decoder.num_places
                and sum(one.num_blocks for one in together) <= node.decoder.num_blocks
            )
        )

    def serve_all(self, jobs: Sequence[Job]) -> list[bool]:
        for job in jobs:
            self.in_time.append(self.serve(job))
        return self.in_time

    def serve(self, job: Job) -> bool:
        self.pass_until(max(self.now, job.at))
        while not (able := [node for node in self.nodes if self.has_room(node, job)]):
            if not self.is_before(self.now + self.change_in(), job.at + GOALS.ttft_s):
                return False
            self.pass_to_change()
        steps = sorted(node.step_s() for node in able)
        if len(steps) > 1 and steps[0] != steps[1]:
            self.is_before(*steps[:2])
        place = min(able, key=NaiveNode.step_s)
        first = min(self.prefill, key=lambda one: (one.free_at, one.slowness))
        begin = max(first.free_at, self.now)
        first_token_at = begin + first.work_s(job)
        if not self.is_before(first_token_at, job.at + GOALS.ttft_s):
            return False
        first.free_at = first_token_at
        if first.shared is not None:
            first.shared.busy_s = max(first.shared.busy_s, begin - self.now) + first_token_at - begin
        waits_steps = (first_token_at - self.now) / place.step_s()
        place.running.append(Running(job, waits_steps, len(self.in_time), first_token_at))
        return True


sequences = st.builds(
    Job,
    at=times,
    prefill_s=st.just(0.0),
    beside_s=st.floats(0.001, 0.2),
    num_blocks=st.integers(1, 8),
    num_output_tokens=st.floats(1.0, 100.0),
)


@settings(deadline=None)
@given(
    st.lists(sequences, max_size=12),
    st.lists(
        st.builds(
            Decoder,
            base_s=st.floats(0.01, 0.3),
            times=st.floats(0.3, 2.0),
            num_places=st.sampled_from([2.0, 4.0, 100.0]),
            num_blocks=st.sampled_from([8.0, 20.0, 1000.0]),
            running=st.lists(sequences, max_size=3),
            from_s=st.sampled_from([0.0, 0.0, 5.0]),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_each_sequence_takes_the_decode_node_with_the_shortest_steps_that_has_room(
    asked: list[Job], decoders: list[Decoder]
) -> None:
    jobs = sorted(asked, key=lambda one: one.at)
    naive = NaiveNodes(decoders)
    expected = naive.serve_all(jobs)
    assume(naive.nearest > 1e-6)
    assert in_time(jobs, [(0.0, 1.0)], *decoders) == expected


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            Job,
            at=times,
            prefill_s=st.floats(0.01, 1.5),
            beside_s=st.floats(0.001, 0.1),
            num_blocks=st.integers(1, 8),
            num_output_tokens=st.floats(1.0, 100.0),
        ),
        max_size=12,
    ),
    st.builds(
        Decoder,
        base_s=st.sampled_from([0.02, 0.1, 0.3]),
        times=st.floats(0.3, 2.0),
        num_places=st.sampled_from([2.0, 100.0]),
        num_blocks=st.just(1000.0),
        running=st.lists(sequences, max_size=3),
        chunk_s=st.sampled_from([0.01, 0.05, 0.2]),
        fill_s=st.sampled_from([0.0, 0.15, 0.31]),
        busy_s=st.sampled_from([0.0, 1.0]),
        most_s=st.sampled_from([math.inf, 0.12]),
        node_ids=st.just(["both"]),
    ),
    st.sampled_from([(), (Decoder(0.06, 0.5, 3.0, 1000.0),)]),
    st.sampled_from([(), (Queue(0.0, 1.0),)]),
    st.sampled_from([1.5, 3.0]),
)
def test_while_a_node_of_both_sides_has_prompts_its_steps_have_a_chunk_each(
    asked: list[Job],
    both: Decoder,
    others: Sequence[Decoder],
    prefill_only: Sequence[Queue],
    slowness: float,
) -> None:
    """Beside sequences a prompt takes longer there. With the last chunk the steps are short again.

    A sequence that has met many chunks may miss the ITL target.
    """
    jobs = sorted(asked, key=lambda one: one.at)
    queues = [Queue(both.busy_s, slowness, node_id="both"), *prefill_only]
    naive = NaiveNodes([both, *others], queues)
    expected = naive.serve_all(jobs)
    assume(naive.nearest > 1e-6)
    assert at_once(served_in_time(jobs, queues, [both, *others], GOALS)) == expected


def test_the_room_of_a_part_of_a_sequence_is_left_on_each_node() -> None:
    """Each sequence adds 0.12 s of the 0.2 that a step has left: three nodes hold three, not five."""
    jobs = [job(beside_s=0.12, outputs=1000.0)] * 5
    assert in_time(jobs, [(0.0, 1.0)], ONE, ONE, ONE) == [True] * 3 + [False] * 2


def test_a_sequence_holds_its_place_from_when_it_is_chosen_until_its_last_token() -> None:
    """Its prompt waits and is computed meanwhile: the room is given before that begins."""
    one_place = replace(ONE, num_places=1.0)
    # 2 s of prompt are 40 steps of now, 50 ms each; with the 10 of its output they take 60 ms each.
    first = job(prefill_s=2.0, beside_s=0.01)
    jobs = [first, job(0.1, beside_s=0.01, prefill_s=1.5)]
    assert in_time(jobs, [(0.0, 1.0), (0.0, 1.0)], one_place) == [True, False]
    jobs[1] = replace(jobs[1], prefill_s=1.0)  # 3.0 - 0.1 + 1.0 <= 4
    assert in_time(jobs, [(0.0, 1.0), (0.0, 1.0)], one_place) == [True, True]


def test_an_idle_node_takes_any_sequence() -> None:
    """A request that is too much for the targets is served alone rather than never."""
    assert in_time([job(beside_s=1.0, num_blocks=99)], [(0.0, 1.0)], ONE) == [True]


def test_a_node_that_moves_takes_up_its_side_when_its_old_work_is_done() -> None:
    """One place more from 5 s on: what comes before that does not find it."""
    jobs = [job(float(at), outputs=1000.0) for at in (0, 1, 6, 7)]
    one, later = replace(ONE, num_places=1.0), replace(ONE, num_places=1.0, from_s=5.0)
    assert in_time(jobs, [(0.0, 1.0)], one, later) == [True, False, True, False]
    assert in_time(jobs, [(0.0, 1.0)], one, one) == [True, True, False, False]


# --- nodes and windows ----------------------------------------------------------------------------


def lengths_of(num_prompt: int, num_outputs: int) -> OutputLengths:
    lengths = OutputLengths()
    by_length = {length_class(num_prompt): (1000.0, 1000.0 * num_outputs)}
    lengths.replace_forecast(None, OutputForecast(0.0, 0.0, 0.0, by_length=by_length))
    return lengths


def ahead_of(
    nodes: Sequence[Described],
    rate: float = 1.0,
    num_prompt: int = 400,
    num_outputs: int = 10,
    num_cached: int = 0,
    stands_for: int = 1,
    goals: Goals = GOALS,
) -> LookAhead:
    """After 20 s of such requests."""
    demand = Demand()
    for number in range(int(20 * rate)):
        demand.add_request(num_prompt, num_cached, num_outputs, number / rate)
    window = demand.window(0.0, 20.0, stands_for, 10_000)
    assert window is not None
    views = cluster(*nodes).views()
    return LookAhead(views, duties_of(nodes), window, lengths_of(num_prompt, num_outputs), goals, 20.0)


def duties_of(nodes: Sequence[Described], **changes: str) -> Duties:
    roles = {one.node_id: one.descriptor.role for one in nodes}
    duties: dict[str, Any] = {name: "both" if role == "mixed" else role for name, role in roles.items()}
    return duties | changes


def prefill(name: str = "p0", **changes: Any) -> Described:
    return node(name, "prefill", num_blocks=4096, step=FIT, **changes)


def decode(name: str = "d0", **changes: Any) -> Described:
    return node(name, "decode", num_blocks=4096, step=FIT, **changes)


def share(ahead: LookAhead, nodes: Sequence[Described], **changes: str) -> float:
    served = at_once(ahead.served(duties_of(nodes, **changes)))
    return sum(served) / len(served)


def test_what_the_nodes_can_do_is_served() -> None:
    nodes = prefill(), decode()
    # 0.44 s of prompt per second.
    assert share(ahead_of(nodes), nodes) == 1.0


def test_the_share_that_is_served_is_that_of_the_nodes_time() -> None:
    """A prompt costs 439 ms: the chunk, and its part of the base. Half of 4.6 per second are served by one.

    And a tenth more: of 40 s of play it ends with 4 s of queue.
    """
    nodes = prefill(), decode(), decode("d1")
    ahead = ahead_of(nodes, rate=4.6)
    assert share(ahead, nodes) == pytest.approx(1 / (4.6 * 0.439), abs=0.1)
    assert share(ahead, nodes, d1="prefill") == pytest.approx(2 / (4.6 * 0.439), abs=0.1)
    # A fifth of 250 ms is all of a step without tokens: there are as few as can be, 17.
    assert share(ahead, nodes, d1="both") == pytest.approx((1 + 17 / 67) / (4.6 * 0.439), abs=0.1)
    assert share(ahead, nodes, p0="decode") == 0.0


@pytest.mark.parametrize(("itl_s", "is_better"), [(0.08, False), (1.0, True)])
def test_a_node_of_both_sides_is_worth_what_the_itl_target_leaves(itl_s: float, is_better: bool) -> None:
    """The only decode node helps with prompts. 67 ms, or 200, are too much of 80, not of 1,000."""
    nodes = prefill(), decode()
    ahead = ahead_of(nodes, rate=3.0, goals=replace(GOALS, itl_s=itl_s))
    assert (share(ahead, nodes, d0="both") > share(ahead, nodes) + 0.1) is is_better


def test_a_node_of_both_sides_decodes_as_a_decode_node_does_while_no_prompts_come() -> None:
    """One prompt per second, of 16 tokens, and long outputs: what limits it are the places."""
    nodes = prefill(), decode()
    ahead = ahead_of(nodes, num_prompt=16, num_outputs=3000)
    shares = [share(ahead, nodes, d0=duty) for duty in ("decode", "both")]
    assert 0.0 < shares[0] == shares[1] < 1.0


def test_chunks_are_what_the_sequences_of_the_moment_leave_not_those_of_now() -> None:
    """A fifth of 1 s has 150 ms beside the base. Twelve sequences leave 30 of them, but end soon."""
    goals = replace(GOALS, itl_s=1.0)
    forecast = OutputForecast(tokens_left=24.0, first_ends_in=1.0, stop_rate=0.0)
    busy = prefill(), decode(num_running=12, num_context_tokens=1200, forecast=forecast)
    idle = prefill(), decode()
    with_busy, with_idle = (
        share(ahead_of(nodes, rate=4.0, goals=goals), nodes, d0="both") for nodes in (busy, idle)
    )
    assert with_busy == pytest.approx(with_idle, abs=0.02)


def test_more_nodes_serve_more() -> None:
    nodes = prefill(), decode()
    ahead = ahead_of(nodes, rate=4.0)
    served = [sum(at_once(ahead.served(duties_of(nodes), more=("prefill", num)))) for num in range(3)]
    assert served[0] < served[1] <= served[2] == ahead.num_played
    assert sum(at_once(ahead.served(duties_of(nodes), more=("decode", 2)))) == served[0]


def test_a_slow_node_counts_for_as_much_as_it_computes() -> None:
    slow_fit = StepFit(3 * BASE_S, 3e-3, attended_token_s=0.0, sequence_s=0.03, context_token_s=0.0)
    slow = node("p1", "prefill", num_blocks=4096, step=slow_fit)
    nodes = prefill(), slow, decode(), decode("d1")
    ahead = ahead_of(nodes, rate=6.0)
    with_fast, with_slow = (share(ahead, nodes, **{name: "decode"}) for name in ("p1", "p0"))
    assert with_fast == pytest.approx(3 * with_slow, rel=0.35)
    assert share(ahead, nodes) > with_fast


def slowed(factor: float) -> StepFit:
    return StepFit(factor * BASE_S, factor * 1e-3, 0.0, sequence_s=factor * 0.0102, context_token_s=0.0)


def quick_decode() -> Described:
    return node("d0", "decode", num_blocks=4096, step=slowed(1.0), max_num_seqs=64)


def test_a_decode_node_that_can_not_keep_to_the_itl_target_counts_for_nothing() -> None:
    """Its empty step takes 0.3 s. Beside two such a quick one serves as much as alone."""
    slow = [node(name, "decode", num_blocks=4096, step=slowed(6.0), num_running=5) for name in ("d1", "d2")]
    alone, beside = (prefill(), decode()), (prefill(), decode(), *slow)
    shares = [share(ahead_of(nodes, rate=2.0, num_outputs=300), nodes) for nodes in (alone, beside)]
    assert 0.2 < shares[0] == shares[1] < 0.5


def test_a_slow_decode_node_counts_for_what_its_steps_have_room_for() -> None:
    """An empty step takes 0.15 s of 0.25: a sequence adds three times as much there, and half as much may be.

    So it takes a sixth of what a quick one does: 0.2 s hold 19.6 sequences of 10.2 ms, 0.1 s 3.3 of 30.6.
    """
    slow = node("d1", "decode", num_blocks=4096, step=slowed(3.0))
    alone, beside = (prefill(), quick_decode()), (prefill(), quick_decode(), slow)
    # Nothing that is accepted ends within the play.
    shares = [share(ahead_of(nodes, rate=2.0, num_outputs=3000), nodes) for nodes in (alone, beside)]
    assert [round(80 * each) for each in shares] == [19, 22]


def test_a_quick_prefill_node_among_slow_ones_is_one_quick_decode_node() -> None:
    """The middle one of three prefill nodes is slow, and that of the decode nodes quick. It has 16 places."""
    slow = [node(name, "prefill", num_blocks=4096, step=slowed(2.0)) for name in ("p1", "p2")]
    nodes = prefill(), *slow, quick_decode()
    ahead = ahead_of(nodes, rate=2.0, num_outputs=3000)
    assert [round(80 * share(ahead, nodes, **moved)) for moved in ({}, {"p0": "decode"})] == [19, 35]


def test_what_prefill_nodes_take_for_a_steps_base_does_not_count_for_decode() -> None:
    """Their chunks are all alike, so what an empty step costs them is a guess."""
    guessed = StepFit(0.4, 1e-4, attended_token_s=0.0, sequence_s=0.0, context_token_s=0.0)
    nodes = node("p0", "prefill", num_blocks=4096, step=guessed), decode()
    assert share(ahead_of(nodes, num_outputs=30), nodes) == 1.0


def test_a_prefill_node_that_leaves_takes_its_cache_along() -> None:
    """Prompts of 2,000 tokens of which all but 100 are cached: on one node half of that is left."""
    nodes = prefill(), prefill("p1"), decode()
    ahead = ahead_of(nodes, rate=3.0, num_prompt=2000, num_cached=1900)
    assert share(ahead, nodes) == 1.0
    assert share(ahead, nodes, p1="decode") < 0.5


def test_sequences_that_run_now_hold_their_places() -> None:
    """16 fit: those that come wait for the ends of these."""
    idle = decode(max_num_seqs=16)
    busy, stuck = (
        decode(
            num_running=16,
            num_context_tokens=1600,
            max_num_seqs=16,
            forecast=OutputForecast(tokens_left=16.0 * each, first_ends_in=each, stop_rate=0.0),
        )
        for each in (256.0, 1000.0)
    )
    served = [share(ahead_of((prefill(), one)), (prefill(), one)) for one in (idle, busy, stuck)]
    assert served[0] == 1.0 > served[1] > served[2]


def test_prompts_that_wait_now_are_before_those_that_come() -> None:
    nodes = prefill(queued_prefill_tokens=10_000), decode()
    served = at_once(ahead_of(nodes).served(duties_of(nodes)))
    assert not served[0]
    assert served[-1]
    nodes = prefill(queued_prefill_tokens=10_000, interruptible_prefill_tokens=10_000), decode()
    assert all(at_once(ahead_of(nodes).served(duties_of(nodes))))


def test_of_many_nodes_and_requests_every_so_manyth_gives_the_same_share() -> None:
    nodes = [prefill(f"p{number}") for number in range(16)] + [decode(f"d{number}") for number in range(16)]
    all_of_them, some = ahead_of(nodes, rate=60.0), ahead_of(nodes, rate=60.0, stands_for=2)
    assert some.num_played == pytest.approx(all_of_them.num_played / 2, abs=2)
    assert share(some, nodes) == pytest.approx(share(all_of_them, nodes), abs=0.03)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0.0, 5.0])), max_size=20), st.integers(1, 9))
def test_fewer_decode_nodes_hold_as_much_as_their_part(
    nodes: list[tuple[int, float]], stands_for: int
) -> None:
    """Those that come later stay apart, so one node more always is more."""
    decoders = [replace(ONE, num_blocks=num, running=[job()] * int(num), from_s=at) for num, at in nodes]
    fewer = fewer_decoders(decoders, stands_for)
    for at in {decoder.from_s for decoder in decoders}:
        some, whole = ([one for one in each if one.from_s == at] for each in (fewer, decoders))
        for part, all_of in (
            (sum(one.num_blocks for one in some), sum(one.num_blocks for one in whole)),
            (sum(1 / one.times for one in some), len(whole)),
            (sum(one.num_places for one in some), 3.0 * len(whole)),
        ):
            assert part == pytest.approx(all_of / stands_for)
        assert sum(len(one.running) for one in some) == sum(len(one.running) for one in whole)


@pytest.mark.parametrize(("rate", "num_outputs"), [(3.0, 20), (3.0, 50), (3.0, 100), (2.0, 200)])
def test_mixed_nodes_as_one_serve_what_as_many_do(rate: float, num_outputs: int) -> None:
    """Eight for four times the requests of two, each for four: limited by prompts, then by sequences."""
    goals = replace(GOALS, itl_s=0.5)
    two, eight = (
        [node(f"m{number}", "mixed", num_blocks=4096, step=FIT) for number in range(num)] for num in (2, 8)
    )
    each = share(ahead_of(two, rate=rate, num_outputs=num_outputs, goals=goals), two)
    as_one = ahead_of(eight, rate=4 * rate, num_outputs=num_outputs, stands_for=4, goals=goals)
    assert 0.4 < each < 0.9
    assert share(as_one, eight) == pytest.approx(each, abs=0.03)


def test_a_prompt_that_stands_for_others_takes_their_time_too() -> None:
    """It is computed as fast as it is, and the next one waits for all of them."""
    jobs = [job(prefill_s=1.0), job(prefill_s=1.0)]
    for stands_for, expected in ((3, True), (4, False)):
        assert at_once(served_in_time(jobs, [Queue(0.0, 1.0)], [ENDLESS], GOALS, stands_for)) == [
            True,
            expected,
        ]


def test_prompts_that_stand_for_others_find_each_prefill_node_as_it_is() -> None:
    """Two of four are busy for long. The two others serve what they serve, whichever these are."""
    busy = {"queued_prefill_tokens": 30_000}
    shares = []
    for places in ((0, 1), (1, 3), (2, 3)):
        nodes = [prefill(f"p{number}", **busy if number in places else {}) for number in range(4)]
        nodes += [decode(f"d{number}") for number in range(4)]
        shares.append(share(ahead_of(nodes, rate=3.0, stands_for=2), nodes))
    assert shares == [1.0, 1.0, 1.0]


def test_without_its_heaviest_request_a_window_is_as_if_that_had_not_come() -> None:
    nodes = prefill(), decode(num_running=3, num_context_tokens=300)
    demand, others = Demand(), Demand()
    for number in range(40):
        length = 6000 if number == 17 else 400
        demand.add_request(length, 0, 10, number / 2)
        if number != 17:
            others.add_request(length, 0, 10, number / 2)
    found = []
    for one in (demand, others):
        window = one.window(0.0, 20.0, 1, 400)
        assert window is not None
        views = cluster(*nodes).views()
        found.append(LookAhead(views, duties_of(nodes), window, lengths_of(400, 10), GOALS, 20.0))
    with_it, lighter = found[0], at_once(found[0].without_heaviest())
    before = at_once(with_it.served(duties_of(nodes)))
    assert at_once(lighter.served(duties_of(nodes))) == at_once(found[1].served(duties_of(nodes)))
    assert at_once(with_it.served(duties_of(nodes))) == before


def test_what_we_gave_and_no_report_shows_counts_as_running() -> None:
    given_work = Work(num_sequences=16, num_blocks=200, context_tokens=1600, output_tokens=16_000.0)
    nodes = prefill(), decode(max_num_seqs=16, given=given_work)
    assert share(ahead_of(nodes), nodes) < 0.9
