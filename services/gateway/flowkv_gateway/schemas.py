"""The bodies of the endpoints: what may stand in them.

Numbers and booleans may be written as text, as in vLLM. `null` means the same as absent. Unknown fields are
accepted, since every client sends some; known ones that are not served are in `fields.py`. Knows nothing of
the model or of tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import msgspec
from msgspec import UNSET, Meta, UnsetType

from flowkv_common.errors import BadRequest, CannotStart
from flowkv_common.wire.messages import TokenLogprob
from flowkv_gateway import fields
from flowkv_gateway.messages import ChatMessage, check_messages
from flowkv_gateway.output import Delta
from flowkv_gateway.tokenizer import Vocabulary

MAX_CHOICES = 128  # answers per request, over all its prompts
_MAX_INT = 2**31 - 1

Count = Annotated[int, Meta(ge=0, le=_MAX_INT)]
PositiveCount = Annotated[int, Meta(ge=1, le=_MAX_INT)]
Share = Annotated[float, Meta(ge=0, le=1)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopK = Annotated[int, Meta(ge=-1, le=_MAX_INT)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Meta(ge=0.01, le=100)]
# Bounded, since matching it takes time and memory in proportion.
StopString = Annotated[str, Meta(min_length=1, max_length=1000)]
# Bounded, since they travel to the nodes with the request.
LogitBias = Annotated[dict[int, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)]
StopIds = Annotated[list[Count], Meta(max_length=128)]
# How PHP and its like write an empty object.
EmptyList = Annotated[list[Any], Meta(max_length=0)]


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(fields.Body, kw_only=True):
    """What both endpoints have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: PositiveCount | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    stop_token_ids: StopIds | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None  # -1: any
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: LogitBias | EmptyList | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None  # vLLM's: the ids of the output tokens beside the text
    priority: Annotated[int, Meta(ge=-_MAX_INT, le=_MAX_INT)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check(self) -> None:
        """Raises BadRequest for fields that contradict each other."""
        options = self.stream_options or StreamOptions()
        if (options.include_usage or options.continuous_usage_stats) and not self.stream:
            raise BadRequest("stream_options is only allowed with stream.", field="stream_options")


class ChatRequest(GenerationRequest, kw_only=True):
    """Body of `POST /v1/chat/completions`."""

    endpoint: ClassVar[str] = fields.CHAT

    messages: list[ChatMessage]
    max_completion_tokens: PositiveCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        super().check()
        check_messages(self.messages)
        _check_end(self.add_generation_prompt, self.continue_final_message)
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs to be true.", field="top_logprobs")


class CompletionRequest(GenerationRequest, kw_only=True):
    """Body of `POST /v1/completions`. The prompt is a text, token ids, or a list of either."""

    endpoint: ClassVar[str] = fields.COMPLETIONS

    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: PositiveCount | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise BadRequest("best_of other than n is not supported.", field="best_of")


class TokenizeRequest(fields.Body):
    """Body of `POST /tokenize`: a prompt or messages."""

    endpoint: ClassVar[str] = fields.TOKENIZE

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise BadRequest("Give either prompt or messages.", field="prompt")
        if self.messages is not None:
            check_messages(self.messages)
        _check_end(self.add_generation_prompt, self.continue_final_message)


class DetokenizeRequest(fields.Body):
    """Body of `POST /detokenize`."""

    tokens: list[Annotated[int, Meta(ge=0, le=_MAX_INT)]]
    model: str | None = None

    def check(self) -> None:
        """Any ids can be turned into text."""


def _check_end(add_generation_prompt: bool | None, continue_final_message: bool | None) -> None:
    if add_generation_prompt and continue_final_message:
        raise BadRequest(
            "A message can't be continued when another one is begun: leave add_generation_prompt out.",
            field="continue_final_message",
        )


log = logging.getLogger(__name__)

_FILE = "generation_config.json"


class SamplingDefaults(msgspec.Struct, frozen=True):
    """Of generation_config.json, what requests can set as well. None: the file does not say.

    `do_sample` is not heeded, nor is it by vLLM: whoever asks for a temperature of 0 gets the best token.
    """

    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    repetition_penalty: RepetitionPenalty | None = None


def load_sampling_defaults(folder: Path, generation_config: str) -> SamplingDefaults:
    """Those of the model in `folder`, and a line in the log; none if `generation_config` is "none".

    Raises CannotStart for a file that can't be used.
    """
    file = folder / _FILE
    if generation_config == "none" or not file.exists():
        return SamplingDefaults()
    try:
        defaults = msgspec.json.decode(file.read_bytes(), type=SamplingDefaults, strict=False)
    except msgspec.DecodeError as error:
        raise CannotStart(f"{file}: {error}; FLOWKV_GENERATION_CONFIG=none leaves it out") from None
    given = {name: value for name, value in msgspec.structs.asdict(defaults).items() if value is not None}
    if given:
        log.info("where a request is silent, %s applies: %s", _FILE, given)
    return defaults


_LEAST_LOGPROB = -9999.0  # what OpenAI shows for minus infinity, which JSON can't

TokenIds = list[int] | UnsetType  # shown only to those who ask for `return_token_ids`


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class AssistantMessage(msgspec.Struct):
    role: str
    content: str
    refusal: None = None


class ChatDelta(msgspec.Struct):
    content: str
    role: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: TokenIds


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: TokenIds


class TextChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None
    token_ids: TokenIds


class Reply(msgspec.Struct):
    """A response or a chunk of one. `usage` is absent, or null in a chunk whose stream will tell it."""

    id: str
    object: str
    created: int  # Unix time, s
    model: str
    choices: Sequence[ChatChoice | ChatChunkChoice | TextChoice]
    usage: Usage | None | UnsetType = UNSET


class Model(msgspec.Struct):
    """An entry of `GET /v1/models`; `max_model_len` is null while no node is known."""

    id: str
    created: int
    root: str
    max_model_len: int | None
    object: str = "model"
    owned_by: str = "flowkv"
    parent: None = None


class ModelList(msgspec.Struct):
    data: list[Model]
    object: str = "list"


@dataclass
class WholeChoice:
    """All deltas of one choice, put together."""

    index: int
    texts: list[str] = field(default_factory=list)
    logprobs: list[tuple[TokenLogprob, int]] = field(default_factory=list)  # with their text offsets
    finish_reason: str | None = None
    token_ids: list[int] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        if delta.token_id is not None:
            self.token_ids.append(delta.token_id)
        if delta.logprob is not None:
            self.logprobs.append((delta.logprob, delta.text_offset))
        self.finish_reason = delta.finish_reason


class Shape(Protocol):
    """How an endpoint writes its answers."""

    id_prefix: str
    object: str
    chunk_object: str

    def whole(self, choice: WholeChoice) -> ChatChoice | TextChoice: ...

    def chunk(self, delta: Delta) -> ChatChunkChoice | TextChoice: ...


class Writer:
    """Encodes all that is sent for one request."""

    def __init__(self, shape: Shape, *, reply_id: str, created: int, model: str) -> None:
        self._shape = shape
        self._id = reply_id
        self._created = created
        self._model = model

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> bytes:
        shown = [self._shape.whole(choice) for choice in choices]
        return self._encode(self._shape.object, shown, usage)

    def chunk(self, delta: Delta, usage: Usage | None | UnsetType) -> bytes:
        return self._encode(self._shape.chunk_object, [self._shape.chunk(delta)], usage)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._encode(self._shape.chunk_object, [], usage)

    def _encode(
        self,
        kind: str,
        choices: Sequence[ChatChoice | ChatChunkChoice | TextChoice],
        usage: Usage | None | UnsetType,
    ) -> bytes:
        return msgspec.json.encode(Reply(self._id, kind, self._created, self._model, choices, usage))


class ChatShape:
    """`/v1/chat/completions`. The role goes out with the first token: earlier, it would look like one."""

    id_prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, vocabulary: Vocabulary, with_token_ids: bool = False) -> None:
        self._vocabulary = vocabulary
        self._with_token_ids = with_token_ids

    def whole(self, choice: WholeChoice) -> ChatChoice:
        message = AssistantMessage("assistant", "".join(choice.texts))
        logprobs = self._logprobs([logprob for logprob, _ in choice.logprobs])
        token_ids = choice.token_ids if self._with_token_ids else UNSET
        return ChatChoice(choice.index, message, logprobs, choice.finish_reason, token_ids)

    def chunk(self, delta: Delta) -> ChatChunkChoice:
        shown = ChatDelta(delta.text, "assistant" if delta.is_first else UNSET)
        logprobs = self._logprobs([] if delta.logprob is None else [delta.logprob])
        token_ids = _ids_of(delta) if self._with_token_ids else UNSET
        return ChatChunkChoice(delta.choice, shown, logprobs, delta.finish_reason, token_ids)

    def _logprobs(self, logprobs: list[TokenLogprob]) -> ChatLogprobs | None:
        if not logprobs:
            return None
        return ChatLogprobs([self._token_logprob(logprob) for logprob in logprobs])

    def _token_logprob(self, logprob: TokenLogprob) -> ChatTokenLogprob:
        top = [TopLogprob(*self._describe(token_id, value)) for token_id, value in logprob.top]
        return ChatTokenLogprob(*self._describe(logprob.token_id, logprob.logprob), top)

    def _describe(self, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
        token_bytes = list(self._vocabulary.token_bytes(token_id))
        return self._vocabulary.token_text(token_id), _finite(logprob), token_bytes


class TextShape:
    """`/v1/completions`. Whole answers and chunks look the same."""

    id_prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, vocabulary: Vocabulary, with_token_ids: bool = False) -> None:
        self._vocabulary = vocabulary
        self._with_token_ids = with_token_ids

    def whole(self, choice: WholeChoice) -> TextChoice:
        logprobs = self._logprobs(choice.logprobs)
        token_ids = choice.token_ids if self._with_token_ids else UNSET
        return TextChoice(choice.index, "".join(choice.texts), logprobs, choice.finish_reason, token_ids)

    def chunk(self, delta: Delta) -> TextChoice:
        logprobs = self._logprobs([] if delta.logprob is None else [(delta.logprob, delta.text_offset)])
        token_ids = _ids_of(delta) if self._with_token_ids else UNSET
        return TextChoice(delta.choice, delta.text, logprobs, delta.finish_reason, token_ids)

    def _logprobs(self, logprobs: list[tuple[TokenLogprob, int]]) -> TextLogprobs | None:
        if not logprobs:
            return None
        text_of = self._vocabulary.token_text
        return TextLogprobs(
            tokens=[text_of(logprob.token_id) for logprob, _ in logprobs],
            token_logprobs=[_finite(logprob.logprob) for logprob, _ in logprobs],
            top_logprobs=[self._top(logprob) for logprob, _ in logprobs],
            text_offset=[offset for _, offset in logprobs],
        )

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        """Of the best tokens and the chosen one, by their texts.

        Where several have one text, it means the chosen token, else the best of them. The others are called
        by their ids, so that none is lost.
        """
        chosen = (logprob.token_id, logprob.logprob)
        values = dict([*logprob.top, chosen])
        names: dict[str, int] = {}
        for token_id in (logprob.token_id, *values):
            names.setdefault(self._vocabulary.token_text(token_id), token_id)
        texts = {token_id: text for text, token_id in names.items()}
        return {
            texts.get(token_id, f"token_id:{token_id}"): _finite(value) for token_id, value in values.items()
        }


def _ids_of(delta: Delta) -> list[int]:
    return [] if delta.token_id is None else [delta.token_id]


def _finite(logprob: float) -> float:
    """In this order of arguments, `max` turns NaN into the least as well."""
    return max(_LEAST_LOGPROB, logprob)
