"""Traffic that is made up: each shape a pure function of the number of requests and a seed.

All run at about one request per second; `at_rate` brings them to another rate and keeps the shape.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate, count, islice
from pathlib import Path

from flowkv.bench.traces import TOKENS_PER_HASH_ID, Request, read_trace, window

# Median prompt and answer tokens and requests per second of two phases, which cost a simulated node about the
# same time. The spread is of the logarithm of both lengths.
LONG_PROMPTS = (4000, 64, 1.0)
LONG_ANSWERS = (256, 512, 3.0)
PHASE_SPREAD = 0.4
# Of `alternating`: a whole period of requests lasts about a minute near the capacity of eight `a10g`.
ALTERNATING_PERIOD = 240
GIANT_TOKENS = 100_000
BURST_SIZE = 50
# `batchy` is a repetition of so many chats, then a batch, then as many chats again.
BATCH_SIZE = 200
TEMPLATES = 6
OPEN_SESSIONS = 24
# A longer session ends.
LONGEST_SESSION = 24_000

Lengths = tuple[int, int]  # tokens of a prompt and of its answer


def synthetic(num_requests: int, seed: int = 0) -> list[Request]:
    """The shape of a chat service: half of the prompts begin with one of 64 prefixes of 512 to 2,048 tokens.

    Log-normal prompts (median about 1,000 tokens) and answers (150), by a Poisson process.
    """
    draw, arrivals = random.Random(seed), random.Random(seed + 1)
    prefixes = [tuple(64 * i + j for j in range(draw.randint(1, 4))) for i in range(64)]
    requests = []
    arrival_s = 0.0
    for number in range(num_requests):
        num_prompt, num_output = _chat(draw)
        num_ids = -(-num_prompt // TOKENS_PER_HASH_ID)
        prefix = draw.choice(prefixes)[: num_ids - 1] if draw.random() < 0.5 else ()
        own = (64 * (64 + number) + i for i in range(num_ids - len(prefix)))
        requests.append(Request(num_prompt, num_output, (*prefix, *own), arrival_s))
        arrival_s += arrivals.expovariate(1.0)
    return requests


def shifting(num_requests: int, seed: int = 0) -> list[Request]:
    """Long prompts with short answers, then the reverse, then back."""
    phases = [LONG_PROMPTS, *[LONG_ANSWERS] * 3, LONG_PROMPTS]
    return _phases(random.Random(seed), [phases[5 * n // num_requests] for n in range(num_requests)])


def alternating(num_requests: int, seed: int = 0) -> list[Request]:
    """Long prompts for half a minute, then long answers for as long, and so on."""
    period = [LONG_PROMPTS] * (ALTERNATING_PERIOD // 4) + [LONG_ANSWERS] * (ALTERNATING_PERIOD * 3 // 4)
    return _phases(random.Random(seed), [period[n % ALTERNATING_PERIOD] for n in range(num_requests)])


def code(num_requests: int, seed: int = 0) -> list[Request]:
    """Azure's code trace: prompts of about 2,000 tokens, answers of ten, one in six of a hundred; bursty."""
    draw = random.Random(seed)
    lengths = [
        (_lognormal(draw, 1500, 0.76, 8000), _lognormal(draw, draw.choice((80, *[10] * 5)), 0.6, 1000))
        for _ in range(num_requests)
    ]
    return _timed(lengths, (draw.gammavariate(0.25, 4.0) for _ in lengths))


def agents(num_requests: int, seed: int = 0) -> list[Request]:
    """Mooncake's tool and agent trace: sessions on a few templates of 4k to 16k tokens, answers of 180.

    Each call adds 300 to 2,000 tokens to those of the last.
    """
    draw, ids = random.Random(seed), count()
    sizes = [draw.randint(8, 32) for _ in range(TEMPLATES)]
    templates = [tuple(islice(ids, size)) for size in sizes]
    return _sessions(
        num_requests,
        draw,
        ids,
        first=lambda: draw.choice(templates),
        lengths=lambda: (draw.randint(300, 2000), _lognormal(draw, 150, 0.6, 1000)),
        num_calls=5,
    )


