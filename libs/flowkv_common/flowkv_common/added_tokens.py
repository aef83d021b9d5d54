"""Added tokens of a parsed tokenizer.json: texts that are one token each, wherever a tokenizer finds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def marks_of(tokenizer_json: Mapping[str, Any]) -> dict[str, int]:
    """The texts of those that are no text to a grammar, with their ids: they stand in it by these alone.

    All that are special, and what looks like it, as llguidance has it: many models have `<tool_call>` and
    `</think>` as tokens that are not special.
    """
    return {
        token["content"]: token["id"]
        for token in tokenizer_json.get("added_tokens") or ()
        if token["special"] or (token["content"].startswith("<") and token["content"].endswith(">"))
    }


def rename(tokenizer_json: dict[str, Any], names: Mapping[str, str]) -> None:
    """Give added tokens these other texts, in place. Their ids and flags stay, and so do all other tokens.

    So a tokenizer takes the text of none of them for the token.
    """
    for token in tokenizer_json["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = tokenizer_json["model"]
    vocab = model["vocab"]
    if isinstance(vocab, list):  # pieces with their scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    else:
        for text in names.keys() & vocab.keys():
            vocab[names[text]] = vocab.pop(text)
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
