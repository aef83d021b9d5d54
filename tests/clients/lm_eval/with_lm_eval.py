"""lm-evaluation-harness: what it finds over HTTP is what it finds with the same weights in `transformers`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from tests.clients.conftest import Served

pytestmark = pytest.mark.client("lm-eval")

HERE = Path(__file__).parent
TASKS = ["questions", "texts"]  # log likelihoods of choices, and of whole texts
METRICS = [("questions", "acc,none"), ("questions", "acc_norm,none"), ("texts", "word_perplexity,none")]


def evaluated(backend: str, num_docs: int | None = None, **model_args: Any) -> Any:
    """All documents of the tasks, or the first ones."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(HERE)
        return lm_eval.simple_evaluate(
            backend,
            model_args=model_args,
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(HERE), include_defaults=False),
            batch_size=8,
            limit=num_docs,
            bootstrap_iters=0,
        )


@pytest.fixture(scope="session")
def model_path() -> str:
    """The folder of the model that is served."""
    return os.environ["FLOWKV_CLIENTS_MODEL_PATH"]


@pytest.fixture(scope="session")
def expected(model_path: str) -> Any:
    return evaluated("hf", pretrained=model_path, dtype="float32", device="cpu")


def log_likelihoods(found: Any, task: str) -> list[float]:
    """Of each choice of each question, or of each text."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    told = [one for sample in samples for one in sample["filtered_resps"]]
    return [one[0] if isinstance(one, (tuple, list)) else one for one in told]


CASES: dict[str, dict[str, Any]] = {
    "prompts of token ids": {},
    "prompts of text": {"tokenized_requests": False, "num_docs": 10},
    "the tokenizer of the server": {"tokenizer_backend": "remote", "num_docs": 10},
}


@pytest.mark.parametrize("case", CASES)
def test_(case: str, model: Served, model_path: str, expected: Any) -> None:
    """Eight prompts in a request, two requests at a time."""
    args = {"tokenizer_backend": "huggingface", "tokenizer": model_path, "num_concurrent": 2, **CASES[case]}
    if args["tokenizer_backend"] == "remote":
        del args["tokenizer"]
    found = evaluated("local-completions", base_url=f"{model.url}/completions", model=model.model, **args)
    for task in TASKS:
        ours, theirs = log_likelihoods(found, task), log_likelihoods(expected, task)
        off = max(abs(one - other) for one, other in zip(ours, theirs, strict=False))
        print(f"{task}: {len(ours)} log likelihoods, off by {off:.1e} at most")
        assert off < 1e-3
    if "num_docs" not in CASES[case]:
        for task, metric in METRICS:
            one, other = found["results"][task][metric], expected["results"][task][metric]
            print(f"{metric}: {one}, with transformers {other}")
            assert one == pytest.approx(other, rel=1e-4)
