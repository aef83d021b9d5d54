"""A chat, whichever endpoint it came by: its conversation for the template, and the reader of its answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from flowkv_common.errors import BadRequest, CannotStart
from flowkv_gateway.calls import check_tools, tell_of_tools
from flowkv_gateway.parsers import (
    Arguments,
    CallBegins,
    Content,
    Event,
    Leftover,
    Parser,
    Reasoning,
    can_reason,
    parser_for,
)
from flowkv_gateway.parsers.hermes import Hermes
from flowkv_gateway.parsers.mistral import Mistral
from flowkv_gateway.parsers.thinking import Thinking
from flowkv_gateway.schemas import ChatMessage, ChatRequest, TokenizeRequest, ToolCall
from flowkv_gateway.tokenizer import Conversation, Tokenizer

log = logging.getLogger(__name__)

# What opens the reasoning is at the end of the prompt, with little behind it.
_PROMPT_END_CHARS = 256
_MISTRAL_ID_CHARS = 9  # its templates refuse ids of another length


class ChatFormat:
    """How a model's chat template writes tools, calls and reasoning.

    `parser_name` is the setting FLOWKV_TOOL_PARSER; empty: the template tells. Raises CannotStart for a name
    that no parser has.
    """

    def __init__(self, tokenizer: Tokenizer, parser_name: str = "") -> None:
        template = tokenizer.template_source
        try:
            found = parser_for(template, parser_name or None)
        except ValueError as error:
            raise CannotStart(f"FLOWKV_TOOL_PARSER: {error}") from None
        self.knows_tools = tokenizer.template_takes_tools
        self.can_reason = found is Thinking or can_reason(template)
        self._for_reasoning = found if self.can_reason else None
        self._for_calls = None if found is Thinking else found
        if not self.knows_tools:  # and so reads what `tell_of_tools` asks for
            self._for_calls = Hermes
        self._is_mistral = found is Mistral

    def parser(self, *, has_tools: bool) -> type[Parser] | None:
        """What reads the answers; None if there is nothing to find in them. Raises BadRequest."""
        if not has_tools:
            return self._for_reasoning
        if self._for_calls is None:
            raise BadRequest(
                "It is not known how this model writes tool calls: its chat template has none of the known "
                "formats. The operator can name one with FLOWKV_TOOL_PARSER.",
                field="tools",
            )
        return self._for_calls

    def conversation(self, request: ChatRequest | TokenizeRequest) -> Conversation:
        """Raises BadRequest for tools that are none."""
        check_tools(request.tools)
        tools = offered_tools(request)
        messages = for_template(request.messages or (), _MISTRAL_ID_CHARS if self._is_mistral else None)
        if not self.knows_tools:
            messages, tools = tell_of_tools(messages, tools), []
        kwargs = request.chat_template_kwargs or {}
        if (effort := request.reasoning_effort) is not None:
            kwargs = {"reasoning_effort": effort, **kwargs}
            if effort == "none":  # the names of Qwen and DeepSeek
                kwargs = {"enable_thinking": False, "thinking": False, **kwargs}
        return Conversation(
            messages,
            # Templates ask whether there are any in their own ways: `is not none` is one of them.
            tools=tools or None,
            documents=request.documents or None,
            template_kwargs=kwargs,
            add_generation_prompt=request.add_generation_prompt is not False,
            continue_final_message=bool(request.continue_final_message),
        )

    def reader(self, request: ChatRequest, prompt: str, special_texts: frozenset[str]) -> MakeReader | None:
        """Makes a reader for each answer to this rendered prompt; None where all of an answer is content."""
        tools = offered_tools(request)
        if (parser := self.parser(has_tools=bool(tools))) is None:
            return None
        prompt_end = prompt[-_PROMPT_END_CHARS:]
        return lambda: AnswerReader(
            parser(tools, prompt_end, streams_calls=bool(request.stream)),
            special_texts=frozenset() if request.skip_special_tokens is False else special_texts,
            shows_reasoning=request.include_reasoning is not False,
            max_calls=1 if request.parallel_tool_calls is False else None,
        )


def offered_tools(request: ChatRequest | TokenizeRequest) -> Sequence[Mapping[str, Any]]:
    """Those that the model may call."""
    return () if request.tool_choice == "none" else request.tools or ()


# --- the conversation ---------------------------------------------------------------------------------


def for_template(messages: Sequence[ChatMessage], max_id_chars: int | None = None) -> list[dict[str, Any]]:
    """Checked messages as templates expect them: plain text, arguments of tool calls as objects.

    Of longer ids of calls, the last `max_id_chars` characters are left.
    """
    shown = []
    for place, message in enumerate(messages):
        # `developer` and `function` are roles that no template knows.
        role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
        if isinstance(message.content, list):
            parts = [part if isinstance(part, str) else part.shown or "" for part in message.content]
            text = "\n".join(parts)
        else:
            text = message.content or message.refusal or ""
        fields: dict[str, Any] = {"role": role, "content": text}
        if message.name is not None:
            fields["name"] = message.name
        if message.tool_call_id is not None:
            fields["tool_call_id"] = (
                message.tool_call_id[-max_id_chars:] if max_id_chars else message.tool_call_id
            )
        calls = message.tool_calls or []
        if not calls and message.function_call is not None:
            calls = [ToolCall(message.function_call)]
        if calls:  # templates take an empty list for a turn that only calls tools
            fields["tool_calls"] = [
                _call_for_template(call, f"messages[{place}].tool_calls[{i}]", max_id_chars)
                for i, call in enumerate(calls)
            ]
        if reasoning := message.reasoning_content or message.reasoning:
            fields["reasoning_content"] = fields["reasoning"] = reasoning
            if not text:  # GPT-OSS's name; its template takes one of the two
                fields["thinking"] = reasoning
        shown.append(fields)
    return shown


def _call_for_template(call: ToolCall, field: str, max_id_chars: int | None) -> dict[str, Any]:
    """With the arguments as an object. A model wrote them: were they refused, the chat could never go on."""
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}")
        except (msgspec.DecodeError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        log.warning("%s: the arguments are no JSON object, they are left out", field)
        arguments = {}
    fields: dict[str, Any] = msgspec.to_builtins(call)
    fields["function"]["arguments"] = arguments
    if call.id and max_id_chars:
        fields["id"] = call.id[-max_id_chars:]
    return fields


# --- the answer ---------------------------------------------------------------------------------------


class AnswerReader:
    """Reads one answer: its text in, what its client is told of it out.

    The text has the special tokens in it that the parser looks for. Those that it passes on as text are not
    shown, if they are among `special_texts`. Text that is no part of the answer is shown as content.
    """

    def __init__(
        self,
        parser: Parser,
        *,
        special_texts: frozenset[str] = frozenset(),
        shows_reasoning: bool = True,
        max_calls: int | None = None,
    ) -> None:
        self._parser = parser
        self._special_texts = special_texts
        self._seen: set[str] = set()  # special tokens in this answer: others' texts were written as text
        self._shows_reasoning = shows_reasoning
        self._max_calls = max_calls
        self._num_calls = 0
        self._num_undecided_tokens = 0
        self.num_reasoning_tokens = 0
        self.is_over = False  # there were as many calls as there may be

    @property
    def has_calls(self) -> bool:
        return self._num_calls > 0

    def push(self, text: str, *, special: str = "", is_last: bool = False) -> list[Event]:
        """What is new with this token. `special`: its own text, if it is a special token."""
        if special in self._special_texts:
            self._seen.add(special)
        events = self._parser.push(text)
        if is_last:
            events += self._parser.finish()
        self._num_undecided_tokens += 1
        if events:
            if any(isinstance(event, Reasoning) for event in events):
                self.num_reasoning_tokens += self._num_undecided_tokens
            self._num_undecided_tokens = 0
        return [shown for event in events if (shown := self._shown(event)) is not None]

    def _shown(self, event: Event) -> Event | None:
        if self.is_over:
            return None
        if isinstance(event, CallBegins):
            if self._num_calls == self._max_calls:
                self.is_over = True
                return None
            self._num_calls += 1
            return event
        if isinstance(event, Arguments) or (isinstance(event, Reasoning) and not self._shows_reasoning):
            return event if isinstance(event, Arguments) else None
        text = event.text
        for special in self._seen:
            text = text.replace(special, "")
        if not text:
            return None
        return Content(text) if isinstance(event, Leftover) else event._replace(text=text)


MakeReader = Callable[[], AnswerReader]