def turns(num_requests: int, seed: int = 0) -> list[Request]:
    """Chats of ten turns on average; each turn sends all that was said before again."""
    draw = random.Random(seed)
    return _sessions(
        num_requests,
        draw,
        count(),
        first=lambda: (),
        lengths=lambda: (_lognormal(draw, 200, 0.8, 4000), _lognormal(draw, 200, 0.6, 1000)),
        num_calls=10,
    )


def hot(num_requests: int, seed: int = 0) -> list[Request]:
    """Four of five prompts begin with the same 6,144 tokens."""
    draw, ids = random.Random(seed), count()
    prefix = tuple(islice(ids, 12))
    requests = []
    for request in _timed([_chat(draw) for _ in range(num_requests)], _poisson(draw)):
        shared = prefix if draw.random() < 0.8 else ()
        num_prompt = request.num_prompt_tokens + len(shared) * TOKENS_PER_HASH_ID
        hash_ids = _named(num_prompt, shared, ids)
        requests.append(request._replace(num_prompt_tokens=num_prompt, hash_ids=hash_ids))
    return requests


def bursts(num_requests: int, seed: int = 0) -> list[Request]:
    """Fifty chats at once, then nothing for 50 s."""
    draw = random.Random(seed)
    gaps = (float(BURST_SIZE) if number % BURST_SIZE == 0 else 0.01 for number in count(1))
    return _timed([_chat(draw) for _ in range(num_requests)], gaps)


def giants(num_requests: int, seed: int = 0) -> list[Request]:
    """Chats, and among each hundred one prompt of 100,000 tokens."""
    draw = random.Random(seed)
    places = {n + draw.randrange(100) for n in range(0, num_requests, 100)}
    chats = [_chat(draw) for _ in range(num_requests)]
    lengths = [(GIANT_TOKENS, chat[1]) if n in places else chat for n, chat in enumerate(chats)]
    return _timed(lengths, _poisson(draw))


