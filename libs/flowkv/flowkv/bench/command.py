"""Measure any OpenAI server under load, in figures as vLLM defines them: a table, JSON, a picture.

  flowkv bench --rate 2 --seconds 60                    an open loop: requests come when they come
  flowkv bench --clients 8 --requests 200               a closed loop: 8 clients, one request each at a time
  flowkv bench --trace azure.csv --rate-factor 0.5      a trace of Mooncake (.jsonl) or Azure (.csv)
  flowkv bench --url http://host:8000 --chat --html run.html    another server, with texts as prompts

Prompts are random token ids, or with --chat random words, as many. All answers have the full length where
the server knows `ignore_eos`. One that refuses it gets OpenAI's fields alone by --plain; then answers may end
sooner.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from flowkv.api import add_api_options, find_url, first_model, headers_with
from flowkv.bench.figures import Figures, figures_of
from flowkv.bench.load import (
    Dialect,
    Lengths,
    Outcome,
    Phase,
    arrivals_of,
    closed_loop,
    completion,
    drive,
    poisson,
)
from flowkv.bench.page import page, rows
from flowkv.bench.traces import Targets, read_trace
from flowkv.terminal import console, make_parser
from flowkv_common.errors import CannotStart

# Fields of `completion` that vLLM and we know. A strict server refuses what it does not know.
NOT_OPENAIS = ("ignore_eos", "return_token_ids")
# About one token each in every tokenizer; equal ids give equal words, so that prefixes stay equal.
WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
)


def main(argv: list[str]) -> int:
    options = _options(argv)
    url = asyncio.run(find_url(options))
    options.model = options.model or first_model(url, options.key)
    targets = Targets(options.ttft_s, options.tpot_s)
    dialect = _dialect(options)
    outcomes = asyncio.run(_send(url, options, dialect))
    if not outcomes:
        raise CannotStart("no request comes in that time: raise --rate or --seconds")
    figures = figures_of(outcomes, targets)
    conditions = {name: value for name, value in vars(options).items() if name not in ("key", "nats")}
    conditions |= {"url": url, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    if options.json:
        options.json.write_bytes(_json(conditions, figures, outcomes))
    if options.html:
        told = ", ".join(
            f"{name} {value}" for name, value in conditions.items() if value not in (None, "", False)
        )
        options.html.write_text(page(f"{options.model} at {url}", told, figures, outcomes))
    for line in _table(figures, targets):
        console().print(line)
    return 0 if figures.num_complete == figures.num_sent else 1


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("bench", __doc__)
    add_api_options(parser)
    parser.add_argument("--model", default="", help="the first that the API lists without")
    parser.add_argument("--chat", action="store_true", help="by /v1/chat/completions, with texts")
    parser.add_argument(
        "--plain", action="store_true", help="OpenAI's fields alone, for a server that is strict"
    )
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--rate", type=float, default=1.0, help="requests per second, on average; default 1")
    load.add_argument("--clients", type=int, default=0, help="a closed loop of so many clients")
    load.add_argument("--trace", type=Path, help="lengths and times of a trace")
    parser.add_argument("--seconds", type=float, default=30.0, help="of an open loop; default 30")
    parser.add_argument("--requests", type=int, default=100, help="of a closed loop; default 100")
    parser.add_argument("--rate-factor", type=float, default=1.0, help="how much faster than the trace")
    parser.add_argument("--prompt-tokens", type=int, default=200, help="default 200")
    parser.add_argument("--max-tokens", type=int, default=50, help="default 50")
    parser.add_argument(
        "--spread", type=float, default=0.5, help="share by which lengths differ; default 0.5"
    )
    parser.add_argument("--ttft-s", type=float, default=5.0, help="target of good requests; default 5")
    parser.add_argument("--tpot-s", type=float, default=0.2, help="target of good requests; default 0.2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="conditions, figures and each request")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a picture of the distributions")
    return parser.parse_args(argv)


def _dialect(options: argparse.Namespace) -> Dialect:
    """`stream_options` and `model` are asked of every server; ours gives token ids besides."""
    shared = {"model": options.model, "stream_options": {"include_usage": True}}

    def complete(prompt_ids: Sequence[int], max_tokens: int) -> dict[str, Any]:
        body = {**completion(prompt_ids, max_tokens), **shared}
        return {name: value for name, value in body.items() if not (options.plain and name in NOT_OPENAIS)}

    def chat(prompt_ids: Sequence[int], max_tokens: int) -> dict[str, Any]:
        body = complete((), max_tokens)
        del body["prompt"]
        words = " ".join(WORDS[token_id % len(WORDS)] for token_id in prompt_ids)
        return {**body, "messages": [{"role": "user", "content": words}]}

    path = "/v1/chat/completions" if options.chat else "/v1/completions"
    return Dialect(path, headers_with(options.key), chat if options.chat else complete)


async def _send(url: str, options: argparse.Namespace, dialect: Dialect) -> list[Outcome]:
    rng = random.Random(options.seed)
    lengths = Lengths(options.prompt_tokens, options.max_tokens, options.spread)
    if options.clients:
        turns = range(options.requests)
        return await closed_loop(url, rng, lengths, options.clients, turns, dialect=dialect)
    if options.trace:
        arrivals = arrivals_of(read_trace(options.trace), options.rate_factor)
    else:
        arrivals = list(poisson([Phase("load", options.rate, options.seconds, lengths)], rng))
    return await drive(url, arrivals, seed=options.seed, dialect=dialect)


def _json(conditions: dict[str, Any], figures: Figures, outcomes: Sequence[Outcome]) -> bytes:
    requests = [
        {
            "sent_s": round(one.sent_s, 4),
            "status": one.status,
            "num_output_tokens": one.num_output_tokens,
            "event_times_s": [round(at_s, 4) for at_s in one.event_times_s],
            "error": one.error,
        }
        for one in outcomes
    ]
    report = {"conditions": conditions, "figures": figures, "requests": requests}
    return msgspec.json.format(msgspec.json.encode(report, enc_hook=str), indent=1)


def _table(figures: Figures, targets: Targets) -> list[Any]:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("ms")
    for name in ("mean", "median", "p90", "p99", "max"):
        table.add_column(name, justify="right")
    for name, one in rows(figures):
        table.add_row(name, *(f"{value:.1f}" for value in (one.mean, one.median, one.p90, one.p99, one.max)))
    color = "green" if figures.num_complete == figures.num_sent else "red"
    lines: list[Any] = [
        f"[{color}]{figures.num_complete} of {figures.num_sent}[/] requests complete "
        f"in {figures.duration_s:.1f} s",
        f"[bold]{figures.requests_per_s:.3f}[/] requests/s; [bold]{figures.good_requests_per_s:.3f}[/] good "
        f"ones: TTFT within {targets.ttft_s:g} s, TPOT within {targets.tpot_s:g} s",
        f"[bold]{figures.output_tokens_per_s:.1f}[/] output tokens/s, "
        f"{figures.input_tokens_per_s:.1f} input tokens/s",
        table,
    ]
    lines += [f"[red]{count} x[/] {escape(error)}" for error, count in figures.errors.items()]
    if any(name in error for error in figures.errors for name in NOT_OPENAIS):
        lines.append("[yellow]this server is strict: try --plain[/]")
    if figures.client_late_ms.p99 > figures.ttft_ms.median / 10:
        lines.append(
            f"[yellow]this client was late itself, by {figures.client_late_ms.p99:.1f} ms in the p99[/]"
        )
    return lines
