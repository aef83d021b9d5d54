"""Compiles grammars for `GrammarChecker`: a line of JSON in, a line with what is wrong with it out.

It ends with its input, as when the gateway dies.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import msgspec

from flowkv_common.errors import BadRequest
from flowkv_common.grammar import Grammars
from flowkv_common.wire.messages import Grammar

# Beside the tokenizer. Common grammars take 5 MB at most, and a node keeps 64 of them.
MAX_BYTES = 128 * 1024 * 1024


def main(tokenizer_file: Path) -> None:
    grammars = Grammars(tokenizer_file, [])
    with contextlib.suppress(BadRequest):  # each grammar will say so
        grammars.num_mask_bytes  # noqa: B018 - reads the tokenizer
    _bound_memory()
    _answer("")
    for line in sys.stdin.buffer:
        _answer(_complaint(grammars, msgspec.json.decode(line, type=Grammar)))


def _complaint(grammars: Grammars, grammar: Grammar) -> str:
    try:
        matcher = grammars.matcher(grammar)
    except BadRequest as error:
        return error.message[:1000]
    allowed = matcher.compute_bitmask()  # part of a grammar is compiled with its first mask
    if matcher.is_error():
        return f"it is too complex: {matcher.stop_reason()}."
    return "" if any(allowed) else "the model has no tokens for it."


def _bound_memory() -> None:
    """Over the bound an allocation fails, and with it the process."""
    status = Path("/proc/self/statm")
    if status.exists():
        num_pages = int(status.read_text().split()[0])
        limit = num_pages * resource.getpagesize() + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _answer(text: str) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(text) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
