"""Names models by content, without reading all of it: equal on every host that has the same files.

Reads files alone, so that a gateway can tell its own model from others without loading any.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

from flowkv_common.wire.parts import ModelFiles

NUM_SAMPLES = 64  # places per file, evenly spread
SAMPLE_BYTES = 4096


def fingerprint(folder: Path, dtype: str, *, has_weights: bool) -> str:
    """32 hex digits over config, dtype and, if `has_weights`, the weight files (no names, no dates)."""
    digest = _new_digest()
    digest.update((folder / "config.json").read_bytes())
    digest.update(f"\0{dtype}\0{has_weights}".encode())
    if has_weights:
        for file in weight_files(folder):
            _add_samples(digest, file)
    return digest.hexdigest()


def model_files(folder: Path, *, has_weights: bool = True) -> ModelFiles:
    """The digests of what is in the folder; without those of weights if they are not what is served."""
    weights = weight_files(folder) if has_weights else []
    digest = _new_digest()
    for file in weights:
        _add_samples(digest, file)
    return ModelFiles(
        tokenizer=_digest_of(folder / "tokenizer.json"),
        config=_digest_of(folder / "config.json"),
        weights=digest.hexdigest() if weights else "",
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, in a fixed order; safetensors if there are any."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _new_digest() -> blake2b:
    return blake2b(digest_size=16)


def _digest_of(file: Path) -> str:
    """Of the whole file; empty if there is none."""
    if not file.exists():
        return ""
    digest = _new_digest()
    digest.update(file.read_bytes())
    return digest.hexdigest()


def _add_samples(digest: blake2b, path: Path) -> None:
    """The size, and samples from the head (where safetensors keeps names, types and shapes) to the tail."""
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        for sample in range(NUM_SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * sample // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
