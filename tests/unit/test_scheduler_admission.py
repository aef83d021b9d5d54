"""Taken, told to wait, or refused: and is the retry time true?"""

from __future__ import annotations

import msgspec
import pytest
from imagined_nodes import NUM_BLOCKS, request, view

from flowkv_common import errors
from flowkv_common.wire.messages import Wait
from flowkv_scheduler.admission import Limits, decide
from flowkv_scheduler.policy import Choice

LIMITS = Limits()
PAIR = [view("p0", "prefill"), view("d0", "decode")]


def test_pair_with_room_is_taken() -> None:
    assert isinstance(decide(request(), PAIR, LIMITS), Choice)


@pytest.mark.parametrize(("num_prompt", "num_new", "field"), [(4096, 1, "prompt"), (96, 4001, "max_tokens")])
def test_request_that_fits_no_pool_is_a_bad_request(num_prompt: int, num_new: int, field: str) -> None:
    with pytest.raises(errors.BadRequest, match="4096 tokens") as caught:
        decide(request(num_prompt, num_new), PAIR, LIMITS)
    assert caught.value.field == field


def test_request_that_just_fits_is_taken() -> None:
    assert isinstance(decide(request(96, 4000), PAIR, LIMITS), Choice)


def test_request_for_a_node_that_is_not_ready_is_no_bad_request() -> None:
    large = view("d1", "decode", num_blocks=2 * NUM_BLOCKS, ready=False)
    assert isinstance(decide(request(96, 5000), [*PAIR, large], LIMITS), Wait)


@pytest.mark.parametrize(
    "nodes", [[], [view("p0", "prefill", ready=False)], [view("d0", "decode", age_s=9.0)]]
)
def test_without_nodes_it_waits_then_gives_up(nodes: list) -> None:
    decision = decide(request(), nodes, LIMITS)
    assert isinstance(decision, Wait)
    assert decision.retry_in_s == LIMITS.no_node_retry_s
    with pytest.raises(errors.Unavailable) as caught:
        decide(request(age_s=LIMITS.no_node_age_s + 0.1), nodes, LIMITS)
    assert caught.value.retry_after_s is not None


def test_full_decode_nodes_make_it_wait() -> None:
    nodes = [view("p0", "prefill"), view("d0", "decode", free=0), view("d1", "decode", free=5)]
    decision = decide(request(), nodes, LIMITS)
    assert isinstance(decision, Wait)
    assert LIMITS.min_retry_s <= decision.retry_in_s <= LIMITS.max_retry_s
    assert "2 decode nodes" in decision.reason


def test_full_decode_nodes_refuse_what_has_waited_too_long() -> None:
    with pytest.raises(errors.Full) as caught:
        decide(
            request(age_s=LIMITS.max_wait_s + 1),
            [view("p0", "prefill"), view("d0", "decode", free=0)],
            LIMITS,
        )
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0


def test_long_queue_is_refused_and_the_retry_time_is_true() -> None:
    queue = view("p0", "prefill", queued_prefill_tokens=72_000)  # at 1000 tokens/s
    with pytest.raises(errors.Full) as caught:
        decide(request(), [queue, PAIR[1]], LIMITS)
    assert caught.value.retry_after_s == pytest.approx(12.0)

    later = msgspec.structs.replace(queue.report, queued_prefill_tokens=72_000 - 12_000)
    assert isinstance(decide(request(), [queue._replace(report=later), PAIR[1]], LIMITS), Choice)


def test_retry_of_a_running_request_is_never_shed() -> None:
    queue = view("p0", "prefill", queued_prefill_tokens=72_000)
    retry = msgspec.structs.replace(request(age_s=LIMITS.max_wait_s + 1), attempt=1)
    assert isinstance(decide(retry, [queue, PAIR[1]], LIMITS), Choice)
    assert isinstance(decide(retry, [PAIR[0], view("d0", "decode", free=0)], LIMITS), Wait)
