"""A tiny real tokenizer and a generator that follows a script: what the gateway's tests stand on."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, decoders, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models as tokenizer_models

from flowkv_common.config import GatewaySettings, listed
from flowkv_common.errors import FlowKVError
from flowkv_common.telemetry import serve_http
from flowkv_common.wire.messages import ModelCard, ModelFiles, NodeRef, TokenChunk, TokenLogprob
from flowkv_common.wire.nodes import NodeDescriptor
from flowkv_gateway.app import Api
from flowkv_gateway.chat import ChatFormat
from flowkv_gateway.cluster import ModelNodes, OwnModel
from flowkv_gateway.dispatch import Dispatch, Load
from flowkv_gateway.grammar import GrammarChecker
from flowkv_gateway.http import ApiConnection, TlsContext
from flowkv_gateway.models import Model, Models
from flowkv_gateway.output import Usage
from flowkv_gateway.prompts import SamplingDefaults
from flowkv_gateway.readiness import Readiness
from flowkv_gateway.request_state import RequestState
from flowkv_gateway.tokenizer import Tokenizer
from tests.described_nodes import descriptor

MODEL = "tiny/model"
NO_DEFAULTS = SamplingDefaults()
CARD = ModelCard(name=MODEL, fingerprint="f", max_model_len=128, vocab_size=512, eos_token_ids=[0])
EOS = 0  # <|end|>, special
START = 1  # <|start|>, special
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] == 'refuse me' %}{{ raise_exception('no such words') }}{% endif %}"
    "<|start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.get('tool_calls') or [] %}{{ call | tojson }}{% endfor %}<|end|>\n"
    "{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

# Knows tools and thinks, as Qwen's does.
THINKS = """\
{%- if tools %}<|start|>system
{% for tool in tools %}{{ tool | tojson }}{% endfor %} <tool_call></tool_call><|end|>
{% endif %}
{%- for message in messages %}<|start|>{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}{% endfor %}<|end|>
{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant
{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>{% endif %}
{%- endif %}"""
# As `THINKS` tells a model to call a function.
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
# Knows neither.
PLAIN = "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE of a few hundred tokens with a chat template, as a model folder has them."""
    raw = RawTokenizer(tokenizer_models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken("<|end|>", special=True), AddedToken("<|start|>", special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog, hello world, user assistant"], trainer
    )
    raw.add_tokens([AddedToken("<tool call>", special=False)])
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", "bos_token": "<|start|>"})
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def tokenizer_with(folder: Path, template: str) -> Tokenizer:
    (write_tokenizer(folder) / "chat_template.jinja").write_text(template)
    return Tokenizer.load(folder)


def token_chunk(
    *token_ids: int,
    finish_reason: str | None = None,
    logprobs: Sequence[TokenLogprob] = (),
    num_cached_tokens: int = 0,
) -> TokenChunk:
    """A chunk as `Dispatch.generate` gives it; what only nodes and streams look at is made up."""
    return TokenChunk(
        transfer_id="r.0",
        index=0,
        token_ids=list(token_ids),
        logprobs=list(logprobs),
        finish_reason=finish_reason,
        num_cached_tokens=num_cached_tokens,
    )


def no_usage() -> Usage:
    return Usage(num_prompt=0, num_cached=0, num_output=0, num_reasoning=None)


def text_chunks(tokenizer: Tokenizer, text: str, finish_reason: str | None = "stop") -> list[TokenChunk]:
    """One chunk per token of `text`; the last one ends the answer."""
    *others, last = tokenizer._encode([text], False)[0]
    return [*map(token_chunk, others), token_chunk(last, finish_reason=finish_reason)]


@dataclass
class ScriptedReadiness(Readiness):
    problem: str | None = None

    def why_not_ready(self) -> str | None:
        return self.problem


@dataclass
class ScriptedDispatch(Dispatch):
    """Gives every request the same steps: a chunk is yielded, an error raised, an event waited for.

    Remembers what it was asked for, and which requests were closed before their script was over.
    """

    script: Iterable[TokenChunk | FlowKVError | Exception | asyncio.Event] = ()
    card: ModelCard | None = CARD
    readiness: ScriptedReadiness = field(default_factory=ScriptedReadiness)
    open: Load = Load(0, 0, 0.0)
    # What is live, each with the error by which it fails.
    pairs: dict[tuple[str, str], FlowKVError | None] = field(default_factory=lambda: {("p0", "d0"): None})
    tried: list[tuple[str, str]] = field(default_factory=list)  # of those
    asked: list[RequestState] = field(default_factory=list)
    log: list[str] = field(default_factory=list)  # "ask <n>", "chunk <n>" in the order they happened
    cancelled: list[str] = field(default_factory=list)
    was_asked: asyncio.Event = field(default_factory=asyncio.Event)
    was_cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, request: RequestState) -> AsyncGenerator[TokenChunk, None]:
        request.begin()
        number = len(self.asked)
        self.asked.append(request)
        self.log.append(f"ask {number}")
        self.was_asked.set()
        try:
            for step in self.script:
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    self.log.append(f"chunk {number}")
                    if step.prompt_logprobs:
                        request.add_prompt_logprobs(step)
                        continue
                    request.add_chunk(step)
                    yield step
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(request.request_id)
            self.was_cancelled.set()
            raise

    def card_of(self, nodes: ModelNodes, num_further_bytes: int = 0) -> ModelCard | None:
        return self.card

    def load(self, nodes: ModelNodes) -> Load:
        return self.open

    def live_pairs(self) -> list[tuple[NodeDescriptor, NodeDescriptor]]:
        return [
            (descriptor(prefill, "prefill"), descriptor(decode, "decode")) for prefill, decode in self.pairs
        ]

    async def run_on(self, request: RequestState, prefill: NodeRef, decode: NodeRef) -> None:
        self.tried.append((prefill.node_id, decode.node_id))
        if error := self.pairs[prefill.node_id, decode.node_id]:
            raise error


class ScriptedNodes(ModelNodes):
    """They serve what a scripted dispatch says."""

    def __init__(self, dispatch: ScriptedDispatch) -> None:
        self._dispatch = dispatch
        super().__init__(OwnModel(ModelFiles()))

    @property
    def model(self) -> ModelCard | None:
        return self._dispatch.card

    @model.setter
    def model(self, _: ModelCard | None) -> None:
        """Not before the dispatch has one."""


def model_in_memory(
    settings: GatewaySettings,
    tokenizer: Tokenizer,
    nodes: ModelNodes,
    defaults: SamplingDefaults = NO_DEFAULTS,
) -> Model:
    """As `Model.load` makes it, of a folder that is not there."""
    return Model(
        tokenizer=tokenizer,
        format=ChatFormat(tokenizer, settings.tool_parser),
        defaults=defaults,
        checker=GrammarChecker(tokenizer.file),
        nodes=nodes,
        folder_names=(Path(settings.model_path).name,),
        set_names=listed(settings.model_names) or [settings.model_name],
        parser_name=settings.tool_parser,
    )


@dataclass
class Gateway:
    """One that serves over HTTP, and clients of it."""

    port: int
    dispatch: ScriptedDispatch
    http: httpx.AsyncClient
    client: openai.AsyncOpenAI
    stop: asyncio.Event  # it is about to stop
    leave: asyncio.Event  # its delay is over

    async def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        text = (await self.http.get("/metrics")).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            async with asyncio.timeout(10):
                yield reader, writer
        finally:
            writer.transport.abort()


@contextlib.asynccontextmanager
async def serving(
    tokenizer: Tokenizer,
    *,
    text: str = "hello",
    defaults: SamplingDefaults = NO_DEFAULTS,
    dispatch: ScriptedDispatch | None = None,
    **settings: Any,
) -> AsyncIterator[Gateway]:
    """A gateway that answers with `text`, or as `dispatch` does."""
    wanted = GatewaySettings(**{"model_path": "unused", "model_name": MODEL, **settings})
    dispatch = dispatch or ScriptedDispatch(text_chunks(tokenizer, text))
    stop, leave = asyncio.Event(), asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    models = Models([model_in_memory(wanted, tokenizer, ScriptedNodes(dispatch), defaults)])
    api = Api(wanted, models, dispatch, CollectorRegistry(), stop)

    async def serve() -> None:
        async with serve_http(
            api.app,
            "127.0.0.1",
            0,
            connection=ApiConnection,
            keep_alive_s=wanted.keep_alive_s,
            drain_timeout_s=wanted.drain_timeout_s,
            tls=TlsContext(wanted.tls_cert, wanted.tls_key) if wanted.tls_cert else None,
        ) as bound:
            port.set_result(bound)
            await leave.wait()

    async with models, asyncio.TaskGroup() as tasks:
        tasks.create_task(serve())
        url = f"{'https' if wanted.tls_cert else 'http'}://127.0.0.1:{await port}"
        async with (
            httpx.AsyncClient(base_url=url, timeout=10, trust_env=False, verify=False) as http,
            openai.AsyncOpenAI(
                base_url=f"{url}/v1",
                api_key="none",
                max_retries=0,
                timeout=10,
                http_client=openai.DefaultAsyncHttpxClient(trust_env=False, verify=False),
            ) as client,
        ):
            yield Gateway(await port, dispatch, http, client, stop, leave)
        leave.set()
