"""What arrives: windows of traces, rates, the made-up shift, and the targets that follow."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.simulator.kinds import KINDS, default_targets, unloaded_prefill_s
from benchmarks.traffic import MADE_UP, shifting
from flowkv.bench.traces import Request, at_rate, cut_to, own_rate, tokens_of, window

H100 = KINDS["h100"]


def trace(num_requests: int, *, tick_s: float = 3.0) -> list[Request]:
    """Three requests per tick."""
    return [Request(100 + n, 10, (), tick_s * (n // 3)) for n in range(num_requests)]


def test_a_window_is_a_stretch_of_the_trace_that_the_seed_places() -> None:
    everything = trace(300)
    one, again, other = (window(everything, 30, seed) for seed in (1, 1, 2))
    assert one == again != other
    begin = everything.index(one[0])
    assert one == everything[begin : begin + 30]
    assert window(everything, 1_000, 1) == everything


def test_arrivals_come_at_the_wanted_rate_and_differ_by_seed() -> None:
    timed = at_rate(trace(3_000), 8.0, seed=1)
    assert sorted(r.num_prompt_tokens for r in timed) == [r.num_prompt_tokens for r in trace(3_000)]
    assert [r.arrival_s for r in timed] == sorted(r.arrival_s for r in timed)
    assert own_rate(timed) == pytest.approx(8.0, rel=0.01)
    assert len({r.arrival_s for r in timed}) == 3_000
    assert timed == at_rate(trace(3_000), 8.0, seed=1)
    assert timed != at_rate(trace(3_000), 8.0, seed=2)


def test_bursts_survive_another_rate() -> None:
    bursty = [Request(1, 1, (), 100.0 * (n // 50) + n % 50 * 0.01) for n in range(200)]
    timed = at_rate(bursty, 10.0, seed=0)
    # A burst of 50 spans half a second of 100 before, and a few jitters of 0.1 s of 5 now.
    gaps = [later.arrival_s - sooner.arrival_s for sooner, later in zip(timed, timed[1:], strict=False)]
    assert sum(gap > 2.0 for gap in gaps) == 3


def test_prompts_and_answers_are_cut_to_what_fits() -> None:
    (request,) = cut_to([Request(9_000, 5_000, tuple(range(18)))], 8_192)
    assert (request.num_prompt_tokens, request.num_output_tokens) == (8_192 - 2_048, 2_048)


def test_the_shift_goes_from_prompts_to_answers_and_back() -> None:
    requests = shifting(900, seed=4)
    assert requests == shifting(900, seed=4) != shifting(900, seed=5)
    phases = [requests[:180], requests[180:720], requests[720:]]  # a fifth, three, and one of all
    prompts = [sum(r.num_prompt_tokens for r in phase) for phase in phases]
    answers = [sum(r.num_output_tokens for r in phase) for phase in phases]
    assert min(prompts[0], prompts[2]) > 4 * prompts[1]
    assert answers[1] > 15 * max(answers[0], answers[2])
    begins = [phase[0].arrival_s for phase in phases] + [requests[-1].arrival_s]
    lasts = [after - before for before, after in itertools.pairwise(begins)]
    assert max(lasts) < 1.5 * min(lasts)
    ids = [key for request in requests for key in request.hash_ids]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", MADE_UP)
def test_made_up_traffic_follows_from_its_seed(name: str) -> None:
    requests = MADE_UP[name](400, 4)
    assert requests == MADE_UP[name](400, 4) != MADE_UP[name](400, 5)
    assert len(requests) == 400
    assert requests[0].arrival_s == 0
    assert all(sooner.arrival_s <= later.arrival_s for sooner, later in itertools.pairwise(requests))
    assert all(len(r.hash_ids) in (0, -(-r.num_prompt_tokens // 512)) for r in requests)
    assert min(min(r.num_prompt_tokens, r.num_output_tokens) for r in requests) >= 1


@pytest.mark.parametrize(
    ("name", "least", "most"), [("agents", 0.8, 0.97), ("turns", 0.7, 0.9), ("hot", 0.7, 0.8)]
)
def test_prompts_share_what_their_traffic_is_about(name: str, least: float, most: float) -> None:
    seen: set[int] = set()
    num_shared = num_all = 0
    for request in MADE_UP[name](600, 1):
        new = [key for key in request.hash_ids if key not in seen]
        assert request.hash_ids[len(request.hash_ids) - len(new) :] == tuple(new)  # seen ids come first
        num_shared += 512 * (len(request.hash_ids) - len(new))
        num_all += request.num_prompt_tokens
        seen.update(new)
    assert least < num_shared / num_all < most


def test_bursts_and_batches_are_still_there_at_another_rate() -> None:
    for name, most in (("bursts", 50), ("batchy", 200)):
        timed = [r.arrival_s for r in at_rate(MADE_UP[name](600, 0), 4.0, seed=0)]
        assert max(sum(at <= other < at + 5 for other in timed) for at in timed) == pytest.approx(
            most, abs=25
        )


def test_equal_ids_give_equal_tokens() -> None:
    one, other = tokens_of((7, 8), 1024), tokens_of((7, 9), 700)
    assert (len(one), len(other)) == (1024, 700)
    assert one[:512] == other[:512]
    assert one[512:700] != other[512:]
    assert tokens_of((7, 8), 1024) == one
    assert tokens_of((), 100) == []


def test_targets_are_multiples_of_an_idle_node() -> None:
    requests = [Request(1_000, 100)] * 8 + [Request(5_000, 100)] * 2
    targets = default_targets(H100, requests)
    assert targets.ttft_s == pytest.approx(3 * unloaded_prefill_s(H100, 5_000) + 0.25)
    fit = H100.fit
    assert targets.tpot_s == pytest.approx(2 * (fit.base_s + fit.sequence_s + 1_850 * fit.context_token_s))


def test_an_unloaded_prompt_takes_the_time_of_its_chunks() -> None:
    fit, budget = H100.fit, H100.token_budget
    two_chunks = 2 * fit.base_s + fit.prefill_token_s * 5_000 + fit.attended_token_s * 5_000 * 5_001 / 2
    assert budget == 4_096
    assert unloaded_prefill_s(H100, 5_000) == pytest.approx(two_chunks)
