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
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from os.path import commonprefix
from typing import Any

import tokenizers

from flowkv_common.errors import BadRequest
from flowkv_gateway.chat_template import Conversation

# What a person, a model or a tool may have written in a conversation.
_TYPED_PARTS = ("messages", "tools", "documents")


class TypedSpecials:
    """Of one tokenizer. Nobody outside can guess a stand-in or a name: they are drawn at each start."""

    def __init__(self, encoder: tokenizers.Tokenizer) -> None:
        added = encoder.get_added_tokens_decoder().items()
        texts = {token.content: token_id for token_id, token in added if token.special}
        nonce = secrets.token_hex(8)
        self._stand_ins = {text: f"typed{nonce}n{token_id}n" for text, token_id in texts.items()}
        self._names = {text: f"special{nonce}n{token_id}n" for text, token_id in texts.items()}
        self._special = _any_of(texts)
        self._stand_in = re.compile(f"typed{nonce}n[0-9]+n")
        # Now, not with the first request that needs it: a large vocabulary would hold up all others.
        self._renamed = self._rename(encoder)

    def occur_in(self, conversation: Conversation) -> bool:
        """Whether a special token's text was typed anywhere in it."""
        parts = [getattr(conversation, name) for name in _TYPED_PARTS]
        return any(self._special.search(text) for text in _texts(parts))

    def hide(self, conversation: Conversation) -> Conversation:
        """The same with stand-ins, to be rendered for `encode`.

        Raises BadRequest for JSON that is nested deeper than Python calls itself.
        """
        hidden = {}
        for name in _TYPED_PARTS:
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

    def _rename(self, encoder: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
        """The tokenizer with its special tokens under their other names: same ids, same flags."""
        source = json.loads(encoder.to_str())
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


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    """Of several that begin alike the longest is found, as tokenizers do it.

    What they have in common is tried once, not once for each of them: some models have a thousand.
    """
    return re.compile(_branches(sorted(texts)) if texts else r"(?!)")


def _branches(texts: Sequence[str]) -> str:
    """A regular expression for any of these; they are sorted. An empty one among them comes last."""
    branches = []
    for _, alike in groupby(filter(None, texts), key=lambda text: text[0]):
        group = list(alike)
        common = commonprefix(group)
        rests = [text[len(common) :] for text in group]
        branches.append(re.escape(common) + (_branches(rests) if len(rests) > 1 else ""))
    return f"(?:{'|'.join(branches)}){'' if texts[0] else '?'}"
