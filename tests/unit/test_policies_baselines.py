"""The baselines choose as their names say."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import msgspec
import pytest

from benchmarks.baselines import BASELINES
from benchmarks.simulator.batch import Histogram
from benchmarks.simulator.kinds import KINDS
from benchmarks.simulator.node import FINGERPRINT
from benchmarks.simulator.run import Machines
from flowkv_common.errors import BadRequest
from flowkv_common.wire.messages import ScheduleRequest, Wait
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.policy import Choice


class Load(NamedTuple):
    """What a node of the test has to do."""

    num_queued: int = 0
    num_running: int = 0
    num_free: int = 10**6


def baseline(name: str, loads: list[Load], num_prefill: int, seed: int = 0) -> Planner:
    made = Planner(Goals(ttft_s=1e3), lends=False, choose=BASELINES[name](seed))
    nodes = Machines(KINDS["h100"], len(loads)).nodes(num_prefill, Histogram())
    made.set_descriptors({node.ref.node_id: node.descriptor() for node in nodes})
    for node, load in zip(nodes, loads, strict=True):
        report = node.report(0.0)
        blocks = msgspec.structs.replace(report.blocks, free=load.num_free)
        made.add_report(
            msgspec.structs.replace(
                report,
                queued_prefill_tokens=load.num_queued,
                num_running=load.num_running,
                blocks=blocks,
            ),
            0.0,
        )
    return made


def ask(planner: Planner, number: int = 0, hashes: list[str] | None = None) -> tuple[str, str]:
    request = ScheduleRequest(
        request_id=str(number),
        attempt=0,
        fingerprint=FINGERPRINT,
        num_prompt_tokens=640,
        max_new_tokens=100,
        block_hashes=hashes or [],
    )
    pair = planner.schedule(request, 0.1)
    assert isinstance(pair, Choice)
    return pair.prefill.node_id[-1], pair.decode.node_id[-1]


def test_round_robin_takes_each_node_in_turn_on_its_own_side() -> None:
    planner = baseline("round_robin", [Load()] * 5, num_prefill=2)
    pairs = [ask(planner, n) for n in range(6)]
    assert Counter(p for p, _ in pairs) == {"0": 3, "1": 3}
    assert Counter(d for _, d in pairs) == {"2": 2, "3": 2, "4": 2}


def test_least_loaded_counts_reports_and_its_own_choices() -> None:
    planner = baseline("least_loaded", [Load(700), Load(0), Load(0, 3), Load(0, 1)], num_prefill=2)
    assert [ask(planner, n) for n in range(4)] == [("1", "3"), ("1", "3"), ("0", "2"), ("1", "3")]


def test_random_takes_all_nodes_of_a_side_alike() -> None:
    planner = baseline("random", [Load()] * 4, num_prefill=2)
    counts = Counter(node for n in range(60) for node in ask(planner, n))
    assert counts.keys() == {"0", "1", "2", "3"}
    assert min(counts.values()) > 15


def test_two_choices_never_takes_the_most_loaded() -> None:
    planner = baseline("two_choices", [Load(9_000), Load(), Load(), Load(0, 90), Load(), Load()], 3)
    assert all(p != "0" and d != "3" for p, d in (ask(planner, n) for n in range(10)))


def chain(number: int) -> list[str]:
    return [f"{number:08x}{place:08x}" * 2 for place in range(10)]


def test_prefixes_have_a_home() -> None:
    planner = baseline("prefix_affinity", [Load(5000), Load(), Load(), Load(), Load()], num_prefill=4)
    homes = {ask(planner, n, chain(n % 8))[0] for n in range(8)}
    again = [ask(planner, 100 + n, chain(n % 8))[0] for n in range(8)]
    assert [ask(planner, 200 + n, chain(n % 8))[0] for n in range(8)] == again
    assert len(homes) > 1


@pytest.mark.parametrize("name", BASELINES)
def test_decode_nodes_without_room_are_left_out(name: str) -> None:
    planner = baseline(name, [Load(), Load(num_free=5), Load()], num_prefill=1)
    assert {ask(planner, n)[1] for n in range(10)} == {"2"}


@pytest.mark.parametrize("name", BASELINES)
def test_admission_is_the_schedulers(name: str) -> None:
    full = baseline(name, [Load(), Load(num_free=5)], num_prefill=1)
    request = ScheduleRequest(
        request_id="a", attempt=0, fingerprint=FINGERPRINT, num_prompt_tokens=640, max_new_tokens=100
    )
    assert isinstance(full.schedule(request, 0.1), Wait)
    with pytest.raises(BadRequest):
        full.schedule(msgspec.structs.replace(request, num_prompt_tokens=10**7), 0.1)
