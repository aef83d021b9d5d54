"""Conversations and texts to token ids, and ids to bytes: the model's tokenizer and its chat template."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import groupby
from os.path import commonprefix
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jinja2
import tokenizers
from jinja2 import meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flowkv_common.added_tokens import marks_of, rename
from flowkv_common.errors import BadRequest, CannotStart

# Encoding runs at about one million characters a second: this many take less than 5 ms.
_MAX_INLINE_CHARS = 2048
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Those that are functions of single tokens.
_KNOWN_DECODERS = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
_MAKE_OF_MODEL = (
    "; make it of tokenizer.model: pip install sentencepiece protobuf tiktoken && python -c "
    "\"from transformers import AutoTokenizer; f='{0}'; AutoTokenizer.from_pretrained(f).save_pretrained(f)\""
)
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


class ChatPrompt(NamedTuple):
    """A rendered conversation. Special tokens that were typed in it have stand-ins in `text`."""

    text: str
    token_ids: list[int]


class Tokenizer:
    """A model's tokenizer and chat template. Long texts are encoded in a thread, short ones at once."""

    def __init__(
        self,
        file: Path,
        encoder: tokenizers.Tokenizer,
        vocabulary: Vocabulary,
        template: ChatTemplate | None,
        config: Mapping[str, Any],
        *,
        trusts_typed_special_tokens: bool = False,
    ) -> None:
        self.file = file
        self.vocabulary = vocabulary
        self._encoder = encoder
        self._template = template
        self._config = config
        self._typed = None if trusts_typed_special_tokens else TypedSpecials(encoder)

    @classmethod
    def load(cls, folder: Path, *, trusts_typed_special_tokens: bool = False) -> Tokenizer:
        """From tokenizer.json and, where they exist, tokenizer_config.json and a chat template's file.

        Raises CannotStart if one of them can't be used, or the first is missing.
        """
        if not folder.is_dir():
            raise CannotStart(f"there is no model folder at {folder}")
        if not (folder / "tokenizer.json").is_file():
            raise CannotStart(
                f"{folder} has no tokenizer.json, the only form of a tokenizer that FlowKV reads"
                + (_MAKE_OF_MODEL.format(folder) if (folder / "tokenizer.model").is_file() else "")
            )
        try:
            source = (folder / "tokenizer.json").read_text(encoding="utf-8")
            encoder = tokenizers.Tokenizer.from_str(source)
            encoder.no_truncation()
            encoder.no_padding()
            vocabulary = Vocabulary.from_json(json.loads(source), encoder.get_vocab(with_added_tokens=True))
            config = _load_config(folder)
            template = ChatTemplate.load(folder, config)
            return cls(
                folder / "tokenizer.json",
                encoder,
                vocabulary,
                template,
                config,
                trusts_typed_special_tokens=trusts_typed_special_tokens,
            )
        except Exception as error:  # `tokenizers` has no class of its own for its errors
            raise CannotStart(f"the tokenizer in {folder} can't be used: {error}") from error

    def with_template(self, source: str) -> Tokenizer:
        """The same with another chat template. Raises BadRequest for one that is none."""
        other = copy(self)
        special_tokens = self._template.special_tokens if self._template else {}
        try:
            other._template = ChatTemplate(source, special_tokens)
        except (jinja2.TemplateError, RecursionError) as error:
            raise BadRequest(f"chat_template: {error}", field="chat_template") from None
        return other

    @property
    def info(self) -> dict[str, Any]:
        """What tokenizer_config.json says, and the chat template, wherever it comes from."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",  # unless the file says it
            **self._config,
            "chat_template": self._template.main_source if self._template else None,
        }

    @property
    def template_source(self) -> str:
        """Of all chat templates of the model; empty if it has none."""
        return self._template.source if self._template else ""

    @property
    def template_takes_tools(self) -> bool:
        return self._template is not None and self._template.takes_tools

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of each text."""
        if sum(map(len, texts)) <= _MAX_INLINE_CHARS:
            return self._encode(texts, add_special_tokens)
        return await asyncio.to_thread(self._encode, texts, add_special_tokens)

    async def encode_chat(
        self, conversation: Conversation, *, add_special_tokens: bool = False
    ) -> ChatPrompt:
        """The rendered conversation and its ids. Special tokens that were typed in it are text, or trusted.

        Templates write all special tokens, BOS among them: more are added only if asked for. Raises
        BadRequest if the template refuses the conversation.
        """
        if self._template is None:
            raise BadRequest("This model has no chat template; use /v1/completions.", field="messages")
        if self._typed is not None and self._typed.occur_in(conversation):
            text = self._template.render(self._typed.hide(conversation))
            token_ids = await asyncio.to_thread(
                self._typed.encode, text, add_special_tokens=add_special_tokens
            )
            return ChatPrompt(text, token_ids)
        text = self._template.render(conversation)
        [token_ids] = await self.encode([text], add_special_tokens=add_special_tokens)
        return ChatPrompt(text, token_ids)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included; unknown ids add nothing."""
        # One batch as for encoding: it does not stop the other threads.
        [text] = await asyncio.to_thread(
            self._encoder.decode_batch, [list(token_ids)], skip_special_tokens=False
        )
        return text

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        # Of all ways to encode, the batched ones alone let other threads run meanwhile.
        encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]


def _load_config(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says; multimodal folders may have their template in a file beside it."""
    config: dict[str, Any] = {}
    for file in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        if file.exists():
            config |= json.loads(file.read_text(encoding="utf-8"))
    return config


