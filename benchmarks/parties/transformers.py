"""`transformers` generate, with its own cache: contiguous, and of the right length from the beginning."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch
from transformers import DynamicCache

from benchmarks.parties import Job, Prompts, serve
from tests.oracle import load_reference


class Transformers:
    def __init__(self, model_path: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._model = load_reference(Path(model_path))
        self._model.generation_config.eos_token_id = None
        self._cache = DynamicCache()

    @torch.inference_mode()
    def compute_prompts(self, job: Job, prompts: Prompts) -> None:
        self._cache = DynamicCache()
        ids = torch.tensor(prompts)[:, :-1]
        self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def decode_s(self, job: Job, prompts: Prompts) -> float:
        return self._generate_s(prompts, job.num_steps, copy.deepcopy(self._cache))

    def prefill_s(self, job: Job, prompts: Prompts) -> float:
        return self._generate_s(prompts, 1, DynamicCache())

    def _generate_s(self, prompts: Prompts, num_tokens: int, cache: DynamicCache) -> float:
        ids = torch.tensor(prompts)
        began = time.perf_counter()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=num_tokens,
        )
        return time.perf_counter() - began


if __name__ == "__main__":
    serve(Transformers)
