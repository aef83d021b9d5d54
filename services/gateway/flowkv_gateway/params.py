"""The bodies of the endpoints: what may stand in them.

Numbers and booleans may be written as text, as in vLLM. `null` means the same as absent. Unknown fields are
accepted, since every client sends some; known ones that are not served are in `unserved.py`. Knows nothing of
the model or of tokens.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from flowkv_common.errors import BadRequest
from flowkv_gateway import unserved
from flowkv_gateway.messages import ChatMessage, check_messages

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


class GenerationRequest(unserved.Body, kw_only=True):
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

    endpoint: ClassVar[str] = unserved.CHAT

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

    endpoint: ClassVar[str] = unserved.COMPLETIONS

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


class TokenizeRequest(unserved.Body):
    """Body of `POST /tokenize`: a prompt or messages."""

    endpoint: ClassVar[str] = unserved.TOKENIZE

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


class DetokenizeRequest(unserved.Body):
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