class Vocabulary:
    """Token ids to bytes. Ids that the tokenizer lacks (padding of the embedding) have no bytes.

    `marks`: the ids of tokens that are no text to a grammar, by their texts. `mark_pattern` finds them, the
    longest where several begin alike.
    """

    def __init__(
        self,
        token_bytes: Mapping[int, bytes],
        special_ids: frozenset[int],
        marks: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.special_ids = special_ids
        self.marks = marks
        # Now, not with the first request that needs it: some models have thousands.
        self.mark_pattern = re.compile(_any_of(sorted(filter(None, marks))))
        self._token_bytes = token_bytes

    @classmethod
    def from_json(cls, tokenizer_json: Mapping[str, Any], vocab: Mapping[str, int]) -> Vocabulary:
        """From a parsed tokenizer.json and its full `vocab` (token to id, added tokens included).

        Raises ValueError for a decoder that is not a function of single tokens.
        """
        kinds = set(_decoder_kinds(tokenizer_json.get("decoder")))
        if unknown := kinds - _KNOWN_DECODERS:
            raise ValueError(f"tokenizer.json: decoder {', '.join(sorted(unknown))} is not supported")
        to_bytes = _byte_level if "ByteLevel" in kinds else _sentencepiece
        added = tokenizer_json.get("added_tokens") or []
        special = frozenset(token["id"] for token in added if token["special"])
        token_bytes = {token_id: to_bytes(token) for token, token_id in vocab.items()}
        return cls(token_bytes, special, marks_of(tokenizer_json))

    @cached_property
    def special_texts(self) -> frozenset[str]:
        return frozenset(map(self.token_text, self.special_ids))

    def token_bytes(self, token_id: int) -> bytes:
        """The token's own bytes, special or not."""
        return self._token_bytes.get(token_id, b"")

    def token_text(self, token_id: int) -> str:
        """The token for people: its text, or `bytes:\\xe2\\x82` when it is only part of a character."""
        own = self.token_bytes(token_id)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)


def _decoder_kinds(decoder: Mapping[str, Any] | None) -> Iterator[str]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _decoder_kinds(part)
    else:
        yield decoder["type"]


# GPT-2's way to write any byte as a printable character: printable Latin-1 stands for itself.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:  # an added token: written as it is
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace("\u2581", " ").encode()


