"""What the planner adds to its parts."""

from __future__ import annotations

import contextlib
import math

import msgspec
import pytest

from flowkv_common import errors
from flowkv_common.wire.messages import Wait
from flowkv_common.wire.nodes import SetPrefillCap, StepFit
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.demand import Window
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.policy import Choice
from flowkv_scheduler.rebalance import Order
from flowkv_scheduler.slices import at_once
from tests.described_nodes import CAPS, GROWN, MODEL, TOKEN_BUDGET, descriptor, report, request


def test_a_lent_node_is_forgotten_when_it_leaves_the_registry_not_when_it_is_silent() -> None:
    planner = Planner(Goals())
    roles = {"p0": "prefill", "d0": "decode", "d1": "decode"}
    nodes = {name: descriptor(name, role) for name, role in roles.items()}
    planner.set_descriptors(nodes)
    for name, role in roles.items():
        cap = TOKEN_BUDGET if name == "d0" else CAPS[role]
        planner.add_report(report(name, role, max_prefill_tokens_per_step=cap), 0.0)
    at_once(planner.tick(0.0))
    assert planner.rebalancer.leaving == {"d0": "decode"}
    at_once(planner.tick(9.0))  # all are silent
    assert planner.rebalancer.leaving == {"d0": "decode"}
    planner.set_descriptors({name: nodes[name] for name in ("p0", "d1")})
    assert planner.rebalancer.leaving == {}
    assert planner.rebalancer.moved == {}


def test_prompts_that_come_at_once_to_one_node_wait_for_each_other_and_are_not_refused() -> None:
    """A chunk beside decode takes longer than the goal here: they take turns, one prompt at a time."""
    planner = Planner(Goals())
    planner.set_descriptors({"m0": descriptor("m0", "mixed", num_blocks=1456)})
    core = StepFit(
        base_s=0.02, prefill_token_s=0.0011, attended_token_s=2e-7, sequence_s=0.0012, context_token_s=1e-6
    )
    load = report("m0", "mixed", free=1456, max_prefill_tokens_per_step=256, max_num_seqs=64, step=core)
    planner.add_report(load, 0.0)
    wanted = [msgspec.structs.replace(request(512, 64), request_id=f"r{number}") for number in range(16)]
    first, *others = [planner.schedule(each, 0.1) for each in wanted]
    assert isinstance(first, Choice)
    assert all(isinstance(other, Wait) and other.retry_in_s <= 0.5 for other in others)


def small_cluster(goals: Goals, roles: dict[str, str]) -> Planner:
    """Large pools, 1000 prompt tokens per second, and decode nodes with no time for a prompt."""
    planner = Planner(goals, lends=False)
    planner.set_descriptors({name: descriptor(name, role, num_blocks=10**6) for name, role in roles.items()})
    for name, role in roles.items():
        queued = 500_000 if role == "decode" else 0
        load = report(name, role, num_blocks=10**6, max_num_seqs=1000, forecast=GROWN)
        planner.add_report(msgspec.structs.replace(load, queued_prefill_tokens=queued), 0.0)
    return planner


PAIR = {"p0": "prefill", "d0": "decode"}


def seen(planner: Planner, model: str = MODEL.fingerprint) -> Window | None:
    """All that the planner remembers of what was wanted."""
    demand = planner._demands.get(model)
    return demand.window(-math.inf, 1.0, 1, 10**6) if demand else None


def num_lost(planner: Planner) -> int:
    window = seen(planner)
    return window.num_lost if window else 0


def test_what_is_wanted_moves_nodes_before_decode_is_full() -> None:
    """Prompts of a few tokens with long answers, for ten seconds: a prefill node is lent to decode."""
    planner = Planner(Goals())
    roles = {"p0": "prefill", "p1": "prefill", "d0": "decode"}
    planner.set_descriptors({name: descriptor(name, role) for name, role in roles.items()})
    fit = StepFit(
        base_s=0.02, prefill_token_s=1e-4, attended_token_s=0.0, sequence_s=0.01, context_token_s=0.0
    )
    orders: list[Order] = []
    for number in range(103):
        now = 0.1 * number
        for name, role in roles.items():
            planner.add_report(report(name, role, step=fit, max_num_seqs=64, seq=number), now)
        with contextlib.suppress(errors.Full):
            planner.schedule(request(16, 2000, request_id=f"r{number}"), now)
        orders += at_once(planner.tick(now))
    told = [(order.node.node_id, order.reason) for order in orders if isinstance(order, SetPrefillCap)]
    assert len({name for name, _ in told}) == 1
    assert told[0][0] in {"p0", "p1"}
    assert told[0][1].startswith("lent to decode")


