"""The bodies of requests: what may stand in them, what is refused, and how bytes become one.

Numbers and booleans may be written as text, as in vLLM. `null` means the same as absent. Unknown fields are
accepted, since every client sends some. Knows nothing of the model or of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from flowkv_common.errors import BadRequest, invalid_input

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
AllowedIds = Annotated[list[Count], Meta(max_length=16_384)]
BadWord = Annotated[str, Meta(min_length=1, max_length=100)]
# How PHP and its like write an empty object.
EmptyList = Annotated[list[Any], Meta(max_length=0)]

# --- the messages of a chat ---------------------------------------------------------------------------
#
# A history is sent again and again, with all that this or another server once answered. So it is read with
# patience: what says nothing counts as empty, and older forms as their newer ones. What would be lost (an
# image), or can't have been an answer, is refused.


class ContentPart(msgspec.Struct, omit_defaults=True):
    type: str
    text: str | None = None
    refusal: str | None = None

    @property
    def shown(self) -> str | None:
        return self.refusal if self.type == "refusal" else self.text


class FunctionCall(msgspec.Struct):
    name: str
    arguments: Any = None


class ToolCall(msgspec.Struct):
    function: FunctionCall
    id: str | None = None
    type: str = "function"


class ChatMessage(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart | str] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None  # what `tool_calls` replaced
    refusal: str | None = None  # instead of content
    reasoning_content: str | None = None
    reasoning: str | None = None  # its newer name


# --- the bodies ---------------------------------------------------------------------------------------


class Body(msgspec.Struct, kw_only=True):
    """A request's body. Making one raises BadRequest for fields that contradict each other."""

    model: str | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(msgspec.Struct):
    """`strict` changes nothing: an answer always keeps to the schema."""

    schema: dict[str, Any] | bool | None = None


class Structure(msgspec.Struct):
    begin: str
    end: str
    schema: dict[str, Any] | bool = {}


class StructuralTag(msgspec.Struct):
    structures: list[Structure] | None = None
    triggers: list[str] | None = None


class ResponseFormat(StructuralTag):
    type: Literal["text", "json_object", "json_schema", "structural_tag"] = "text"
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct):
    """vLLM's. Of its settings those are refused that would change the answer."""

    json: Any = None  # a schema, or its text
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None  # JSON
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None


class GenerationRequest(Body, kw_only=True):
    """What chats, completions and responses have in common."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
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
    bad_words: Annotated[list[BadWord], Meta(max_length=128)] | None = None
    allowed_token_ids: AllowedIds | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=_MAX_INT)] | None = None  # -1: to the room there is
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None  # the next ones are what `structured_outputs` replaced
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: Annotated[int, Meta(ge=-_MAX_INT, le=_MAX_INT)] | None = None
    service_tier: str | None = None  # there is one: `default`
    user: str | None = None  # for the log
    safety_identifier: str | None = None  # what replaced it

    def __post_init__(self) -> None:
        options = self.stream_options or StreamOptions()
        if (options.include_usage or options.continuous_usage_stats) and not self.stream:
            raise BadRequest("stream_options is only allowed with stream.", field="stream_options")
        if self.truncate_prompt_tokens == 0:
            raise BadRequest("A prompt must keep at least one token.", field="truncate_prompt_tokens")


class ChoicesRequest(GenerationRequest, kw_only=True):
    """What chats and completions have in common: an answer may have several choices."""

    max_tokens: PositiveCount | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    response_format: ResponseFormat | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    return_token_ids: bool | None = None  # vLLM's: the ids of the output tokens beside the text

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_logprobs is not None and self.stream:
            raise BadRequest("prompt_logprobs can't be streamed.", field="prompt_logprobs")

    @property
    def num_samples(self) -> int:
        """Answers that are made for each prompt."""
        return self.n or 1

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Of the best tokens, for each token of the prompt; None: nothing is asked of them."""
        return self.prompt_logprobs