def documents(num_requests: int, seed: int = 0) -> list[Request]:
    """Three questions on each document of about 10,000 tokens, answers of 300: few fill a decode node."""
    draw, ids = random.Random(seed), count()
    return _sessions(
        num_requests,
        draw,
        ids,
        first=lambda: tuple(islice(ids, -(-_lognormal(draw, 10_000, 0.9, 60_000) // TOKENS_PER_HASH_ID))),
        lengths=lambda: (draw.randint(20, 200), _lognormal(draw, 300, 0.6, 1000)),
        num_calls=3,
    )


def ramp(num_requests: int, seed: int = 0) -> list[Request]:
    """A compressed day of chats: the rate climbs to twice the first one, and falls again."""
    draw = random.Random(seed)
    middle = num_requests / 2
    gaps = (draw.expovariate(2.0 - abs(n - middle) / middle) for n in count())
    return _timed([_chat(draw) for _ in range(num_requests)], gaps)


def batchy(num_requests: int, seed: int = 0) -> list[Request]:
    """Steady chats; at the third of each 600 requests a batch of 200 comes within two seconds."""
    draw = random.Random(seed)
    gaps = (0.01 if n // BATCH_SIZE % 3 == 1 else draw.expovariate(1.0) for n in count())
    return _timed([_chat(draw) for _ in range(num_requests)], gaps)


def bimodal(num_requests: int, seed: int = 0) -> list[Request]:
    """Chats whose answers have 10 tokens or 1,500, as many of each."""
    draw = random.Random(seed)
    lengths = [(_chat(draw)[0], draw.choice((10, 1500))) for _ in range(num_requests)]
    return _timed(lengths, _poisson(draw))


MADE_UP: dict[str, Callable[[int, int], list[Request]]] = {
    make.__name__: make
    for make in (
        synthetic, shifting, alternating, code, agents, turns, hot, bursts, giants,
        documents, ramp, batchy, bimodal,
    )
}  # fmt: skip
TRACE_HELP = f"Mooncake .jsonl, Azure .csv, or one of {', '.join(MADE_UP)}"


def add_traffic(parser: argparse.ArgumentParser, num_requests: int) -> None:
    """The options of a benchmark that sends requests of a trace."""
    parser.add_argument("--trace", default="synthetic", help=TRACE_HELP)
    parser.add_argument("--requests", type=int, default=num_requests, help="a window of the trace")
    parser.add_argument("--seed", type=int, default=0)


def read_window(trace: str, num_requests: int, seed: int) -> list[Request]:
    """Requests of a file or, with the seed, of a generator of `MADE_UP`. Raises as `read_trace`."""
    if trace in MADE_UP:
        return MADE_UP[trace](num_requests, seed)
    return window(read_trace(Path(trace)), num_requests, seed)


def _lognormal(draw: random.Random, median: float, spread: float, longest: int) -> int:
    return min(longest, max(1, round(median * draw.lognormvariate(0.0, spread))))


def _chat(draw: random.Random) -> Lengths:
    num_prompt = min(16_000, max(1, round(draw.lognormvariate(6.9, 0.9))))
    return num_prompt, min(1_000, max(1, round(draw.lognormvariate(5.0, 0.8))))


def _poisson(draw: random.Random) -> Iterator[float]:
    return iter(partial(draw.expovariate, 1.0), None)


def _timed(lengths: Iterable[Lengths], gaps: Iterable[float]) -> list[Request]:
    """Requests without shared prefixes; each gap is the time to the next one."""
    times = accumulate(gaps, initial=0.0)
    return [Request(*both, (), at) for both, at in zip(lengths, times, strict=False)]


def _phases(draw: random.Random, phases: Iterable[tuple[int, int, float]]) -> list[Request]:
    requests = []
    arrival_s, ids = 0.0, count()
    for prompt_tokens, output_tokens, rate in phases:
        num_prompt = max(1, round(prompt_tokens * draw.lognormvariate(0, PHASE_SPREAD)))
        num_output = max(1, round(output_tokens * draw.lognormvariate(0, PHASE_SPREAD)))
        requests.append(Request(num_prompt, num_output, _named(num_prompt, (), ids), arrival_s))
        arrival_s += draw.expovariate(rate)
    return requests


def _sessions(
    num_requests: int,
    draw: random.Random,
    ids: Iterator[int],
    first: Callable[[], tuple[int, ...]],
    lengths: Callable[[], Lengths],
    num_calls: int,
) -> list[Request]:
    """`OPEN_SESSIONS` at a time, each of `num_calls` on average, go on in random order by a Poisson process.

    A session begins with the tokens that `first` names. A call appends a prompt and an answer of `lengths`.
    """

    def opened() -> tuple[int, tuple[int, ...]]:
        named = first()
        return len(named) * TOKENS_PER_HASH_ID, named

    sessions = [opened() for _ in range(OPEN_SESSIONS)]
    requests = []
    for arrival_s in islice(accumulate(_poisson(draw), initial=0.0), num_requests):
        place = draw.randrange(OPEN_SESSIONS)
        num_before, named = sessions[place]
        num_new, num_output = lengths()
        num_prompt = num_before + num_new
        hash_ids = _named(num_prompt, named, ids)
        requests.append(Request(num_prompt, num_output, hash_ids, arrival_s))
        whole = hash_ids[: num_prompt // TOKENS_PER_HASH_ID]
        goes_on = draw.random() * num_calls > 1 and num_prompt + num_output < LONGEST_SESSION
        sessions[place] = (num_prompt + num_output, whole) if goes_on else opened()
    return requests


def _named(num_prompt: int, prefix: tuple[int, ...], ids: Iterator[int]) -> tuple[int, ...]:
    """The ids of a prompt that begins with those of `prefix`; the rest is its own."""
    return (*prefix, *islice(ids, -(-num_prompt // TOKENS_PER_HASH_ID) - len(prefix)))
