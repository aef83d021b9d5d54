"""Responses in OpenAI's shapes, for both endpoints, whole and in chunks. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from flowkv_common.wire.parts import TokenLogprob
from flowkv_gateway.choice import Delta
from flowkv_gateway.vocabulary import Vocabulary

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


class ChatMessage(msgspec.Struct):
    role: str
    content: str
    refusal: None = None


class ChatDelta(msgspec.Struct):
    content: str
    role: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
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
        message = ChatMessage("assistant", "".join(choice.texts))
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
