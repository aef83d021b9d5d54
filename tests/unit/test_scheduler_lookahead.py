"""Playing requests over a split of the nodes, against naive models of a queue and of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flowkv_common.wire.nodes import OutputForecast, StepFit, length_class
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.demand import Demand, OutputLengths
from flowkv_scheduler.lookahead import (
    SHARED,
    Batch,
    Duties,
    Job,
    LookAhead,
    fewer_queues,
    served_in_time,
)
from flowkv_scheduler.node_view import Work
from flowkv_scheduler.slices import at_once
from tests.described_nodes import Described, cluster, node

GOALS = Goals(ttft_s=4.0, itl_s=0.25)
BASE_S = 0.05
FIT = StepFit(BASE_S, prefill_token_s=1e-3, attended_token_s=0.0, sequence_s=0.01, context_token_s=0.0)
ENDLESS = Batch(num_nodes=1e9, num_places=1e9, num_blocks=1e9)
ONE = Batch(num_nodes=1.0, num_places=3.0, num_blocks=10.0)


def job(at: float = 0.0, prefill_s: float = 0.0, outputs: float = 10.0, **changes: Any) -> Job:
    return Job(at, prefill_s, 0.01, 1, outputs)._replace(**changes)


def in_time(
    jobs: Sequence[Job],
    queues: Sequence[tuple[float, float]],
    batch: Batch = ENDLESS,
    batches: tuple[Batch, Batch, float] | None = None,
    running: Sequence[Job] = (),
) -> list[bool]:
    return at_once(
        served_in_time(jobs, (queues, 1.0), batches or (batch, batch, 0.0), running, BASE_S, GOALS)
    )


# --- prefill: a queue -----------------------------------------------------------------------------


times = st.floats(0.0, 20.0)


@settings(deadline=None)
@given(st.lists(st.tuples(times, st.floats(0.01, 6.0)), max_size=12), st.floats(0.0, 6.0))
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


def test_a_prompt_that_no_node_computes_in_time_delays_no_prompt_but_is_decoded() -> None:
    """It is served where a node is idle, as admission does, and refused where one is not."""
    giant, small = job(0.0, prefill_s=10.0), job(1.0, prefill_s=0.5)
    assert in_time([giant, small], [(0.0, 1.0)]) == [False, True]
    one_place = ONE._replace(num_places=1.0)
    assert in_time([giant, small], [(0.0, 1.0)], batch=one_place) == [False, False]
    assert in_time([giant, small], [(1.0, 1.0)], batch=one_place) == [False, True]


# --- decode: a shared batch -----------------------------------------------------------------------


class Running:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.left = job.num_output_tokens


class NaiveBatch:
    """Each step gives each sequence a token and takes longer for each of them.

    Between two ends all steps take as long, so they are passed at once. `nearest`: how near two figures have
    come whose order decides.
    """

    def __init__(self, batch: Batch, running: Sequence[Job]) -> None:
        self.batch = batch
        self.now = 0.0
        self.running = [Running(one) for one in running]
        self.nearest = math.inf

    def step_s(self) -> float:
        return BASE_S + sum(one.job.beside_s for one in self.running) / self.batch.num_nodes

    def next_end(self) -> float:
        return self.now + min((one.left for one in self.running), default=math.inf) * self.step_s()

    def pass_until(self, when: float) -> None:
        while self.is_before(self.next_end(), when):
            self.pass_to_end()
        num_steps = (when - self.now) / self.step_s()
        for one in self.running:
            one.left -= num_steps
        self.now = when

    def pass_to_end(self) -> None:
        first = min(self.running, key=lambda one: one.left)
        self.now += first.left * self.step_s()
        self.running.remove(first)
        for one in self.running:
            one.left -= first.left

    def is_before(self, one: float, another: float) -> bool:
        self.nearest = min(self.nearest, abs(one - another))
        return one <= another

    def has_room(self, job: Job) -> bool:
        together = [job, *(one.job for one in self.running)]
        longest_s = (GOALS.itl_s - BASE_S) * self.batch.num_nodes
        return not self.running or (
            self.is_before(sum(one.beside_s for one in together), longest_s)
            and len(together) <= self.batch.num_places
            and sum(one.num_blocks for one in together) <= self.batch.num_blocks
        )

    def serve(self, job: Job) -> bool:
        self.pass_until(max(self.now, job.at))
        while not self.has_room(job):
            if not self.is_before(self.next_end(), job.at + GOALS.ttft_s):
                return False
            self.pass_to_end()
        if not self.is_before(self.now, job.at + GOALS.ttft_s):
            return False
        self.running.append(Running(job))
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
    st.lists(sequences, max_size=3),
    st.builds(
        Batch,
        num_nodes=st.floats(0.5, 3.0),
        num_places=st.sampled_from([2.0, 4.0, 100.0]),
        num_blocks=st.sampled_from([8.0, 20.0, 1000.0]),
    ),
)
def test_decode_nodes_are_one_batch_whose_sequences_share_its_steps(
    asked: list[Job], running: list[Job], batch: Batch
) -> None:
    jobs = sorted(asked, key=lambda one: one.at)
    naive = NaiveBatch(batch, running)
    expected = [naive.serve(one) for one in jobs]
    assume(naive.nearest > 1e-6)
    assert in_time(jobs, [(0.0, 1.0)], batch=batch, running=running) == expected


def test_a_sequence_holds_its_place_from_when_it_is_chosen_until_its_last_token() -> None:
    """Its prompt waits and is computed meanwhile: the room is given before that begins."""
    batch = ONE._replace(num_places=1.0)
    # 2 s of prompt are 40 steps of now, 50 ms each; with the 10 of its output they take 60 ms each.
    first = job(prefill_s=2.0, beside_s=0.01)
    jobs = [first, job(0.1, beside_s=0.01, prefill_s=1.5)]
    assert in_time(jobs, [(0.0, 1.0), (0.0, 1.0)], batch=batch) == [True, False]
    jobs[1] = jobs[1]._replace(prefill_s=1.0)  # 3.0 - 0.1 + 1.0 <= 4
    assert in_time(jobs, [(0.0, 1.0), (0.0, 1.0)], batch=batch) == [True, True]


def test_an_empty_batch_takes_any_sequence() -> None:
    """A request that is too much for the targets is served alone rather than never."""
    assert in_time([job(beside_s=1.0, num_blocks=99)], [(0.0, 1.0)], batch=ONE) == [True]


def test_a_node_that_moves_takes_up_its_side_when_its_old_work_is_done() -> None:
    """One place more from 5 s on: what comes before that does not find it."""
    jobs = [job(float(at), outputs=1000.0) for at in (0, 1, 6, 7)]
    now, later = ONE._replace(num_places=1.0), ONE._replace(num_places=2.0)
    assert in_time(jobs, [(0.0, 1.0)], batches=(now, later, 5.0)) == [True, False, True, False]
    assert in_time(jobs, [(0.0, 1.0)], batches=(later, later, 0.0)) == [True, True, False, False]


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
) -> LookAhead:
    """After 20 s of such requests."""
    demand = Demand()
    for number in range(int(20 * rate)):
        demand.add_request(num_prompt, num_cached, num_outputs, number / rate)
    window = demand.window(0.0, 20.0, stands_for, 10_000)
    assert window is not None
    views = cluster(*nodes).views()
    return LookAhead(views, duties_of(nodes), window, lengths_of(num_prompt, num_outputs), GOALS, 20.0)


def duties_of(nodes: Sequence[Described], **changes: str) -> Duties:
    duties: dict[str, Any] = {one.node_id: one.descriptor.role for one in nodes} | changes
    return duties


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
    assert share(ahead, nodes, d1="both") == pytest.approx((1 + SHARED) / (4.6 * 0.439), abs=0.1)
    assert share(ahead, nodes, p0="decode") == 0.0


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
    """The middle one of three prefill nodes is slow, and that of the decode nodes quick."""
    slow = [node(name, "prefill", num_blocks=4096, step=slowed(2.0)) for name in ("p1", "p2")]
    nodes = prefill(), *slow, quick_decode()
    ahead = ahead_of(nodes, rate=2.0, num_outputs=3000)
    assert [round(80 * share(ahead, nodes, **moved)) for moved in ({}, {"p0": "decode"})] == [19, 39]


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
    nodes = prefill(queued_prefill_tokens=20_000), decode()
    served = at_once(ahead_of(nodes).served(duties_of(nodes)))
    assert not served[0]
    assert served[-1]
    nodes = prefill(queued_prefill_tokens=20_000, interruptible_prefill_tokens=20_000), decode()
    assert all(at_once(ahead_of(nodes).served(duties_of(nodes))))


def test_of_many_nodes_and_requests_every_so_manyth_gives_the_same_share() -> None:
    nodes = [prefill(f"p{number}") for number in range(16)] + [decode(f"d{number}") for number in range(16)]
    all_of_them, some = ahead_of(nodes, rate=60.0), ahead_of(nodes, rate=60.0, stands_for=2)
    assert some.num_played == pytest.approx(all_of_them.num_played / 2, abs=2)
    assert share(some, nodes) == pytest.approx(share(all_of_them, nodes), abs=0.03)


@settings(deadline=None)
@given(st.lists(st.tuples(times, st.floats(0.5, 3.0)), unique=True, max_size=40), st.integers(1, 9))
def test_fewer_prefill_nodes_do_as_much_as_their_part(
    queues: list[tuple[float, float]], stands_for: int
) -> None:
    """So one node more always is more."""
    assert fewer_queues(queues, 1) == (queues, 1.0 if queues else 0.0)
    chosen, num_each = fewer_queues(queues, stands_for)
    assert set(chosen) <= set(queues)
    assert len(set(chosen)) == len(chosen)
    if queues:
        assert len(chosen) / num_each == pytest.approx(len(queues) / stands_for)


def test_a_prompt_that_stands_for_others_takes_their_time_too() -> None:
    """It is computed as fast as it is, and the next one waits for all of them."""
    jobs = [job(prefill_s=1.0), job(prefill_s=1.0)]
    for num_each, expected in ((3.0, True), (3.1, False)):
        batches = ENDLESS, ENDLESS, 0.0
        served = at_once(served_in_time(jobs, ([(0.0, 1.0)], num_each), batches, [], BASE_S, GOALS))
        assert served == [True, expected]


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
