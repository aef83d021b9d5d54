"""One request gives one trace: over all services, with the right parents and the sums of its timeline."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import AsyncIterator

import httpx
import pytest
from nats.aio.msg import Msg

from flowkv_common.aio import running
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.config import SchedulerSettings, wants_traces
from flowkv_common.timeline import timeline
from flowkv_common.tracing import NO_TRACING, open_tracing
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Accepted, FindFinished, RequestFinished
from flowkv_engine.engine.model import LoadedModel
from flowkv_gateway.tokenizer import Tokenizer
from flowkv_scheduler.app import serve as serve_scheduler
from tests.collector import Collector, TracedSpan, collecting
from tests.live_nodes import TIMEOUT_S, live_node
from tests.live_page import serving_page
from tests.nats_server import NatsServer
from tests.waiting import soon, until

# A client's own span, as W3C's example has it; sampled.
TRACE_ID, CLIENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{CLIENT_ID}-01"
NUM_TOKENS = 5
ROUNDED_S = 2e-5
BODY = {
    "messages": [{"role": "user", "content": "the quick brown fox " * 8}],
    "max_tokens": NUM_TOKENS,
    "ignore_eos": True,
    "temperature": 0.5,
    "stream": True,
}


@contextlib.asynccontextmanager
async def cluster(
    nats_server: NatsServer, bus: Bus, model: LoadedModel, tokenizer: Tokenizer
) -> AsyncIterator[httpx.AsyncClient]:
    """1P1D, ready. No ITL goal can be kept: no prompt stays on the decode node, and each gap is told."""
    settings = SchedulerSettings(nats_url=nats_server.url, itl_goal_s=1e-6, lending=False)
    async with (
        running(serve_scheduler(settings, asyncio.Event())),
        live_node(nats_server, bus, model, "p0", role="prefill"),
        live_node(nats_server, bus, model, "d0", role="decode", peers=1),
        serving_page(nats_server, tokenizer) as served,
    ):
        await until(lambda: served.dispatch.readiness.why_not_ready() is None)
        yield served.http


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    """It is on for what starts from here on; no proxy stands between."""
    async with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setattr("flowkv_common.otel.LAST_SPANS_S", TIMEOUT_S)  # a busy host takes long
        yield collector


def below(spans: list[TracedSpan], parent: TracedSpan) -> list[tuple[str, str]]:
    """(service, name) of its children, in order of time; of those of one name the first."""
    children = sorted((span for span in spans if span.parent_id == parent.span_id), key=lambda one: one.began)
    return list(dict.fromkeys((child.service.removeprefix("flowkv-"), child.name) for child in children))


def only(spans: list[TracedSpan], service: str, name: str) -> TracedSpan:
    [found] = [span for span in spans if span.name == name and span.service == f"flowkv-{service}"]
    return found


async def test_a_request_is_one_trace(
    nats_server: NatsServer, bus: Bus, model: LoadedModel, tokenizer: Tokenizer, collector: Collector
) -> None:
    finished: asyncio.Queue[RequestFinished] = asyncio.Queue()
    async with (
        cluster(nats_server, bus, model, tokenizer) as http,
        await bus.subscribe(subjects.event("request_finished", "*"), RequestFinished, finished.put),
    ):
        answer = await http.post("/v1/chat/completions", json=BODY, headers={"traceparent": TRACEPARENT})
        assert answer.status_code == 200, answer.text
        event = await soon(finished.get())
    # All services have ended, and so have sent what they had.
    spans = [span for span in collector.spans if span.trace_id == TRACE_ID]
    assert spans == collector.spans
    assert not any(span.is_error for span in spans)
    assert collector.services.keys() == {
        "flowkv-gateway",
        "flowkv-scheduler",
        "flowkv-prefill",
        "flowkv-decode",
    }
    assert collector.services["flowkv-decode"] == {"d0"}

    # --- parents ---
    post = only(spans, "gateway", "POST /v1/chat/completions")
    assert (post.parent_id, post.kind, post.attributes["http.response.status_code"]) == (
        CLIENT_ID,
        "server",
        200,
    )
    [chat] = [span for span in spans if span.name.startswith("chat ")]
    assert chat.parent_id == post.span_id
    assert below(spans, chat) == [("gateway", "schedule"), ("gateway", "attempt")]
    schedule, attempt = only(spans, "gateway", "schedule"), only(spans, "gateway", "attempt")
    assert below(spans, schedule) == [("scheduler", "schedule")]
    assert set(below(spans, attempt)) == {
        ("prefill", "prefill"),
        ("decode", "decode"),
        ("gateway", "gap"),
        ("gateway", "end"),
    }
    prefill, decode = only(spans, "prefill", "prefill"), only(spans, "decode", "decode")
    assert {name for _, name in below(spans, prefill)} == {"queue", "reserve", "chunk", "send"}
    assert below(spans, decode) == [("decode", "step")]

    # --- times: the phases are the timeline's, and the gateway's two spans fill the request's time ---
    told = {
        name: sum(
            phase.took_s
            for times in event.attempt_times[0].nodes
            for phase in times.phases
            if phase.name == name
        )
        for name in ("queue", "reserve", "chunk", "send", "step")
    }
    for name, told_s in told.items():
        traced_s = sum(span.took_s for span in spans if span.name == name)
        assert traced_s == pytest.approx(told_s, abs=ROUNDED_S), name
    gaps = [span for span in spans if span.name == "gap"]
    assert len(gaps) == len(event.attempt_times[0].gaps) == NUM_TOKENS - 1
    total_s = event.phases_s["total"]
    assert schedule.took_s + attempt.took_s == pytest.approx(total_s, rel=0.02, abs=0.002)
    in_line_s = sum(span.took_s for span in timeline(event) if not span.is_beside)
    assert schedule.took_s + attempt.took_s == pytest.approx(in_line_s, rel=0.02, abs=0.002)
    assert schedule.took_s == pytest.approx(event.attempt_times[0].assigned_s, rel=0.02, abs=0.002)
    assert prefill.began >= attempt.began - ROUNDED_S
    assert decode.began + decode.took_s <= attempt.began + attempt.took_s + ROUNDED_S

    # --- what is told of the answer ---
    assert (
        chat.attributes.items()
        >= {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "flowkv",
            "gen_ai.request.max_tokens": NUM_TOKENS,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.stream": True,
            "gen_ai.usage.input_tokens": event.num_prompt_tokens,
            "gen_ai.usage.output_tokens": NUM_TOKENS,
            "gen_ai.response.finish_reasons": ["length"],
            "gen_ai.response.time_to_first_chunk": event.phases_s["ttft"],
        }.items()
    )
    assert chat.name == f"chat {chat.attributes['gen_ai.request.model']}"
    assert attempt.attributes.items() >= {"flowkv.prefill_node": "p0", "flowkv.decode_node": "d0"}.items()
    assert attempt.attributes["flowkv.reason"] == schedule.attributes["flowkv.reason"]
    assert attempt.events == ["first token", "second token"]
    sends = [span for span in spans if span.name == "send"]
    assert all(span.attributes["flowkv.num_bytes"] > 0 for span in sends)
    assert "quick brown fox" not in repr(spans)


async def test_a_client_that_samples_nothing_gets_no_trace(
    nats_server: NatsServer, bus: Bus, model: LoadedModel, tokenizer: Tokenizer, collector: Collector
) -> None:
    """And one whose header makes no sense gets a trace of its own."""
    async with cluster(nats_server, bus, model, tokenizer) as http:
        for traceparent in (TRACEPARENT.removesuffix("01") + "00", "nonsense"):
            body = {**BODY, "stream": False}
            answer = await http.post("/v1/chat/completions", json=body, headers={"traceparent": traceparent})
            assert answer.status_code == 200
    assert collector.spans
    assert TRACE_ID not in {span.trace_id for span in collector.spans}
    assert len({span.trace_id for span in collector.spans}) == 1


async def test_a_refused_request_is_told_as_an_error(
    nats_server: NatsServer, tokenizer: Tokenizer, collector: Collector
) -> None:
    async with serving_page(nats_server, tokenizer) as served:
        answer = await served.http.post("/v1/chat/completions", json=BODY)
        assert answer.status_code == 503  # no node has joined
        assert (await served.http.get("/v1/models")).status_code == 200  # asks for no text: no span
    [post] = collector.spans
    assert (post.is_error, post.attributes["error.type"]) == (True, "503")
    assert post.parent_id == ""


async def test_a_collector_that_is_away_holds_up_no_exit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1.5")  # it tries again after about 1 s, and no more
    monkeypatch.setattr("flowkv_common.otel.LAST_SPANS_S", 0.05)
    async with asyncio.timeout(TIMEOUT_S):
        async with open_tracing("flowkv-test", "t0") as tracing:
            with tracing.begin("lost"):
                pass
    assert "the last spans are not sent" in caplog.text
    # It draws random numbers between two tries, and must not in the middle of other tests.
    for thread in [one for one in threading.enumerate() if one.name == "last-spans"]:
        await asyncio.to_thread(thread.join, TIMEOUT_S)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_opentelemetrys_own_variables_turn_it_on(environ: dict[str, str], wanted: bool) -> None:
    assert wants_traces(environ) == wanted


async def test_off_it_does_nothing() -> None:
    async with open_tracing("flowkv-test", "t0") as tracing:
        assert tracing is NO_TRACING
        with tracing.continuing({"traceparent": TRACEPARENT}), tracing.begin("nothing") as span:
            assert not span.is_recorded
            assert tracing.headers() == {}


@pytest.mark.parametrize("is_on", [False, True])
async def test_a_request_over_nats_names_its_span_if_there_is_one(
    nats_server: NatsServer, bus: Bus, collector: Collector, monkeypatch: pytest.MonkeyPatch, is_on: bool
) -> None:
    if not is_on:
        monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    heard: list[dict[str, str] | None] = []

    async def answer(msg: Msg) -> None:
        heard.append(msg.headers)
        await bus.publish(msg.reply, Accepted(node_id="n0"))

    async with (
        open_tracing("flowkv-test", "t0") as tracing,
        connect(nats_server.url, name="asks", tracing=tracing) as asking,
        await bus.subscribe_raw("ask", answer),
    ):
        await asking.request("ask", FindFinished(), Accepted, timeout_s=TIMEOUT_S)  # no span is current
        with tracing.begin("asks") as span, span.current():
            await asking.request("ask", FindFinished(), Accepted, timeout_s=TIMEOUT_S)
    assert heard[0] is None
    if not is_on:
        assert heard[1] is None
        return
    [sent] = collector.spans
    assert heard[1] is not None
    assert heard[1].keys() == {"traceparent"}
    assert heard[1]["traceparent"].startswith(f"00-{sent.trace_id}-{sent.span_id}-")


def test_off_no_service_imports_it() -> None:
    """Nor does a node, by the contracts of pyproject.toml: it would take seconds to see."""
    probe = (
        "import asyncio, sys\n"
        "import flowkv_gateway.__main__, flowkv_scheduler.__main__\n"
        "from flowkv_common.tracing import open_tracing\n"
        "async def run():\n"
        "    async with open_tracing('flowkv-test', 't0'):\n"
        "        print([name for name in sys.modules if name.split('.')[0] == 'opentelemetry'])\n"
        "asyncio.run(run())\n"
    )
    command = [sys.executable, "-c", probe]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


async def test_without_the_extra_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delitem(sys.modules, "flowkv_common.otel", raising=False)
    async with open_tracing("flowkv-test", "t0") as tracing:
        assert tracing is NO_TRACING
    assert "pip install 'flowkv[otel]'" in caplog.text
