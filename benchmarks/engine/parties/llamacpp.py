"""llama.cpp with the weights of its file, of 4 bits for the default model. A Node program holds the engine.

Its file is the GGUF of the package that the default model comes in.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.engine.jobs import Job, Party, serve

_PROGRAM = Path(__file__).with_name("llamacpp.mjs")


class LlamaCpp(Party):
    """`argv`: model folder, threads, the GGUF, and the folder where node-llama-cpp is installed."""

    def __init__(self, _: str, num_threads: int) -> None:
        gguf, folder = sys.argv[3:5]
        self._node = subprocess.Popen(
            ["node", str(_PROGRAM), gguf, str(num_threads), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def decode_s(self, job: Job) -> float:
        return self._ask(job, job.prompts())

    def prefill_s(self, job: Job, seed: int) -> float:
        return self._ask(job, job.prompts(seed))

    def _ask(self, job: Job, prompts: list[list[int]]) -> float:
        asked = {"job": {"batch": job.batch, "context": job.context, "num_steps": job.num_steps}}
        assert self._node.stdin is not None
        self._node.stdin.write(json.dumps(asked | {"prompts": prompts}) + "\n")
        self._node.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str | float:
        assert self._node.stdout is not None
        answer: str | float = json.loads(self._node.stdout.readline())
        return answer


if __name__ == "__main__":
    serve(LlamaCpp)