def test_a_request_is_wanted_once_however_often_it_asks() -> None:
    planner = small_cluster(Goals(max_wait_s=30.0), PAIR)
    plain = request(20_000, 50, request_id="plain")
    assert isinstance(planner.schedule(plain, 0.0), Choice)
    waits = request(5000, 60, request_id="waits")
    for now in (0.0, 0.4, 0.8):
        assert isinstance(planner.schedule(waits, now), Wait)
    window = seen(planner)
    assert window is not None
    assert [(one.num_prompt_tokens, one.max_new_tokens) for one in window.wanted] == [
        (20_000, 50),
        (5000, 60),
    ]
    # Not again when its attempt has failed, before its first token or after.
    for again in ({"attempt": 1}, {"attempt": 1, "num_output_tokens": 3}):
        planner.schedule(msgspec.structs.replace(plain, **again), 1.0)
    assert len(window.wanted) == len((seen(planner) or window).wanted)


def test_a_refused_request_is_wanted_too() -> None:
    """Else a cluster that refuses most would seem to have little to do."""
    planner = small_cluster(Goals(max_wait_s=10.0), PAIR)
    planner.schedule(request(20_000, 50), 0.0)
    for number in range(5):
        with pytest.raises(errors.Full):
            planner.schedule(request(5000, 50, request_id=f"refused{number}"), 0.1)
    window = seen(planner)
    assert window is not None
    assert [one.num_prompt_tokens for one in window.wanted] == [20_000] + 5 * [5000]


def test_the_cached_part_of_a_prompt_is_known_as_it_was_when_it_came() -> None:
    planner = small_cluster(Goals(), PAIR)
    hashes = [f"{number:016x}" * 2 for number in range(16)]
    for number in range(2):
        planner.schedule(request(261, 50, request_id=f"r{number}", block_hashes=hashes), 0.1 * number)
    window = seen(planner)
    assert window is not None
    assert [one.num_cached_tokens for one in window.wanted] == [0, 256]


def test_a_loss_counts_once_when_a_request_becomes_late_or_is_refused() -> None:
    planner = small_cluster(Goals(max_wait_s=30.0), PAIR)
    planner.schedule(request(20_000, 50), 0.0)
    planner.schedule(request(4200, 50), 0.0)
    assert num_lost(planner) == 0  # one late by itself, but served at once, and one that interrupts it
    for now in (0.0, 0.4, 0.8):
        planner.schedule(request(100, 50, request_id="late", age_s=now), now)
        assert num_lost(planner) == 1
    with pytest.raises(errors.Full):
        planner.schedule(request(100, 50, request_id="late", age_s=46.0), 0.9)
    assert num_lost(planner) == 1
    with pytest.raises(errors.Full):
        planner.schedule(request(100, 50, request_id="refused", deadline_in_s=1.0), 0.9)
    assert num_lost(planner) == 2
    with pytest.raises(errors.BadRequest):
        planner.schedule(request(10**8, 50, request_id="bad"), 0.9)
    assert num_lost(planner) == 2


def test_demand_is_dropped_with_its_model() -> None:
    planner = small_cluster(Goals(), PAIR)
    other = msgspec.structs.replace(MODEL, fingerprint="g")
    nodes = {name: descriptor(name, role) for name, role in PAIR.items()}
    planner.set_descriptors(nodes | {"x0": descriptor("x0", "mixed", model=other)})
    planner.add_report(report("x0", "mixed"), 0.0)
    for model in ("f", "g"):
        planner.schedule(request(request_id=model, fingerprint=model), 0.0)
        assert seen(planner, model) is not None
    planner.set_descriptors(nodes)
    assert seen(planner, "f") is not None
    assert seen(planner, "g") is None


