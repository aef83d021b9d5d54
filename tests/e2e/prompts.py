"""Prompts for identity tests: lengths around block and chunk borders, shared prefixes, several at once."""

from __future__ import annotations

import random

BLOCK = 16
CHUNK = 512  # the default token budget of a prefill node

# 3 to 3,000 tokens; the borders of blocks and chunks, and both sides of each.
LENGTHS = [3, 4, 5, 7, 8, 9, 20, 24, 40, 50, 80, 100]
LENGTHS += [length for border in (16, 32, 64, 128) for length in (border - 1, border, border + 1)]
LENGTHS += [200, 255, 256, 257, 300, 511, 512, 513, 1024, 1025, 3000]


def make_prompts(vocab_size: int, longest: int = 3000, seed: int = 7) -> list[list[int]]:
    """At least 40 prompts of at most `longest` random tokens; the last few share a prefix."""
    rng = random.Random(seed)
    # Special tokens stand at the start of the vocabulary; random text has none.
    lengths = [min(length, longest) for length in LENGTHS]
    prompts = [[rng.randrange(20, vocab_size) for _ in range(length)] for length in lengths]
    shared = prompts[lengths.index(min(300, longest))]
    for cut in (1, BLOCK, 2 * BLOCK, 5 * BLOCK + 3, len(shared) - 1, len(shared)):
        prompts.append(shared[:cut] + [rng.randrange(20, vocab_size) for _ in range(9)])
    return prompts
