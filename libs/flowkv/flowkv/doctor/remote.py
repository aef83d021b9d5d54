"""Real requests through the API: one, to see on the bus where it ran and how its KV moved; one per pair."""

from __future__ import annotations

import asyncio
import secrets

import msgspec

from flowkv.api import asked, reachable
from flowkv.doctor import Finding, bad, good, look
from flowkv_common.cluster_view import ClusterView
from flowkv_common.errors import Unavailable
from flowkv_common.wire.deep_health import DeepHealth

REQUEST_TIMEOUT_S = 60.0
# Events follow the answer at once.
EVENTS_TIMEOUT_S = 2.0
NUM_TOKENS = 4  # the first is prefill's
ABOUT = "a request"
PAIRS = "pairs"


class Answer(msgspec.Struct):
    id: str


async def prove_remote_prefill(view: ClusterView, url: str, key: str) -> list[Finding]:
    """Asks the API at `url`, else where the gateway says it is."""
    url = url or _url_told(view)
    if not url:
        return [look(ABOUT, "no gateway says where its API is", "say it: --url http://HOST:PORT")]
    try:
        status, body = await asyncio.to_thread(_ask, url, key)
    except Unavailable as error:
        mend = (
            "in Compose it is on another port, which `docker compose port gateway 8000` prints: --url says it"
        )
        return [bad(ABOUT, error.message, mend)]
    if status == 401:
        return [look(ABOUT, "the API needs a key", "give one: --key")]
    if status != 200:
        return [
            bad(ABOUT, f"it got {status}: {body[:300].decode(errors='replace')}", "see what is bad above")
        ]
    request_id = msgspec.json.decode(body, type=Answer).id
    try:
        async with asyncio.timeout(EVENTS_TIMEOUT_S):
            while not (finished := [one for one in view.finished if one.request_id == request_id]):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    except TimeoutError:
        said = "it was answered, but its end was not heard on this NATS"
        return [look(ABOUT, said, "is this the NATS of that gateway?")]
    where = finished[0]
    took = f"first token after {where.phases_s.get('ttft', 0.0):.3f} s"
    if where.prefill_node == where.decode_node:
        said = f"of {where.num_prompt_tokens} tokens ran on {where.prefill_node} alone, {took}: no KV moved"
        return [look(ABOUT, said, "as it should with one mixed node, or where all others are busy")]
    said = (
        f"of {where.num_prompt_tokens} tokens: prefill on {where.prefill_node}, decode on {where.decode_node}"
    )
    moved = [one for one in view.transfers if one.transfer_id.startswith(f"{request_id}.")]
    if not moved:
        return [
            look(ABOUT, f"{said}, {took}; no transfer was heard", "decode may have had all of the prompt")
        ]
    how = f"{moved[-1].num_bytes} bytes of KV by {moved[-1].connector} in {moved[-1].num_calls} calls"
    return [good(ABOUT, f"{said}, {how}, {took}")]


async def try_pairs(view: ClusterView, url: str, key: str) -> list[Finding]:
    """By the gateway's `/health/deep`; nothing where it can't be asked, as the request before has shown."""
    url = url or _url_told(view)
    if not url:
        return []
    try:
        health = await asyncio.to_thread(_ask_deep_health, url, key)
    except (Unavailable, msgspec.DecodeError):  # or an older gateway's
        return []
    failed = [pair for pair in health.pairs if not pair.ok]
    mend = "look at the logs of both; if a node is in all of these, take it out: flowkv cordon NODE"
    findings = [bad(PAIRS, f"{pair.prefill} to {pair.decode}: {pair.error}", mend) for pair in failed]
    if not failed and health.pairs:
        slowest = max(health.pairs, key=lambda pair: pair.ms)
        said = f"{len(health.pairs)} of {health.num_pairs} answer, the slowest in {slowest.ms:.0f} ms"
        findings.append(good(PAIRS, f"{said} ({slowest.prefill} to {slowest.decode})"))
    return findings


def _url_told(view: ClusterView) -> str:
    """Where the first gateway says that its API is; empty if none does."""
    return next((reachable(one.metadata.get("url", "")) for one in view.services("gateway")), "")


def _ask_deep_health(url: str, key: str) -> DeepHealth:
    """Raises Unavailable, or DecodeError for any other answer."""
    with asked(url, "/health/deep", key=key, timeout_s=REQUEST_TIMEOUT_S) as response:
        return msgspec.json.decode(response.read(), type=DeepHealth)


def _ask(url: str, key: str) -> tuple[int, bytes]:
    """Status and body of a short completion of a prompt that no cache holds. Raises Unavailable."""
    prompt = " ".join(secrets.token_hex(4) for _ in range(12))
    body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}
    with asked(url, "/v1/completions", body, key=key, timeout_s=REQUEST_TIMEOUT_S) as response:
        return response.status, response.read()
