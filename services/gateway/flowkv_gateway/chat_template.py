"""A model's chat template, rendered in a sandbox: the template is the model's, the messages the user's."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flowkv_common.errors import BadRequest

# Templates may write a space or a line break after a message, but hardly this.
_SPACE = " \t "


@dataclass(frozen=True)
class Conversation:
    """What a template turns into a prompt. `template_kwargs` are settings that only this template knows.

    `continue_final_message`: the prompt ends within the last message, for the model to go on with it.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class _Generation(Extension):
    """`{% generation %}` marks what the model said, for training. Here its body is just shown."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Messages to the text that the model expects. `special_tokens` are names such as `bos_token`."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template = environment.from_string(source)
        self._variables = meta.find_undeclared_variables(environment.parse(source))
        self._special_tokens = dict(special_tokens)

    def render(self, conversation: Conversation) -> str:
        """Raises BadRequest with what the template says against this conversation."""
        if conversation.documents and "documents" not in self._variables:
            raise BadRequest("This model's chat template has no place for documents.", field="documents")
        is_continued, messages = conversation.continue_final_message, conversation.messages
        # Nobody can type the mark: a message's own text may occur again after it.
        mark = secrets.token_hex(16)
        if is_continued:
            messages = _with_mark(messages, mark)
        variables = {
            **self._special_tokens,
            **conversation.template_kwargs,
            "messages": messages,
            "tools": conversation.tools,
            "documents": conversation.documents,
            "add_generation_prompt": conversation.add_generation_prompt and not is_continued,
        }
        try:
            text = self._template.render(variables)
        except Exception as error:  # whatever it is, the template can't take these messages
            raise BadRequest(f"The chat template refused the messages: {error}", field="messages") from error
        return _cut_at(text, mark) if is_continued else text


def _with_mark(messages: Sequence[Mapping[str, Any]], mark: str) -> list[Mapping[str, Any]]:
    """The messages with `mark` at the end of the last one. Raises BadRequest if that one is empty."""
    *before, last = messages
    if not last["content"].strip():
        raise BadRequest("The last message can't be continued: it is empty.", field="continue_final_message")
    return [*before, {**last, "content": last["content"] + mark + _SPACE}]


def _cut_at(text: str, mark: str) -> str:
    """The prompt up to the mark. A template that took the space after it trims messages."""
    place = text.rfind(mark)
    if place < 0:
        raise BadRequest(
            "The last message can't be continued: the chat template does not show it as it is.",
            field="continue_final_message",
        )
    prompt = text[:place]
    return prompt if text.startswith(_SPACE, place + len(mark)) else prompt.rstrip()


def _raise(message: str) -> str:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
