"""Bytes of a request body to a checked struct, or a BadRequest that names the field."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple, TypeVar

import msgspec

from flowkv_common.errors import BadRequest, invalid_input

# Looking for the field costs a second, slower parse, which a large broken body is not worth.
_MAX_EXPLAINED_BYTES = 64 * 1024

T = TypeVar("T")


def parse_json(body: bytes, kind: type[T]) -> T:
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
    if not isinstance(fields, dict):
        return None
    return next((name for name, value in fields.items() if _holds(value, mark)), None)


def _holds(value: Any, mark: object) -> bool:
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if current is mark:
            return True
        if isinstance(current, dict):
            waiting.extend(current.values())
        elif isinstance(current, list):
            waiting.extend(current)
    return False


CHAT, COMPLETIONS, TOKENIZE = "chat", "completions", "tokenize"
_BOTH = (CHAT, COMPLETIONS)
_UNLESS_TRUE: Sequence[Any] = (None, False)
_UNLESS_GIVEN: Sequence[Any] = (None,)
_UNLESS_FILLED: Sequence[Any] = (None, [], {}, "")


class Refused(NamedTuple):
    """A field that is refused unless its value is one of `accepted`; `reason` is for the client."""

    name: str
    endpoints: Sequence[str]
    accepted: Sequence[Any]
    reason: str

    @property
    def kind(self) -> Any:
        """What its value is read as: flags and numbers may be written as text, as in served fields."""
        for kind in (bool, int):
            if any(type(value) is kind for value in self.accepted):
                return kind | None
        return Any


_CONSTRAINED = "output can't be constrained"
_REASONING = "reasoning is not told from the rest of the answer"
_TOOLS = "tools are shown to the model, but its calls stay text"

REFUSED = [
    Refused("response_format", _BOTH, (None, {"type": "text"}), _CONSTRAINED),
    *(
        Refused(name, _BOTH, _UNLESS_FILLED, _CONSTRAINED)
        for name in (
            *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
            *("structural_tag", "regex", "ebnf", "grammar", "json_schema"),
        )
    ),
    Refused("tool_choice", (CHAT, TOKENIZE), (None, "none", "auto"), f"{_TOOLS}; use `auto` or `none`"),
    Refused("functions", (CHAT,), _UNLESS_FILLED, "use `tools`, which replaced it"),
    Refused("function_call", (CHAT,), (None, "none", "auto"), _TOOLS),
    Refused("reasoning_effort", (CHAT,), _UNLESS_GIVEN, _REASONING),
    Refused("include_reasoning", (CHAT,), (None, True), _REASONING),
    Refused("thinking_token_budget", _BOTH, (None, -1), _REASONING),
    Refused("verbosity", (CHAT,), (None, "medium"), "models are not told how long to answer"),
    Refused("modalities", (CHAT,), (None, [], ["text"]), "answers are text"),
    Refused("audio", (CHAT,), _UNLESS_GIVEN, "answers are text"),
    Refused("web_search_options", (CHAT,), _UNLESS_GIVEN, "nothing is looked up"),
    Refused("moderation", (CHAT,), _UNLESS_GIVEN, "nothing is moderated"),
    Refused("chat_template", (CHAT, TOKENIZE), _UNLESS_GIVEN, "the model's own template is used"),
    Refused("echo", _BOTH, _UNLESS_TRUE, "answers hold what is new"),
    Refused("suffix", (COMPLETIONS,), (None, ""), "text is continued at its end only"),
    Refused("prompt_embeds", (COMPLETIONS,), _UNLESS_FILLED, "a prompt is text or token ids"),
    Refused("max_completion_tokens", (COMPLETIONS,), _UNLESS_GIVEN, "it is called `max_tokens` here"),
    Refused("use_beam_search", _BOTH, _UNLESS_TRUE, "answers are sampled one by one"),
    Refused("truncate_prompt_tokens", _BOTH, _UNLESS_GIVEN, "prompts are taken whole"),
    Refused("prompt_logprobs", _BOTH, _UNLESS_GIVEN, "only output tokens have log probabilities"),
    Refused("logprob_token_ids", _BOTH, _UNLESS_FILLED, "log probabilities are of the most likely tokens"),
    Refused("return_tokens_as_token_ids", _BOTH, _UNLESS_TRUE, "use `return_token_ids`"),
    Refused("allowed_token_ids", _BOTH, _UNLESS_FILLED, "use `logit_bias`"),
    Refused("bad_words", _BOTH, _UNLESS_FILLED, "use `logit_bias`"),
    Refused("watermarking", _BOTH, _UNLESS_TRUE, "nothing is marked"),
    Refused("repetition_detection", _BOTH, _UNLESS_GIVEN, "use `repetition_penalty`"),
    Refused("return_prompt_text", (CHAT,), _UNLESS_TRUE, "use `/tokenize` and `/detokenize`"),
    Refused("return_token_strs", (TOKENIZE,), _UNLESS_TRUE, "use `/detokenize`"),
    Refused("cache_salt", _BOTH, _UNLESS_GIVEN, "all requests share the prefix cache"),
    Refused("kv_transfer_params", _BOTH, _UNLESS_FILLED, "the scheduler chooses the nodes"),
    Refused("ec_transfer_params", _BOTH, _UNLESS_FILLED, "the scheduler chooses the nodes"),
    Refused("vllm_xargs", _BOTH, _UNLESS_FILLED, "there are no extensions"),
]

CHANGE_NOTHING = {
    "user": "who asked",
    "safety_identifier": "who asked",
    "metadata": "for stored answers",
    "store": "nothing is stored",
    "service_tier": "there is one",
    "prompt_cache_key": "the prefix cache finds its blocks by what they hold",
    "prompt_cache_options": "the same",
    "prompt_cache_retention": "the same",
    "prediction": "would make an answer faster, not another one",
    "parallel_tool_calls": "there are no tool calls",
    "length_penalty": "of beam search, which is refused",
    "truncation_side": "of `truncate_prompt_tokens`, which is refused",
    "spaces_between_special_tokens": "there are never any",
    "guided_decoding_backend": "of constrained output, which is refused",
    "guided_whitespace_pattern": "the same",
    "media_io_kwargs": "of images and sound, which are refused",
    "mm_processor_kwargs": "the same",
    "return_mm_kwargs": "the same",
    "return_token_offsets": "of an endpoint that does not exist here",
    "routed_experts_prompt_start": "the choice of experts is not shown",
    "request_id": "an answer's id is the gateway's",
    "session_id": "related requests are known by what they share",
    "stream_interval": "a stream has a chunk per token",
}


class Body(msgspec.Struct):
    """A request's body, for the endpoint by whose name the tables know it."""

    endpoint: ClassVar[str] = ""


B = TypeVar("B", bound=Body)


def parse_request(body: bytes, kind: type[B]) -> B:
    """The `kind` in `body`. Raises BadRequest for what it can't be, and for what is known and not served."""
    request: B = parse_json(body, _with_refused(kind))
    for row in _rows(kind):
        if getattr(request, row.name) not in row.accepted:
            raise BadRequest(f"{row.name} is not supported: {row.reason}.", field=row.name)
    return request


def _rows(kind: type[Body]) -> list[Refused]:
    return [row for row in REFUSED if kind.endpoint in row.endpoints]


@cache
def _with_refused(kind: type[Body]) -> type[Any]:
    """The struct `kind` with the fields refused there: a body may be large, and is read only once."""
    refused = [(row.name, row.kind, None) for row in _rows(kind) if row.name not in kind.__struct_fields__]
    return msgspec.defstruct(kind.__name__, refused, bases=(kind,), kw_only=True)
