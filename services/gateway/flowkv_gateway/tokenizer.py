"""Text to token ids and back for one model folder, with `tokenizers` alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from flowkv_common.errors import BadRequest, CannotStart
from flowkv_gateway.chat_template import ChatTemplate, Conversation
from flowkv_gateway.typed_specials import TypedSpecials
from flowkv_gateway.vocabulary import Vocabulary

# Encoding runs at about one million characters a second: this many take less than 5 ms.
_MAX_INLINE_CHARS = 2048


class Tokenizer:
    """A model's tokenizer and chat template. Long texts are encoded in a thread, short ones at once."""

    def __init__(
        self, encoder: tokenizers.Tokenizer, vocabulary: Vocabulary, template: ChatTemplate | None
    ) -> None:
        self.vocabulary = vocabulary
        self._encoder = encoder
        self._template = template
        self._typed = TypedSpecials(encoder)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """From tokenizer.json and, where they exist, tokenizer_config.json and chat_template.jinja.

        Raises CannotStart if one of them can't be used, or the first is missing.
        """
        if not folder.is_dir():
            raise CannotStart(f"there is no model folder at {folder}")
        if not (folder / "tokenizer.json").is_file():
            raise CannotStart(
                f"{folder} has no tokenizer.json, the only form of a tokenizer that FlowKV reads"
            )
        try:
            source = (folder / "tokenizer.json").read_text(encoding="utf-8")
            encoder = tokenizers.Tokenizer.from_str(source)
            encoder.no_truncation()
            encoder.no_padding()
            vocabulary = Vocabulary.from_json(json.loads(source), encoder.get_vocab(with_added_tokens=True))
            return cls(encoder, vocabulary, _load_template(folder))
        except Exception as error:  # `tokenizers` has no class of its own for its errors
            raise CannotStart(f"the tokenizer in {folder} can't be used: {error}") from error

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of each text."""
        if sum(map(len, texts)) <= _MAX_INLINE_CHARS:
            return self._encode(texts, add_special_tokens)
        return await asyncio.to_thread(self._encode, texts, add_special_tokens)

    async def encode_chat(self, conversation: Conversation, *, add_special_tokens: bool = False) -> list[int]:
        """The ids of the rendered conversation; special tokens that were typed in it are text.

        Templates write all special tokens, BOS among them: more are added only if asked for. Raises
        BadRequest if the template refuses the conversation.
        """
        if self._template is None:
            raise BadRequest("This model has no chat template; use /v1/completions.", field="messages")
        if self._typed.occur_in(conversation):
            text = self._template.render(self._typed.hide(conversation))
            return await asyncio.to_thread(self._typed.encode, text, add_special_tokens=add_special_tokens)
        text = self._template.render(conversation)
        [token_ids] = await self.encode([text], add_special_tokens=add_special_tokens)
        return token_ids

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


def _load_template(folder: Path) -> ChatTemplate | None:
    config_file = folder / "tokenizer_config.json"
    config: dict[str, Any] = (
        json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
    )
    template_file = folder / "chat_template.jinja"
    if template_file.exists():
        source = template_file.read_text(encoding="utf-8")
    else:
        source = _default_template(config.get("chat_template"))
    return ChatTemplate(source, _special_tokens(config)) if source else None


def _default_template(entry: Any) -> str:
    """tokenizer_config.json has one template or a list of named ones."""
    if isinstance(entry, list):
        named = {template["name"]: str(template["template"]) for template in entry}
        return named.get("default", "")
    return str(entry or "")


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like; older files write them as objects."""
    tokens: dict[str, str] = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens
