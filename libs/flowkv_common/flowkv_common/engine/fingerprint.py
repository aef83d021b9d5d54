"""Names weights by content, without reading all of them: equal on every host that has the same model."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

NUM_SAMPLES = 64  # places per file, evenly spread
SAMPLE_BYTES = 4096


def fingerprint(folder: Path, dtype: str, *, has_weights: bool) -> str:
    """32 hex digits over config, dtype and, if `has_weights`, the weight files (no names, no dates)."""
    digest = blake2b(digest_size=16)
    digest.update((folder / "config.json").read_bytes())
    digest.update(f"\0{dtype}\0{has_weights}".encode())
    if has_weights:
        for file in weight_files(folder):
            _add_file(digest, file)
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, in a fixed order; safetensors if there are any."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _add_file(digest: blake2b, path: Path) -> None:
    """The size, and samples from the head (where safetensors keeps names, types and shapes) to the tail."""
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        for sample in range(NUM_SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * sample // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
