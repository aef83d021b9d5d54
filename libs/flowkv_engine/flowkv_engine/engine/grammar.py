"""Keeps output to grammars: which tokens may come next, found beside the step that computes the logits."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding

from flowkv_common.errors import BadRequest
from flowkv_common.grammar import Grammars
from flowkv_common.wire.messages import Grammar

if TYPE_CHECKING:
    from flowkv_engine.engine.sampler import Sampled, SampleInput

Bits = NDArray[np.uint8]

# More masks are made on several threads. 16 take 0.14 ms one by one, 0.27 ms on threads that have to wake up.
MAX_ONE_BY_ONE = 16


@cache
def _penalties(device: torch.device) -> Tensor:
    """What a byte of a mask adds to the logits of its eight tokens, the lowest bit first: [256, 8]."""
    rows = [[0.0 if byte >> place & 1 else -torch.inf for place in range(8)] for byte in range(256)]
    return torch.tensor(rows, device=device)


class Matcher:
    """Where one sequence stands in its grammar: a function of its output ids, so nothing of it travels.

    Only one thread at a time may use it.
    """

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._state: LLMatcher | None = None
        self._num_consumed = 0  # output ids

    def follow(self, output_ids: list[int], grammars: Grammars) -> LLMatcher:
        """The state after `output_ids`. Raises BadRequest if the grammar can't go on after them."""
        if self._state is None:
            self._state = grammars.matcher(self._grammar)
        self._state.consume_tokens(output_ids[self._num_consumed :])
        self._num_consumed = len(output_ids)
        if self._state.is_error():
            raise BadRequest(f"The grammar can't be followed further: {self._state.get_error()}")
        return self._state


class Masks(NamedTuple):
    """What may come next in each row of a batch.

    `allowed`: [rows, bytes], a bit per token id, the lowest first. A row without a grammar allows all, and so
    does one whose grammar can't go on: `errors` says why. `states`: where the grammars of rows stand before
    their token; not of rows after a guess that the grammar forbids, which never count.
    """

    allowed: Bits
    errors: dict[int, BadRequest]
    states: dict[int, LLMatcher]

    def apply(self, logits: Tensor) -> Tensor:
        """A copy of `logits` [rows, vocab] in float32, minus infinity where a token is not allowed."""
        allowed = torch.from_numpy(self.allowed).to(logits.device)
        # To look them up and to add is far faster than to fill where a mask says so.
        penalties = embedding(allowed.int(), _penalties(logits.device)).flatten(1)
        return logits.float() + penalties[:, : logits.shape[1]]

    def mark(self, sampled: list[Sampled]) -> list[Sampled]:
        """The tokens, with marks on those that end their grammar and on those that have no worth."""
        return [
            one._replace(error=self.errors[row])
            if row in self.errors
            else one._replace(ends_grammar=_ends(self.states[row], one.token_id))
            if row in self.states
            else one
            for row, one in enumerate(sampled)
        ]


def _ends(state: LLMatcher, token_id: int) -> bool:
    """Whether the grammar allows nothing after the token."""
    after = state.deep_copy()
    after.consume_token(token_id)
    return after.is_stopped()


class Constraints:
    """Makes the masks of a node's steps, on a thread of its own."""

    def __init__(self, grammars: Grammars, vocab_size: int, eos_token_ids: list[int]) -> None:
        """`vocab_size`: of the logits. Tokens that the tokenizer does not have are never allowed."""
        self._grammars = grammars
        self._num_bytes = -(-vocab_size // 8)
        self._eos_token_ids = eos_token_ids
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flowkv-grammar")

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()  # has threads from the beginning

    def begin(self, inputs: list[SampleInput]) -> Future[Masks] | None:
        """Begins with the masks of a step, or `None` if no row has a grammar."""
        if all(input.matcher is None for input in inputs):
            return None
        return self._worker.submit(self._masks, inputs)

    def _masks(self, inputs: list[SampleInput]) -> Masks:
        states: dict[int, LLMatcher] = {}
        errors: dict[int, BadRequest] = {}
        for row, input in enumerate(inputs):
            if input.matcher is None:
                continue
            if not input.is_drafted:
                try:
                    states[row] = input.matcher.follow(input.output_ids, self._grammars)
                except BadRequest as error:
                    errors[row] = error
            elif before := states.get(row - 1):
                state = before.deep_copy()
                if state.try_consume_tokens(input.output_ids[-1:]):
                    states[row] = state
        allowed = np.full((len(inputs), self._num_bytes), 0xFF, np.uint8)
        found = self._compute(list(states.values()))
        for (row, state), bits in zip(states.items(), found, strict=True):
            width = min(bits.size, self._num_bytes)
            allowed[row] = 0
            allowed[row, :width] = bits[:width]
            if state.is_error():
                errors[row] = BadRequest(f"The grammar can't be followed further: {state.get_error()}")
            elif not allowed[row].any():
                errors[row] = BadRequest("The grammar asks for text that the model has no tokens for.")
            else:
                self._leave_out_stops(allowed[row], inputs[row])
        for row in errors:
            allowed[row] = 0xFF
        return Masks(allowed, errors, states)

    def _compute(self, states: list[LLMatcher]) -> Bits:
        """[states, bytes] in the order of `states`."""
        if not states:
            return np.empty((0, 0), np.uint8)
        num_bytes = self._grammars.num_mask_bytes
        bits = np.zeros((len(states), num_bytes), np.uint8)
        if len(states) > MAX_ONE_BY_ONE:
            rows = [(state, row) for row, state in enumerate(states)]
            self._executor.unsafe_compute_mask_ptr(rows, bits.ctypes.data, num_bytes, len(states))
        else:
            for row, state in enumerate(states):
                state.unsafe_compute_mask_ptr(bits[row].ctypes.data, num_bytes)
        return bits

    def _leave_out_stops(self, allowed: Bits, input: SampleInput) -> None:
        """Below `min_tokens` no stop, and no EOS where it is ignored, unless nothing else may come."""
        sampling = input.sampling
        stops = list(self._eos_token_ids) if sampling.ignore_eos else []
        if input.output_index < sampling.min_tokens:
            stops = [*self._eos_token_ids, *sampling.stop_token_ids]
        before = allowed.copy() if stops else allowed
        for token_id in stops:
            if 0 <= token_id < 8 * len(allowed):
                allowed[token_id // 8] &= ~(1 << token_id % 8) & 0xFF
        if stops and not allowed.any():
            allowed[:] = before
