"""Runs packed batches: a model over its pool, its check, and the thread on which a node's steps run."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowkv_common import __version__
from flowkv_common.wire.messages import LayerKV, SamplingParams, TokenLogprob
from flowkv_engine.engine.attention import make_attention
from flowkv_engine.engine.batch import PackedBatch, PromptRows, Sequence, WorkItem, pack
from flowkv_engine.engine.dry_run import UnsupportedModel, quiet
from flowkv_engine.engine.forward import IMPLEMENTATION, make_forward
from flowkv_engine.engine.grammar import Constraints
from flowkv_engine.engine.model import LoadedModel
from flowkv_engine.engine.sampler import Sampled, logprobs, sample

if TYPE_CHECKING:
    from flowkv_engine.engine.gpu.forward import GraphedSteps

CLOSE_TIMEOUT_S = 5.0

PROMPT_LENS = (9, 6)  # tokens of the prompts that are compared; the last of each is a step by itself
# Logits may differ from the model's own by 64 units of rounding, as a share of their spread: 3 % in float32,
# 50 % in bfloat16. Rounding costs up to 35 units; a wrong position, mask or neighbour costs 20 % or more.
TOLERANCE = 64.0
MOST_ERROR = 0.5  # also where KV is e4m3: that alone costs up to 28 %, of random models
LEAST_EPS = 5e-4  # a GPU may multiply float32 with 11 bits

# Logits of prompts that are there at a time: 16 MB in float32, as of a large batch that decodes.
MAX_PROMPT_LOGITS = 2**22


class Result(NamedTuple):
    """What a step gives: per item of the batch its new token, or None if its last token was not reached.

    `prompt_logprobs`: by a work item's place, of the tokens of its `PromptRows`.
    """

    sampled: list[Sampled | None]
    prompt_logprobs: dict[int, list[TokenLogprob]] = {}


class DeviceLost(Exception):
    """The device computes nothing more for this process: after a CUDA error every further call fails."""


class Runner:
    """A model, a KV pool and an attention backend. One step at a time, on any thread."""

    def __init__(
        self,
        model: LoadedModel,
        pool: SequenceOf[Tensor],
        *,
        attention: str = "torch",
        max_num_seqs: int = 64,
        token_budget: int = 512,
    ) -> None:
        """`pool`: as `layer_views` has it, on the model's device.

        Computes two short prompts, in the first blocks of the pool: kernels are compiled (half a minute, once
        per machine), and the logits are compared. On a GPU records graphs for steps of up to `max_num_seqs`
        sequences and `token_budget` tokens. `attention`: "torch", "cpu", "triton", or "auto" for the fastest
        that works here. Raises `ValueError` if the pool is not of this model, or the backend is unknown or
        can't run, and `UnsupportedModel` if logits differ from those of the model's own forward pass.
        """
        writers = model.writers
        has = [LayerKV(layer.shape[3], layer.shape[4], layer.shape[1]) for layer in pool]
        if has != (wants := [model.layers[number].kv for number in writers]):
            raise ValueError(f"a pool of {has} is not for {model.card.name}, which needs {wants}")
        # A layer that reads what another has written is given the same keys, and writes them once more.
        layers = [pool[writers.index(layer.writer)] for layer in model.layers]
        self.attention = make_attention(attention, layers)
        self._eos_token_ids = model.card.eos_token_ids
        self._max_prompt_rows = max(1, MAX_PROMPT_LOGITS // model.card.vocab_size)
        self._constraints = Constraints(model.grammars, model.card.vocab_size, model.card.eos_token_ids)
        self._device = pool[0].device
        self._graphs: GraphedSteps | None = None
        with _current(self._device):
            check = SelfCheck(model, pool)
        self.forward = make_forward(model.module, self.attention, model.spans)
        cache_dir = os.environ.get("NUMBA_CACHE_DIR") if self.attention.name == "cpu" else None
        sources = source_stamp(Path(__file__).with_name("cpu"))
        kernels = f"{__version__}-{sources}-{model.card.fingerprint}-{pool[0].dtype}"
        with torch.inference_mode(), _current(self._device):
            with compiling_alone(Path(cache_dir), kernels) if cache_dir else contextlib.nullcontext():
                check.compare(self._logits)
            if self._device.type == "cuda":
                # torch's CUDA build brings Triton.
                from flowkv_engine.engine.gpu.forward import GraphedSteps, TritonFlatForward, cuda_recorder

                if isinstance(self.forward, TritonFlatForward) and self.forward.can_be_recorded:
                    num_blocks, block_size = len(pool[0]), pool[0].shape[2]
                    self._graphs = GraphedSteps(
                        self.forward,
                        max_num_seqs=max_num_seqs,
                        token_budget=token_budget,
                        max_num_blocks=min(num_blocks, -(-model.card.max_model_len // block_size)),
                        record=cuda_recorder(),
                    )

    @torch.inference_mode()
    def run(self, batch: PackedBatch) -> Result:
        """Computes the batch, samples, and finds the log probabilities that prompts ask for.

        Raises `FloatingPointError` if the model gives logits that are not finite, and `DeviceLost`.
        """
        try:
            with _current(self._device):
                inputs = [input for input in batch.samples if input is not None]
                masking = self._constraints.begin(inputs)
                pieces = [piece for rows in batch.prompt_rows for piece in rows.split(self._max_prompt_rows)]
                further = self._logits_in_pieces(batch, pieces) if pieces else None
                logits = next(further) if further else self._logits(batch)
                masks = masking.result() if masking else None
                sampled = sample(logits, inputs, self._eos_token_ids, masks)
                scored = _score_prompts(pieces, further) if further else {}
        except RuntimeError as error:
            if isinstance(error, torch.AcceleratorError) or str(error).startswith("Triton Error [CUDA]"):
                raise DeviceLost(str(error).partition("\n")[0]) from error
            raise
        results = iter(masks.mark(sampled) if masks else sampled)
        return Result([None if input is None else next(results) for input in batch.samples], scored)

    def _logits(self, batch: PackedBatch) -> Tensor:
        """Of the places to sample from, [S, vocab]."""
        if self._graphs and (shape := self._graphs.shape_of(batch)):
            return self._graphs.run(batch, shape)
        return self.forward(*self._inputs(batch), self._rows(batch.logits_indices))

    def _logits_in_pieces(self, batch: PackedBatch, pieces: list[PromptRows]) -> Iterator[Tensor]:
        """Of the places to sample from, then of each piece, [rows, vocab]."""
        rows = [np.arange(piece.start, piece.start + len(piece.token_ids)) for piece in pieces]
        inputs = self._inputs(batch)
        return self.forward.in_pieces(*inputs, [self._rows(each) for each in (batch.logits_indices, *rows)])

    def _inputs(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        self.attention.bind(batch)
        return self._rows(batch.token_ids), self._rows(batch.position_ids)

    def _rows(self, numbers: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(numbers).to(self._device)


def _score_prompts(pieces: list[PromptRows], all_logits: Iterator[Tensor]) -> dict[int, list[TokenLogprob]]:
    """By item; `all_logits` are those of the pieces."""
    scored: dict[int, list[TokenLogprob]] = {}
    for piece, logits in zip(pieces, all_logits, strict=True):
        nums_top = [piece.num_top] * len(piece.token_ids)
        scored.setdefault(piece.item, []).extend(logprobs(logits, piece.token_ids, nums_top, ranked=True))
    return scored


def source_stamp(folder: Path) -> str:
    """Of the kernels' source files, by place and time: numba keeps the code of each of these apart."""
    files = [(str(file), file.stat().st_mtime_ns) for file in sorted(folder.glob("*.py"))]
    return hashlib.sha256(repr(files).encode()).hexdigest()[:12]


