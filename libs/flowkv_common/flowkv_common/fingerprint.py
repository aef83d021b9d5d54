"""Names by content: of models, and of the blocks of their KV caches.

A model's is made without reading all of its weights, and is equal on every host that has the same files. Only
files are read, so that a gateway can tell its own model from others without loading any.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from flowkv_common.errors import CannotStart
from flowkv_common.wire.messages import ModelFiles

NUM_SAMPLES = 64  # places per file, evenly spread
SAMPLE_BYTES = 4096


def fingerprint(
    folder: Path, dtype: str, *, has_weights: bool, overrides: str = "", max_model_len: int = 0
) -> str:
    """32 hex digits over config, dtype and, if `has_weights`, the weight files (no names, no dates).

    `overrides` and `max_model_len`: what counts instead of the config, if anything.
    """
    digest = blake2b((folder / "config.json").read_bytes(), digest_size=16)
    digest.update(f"\0{dtype}\0{has_weights}".encode())
    if overrides or max_model_len:
        digest.update(f"\0{overrides}\0{max_model_len}".encode())
    if has_weights:
        for file in weight_files(folder):
            _add_samples(digest, file)
    return digest.hexdigest()


def model_files(folder: Path, *, has_weights: bool = True) -> ModelFiles:
    """The digests of what is in the folder; without those of weights if they are not what is served.

    A folder in which some of the weight files are missing counts as one without weights. Raises `CannotStart`
    as `weight_files`.
    """
    weights = weight_files(folder) if has_weights else []
    if not all(file.is_file() for file in weights):
        weights = []
    tokenizer, config = (
        blake2b(file.read_bytes(), digest_size=16).hexdigest() if file.exists() else ""
        for file in (folder / "tokenizer.json", folder / "config.json")
    )
    return ModelFiles(tokenizer=tokenizer, config=config, weights=sampled_digest(*weights) if weights else "")


def sampled_digest(*files: Path) -> str:
    """32 hex digits over the files' sizes and samples of them."""
    digest = blake2b(digest_size=16)
    for file in files:
        _add_samples(digest, file)
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files that `transformers` reads weights from, in a fixed order; none if there are none.

    One whole file, or all the shards that an index names, whether they are there or not: other files in the
    folder hold no weights of the model. Raises `CannotStart` if the index can't be read.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                names = json.loads(index.read_bytes())["weight_map"].values()
                return sorted({folder / name for name in names})
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise CannotStart(f"{index} is no index of weights: {error!r}") from error
    return []


def _add_samples(digest: blake2b, path: Path) -> None:
    """The size, and samples from the head (where safetensors keeps names, types and shapes) to the tail."""
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        for sample in range(NUM_SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * sample // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))


def block_hashes(
    fingerprint: str, token_ids: Sequence[int], block_size: int, known: Sequence[str] = ()
) -> list[str]:
    """Hashes of the *full* blocks of `token_ids`, each chained to the one before (32 hex digits each).

    The chain starts at the model's fingerprint, so caches of different weights never meet. `known` are the
    first of them, if the caller has those already.
    """
    hashes = list(known)
    for end in range((len(hashes) + 1) * block_size, len(token_ids) + 1, block_size):
        parent = hashes[-1] if hashes else None
        hashes.append(chained_hash(fingerprint, parent, token_ids[end - block_size : end]))
    return hashes


def chained_hash(fingerprint: str, parent: str | None, block: Sequence[int]) -> str:
    """The hash of one full block behind the block of hash `parent`, or of a first block."""
    digest = blake2b(fingerprint.encode() if parent is None else bytes.fromhex(parent), digest_size=16)
    digest.update(array("I", block).tobytes())
    return digest.hexdigest()
