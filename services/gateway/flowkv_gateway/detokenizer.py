"""Tokens to text while they arrive: linear in the output, and no character is ever cut in two."""

from __future__ import annotations

import codecs

from flowkv_gateway.vocabulary import Vocabulary


class Detokenizer:
    """The text of one answer. `push` returns what the token completes; `finish` what can't be completed."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._vocabulary.token_bytes(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)