class ChatRequest(ChoicesRequest, kw_only=True):
    """Body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage]
    max_completion_tokens: PositiveCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None  # Qwen's
    include_reasoning: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_conversation(self)
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs to be true.", field="top_logprobs")


class CompletionRequest(ChoicesRequest, kw_only=True):
    """Body of `POST /v1/completions`. The prompt is a text, token ids, or a list of either."""

    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    max_tokens: Count | None = None  # 0 with `echo`: the prompt alone is told
    echo: bool | None = None  # the prompt in front of the answer
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: PositiveCount | None = None

    @property
    def num_samples(self) -> int:
        return self.best_of or self.n or 1

    @property
    def has_spare_samples(self) -> bool:
        """Whether more answers are made than sent."""
        return self.num_samples > (self.n or 1)

    @property
    def num_logprobs(self) -> int | None:
        return 0 if self.logprobs is None and self.has_spare_samples else self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((num_top for num_top in asked if num_top is not None), default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens == 0 and not self.echo:
            raise BadRequest("An answer of no tokens needs echo.", field="max_tokens")
        if self.num_samples < (self.n or 1):
            raise BadRequest("best_of is less than n.", field="best_of")
        if self.stream and self.has_spare_samples:
            raise BadRequest(
                "The best answers are known at their end: leave out stream, or best_of.", field="best_of"
            )


class InputItem(msgspec.Struct, omit_defaults=True):
    """A message, or what its `type` says: that tells which of the other fields it has."""

    type: str | None = None
    id: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[ContentPart | str] | None = None
    summary: list[ContentPart] | None = None
    name: str | None = None
    namespace: str | None = None  # of the function
    arguments: Any = None
    call_id: str | None = None
    output: str | list[ContentPart | str] | None = None


class FunctionTool(msgspec.Struct, omit_defaults=True):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseTool(FunctionTool):
    """A function, or a `namespace` with functions of its own."""

    tools: list[FunctionTool] | None = None


class TextFormat(msgspec.Struct, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct):
    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningConfig(msgspec.Struct):
    """With any `summary`, what a model has thought is shown as one."""

    effort: str | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


# What answers have of these is all there is: no tools run here.
Included = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponseRequest(GenerationRequest, kw_only=True):
    """Body of `POST /v1/responses`."""

    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: PositiveCount | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[Included] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None
    store: bool | None = None  # true where responses are stored
    previous_response_id: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_logprobs and not self.shows_logprobs:
            raise BadRequest(
                "top_logprobs needs include to have message.output_text.logprobs.", field="top_logprobs"
            )

    @property
    def shows_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ())


class TokenizeRequest(Body, kw_only=True):
    """Body of `POST /tokenize`: a prompt or messages."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None  # Qwen's
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise BadRequest("Give either prompt or messages.", field="prompt")
        _check_conversation(self)


class DetokenizeRequest(Body, kw_only=True):
    """Body of `POST /detokenize`."""

    tokens: list[Count]


def _check_conversation(request: ChatRequest | TokenizeRequest) -> None:
    if request.add_generation_prompt and request.continue_final_message:
        raise BadRequest(
            "A message can't be continued when another one is begun: leave add_generation_prompt out.",
            field="continue_final_message",
        )
    if request.messages == []:
        raise BadRequest("messages must not be empty.", field="messages")
    for place, message in enumerate(request.messages or ()):
        field = f"messages[{place}].content"
        if message.content is None and message.role not in ("assistant", "tool", "function"):
            raise BadRequest(f"{field} is missing.", field=field)
        for at, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if isinstance(part, str):
                continue
            if part.type not in ("text", "input_text", "output_text", "refusal"):
                raise BadRequest(f"Only text can be read, not {part.type!r}.", field=f"{field}[{at}].type")
            if part.shown is None:
                raise BadRequest("The part has no text.", field=f"{field}[{at}].text")


# --- fields that are known and not served -------------------------------------------------------------

_CHAT, _COMPLETIONS, _TOKENIZE = (ChatRequest,), (CompletionRequest,), (TokenizeRequest,)
_RESPONSES = (ResponseRequest,)
_BOTH = (*_CHAT, *_COMPLETIONS)
_ALL = (*_BOTH, *_RESPONSES)
_UNLESS_TRUE: Sequence[Any] = (None, False)
_UNLESS_GIVEN: Sequence[Any] = (None,)
_UNLESS_FILLED: Sequence[Any] = (None, [], {}, "")


class Refused(NamedTuple):
    """A field that `bodies` may only have with one of the `accepted` values; `reason` is for the client."""

    name: str
    bodies: Sequence[type[Body]]
    accepted: Sequence[Any]
    reason: str


_REASONING = "the model decides how long it thinks"