def test_requests_for_unknown_models_take_no_memory() -> None:
    planner = small_cluster(Goals(), PAIR)
    for number in range(1000):
        found = planner.schedule(request(request_id=f"r{number}", fingerprint=f"x{number}"), 0.0)
        assert isinstance(found, Wait)
        at_once(planner.tick(0.0))
    assert not planner._demands
    assert planner.state.lengths.keys() <= {MODEL.fingerprint}
    assert len(planner._queue) == 1000
    planner.schedule(request(), 10.0)
    assert len(planner._queue) <= 1  # the others have not asked again


class Burst:
    """A pair that obeys at once, and gateways that ask again when they are told to."""

    def __init__(self, goals: Goals, num_requests: int, num_prompt_tokens: int) -> None:
        self.planner = small_cluster(goals, PAIR)
        self.num_prompt_tokens = num_prompt_tokens
        self.asks_at = {f"r{number:02}": 0.0 for number in range(num_requests)}
        self.first_tokens: dict[str, float] = {}  # in the order of service
        self.told: dict[str, float] = {}  # the first token's time, as first told

    def play(self) -> None:
        num_ticks, now, free_at = 0, 0.0, 0.0
        while self.asks_at:
            queued = max(0, round((free_at - now) * 1000))
            load = report(
                "p0",
                "prefill",
                num_blocks=10**6,
                seq=num_ticks,
                queued_prefill_tokens=queued,
                num_prompts_accepted=len(self.first_tokens),
            )
            self.planner.add_report(load, now)
            decoding = report(
                "d0",
                "decode",
                num_blocks=10**6,
                seq=num_ticks,
                queued_prefill_tokens=500_000,
                max_num_seqs=1000,
                num_rooms_given=len(self.first_tokens),
                num_sequences_accepted=len(self.first_tokens),
                forecast=GROWN,
            )
            self.planner.add_report(decoding, now)
            for name in [name for name, at in self.asks_at.items() if at <= now]:
                wanted = request(self.num_prompt_tokens, 50, request_id=name, age_s=now)
                answer = self.planner.schedule(wanted, now)
                if isinstance(answer, Wait):
                    self.asks_at[name] = now + answer.retry_in_s
                    self.told.setdefault(name, now + answer.first_token_in_s)
                else:
                    del self.asks_at[name]
                    free_at = max(free_at, now) + self.num_prompt_tokens / 1000
                    self.first_tokens[name] = free_at
            num_ticks += 1
            now = 0.05 * num_ticks


@pytest.mark.parametrize("num_prompt_tokens", [100, 500, 1100])
def test_a_burst_is_served_in_order_and_none_of_it_is_refused(num_prompt_tokens: int) -> None:
    """50 at once take 5 s, 25 s or 55 s: most are late, all within the longest wait of 60 s."""
    burst = Burst(Goals(), 50, num_prompt_tokens)
    burst.play()
    assert list(burst.first_tokens) == sorted(burst.first_tokens)
    assert len(burst.first_tokens) == 50
    # The prefill node is never idle meanwhile, and what they were told at first is true.
    assert max(burst.first_tokens.values()) == pytest.approx(50 * num_prompt_tokens / 1000, rel=0.02)
    for name, told in burst.told.items():
        assert burst.first_tokens[name] == pytest.approx(told, rel=0.1)


def test_a_batch_is_no_demand_and_no_loss() -> None:
    """It moves no node: neither when it waits, nor when it is refused."""
    planner = small_cluster(Goals(), PAIR)
    planner.schedule(request(request_id="served", is_batch=True), 0.0)
    planner.schedule(request(4000, request_id="waits", is_batch=True), 0.0)
    with pytest.raises(errors.Full):
        planner.schedule(request(request_id="refused", is_batch=True, deadline_in_s=0.0), 0.0)
    assert seen(planner) is None
    planner.schedule(request(request_id="plain"), 0.0)
    assert seen(planner) is not None
