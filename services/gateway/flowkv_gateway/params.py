"""The bodies of both generation endpoints: what may stand in them, and what can't be served.

Unknown fields are accepted, since every client sends some. Knows nothing of the model or of tokens.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from flowkv_common.errors import BadRequest

MAX_CHOICES = 128  # answers per request, over all its prompts
_MAX_INT = 2**31 - 1

Count = Annotated[int, Meta(ge=0, le=_MAX_INT)]
PositiveCount = Annotated[int, Meta(ge=1, le=_MAX_INT)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
# Bounded, since matching it takes time and memory in proportion.
StopString = Annotated[str, Meta(min_length=1, max_length=1000)]
# Bounded, since it travels to the nodes with the request.
LogitBias = Annotated[dict[int, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)]


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What both endpoints have in common. `null` means the same as absent."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: PositiveCount | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_MAX_INT)] | None = None
    min_p: Share | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    logit_bias: LogitBias | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None  # vLLM's: the ids of the output tokens beside the text
    priority: Annotated[int, Meta(ge=-_MAX_INT, le=_MAX_INT)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check(self) -> None:
        """Raises BadRequest for fields that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options is only allowed with stream.", field="stream_options")


class TextPart(msgspec.Struct):
    type: str
    text: str | None = None


class FunctionCall(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(msgspec.Struct):
    function: FunctionCall
    id: str | None = None
    type: str = "function"


class ChatMessage(msgspec.Struct, omit_defaults=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class ResponseFormat(msgspec.Struct):
    type: str


class ChatRequest(GenerationRequest, kw_only=True):
    """Body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage]
    max_completion_tokens: PositiveCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        super().check()
        check_messages(self.messages)
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs to be true.", field="top_logprobs")
        if self.response_format is not None and self.response_format.type != "text":
            raise BadRequest("Only the response format `text` is supported.", field="response_format")
        if self.tool_choice not in (None, "auto", "none"):
            raise BadRequest("A tool call can't be forced; use `auto` or `none`.", field="tool_choice")


class CompletionRequest(GenerationRequest, kw_only=True):
    """Body of `POST /v1/completions`. The prompt is a text, token ids, or a list of either."""

    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: PositiveCount | None = None
    echo: bool | None = None
    suffix: str | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def check(self) -> None:
        super().check()
        if self.echo:
            raise BadRequest("echo is not supported.", field="echo")
        if self.suffix:
            raise BadRequest("suffix is not supported.", field="suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise BadRequest("best_of other than n is not supported.", field="best_of")


class TokenizeRequest(msgspec.Struct):
    """Body of `POST /tokenize`: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise BadRequest("Give either prompt or messages.", field="prompt")
        if self.messages is not None:
            check_messages(self.messages)


class DetokenizeRequest(msgspec.Struct):
    """Body of `POST /detokenize`."""

    tokens: list[Annotated[int, Meta(ge=0, le=_MAX_INT)]]
    model: str | None = None

    def check(self) -> None:
        """Any ids can be turned into text."""


def check_messages(messages: list[ChatMessage]) -> None:
    """Raises BadRequest when there is nothing to render."""
    if not messages:
        raise BadRequest("messages must not be empty.", field="messages")
    for place, message in enumerate(messages):
        field = f"messages[{place}].content"
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            raise BadRequest(f"{field} is missing.", field=field)
        for at, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if part.type != "text":
                raise BadRequest(f"Only text can be read, not {part.type!r}.", field=f"{field}[{at}].type")
            if part.text is None:
                raise BadRequest("The part has no text.", field=f"{field}[{at}].text")