REFUSED = [
    *(
        Refused(name, bodies, _UNLESS_FILLED, f"use `{format}` or `structured_outputs`")
        for bodies, format in ((_BOTH, "response_format"), (_RESPONSES, "text.format"))
        for name in ("structural_tag", "regex", "ebnf", "grammar", "json_schema")
    ),
    Refused("guided_whitespace_pattern", _ALL, _UNLESS_FILLED, "JSON has the spaces that are usual"),
    Refused("functions", _CHAT, _UNLESS_FILLED, "use `tools`, which replaced it"),
    Refused("function_call", _CHAT, (None, "none", "auto"), "use `tool_choice`, which replaced it"),
    Refused("thinking_token_budget", _ALL, (None, -1), _REASONING),
    Refused("verbosity", _CHAT, (None, "medium"), "models are not told how long to answer"),
    Refused("modalities", _CHAT, (None, [], ["text"]), "answers are text"),
    Refused("audio", _CHAT, _UNLESS_GIVEN, "answers are text"),
    Refused("web_search_options", _CHAT, _UNLESS_GIVEN, "nothing is looked up"),
    Refused("moderation", (*_CHAT, *_RESPONSES), _UNLESS_GIVEN, "nothing is moderated"),
    Refused("echo", (*_CHAT, *_RESPONSES), _UNLESS_TRUE, "answers hold what is new"),
    Refused("suffix", _COMPLETIONS, (None, ""), "text is continued at its end only"),
    Refused("prompt_embeds", _COMPLETIONS, _UNLESS_FILLED, "a prompt is text or token ids"),
    Refused("max_completion_tokens", _COMPLETIONS, _UNLESS_GIVEN, "it is called `max_tokens` here"),
    Refused("use_beam_search", _ALL, _UNLESS_TRUE, "answers are sampled one by one"),
    Refused("truncation_side", _ALL, (None, "left"), "the end of a prompt is what is kept"),
    Refused("logprob_token_ids", _ALL, _UNLESS_FILLED, "log probabilities are of the most likely tokens"),
    Refused("return_tokens_as_token_ids", _BOTH, _UNLESS_TRUE, "use `return_token_ids`"),
    Refused("watermarking", _ALL, _UNLESS_TRUE, "nothing is marked"),
    Refused("repetition_detection", _ALL, _UNLESS_GIVEN, "use `repetition_penalty`"),
    Refused("return_prompt_text", _CHAT, _UNLESS_TRUE, "use `/tokenize` and `/detokenize`"),
    Refused("return_token_strs", _TOKENIZE, _UNLESS_TRUE, "use `/detokenize`"),
    Refused("cache_salt", _ALL, _UNLESS_GIVEN, "all requests share the prefix cache"),
    Refused("kv_transfer_params", _ALL, _UNLESS_FILLED, "the scheduler chooses the nodes"),
    Refused("ec_transfer_params", _ALL, _UNLESS_FILLED, "the scheduler chooses the nodes"),
    Refused("vllm_xargs", _ALL, _UNLESS_FILLED, "there are no extensions"),
    Refused("background", _RESPONSES, _UNLESS_TRUE, "an answer is made while its client waits"),
    Refused("conversation", _RESPONSES, _UNLESS_FILLED, "send what was said before in `input`"),
    Refused("prompt", _RESPONSES, _UNLESS_GIVEN, "no prompts are kept here"),
    Refused("context_management", _RESPONSES, _UNLESS_FILLED, "a history is shortened by its client"),
    Refused("n", _RESPONSES, (None, 1), "a response is one answer"),
    Refused("max_tokens", _RESPONSES, _UNLESS_GIVEN, "it is called `max_output_tokens` here"),
    Refused("max_completion_tokens", _RESPONSES, _UNLESS_GIVEN, "it is called `max_output_tokens` here"),
    Refused("response_format", _RESPONSES, _UNLESS_GIVEN, "it is called `text.format` here"),
    Refused("prompt_logprobs", _RESPONSES, _UNLESS_GIVEN, "responses have no place for them"),
    Refused("return_token_ids", _RESPONSES, _UNLESS_TRUE, "responses have no place for them"),
]

# --- from bytes to a body -----------------------------------------------------------------------------

# Looking for the field costs a second, slower parse, which a large broken body is not worth.
_MAX_EXPLAINED_BYTES = 64 * 1024

B = TypeVar("B", bound=Body)


def parse_request(body: bytes, kind: type[B]) -> B:
    """The `kind` in `body`. Raises BadRequest for what it can't be, and for what is known and not served."""
    request: B = parse_json(body, _with_refused(kind))
    for row in REFUSED:
        if kind in row.bodies and getattr(request, row.name) not in row.accepted:
            raise BadRequest(f"{row.name} is not supported: {row.reason}.", field=row.name)
    return request


@cache
def _with_refused(kind: type[Body]) -> type[Any]:
    """The struct `kind` with the fields refused there: a body may be large, and is read only once."""
    fields: list[tuple[str, Any, None]] = []
    for row in REFUSED:
        if kind in row.bodies and row.name not in kind.__struct_fields__:
            # Flags and numbers may be written as text, as in served fields.
            types = {type(value) for value in row.accepted} & {bool, int}
            fields.append((row.name, types.pop() | None if types else Any, None))
    return msgspec.defstruct(kind.__name__, fields, bases=(kind,), kw_only=True)


def parse_json(body: bytes, kind: type[B]) -> B:
    """The `kind` in `body`, where numbers and booleans may be written as text, and whole numbers as 10.0.

    Raises BadRequest for anything else that bytes can be.
    """
    try:
        return msgspec.json.decode(body, type=kind, strict=False)
    except msgspec.ValidationError as error:
        raise invalid_input(str(error)) from None
    except UnicodeDecodeError:
        raise BadRequest("The body is not valid UTF-8.") from None
    except RecursionError:
        raise BadRequest("The JSON is nested too deeply.") from None
    except msgspec.DecodeError as error:
        if field := _non_finite_field(body):
            raise BadRequest(f"{field}: NaN and Infinity are not numbers in JSON.", field=field) from None
        raise BadRequest(f"The body is not valid JSON: {error}") from None


def _non_finite_field(body: bytes) -> str | None:
    """The top-level field that holds a NaN or Infinity, as many JSON writers put them."""
    if len(body) > _MAX_EXPLAINED_BYTES:
        return None
    mark = object()
    try:
        fields = json.loads(body, parse_constant=lambda _: mark)
    except (ValueError, RecursionError):
        return None
    for name, value in fields.items() if isinstance(fields, dict) else ():
        waiting = [value]
        while waiting:
            current = waiting.pop()
            if current is mark:
                return str(name)
            if isinstance(current, dict | list):
                waiting.extend(current.values() if isinstance(current, dict) else current)
    return None
