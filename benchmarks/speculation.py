"""Guessed tokens: what they gain where an answer copies, and what they cost where it does not.

Two nodes with the same cores, one guesses; the same prompts go to one after the other, in turn, and the other
one idles. Prompts are plain text, with an example, that the small default model goes on with as meant: a text
again, code with a name changed, an answer in the words of a document, and a story.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import time
from collections.abc import Sequence
from typing import Any

import httpx

from benchmarks import BenchmarkFailed
from benchmarks.clusters import UNBOUNDED, start_cluster
from benchmarks.report import Report, make_parser, spread
from flowkv.local_cluster import Cluster

TIMEOUT_S = 600.0
COLUMNS = ("task", "batch", "off_tokens_per_s", "on_tokens_per_s", "is_times", "drafted", "accepted", "same")

TEXT = (
    "The {0} harbour of the old town was built in the {1} century. Ships brought salt, timber and wool, and "
    "took away glass, rope and dried fish. A wall of grey stone kept the waves out, and at its end stood a "
    "lighthouse whose keeper was paid in bread. When the river changed its course the harbour filled with "
    "sand, the merchants left for the {2} coast, and only the fishermen stayed. Today the lighthouse is a "
    "museum with three rooms: one for the ships, one for the keeper, and one for the sand."
)
CODE = (
    "def total_{0}(rows, limit):\n"
    '    """The sum of the {1} of all rows up to the limit."""\n'
    "    total = 0\n"
    "    for row in rows:\n"
    "        if row.{1} > limit:\n"
    "            continue\n"
    "        if row.is_deleted:\n"
    "            raise ValueError('a deleted row in total_{0}')\n"
    "        total += row.{1}\n"
    "    return total\n"
)
NAMES = ("north", "south", "upper", "lower", "eastern", "western", "inner", "outer")
CENTURIES = ("tenth", "twelfth", "ninth", "eighth", "sixth", "seventh", "fifth", "eleventh")


def rewrite(number: int) -> str:
    before, text = a_text(number + 3), a_text(number)
    return f"Text: {before}\n\nText, typed again: {before}\n\nText: {text}\n\nText, typed again:"


def edit(number: int) -> str:
    name = NAMES[number % len(NAMES)]
    before = CODE.format(name, "price")
    after = CODE.format(name, "weight")
    return f"# price\n{before}\n# weight\n{after}\n# height\n"


def answer(number: int) -> str:
    before, text = a_text(number + 3), a_text(number)
    quotation = ". ".join(before.split(". ")[1:3])
    return (
        f"Document: {before}\nQuestion: What did the ships bring, and where was the lighthouse?\n"
        f"Answer, in the words of the document: {quotation}.\n\n"
        f"Document: {text}\nQuestion: What happened to the harbour, and what is the lighthouse today?\n"
        "Answer, in the words of the document:"
    )


def story(number: int) -> str:
    name, century = NAMES[number % len(NAMES)], CENTURIES[number % len(CENTURIES)]
    return f"Once upon a time, in the {century} year of the {name} queen,"


def a_text(number: int) -> str:
    return TEXT.format(NAMES[number % 8], CENTURIES[number // 2 % 8], NAMES[(number + 3) % 8])


# The prompts, and the temperature. A greedy story of a small model would repeat itself, and so copy.
TASKS = {"rewrite": (rewrite, 0.0), "edit": (edit, 0.0), "answer": (answer, 0.0), "story": (story, 1.0)}


def main(argv: Sequence[str]) -> int:
    parser = make_parser("speculation", __doc__, model=True)
    parser.add_argument("--pairs", type=int, default=5, help="rounds that count, after one that warms up")
    parser.add_argument("--threads", type=int, default=2, help="of each node")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="answers at a time")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    options = parser.parse_args(argv)
    report = Report(options)
    with contextlib.ExitStack() as opened:
        clusters = [
            opened.enter_context(
                start_cluster(
                    options.model,
                    {"mixed": 1},
                    settings={**UNBOUNDED, "num_threads": options.threads, "speculation": speculation},
                )
            ).cluster
            for speculation in ("off", "ngram")
        ]
        asyncio.run(measure(clusters, options, report))
    return report.finish(*COLUMNS)


async def measure(clusters: list[Cluster], options: argparse.Namespace, report: Report) -> None:
    off, on = clusters
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as http:
        for task in options.tasks:
            for batch in options.batches:
                rates: dict[str, list[float]] = {"off": [], "on": []}
                num_same, before = 0, await counts(http, on)
                for number in range(options.pairs + 1):
                    texts = {}
                    for name, cluster in (("off", off), ("on", on)):
                        texts[name], rate = await ask_all(http, cluster, task, batch, number, options.tokens)
                        if number:
                            rates[name].append(rate)
                    num_same += sum(a == b for a, b in zip(*texts.values(), strict=True))
                drafted, accepted = (b - a for a, b in zip(before, await counts(http, on), strict=True))
                report.add_row(
                    task=task,
                    batch=batch,
                    off_tokens_per_s=spread(rates["off"]),
                    on_tokens_per_s=spread(rates["on"]),
                    is_times=spread(b / a for a, b in zip(rates["off"], rates["on"], strict=True)),
                    drafted=drafted,
                    accepted=accepted,
                    same=f"{num_same}/{(options.pairs + 1) * batch}",
                )
                report.say(f"{task} {batch} is done")


async def ask_all(
    http: httpx.AsyncClient, cluster: Cluster, task: str, batch: int, seed: int, num_tokens: int
) -> tuple[list[str], float]:
    """Texts, and tokens per second of all together, with their prompts. Raises BenchmarkFailed."""
    prompt, temperature = TASKS[task]

    async def ask(number: int) -> str:
        body: dict[str, Any] = {
            "prompt": prompt(number),
            "temperature": temperature,
            "seed": seed,
            "max_tokens": num_tokens,
            "ignore_eos": True,
        }
        answer = await http.post(f"{cluster.url}/v1/completions", json=body)
        if answer.is_error or answer.json()["usage"]["completion_tokens"] != num_tokens:
            raise BenchmarkFailed(f"an answer is not whole: {answer.text[:200]}")
        text: str = answer.json()["choices"][0]["text"]
        return text

    began = time.perf_counter()
    texts = await asyncio.gather(*map(ask, range(batch)))
    return texts, batch * num_tokens / (time.perf_counter() - began)


async def counts(http: httpx.AsyncClient, cluster: Cluster) -> list[int]:
    """Tokens guessed so far, and right ones."""
    metrics = (await http.get(cluster.metrics_urls()["mixed-0"])).text
    names = ("draft", "accepted")
    pattern = r"^vllm:spec_decode_num_{}_tokens_total\S* (\S+)$"
    found = [re.search(pattern.format(name), metrics, re.MULTILINE) for name in names]
    return [int(float(each[1])) if each else 0 for each in found]
