"""A chat, whichever endpoint it came by: its conversation for the template, and the reader of its answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from flowkv_common.errors import BadRequest, CannotStart
from flowkv_gateway.call_grammar import (
    answer_grammar,
    form_of,
    harmony_rule,
    kimi_k3_rule,
)
from flowkv_gateway.calls import forced_names, offered_tools, tell_of_tools
from flowkv_gateway.grammar import Wanted, check_size, wanted_grammar
from flowkv_gateway.grammar_text import in_grammar, up_to
from flowkv_gateway.parsers import Parser, can_reason, parser_for
from flowkv_gateway.parsers.gemma import Gemma
from flowkv_gateway.parsers.harmony import Harmony
from flowkv_gateway.parsers.hermes import Hermes
from flowkv_gateway.parsers.kimi_k3 import KimiK3
from flowkv_gateway.parsers.mistral import Mistral
from flowkv_gateway.parsers.thinking import Thinking
from flowkv_gateway.reader import AnswerReader
from flowkv_gateway.schemas import ChatMessage, ChatRequest, TokenizeRequest, ToolCall
from flowkv_gateway.tokenizer import ChatPrompt, Conversation, Tokenizer

log = logging.getLogger(__name__)

MakeReader = Callable[[], AnswerReader]

# What opens the reasoning is at the end of the prompt, with little behind it.
_PROMPT_END_CHARS = 256
_REASONING_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
_GEMMA_MARKS = (("<|channel>thought\n", "<channel|>"),)
_MISTRAL_ID_CHARS = 9  # its templates refuse ids of another length


class AnswerFormat(NamedTuple):
    """What the answers to one prompt have to keep to, and what makes a reader for each of them.

    None: they may be any text, and all of it is content.
    """

    wanted: Wanted | None
    make_reader: MakeReader | None


class ChatFormat:
    """How a model's chat template writes tools, calls and reasoning.

    `parser_name` is the setting FLOWKV_TOOL_PARSER; empty: the template tells. Raises CannotStart for a name
    that no parser has.
    """

    def __init__(self, tokenizer: Tokenizer, parser_name: str = "") -> None:
        self._tokenizer = tokenizer
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
        self._form = form_of(self._for_calls, template)
        self._is_mistral = found is Mistral
        self._reasoning_marks = [marks for marks in _REASONING_MARKS if marks[1] in template]

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
        tools = offered_tools(request)
        forced_names(request)  # or else the template would be rendered for nothing
        messages = for_template(request.messages or (), _MISTRAL_ID_CHARS if self._is_mistral else None)
        if not self.knows_tools:
            messages, tools = tell_of_tools(messages, tools), []
        kwargs = request.chat_template_kwargs or {}
        if request.enable_thinking is not None:
            kwargs = {**_thinking_kwargs(request.enable_thinking), **kwargs}
        if (effort := request.reasoning_effort) is not None:
            kwargs = {"reasoning_effort": effort, **kwargs}
            if effort == "none":
                kwargs = {**_thinking_kwargs(False), **kwargs}
        return Conversation(
            messages,
            # Templates ask whether there are any in their own ways: `is not none` is one of them.
            tools=tools or None,
            documents=request.documents or None,
            template_kwargs=kwargs,
            add_generation_prompt=request.add_generation_prompt is not False,
            continue_final_message=bool(request.continue_final_message),
        )

    async def prompt(self, request: ChatRequest | TokenizeRequest) -> ChatPrompt:
        """Raises BadRequest as `conversation`, and if the template refuses the messages."""
        adds_special = bool(request.add_special_tokens)
        return await self._tokenizer.encode_chat(self.conversation(request), add_special_tokens=adds_special)

    async def drop_oldest(self, request: ChatRequest, max_tokens: int) -> ChatPrompt:
        """Drops so many of the oldest turns that the prompt, which is returned, has up to `max_tokens`.

        A system message stays, and so does all from the user's last message on, however long it is. Raises
        BadRequest as `prompt`.
        """
        messages = request.messages
        num_kept = int(messages[0].role in ("system", "developer"))
        later = [place for place in range(num_kept + 1, len(messages)) if messages[place].role == "user"]
        begins = [num_kept, *later]

        def turns_from(which: int) -> list[ChatMessage]:
            return [*messages[:num_kept], *messages[begins[which] :]]

        fitting: ChatPrompt | None = None  # that of `high`, once it was tried
        low, high = 0, len(begins) - 1
        middle = 0  # most prompts fit as they are
        while low < high:
            request.messages = turns_from(middle)
            prompt = await self.prompt(request)
            if len(prompt.token_ids) <= max_tokens:
                high, fitting = middle, prompt
            else:
                low = middle + 1
            middle = (low + high) // 2
        request.messages = turns_from(low)
        return fitting or await self.prompt(request)

    def answer_format(self, request: ChatRequest, prompt: str) -> AnswerFormat:
        """Of the answers to this rendered prompt. Raises BadRequest."""
        tools, forced = offered_tools(request), forced_names(request)
        asked = wanted_grammar(request, self._tokenizer.vocabulary)
        is_in_grammar = bool(tools) and bool(forced or asked)
        parser = self._form.parser if is_in_grammar else self.parser(has_tools=bool(tools))
        reasoning = self._reasoning_rule(prompt.rstrip(), parser)
        if tools or reasoning:
            field = "tool_choice" if forced else asked.field if asked else "tools"
            # The form is not the model's own, which may be anything: it can be forced, not guided.
            is_own = self._form.parser is self._for_calls
            grammar = answer_grammar(
                asked if not forced else None,
                tools if is_own or is_in_grammar else (),
                forced,
                self._form,
                self._tokenizer.vocabulary,
                max_calls=1 if isinstance(request.tool_choice, dict) else _max_calls(request),
                reasoning=reasoning,
            )
            asked = check_size(Wanted(field, grammar)) if grammar else None
        if parser is None:
            return AnswerFormat(asked, None)
        prompt_end = prompt[-_PROMPT_END_CHARS:]
        shows_special = request.skip_special_tokens is False
        special_texts = frozenset() if shows_special else self._tokenizer.vocabulary.special_texts

        def make_reader() -> AnswerReader:
            return AnswerReader(
                parser(tools, prompt_end, streams_calls=bool(request.stream)),
                special_texts=special_texts,
                shows_reasoning=request.include_reasoning is not False,
                max_calls=_max_calls(request),
            )

        return AnswerFormat(asked, make_reader)

    def _reasoning_rule(self, prompt: str, parser: type[Parser] | None) -> str:
        """A grammar's rule for what comes before the answer; empty if this prompt lets nothing come.

        It lets come what `parser` reads.
        """
        vocabulary = self._tokenizer.vocabulary
        if parser is Harmony:
            return harmony_rule(vocabulary) if prompt.endswith("<|start|>assistant") else ""
        if parser is KimiK3:
            return kimi_k3_rule(prompt, vocabulary)
        for begin, end in _GEMMA_MARKS if parser is Gemma else self._reasoning_marks:
            if prompt.endswith(end):
                return ""
            ended = up_to("ended", end, vocabulary)
            if prompt.endswith(begin.rstrip()):
                return f"reasoning: ended\n{ended}"
            return f"reasoning: ({in_grammar(begin, vocabulary)} ended)?\n{ended}"
        return ""


def _max_calls(request: ChatRequest) -> int | None:
    return 1 if request.parallel_tool_calls is False else None


def _thinking_kwargs(is_wanted: bool) -> dict[str, Any]:
    """For templates, by the names of Qwen and DeepSeek."""
    return {"enable_thinking": is_wanted, "thinking": is_wanted}


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
