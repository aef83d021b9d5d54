"""Which tokens end a text: what any file of a model's folder says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

_TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")


def eos_token_ids(folder: Path, config: PretrainedConfig) -> list[int]:
    """The union of generation_config.json, config.json and the tokenizer's `eos_token`, each id once.

    Models are published whose files differ: one names the end of the text, another the end of a turn. Where
    no file names any, the default of the model's type counts. Ids outside the vocabulary are left out.
    """
    named = [
        *_ids_in(_read(folder / "generation_config.json")),
        *_ids_in(_read(folder / "config.json")),
        *_ids_of_tokenizer(folder),
    ] or list(_ids_in(config.to_dict()))
    return [token_id for token_id in dict.fromkeys(named) if 0 <= token_id < config.vocab_size]


def _ids_in(fields: dict[str, Any]) -> Iterator[int]:
    """One id, a list of them, or none; a model of several parts keeps them in its text part."""
    eos = fields.get("eos_token_id")
    if eos is None:
        eos = (fields.get("text_config") or {}).get("eos_token_id")
    yield from eos if isinstance(eos, list) else [] if eos is None else [eos]


def _ids_of_tokenizer(folder: Path) -> Iterator[int]:
    tokenizer = folder / "tokenizer.json"
    texts = {text for name in _TOKENIZER_CONFIGS if (text := _text(_read(folder / name).get("eos_token")))}
    if not texts or not tokenizer.exists():
        return
    source = _read(tokenizer)
    added = {token["content"]: token["id"] for token in source.get("added_tokens") or []}
    vocab = source["model"].get("vocab")
    for text in sorted(texts):
        found = added.get(text, vocab.get(text) if isinstance(vocab, dict) else None)
        if found is not None:
            yield found


def _text(token: Any) -> str | None:
    """Older files write a token as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read(file: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return fields