@contextlib.contextmanager
def compiling_alone(cache_dir: Path, kernels: str) -> Iterator[None]:
    """The first process compiles these kernels, others wait for it and load what it has kept.

    When several write numba's cache at once, one may replace the code of a kernel by that of another.
    """
    with contextlib.suppress(OSError):
        cache_dir.mkdir(parents=True, exist_ok=True)
    kept = cache_dir / f"{kernels}.kept"
    if kept.exists() or not os.access(cache_dir, os.W_OK):
        yield
        return
    with (cache_dir / f"{kernels}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # goes with its holder, also when that dies
        yield
        kept.touch()


@contextlib.contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Kernels of this thread go to the device, and have ended when the block ends, also by an error.

    Other readers see what they wrote, freed blocks are no longer written, and a step's time is theirs.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        try:
            yield
        finally:
            torch.cuda.current_stream().synchronize()


class SelfCheck:
    """Compares logits of two short prompts with those of the model's own modules."""

    def __init__(self, model: LoadedModel, pool: SequenceOf[Tensor]) -> None:
        """Runs the modules: make it before weights are packed. A pool with room for one prompt gets one."""
        num_free_blocks, self._block_size = len(pool[0]), pool[0].shape[2]
        eps = max(LEAST_EPS, *(torch.finfo(x.dtype).eps for x in (model, pool[0])))
        self._tolerance = min(MOST_ERROR, TOLERANCE * eps)
        self._prompts: list[list[int]] = []
        generator = torch.Generator().manual_seed(0)
        for wanted in PROMPT_LENS:
            length = min(wanted, model.card.max_model_len, num_free_blocks * self._block_size)
            if length > 1:
                prompt = torch.randint(model.card.vocab_size, (length,), generator=generator)
                self._prompts.append(prompt.tolist())
                num_free_blocks -= -(-length // self._block_size)
        self._expected = _plain_logits(model.module, self._prompts) if self._prompts else []

    def compare(self, logits_of: Callable[[PackedBatch], Tensor]) -> None:
        """`logits_of` computes a batch: logits [S, vocab]. Raises `UnsupportedModel` if they differ."""
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        sequences, blocks = [], itertools.count()
        for prompt in self._prompts:
            block_table = [next(blocks) for _ in range(0, len(prompt), self._block_size)]
            sequences.append(Sequence("self-check", "", prompt[:-1], [], sampling, 0.0, block_table))
        for num_left in (1, 0) if sequences else ():  # all tokens but the last one, then the last one
            batch = pack([WorkItem(each, each.num_new_tokens) for each in sequences], self._block_size)
            got = logits_of(batch).float()
            expected = torch.stack([logits[-1 - num_left] for logits in self._expected])
            spread = (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
            error = ((got - expected).norm(dim=-1) / spread).max().item()
            if not error <= self._tolerance:  # NaN too
                raise UnsupportedModel(
                    "its answers would be wrong: the forward pass that serves gives other logits than the "
                    f"model, by {error:.0%} of their spread"
                )
            for sequence, prompt in zip(sequences, self._prompts, strict=True):
                sequence.num_computed_tokens = len(prompt) - 1
                sequence.output_ids = prompt[-1:]


@torch.inference_mode()
def _plain_logits(module: Any, prompts: list[list[int]]) -> list[Tensor]:
    """Of each prompt [its length, vocab] in float32, with the model's own attention."""
    longest = max(prompts, key=len)
    # What stands behind a shorter prompt has no effect on it, and all weights are read once.
    rows = [prompt + longest[len(prompt) :] for prompt in prompts]
    device = next(module.parameters()).device
    with quiet():
        module.set_attn_implementation("eager")
        output = module(torch.tensor(rows, device=device), use_cache=False)
        module.set_attn_implementation(IMPLEMENTATION)
    return [logits[: len(prompt)].float() for logits, prompt in zip(output.logits, prompts, strict=True)]


class Engine(contextlib.AbstractAsyncContextManager["Engine"], Protocol):
    """Runs steps one after the other, in the order asked for. An async context manager.

    A cancelled step goes on, whether it waits or runs, and its result is dropped: its blocks may be written
    until a later step returns. `tests/contract/test_engines.py` tests every engine.
    """

    @property
    def busy_since(self) -> float | None:
        """Monotonic seconds; None while there is no work."""

    async def step(self, batch: PackedBatch) -> Result:
        """The batch's result; raises what computing it raises. `DeviceLost` is the end."""

    def wedge(self, for_s: float) -> None:
        """Holds all later steps up for so long (a test hook: the step that never ends)."""


class EngineThread:
    """An `Engine`: one worker thread that calls `Runner.run`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ended = asyncio.Event()
        self.busy_since: float | None = None  # monotonic seconds; None while the thread waits for work

    async def __aenter__(self) -> EngineThread:
        loop = asyncio.get_running_loop()
        # A daemon: a step that never ends must not keep the process from ending.
        threading.Thread(target=self._work_off, args=(loop,), name="flowkv-engine", daemon=True).start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._work.put(None)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), CLOSE_TIMEOUT_S)

    async def step(self, batch: PackedBatch) -> Result:
        """`Runner.run` on the engine's thread; raises what that raises."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Result] = loop.create_future()

        def settle(set_outcome: Callable[[Any], None], outcome: Result | Exception) -> None:
            if not result.done():  # else cancelled
                set_outcome(outcome)

        def work() -> None:
            try:
                value = self._runner.run(batch)
            except Exception as error:
                _call_soon(loop, settle, result.set_exception, error)
            else:
                _call_soon(loop, settle, result.set_result, value)

        self._work.put(work)
        return await result

    def wedge(self, for_s: float) -> None:
        """Blocks the thread for so long (a test hook: the step that never ends)."""
        self._work.put(lambda: time.sleep(for_s))

    def _work_off(self, loop: asyncio.AbstractEventLoop) -> None:
        while (work := self._work.get()) is not None:
            self.busy_since = time.monotonic()
            work()
            self.busy_since = None
        _call_soon(loop, self._ended.set)


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has closed: no one waits
        loop.call_soon_threadsafe(callback, *args)
