"""Special tokens that somebody typed stay text: only the chat template may begin and end turns.

A tokenizer finds `<|im_end|>` wherever it stands. So a conversation in which such a text was typed is
rendered with a stand-in for it. Then the special tokens that the template has written are given other names,
the stand-ins become what was typed, and a second tokenizer encodes it, which knows special tokens by those
other names alone. It is the first one otherwise: spaces, merges and first words come out as they always do.

A conversation without such a text, that is nearly all of them, takes none of this.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import tokenizers

from flowkv_gateway.chat_template import Conversation


class TypedSpecials:
    """Of one tokenizer. Nobody outside can guess a stand-in or a name: they are drawn at each start."""

    def __init__(self, encoder: tokenizers.Tokenizer) -> None:
        self._encoder = encoder
        added = encoder.get_added_tokens_decoder().items()
        texts = {token.content: token_id for token_id, token in added if token.special}
        nonce = secrets.token_hex(8)
        self._stand_ins = {text: f"typed{nonce}n{token_id}n" for text, token_id in texts.items()}
        self._names = {text: f"special{nonce}n{token_id}n" for text, token_id in texts.items()}
        self._special = _any_of(texts)
        self._stand_in = re.compile(f"typed{nonce}n[0-9]+n")

    def occur_in(self, conversation: Conversation) -> bool:
        """Whether a special token's text was typed anywhere in it."""
        return any(self._special.search(text) for text in _texts(_typed_parts(conversation)))

    def hide(self, conversation: Conversation) -> Conversation:
        """The same with stand-ins, to be rendered for `encode`."""
        messages, tools, documents = self._hide(_typed_parts(conversation))
        return replace(conversation, messages=messages, tools=tools, documents=documents)

    def encode(self, rendered: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of what was rendered from a conversation with stand-ins. The first call takes a second."""
        named = self._special.sub(lambda found: self._names[found[0]], rendered)
        typed = {stand_in: text for text, stand_in in self._stand_ins.items()}
        text = self._stand_in.sub(lambda found: typed[found[0]], named)
        [encoding] = self._renamed.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    @cached_property
    def _renamed(self) -> tokenizers.Tokenizer:
        """The tokenizer with its special tokens under their other names: same ids, same flags."""
        source = json.loads(self._encoder.to_str())
        for token in source["added_tokens"]:
            if token["special"]:
                token["content"] = self._names[token["content"]]
        model = source["model"]
        vocab = model["vocab"]
        if isinstance(vocab, list):  # pieces with their scores
            model["vocab"] = [[self._names.get(piece, piece), score] for piece, score in vocab]
        else:
            model["vocab"] = {self._names.get(piece, piece): token_id for piece, token_id in vocab.items()}
        if model.get("unk_token") in self._names:
            model["unk_token"] = self._names[model["unk_token"]]
        return tokenizers.Tokenizer.from_str(json.dumps(source))

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._special.sub(lambda found: self._stand_ins[found[0]], value)
        if isinstance(value, Mapping):
            return {self._hide(key): self._hide(one) for key, one in value.items()}
        if isinstance(value, Sequence):
            return [self._hide(one) for one in value]
        return value


def _typed_parts(conversation: Conversation) -> list[Any]:
    """What a person, a model or a tool may have written."""
    return [conversation.messages, conversation.tools, conversation.documents]


def _texts(value: Any) -> Iterator[str]:
    """All strings in a JSON value, keys included."""
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if isinstance(current, str):
            yield current
        elif isinstance(current, Mapping):
            waiting.extend((*current, *current.values()))
        elif isinstance(current, Sequence):
            waiting.extend(current)


def _any_of(texts: Mapping[str, int]) -> re.Pattern[str]:
    """Of several that begin alike the longest is found, as tokenizers do it."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
