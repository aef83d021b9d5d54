"""The live page: what happens in the cluster now, for a browser, and where each request's time went.

While no page is open nothing is heard and nothing runs. Open pages share one view of the bus and one picture
of it, which is made twice a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from flowkv_common.cluster_view import ClusterView, NodeState
from flowkv_common.config import GatewaySettings
from flowkv_common.errors import Full, NotFound, Unavailable
from flowkv_common.timeline import timeline
from flowkv_common.wire.messages import FindFinished, RequestFinished
from flowkv_gateway.access import is_local
from flowkv_gateway.finished import FinishedLog

Json = dict[str, Any]
View = Callable[[], AbstractAsyncContextManager[ClusterView]]

PAGE = Path(__file__).with_name("live.html")
PERIOD_S = 0.5
# Each costs an encoded picture per period on its connection.
MAX_OPEN = 16
MAX_SHOWN = 100  # requests of the past, to a page that opens
# Lines are made of so many requests per picture, the newest: some 0.1 ms each. The figures count all.
MAX_NEW = 20
MAX_BYTES = 4 * 1024 * 1024  # of what is remembered, when a page opens
# Nothing from anywhere else, whatever a model's answer says.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def is_wanted(settings: GatewaySettings) -> bool:
    """By itself it shows only to those who have a key, or are on this host."""
    if settings.live_page == "auto":
        return bool(settings.api_keys_file) or is_local(settings.host)
    return settings.live_page == "on"


class LivePage:
    """The routes of the page. `run` must run beside them.

    `view` gives what the bus says. Once `stop` is set, open pages are let go.
    """

    def __init__(self, view: View, finished: FinishedLog, stop: asyncio.Event) -> None:
        self._view = view
        self._finished = finished
        self._stop = stop
        self._num_open = 0
        self._opened = asyncio.Event()
        self._picture: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()  # the next one

    def routes(self) -> list[Route]:
        return [
            Route("/", self.page),
            Route("/live", self.stream),
            Route("/live/{request_id}", self.request),
        ]

    async def page(self, _: Request) -> Response:
        return FileResponse(PAGE, headers={"content-security-policy": _POLICY, "cache-control": "no-cache"})

    async def request(self, request: Request) -> Response:
        """One request that has ended here, moment by moment."""
        request_id = request.path_params["request_id"]
        found = self._finished.find(FindFinished(request_id=request_id), MAX_BYTES).requests
        if not found:
            raise NotFound(f"This gateway does not remember {request_id}: it has its last 1,000 requests.")
        line = [span._asdict() for span in timeline(found[0])]
        body = msgspec.json.encode({"request": found[0], "timeline": line})
        return Response(body, media_type="application/json")

    async def stream(self, _: Request) -> Response:
        """Events, each with a picture. Raises Full while as many pages are open as can be."""
        if self._num_open >= MAX_OPEN:
            raise Full(f"{MAX_OPEN} live pages are open here.", retry_after_s=10.0)
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(self._events(), media_type="text/event-stream", headers=headers)

    async def _events(self) -> AsyncIterator[bytes]:
        self._num_open += 1
        self._opened.set()
        try:
            past = self._finished.last(MAX_SHOWN, MAX_BYTES)
            yield _event({"requests": [_request(event) for event in reversed(past)]})
            while not self._stop.is_set():
                yield await asyncio.shield(self._picture)
        finally:
            self._num_open -= 1

    async def run(self) -> None:
        """Until cancelled: follow the cluster while a page is open."""
        while True:
            self._opened.clear()
            if not self._num_open:
                await self._opened.wait()
            try:
                async with self._view() as view:
                    sight = Sight(view)
                    while self._num_open:
                        await asyncio.sleep(PERIOD_S)
                        self._show(_event(sight.picture()))
            except Unavailable as error:  # cut off just now
                await asyncio.sleep(PERIOD_S)
                self._show(_event({"lost": error.message}))

    def _show(self, event: bytes) -> None:
        shown, self._picture = self._picture, asyncio.get_running_loop().create_future()
        shown.set_result(event)


class Sight:
    """What has changed in a view since the last picture."""

    def __init__(self, view: ClusterView) -> None:
        self._view = view
        self._pools: dict[str, str] = {}
        self._shown: dict[str, set[str]] = {"requests": set(), "transfers": set()}

    def picture(self) -> Json:
        """All that a page draws; of requests and transfers the new ones."""
        view = self._view
        finished = {event.request_id: event for event in view.finished}
        transfers = {event.transfer_id: event for event in view.transfers}
        new_finished = [finished[name] for name in self._new("requests", list(finished))]
        new_transfers = [transfers[name] for name in self._new("transfers", list(transfers))]
        return {
            "leader": view.leader.id if view.leader else "",
            "regime": view.regime,
            "regime_reason": view.regime_reason,
            "wanted": view.wishes(),
            "nodes": [self._node(node) for node in view.nodes()],
            "requests": [_request(event) for event in new_finished[-MAX_NEW:]],
            "num_requests": len(new_finished),
            "num_tokens": sum(event.num_output_tokens for event in new_finished),
            "transfers": [
                [one.prefill_node, one.decode_node, one.num_bytes, one.total_s, one.connector]
                for one in new_transfers
            ],
            "moves": [
                {"node": one.node.node_id, "before": one.before, "after": one.after, "reason": one.reason}
                for one in view.moves
            ][-3:],
        }

    def _new(self, kind: str, names: list[str]) -> list[str]:
        """Those that were not there before. A view keeps the last 100: what is gone is not remembered."""
        new = [name for name in names if name not in self._shown[kind]]
        self._shown[kind] = set(names)
        return new

    def _node(self, node: NodeState) -> Json:
        report = node.report
        shown: Json = {
            "id": node.node_id,
            "role": node.descriptor.role,
            "serves": node.serves,
            "state": node.state,
            "token_budget": node.descriptor.token_budget,
        }
        if report is None:
            return shown
        self._pools[node.node_id] = report.pool or self._pools.get(node.node_id, "")
        blocks = report.blocks
        return {
            **shown,
            "budget": report.max_prefill_tokens_per_step,
            "running": report.num_running,
            "waiting": report.num_waiting,
            "max_running": report.max_num_seqs,
            "prompts": report.num_prompts,
            "queued": report.queued_prefill_tokens,
            "handoffs": report.num_handoffs,
            "pool": self._pools[node.node_id],
            "leased": blocks.leased + blocks.quarantined,
            "cached": blocks.cached,
            "blocks": blocks.total,
            "longest": blocks.longest_free_run,
            "step_s": report.decode_step_s,
            "links": sorted(set(node.links.values()) - {""}),
        }


def _request(event: RequestFinished) -> Json:
    """A row of the waterfall: the spans without their details."""
    return {
        "id": event.request_id,
        "outcome": event.outcome,
        "prompt": event.num_prompt_tokens,
        "cached": event.num_cached_tokens,
        "output": event.num_output_tokens,
        "prefill": event.prefill_node,
        "decode": event.decode_node,
        "ttft": event.phases_s.get("ttft"),
        "total": event.phases_s.get("total", 0.0),
        "began_at": event.began_at,
        "spans": [
            [span.name, round(span.began_s, 5), round(span.took_s, 5)]
            for span in timeline(event)
            if not span.is_beside
        ],
    }


def _event(content: Json) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
