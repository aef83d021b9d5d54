"""Which tokens end a text: what any file of a model's folder says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from transformers import PretrainedConfig

from flowkv_common.engine.servable import UnsupportedModel

_TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")


class _Ids(msgspec.Struct):
    """One id, a list of them, or none; a model of several parts keeps them in its text part."""

    eos_token_id: int | list[int] | None = None
    text_config: _Ids | None = None

    def __iter__(self) -> Iterator[int]:
        if self.eos_token_id is None:
            yield from self.text_config or ()
        else:
            yield from self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]


class _Specials(msgspec.Struct):
    eos_token: Any = None

    def eos(self) -> str | None:
        """Older files write a token as an object."""
        token = self.eos_token.get("content") if isinstance(self.eos_token, dict) else self.eos_token
        return token if isinstance(token, str) else None


class _AddedToken(msgspec.Struct):
    content: str
    id: int


class _Vocabulary(msgspec.Struct):
    vocab: dict[str, int] | list[Any] | None = (
        None  # a list of texts and scores: special tokens are added ones
    )


class _Tokenizer(msgspec.Struct):
    added_tokens: list[_AddedToken] | None = None
    model: _Vocabulary | None = None

    def id_of(self, text: str) -> int | None:
        vocab = self.model.vocab if self.model is not None else None
        known = vocab if isinstance(vocab, dict) else {}
        added = {token.content: token.id for token in self.added_tokens or ()}
        return added.get(text, known.get(text))


_Fields = TypeVar("_Fields", bound=msgspec.Struct)


def eos_token_ids(folder: Path, config: PretrainedConfig) -> list[int]:
    """The union of generation_config.json, config.json and the tokenizer's `eos_token`, each id once.

    Models are published whose files differ: one names the end of the text, another the end of a turn. Where
    no file names any, the default of the model's type counts. Ids outside the vocabulary are left out. Raises
    `UnsupportedModel` if one of the files can't be read.
    """
    named = [
        *_read(folder / "generation_config.json", _Ids),
        *_read(folder / "config.json", _Ids),
        *_ids_of_tokenizer(folder),
    ] or list(msgspec.convert(config.to_dict(), _Ids))
    return [token_id for token_id in dict.fromkeys(named) if 0 <= token_id < config.vocab_size]


def _ids_of_tokenizer(folder: Path) -> Iterator[int]:
    texts = {text for name in _TOKENIZER_CONFIGS if (text := _read(folder / name, _Specials).eos())}
    if texts:
        tokenizer = _read(folder / "tokenizer.json", _Tokenizer)
        for text in sorted(texts):
            if (found := tokenizer.id_of(text)) is not None:
                yield found


def _read(file: Path, fields: type[_Fields]) -> _Fields:
    """Of an absent file the defaults. By Python's json, as published files have NaN and Infinity in them."""
    try:
        return msgspec.convert(json.loads(file.read_bytes()) if file.exists() else {}, fields)
    except ValueError as error:
        raise UnsupportedModel(f"{file} does not say which token ends a text: {error}") from error
