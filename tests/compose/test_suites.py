"""The suites of the local cluster, against the composed system: identity, streaming, errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compose.composed import Composed
from tests.e2e.observer import observe
from tests.e2e.prompts import make_prompts
from tests.e2e.test_bad_input import (  # noqa: F401 - pytest runs what is imported
    _no_process_ends,
    http,
    test_a_good_stream_does_not_notice,
    test_bad_body_names_the_field,
    test_body_over_the_limit,
    test_odd_but_good_bodies,
    test_silent_clients_are_let_go,
    test_unknown_model,
    test_unknown_path,
    test_what_is_no_http,
    test_wrong_method,
)
from tests.e2e.test_identity import check_all, generate_all
from tests.e2e.test_openai_client import (  # noqa: F401
    async_client,
    client,
    eos_id,
    observer,
    test_chat,
    test_chat_logprobs,
    test_chat_stream_is_the_same_text,
    test_completion_and_its_stream,
    test_completion_logprobs_and_their_stream,
    test_eos_ends_is_held_back_or_ignored,
    test_error_classes,
    test_leaving_amid_the_stream_frees_the_blocks,
    test_models,
    test_raw_and_streaming_responses,
    test_seed,
    test_stop_strings,
    test_token_ids_round_trip,
    test_usage_in_the_stream,
)

pytestmark = pytest.mark.compose


@pytest.fixture(scope="module")
def cluster(composed: Composed) -> Composed:
    """What the suites call it."""
    return composed


@pytest.mark.parametrize(
    ("connectors", "scale"),
    [("shm,tcp", {}), ("shm,tcp", {"prefill": 2, "decode": 2}), ("tcp", {"prefill": 1, "decode": 1})],
    ids=["1p1d", "2p2d", "1p1d without shared memory"],
)
async def test_identity(composed: Composed, model_path: Path, connectors: str, scale: dict[str, int]) -> None:
    composed.set(CONNECTORS=connectors)
    composed.up(**scale)
    prompts = make_prompts(vocab_size=49_152)
    async with observe(composed.nats_url) as watching:
        transfers = await watching.events("flowkv.v1.event.kv_transferred.>")
        finishes = await watching.events("flowkv.v1.event.request_finished.>")
        done = await generate_all(composed.url, prompts)
        finished = await finishes.wait_for_all(len(prompts))
        await watching.wait_idle()
    composed.set(CONNECTORS="shm,tcp")
    check_all(model_path, done)
    num_travelled = sum(event["prefill_node"] != event["decode_node"] for event in finished)
    assert {event["connector"] for _, event in transfers.events} == {connectors.split(",")[0]}
    assert len(transfers.events) == num_travelled
    assert num_travelled >= 20
