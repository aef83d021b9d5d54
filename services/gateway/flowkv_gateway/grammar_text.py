"""Text in the rules of grammars: a mark that is a token stands there by its id, its letters are no text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from flowkv_gateway.calls import in_json
from flowkv_gateway.tokenizer import Vocabulary

ANY = r"/(.|\n)*/"


def in_grammar(text: str, vocabulary: Vocabulary) -> str:
    """This text in a rule: marks are not their texts there."""
    parts, place = [], 0
    for found in vocabulary.mark_pattern.finditer(text):
        parts += [text[place : found.start()], found[0]]
        place = found.end()
    parts.append(text[place:])
    ids = vocabulary.marks
    return " ".join(f"<[{ids[part]}]>" if part in ids else in_json(part) for part in parts if part)


def without(texts: Sequence[str], vocabulary: Vocabulary, text: str = ANY) -> str:
    """The `text` in which none of these is spelled out, as far as they are tokens: parsers would take it for
    the token."""
    spelled = [re.escape(one).replace("/", r"\/") for one in texts if one in vocabulary.marks]
    return f"{text} & ~/(.|\\n)*({'|'.join(spelled)})(.|\\n)*/" if spelled else text


def up_to(name: str, mark: str, vocabulary: Vocabulary, *, text: str = "") -> str:
    """A rule of this name for any text, or `text`, up to the first such mark."""
    # If it is a token, it is in no text. Nor may it be in a lazy rule, which is a regular expression.
    lazy = "" if mark in vocabulary.marks else "[lazy]"
    terminal = text or name.upper()
    rule = f"{name}{lazy}: {terminal} {in_grammar(mark, vocabulary)}"
    return rule if text else f"{rule}\n{terminal}: {without([mark], vocabulary)}"


def first_part(text: str, vocabulary: Vocabulary) -> str:
    """The mark that it begins with, else what it has before its first mark."""
    found = vocabulary.mark_pattern.search(text)
    return text if found is None else text[: found.start()] or found[0]
