"""`transformers` generate, with its own cache: contiguous, and of the right length from the beginning."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.engine.jobs import Job, Party, serve


class Transformers(Party):
    def __init__(self, model_path: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        self._model.generation_config.eos_token_id = None
        self._computed: tuple[Job, DynamicCache] | None = None

    def decode_s(self, job: Job) -> float:
        prompts = torch.tensor(job.prompts())
        if self._computed is None or self._computed[0] != job:
            self._computed = job, self._prefill(prompts[:, :-1])
        cache = copy.deepcopy(self._computed[1])
        began = time.perf_counter()
        self._generate(prompts, job.num_steps, cache)
        return time.perf_counter() - began

    def prefill_s(self, job: Job, seed: int) -> float:
        prompts = torch.tensor(job.prompts(seed))
        began = time.perf_counter()
        self._generate(prompts, 1, DynamicCache())
        return time.perf_counter() - began

    @torch.inference_mode()
    def _prefill(self, prompts: torch.Tensor) -> DynamicCache:
        cache = DynamicCache()
        self._model(prompts, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def _generate(self, prompts: torch.Tensor, num_tokens: int, cache: DynamicCache) -> None:
        self._model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=num_tokens,
        )


if __name__ == "__main__":
    serve(Transformers)