class ChatTemplate:
    """Messages to the text that the model expects. `special_tokens` are names such as `bos_token`.

    `with_tools`: the template for conversations with tools, if it is another one.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], with_tools: str = "") -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.main_source = source
        self.source = source + with_tools
        self._template = environment.from_string(source)
        self._with_tools = environment.from_string(with_tools) if with_tools else self._template
        self._variables = {
            variable
            for one in (source, with_tools)
            for variable in meta.find_undeclared_variables(environment.parse(one))
        }
        self.special_tokens = dict(special_tokens)
        self.takes_tools = "tools" in self._variables

    @classmethod
    def load(cls, folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
        """The template of the model in `folder`, which has this tokenizer_config.json; None if none."""
        source = config.get("chat_template") or ""
        named = source if isinstance(source, list) else [{"name": "default", "template": source}]
        sources = {one["name"]: str(one["template"]) for one in named}
        further = folder / "additional_chat_templates" / "tool_use.jinja"
        for name, file in (("default", folder / "chat_template.jinja"), ("tool_use", further)):
            if file.exists():
                sources[name] = file.read_text(encoding="utf-8")
        special_tokens = {}
        for name, value in config.items():
            content = value.get("content") if isinstance(value, dict) else value  # older files have objects
            if name.endswith("_token") and isinstance(content, str):
                special_tokens[name] = content
        if not (default := sources.get("default")):
            return None
        return cls(default, special_tokens, sources.get("tool_use", ""))

    def render(self, conversation: Conversation) -> str:
        """Raises BadRequest with what the template says against this conversation."""
        if conversation.documents and "documents" not in self._variables:
            raise BadRequest("This model's chat template has no place for documents.", field="documents")
        is_continued, messages = conversation.continue_final_message, conversation.messages
        # The prompt of a continued message is cut at a random mark: its own text may occur again after it.
        mark = secrets.token_hex(16)
        if is_continued:
            *before, last = messages
            if not last["content"].strip():
                raise _cant_be_continued("it is empty")
            messages = [*before, {**last, "content": last["content"] + mark + _SPACE}]
        own = {
            "messages": messages,
            "tools": conversation.tools,
            "documents": conversation.documents,
            "add_generation_prompt": conversation.add_generation_prompt and not is_continued,
        }
        for name, value in conversation.template_kwargs.items():
            if value != own.get(name, value):
                field = f"chat_template_kwargs.{name}"
                raise BadRequest(f"{field} is not supported: `{name}` is a field itself.", field=field)
        variables = {**self.special_tokens, **conversation.template_kwargs, **own}
        try:
            text = (self._with_tools if conversation.tools else self._template).render(variables)
        except Exception as error:  # whatever it is, the template can't take these messages
            raise BadRequest(f"The chat template refused the messages: {error}", field="messages") from error
        if not is_continued:
            return text
        prompt, found, rest = text.rpartition(mark)
        if not found:
            raise _cant_be_continued("the chat template does not show it as it is")
        return prompt if rest.startswith(_SPACE) else prompt.rstrip()  # else the template trims messages


def _cant_be_continued(reason: str) -> BadRequest:
    return BadRequest(f"The last message can't be continued: {reason}.", field="continue_final_message")


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the model said, for training. Here its body is just shown."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on. The options are those of `transformers`.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class TypedSpecials:
    """Keeps special tokens that a client typed as text: only the chat template may begin and end turns.

    A tokenizer finds `<|im_end|>` wherever it stands. So a conversation in which such a text was typed is
    rendered with a stand-in for it. Then the special tokens that the template has written are given other
    names, the stand-ins become what was typed, and a second tokenizer encodes it, which knows special tokens
    by those other names alone. Otherwise it equals the first one, so spaces and merges come out the same.
    Nearly all conversations hold no such text and skip all of this.

    Clients can't guess a stand-in or a name: they are random and new at each start.
    """

    # What a person, a model or a tool may have written in a conversation.
    _PARTS = ("messages", "tools", "documents")

    def __init__(self, encoder: tokenizers.Tokenizer) -> None:
        added = encoder.get_added_tokens_decoder().items()
        texts = {token.content: token_id for token_id, token in added if token.special}
        nonce = secrets.token_hex(8)
        self._stand_ins = {text: f"typed{nonce}n{token_id}n" for text, token_id in texts.items()}
        self._names = {text: f"special{nonce}n{token_id}n" for text, token_id in texts.items()}
        self._special = re.compile(_any_of(sorted(texts)))
        self._stand_in = re.compile(f"typed{nonce}n[0-9]+n")
        # Now, not with the first request that needs it: a large vocabulary would hold up all others.
        source = json.loads(encoder.to_str())
        rename(source, self._names)
        self._renamed = tokenizers.Tokenizer.from_str(json.dumps(source))

    def occur_in(self, conversation: Conversation) -> bool:
        """Whether a special token's text was typed anywhere in it, keys of objects included."""
        waiting: list[Any] = [getattr(conversation, name) for name in self._PARTS]
        while waiting:
            value = waiting.pop()
            if isinstance(value, str):
                if self._special.search(value):
                    return True
            elif isinstance(value, Mapping):
                waiting.extend((*value, *value.values()))
            elif isinstance(value, Sequence):
                waiting.extend(value)
        return False

    def hide(self, conversation: Conversation) -> Conversation:
        """The same with stand-ins, to be rendered for `encode`.

        Raises BadRequest for JSON that is nested deeper than Python calls itself.
        """
        hidden = {}
        for name in self._PARTS:
            try:
                hidden[name] = self._hide(getattr(conversation, name))
            except RecursionError:
                raise BadRequest(f"{name} is nested too deeply.", field=name) from None
        return replace(conversation, **hidden)

    def encode(self, rendered: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of what was rendered from a conversation with stand-ins."""
        named = self._special.sub(lambda found: self._names[found[0]], rendered)
        typed = {stand_in: text for text, stand_in in self._stand_ins.items()}
        text = self._stand_in.sub(lambda found: typed[found[0]], named)
        [encoding] = self._renamed.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._special.sub(lambda found: self._stand_ins[found[0]], value)
        if isinstance(value, Mapping):
            return {self._hide(key): self._hide(one) for key, one in value.items()}
        if isinstance(value, Sequence):
            return [self._hide(one) for one in value]
        return value


def _any_of(texts: Sequence[str]) -> str:
    """A regular expression for any of these, sorted; of several that begin alike the longest is found.

    What they have in common is tried once, not once for each of them: some models have a thousand.
    """
    if not texts:
        return r"(?!)"
    branches = []
    for _, alike in groupby(filter(None, texts), key=lambda text: text[0]):
        group = list(alike)
        common = commonprefix(group)
        rests = [text[len(common) :] for text in group]
        branches.append(re.escape(common) + (_any_of(rests) if len(rests) > 1 else ""))
    return f"(?:{'|'.join(branches)}){'' if texts[0] else '?'}"  # an empty one comes first
