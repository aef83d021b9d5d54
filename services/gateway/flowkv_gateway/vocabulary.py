"""The bytes behind each token id, for byte-level BPE and for sentencepiece-style vocabularies."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_KNOWN_DECODERS = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class Vocabulary:
    """Token ids to bytes. Ids that the tokenizer lacks (padding of the embedding) have no bytes."""

    def __init__(self, token_bytes: Mapping[int, bytes], special_ids: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._special_ids = special_ids

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
        return cls({token_id: to_bytes(token) for token, token_id in vocab.items()}, special)

    @cached_property
    def special_texts(self) -> frozenset[str]:
        return frozenset(map(self.token_text, self._special_ids))

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

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


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's way to write any byte as a printable character: printable Latin-1 stands for itself."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return alphabet


_ALPHABET = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:  # an added token: written as it is
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace("\u2581", " ").encode()
