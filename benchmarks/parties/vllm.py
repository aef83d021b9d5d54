"""vLLM's CPU build, by its offline class. Prompts of decode jobs come from its prefix cache."""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.parties import Job, Prompts, serve

_KV_CACHE_GIB = 3


class VLLM:
    def __init__(self, model_path: str, num_threads: int) -> None:
        cores = sorted(os.sched_getaffinity(0))[:num_threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(_KV_CACHE_GIB)
        from vllm import LLM

        self._llm: Any = LLM(
            model_path,
            dtype="float32",
            max_model_len=2560,
            max_num_seqs=16,
            max_num_batched_tokens=2560,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )

    def compute_prompts(self, job: Job, prompts: Prompts) -> None:
        self._llm.reset_prefix_cache()
        self._generate_s(prompts, 1)

    def decode_s(self, job: Job, prompts: Prompts) -> float:
        """With so many more tokens, less without: what remains is decode alone."""
        return self._generate_s(prompts, 1 + job.num_steps) - self._generate_s(prompts, 1)

    def prefill_s(self, job: Job, prompts: Prompts) -> float:
        return self._generate_s(prompts, 1)

    def _generate_s(self, prompts: Prompts, num_tokens: int) -> float:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        self._llm.generate([{"prompt_token_ids": each} for each in prompts], sampling, use_tqdm=False)
        return time.perf_counter() - began


if __name__ == "__main__":
    serve(VLLM)
