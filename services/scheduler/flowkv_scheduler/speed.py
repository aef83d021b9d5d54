"""What the steps of a node cost, from what it has measured of itself. Pure arithmetic, in seconds."""

from __future__ import annotations

import msgspec

from flowkv_common.wire.nodes import LoadReport

# Assumed until a node has measured its own: middling figures of a small model on CPU.
DEFAULT_PREFILL_TOKENS_PER_S = 1000.0
DEFAULT_DECODE_STEP_S = 0.03


class Speed(msgspec.Struct, frozen=True, gc=False):
    """A step is `base_s` and so much for each thing in it, as in `StepFit`.

    `chunk_base_s` is the part of `base_s` that chunks of a prompt pay too: none where the node has told only
    its rates, for its prefill rate includes it.
    """

    base_s: float
    chunk_base_s: float
    prefill_token_s: float
    attended_token_s: float
    sequence_s: float
    context_token_s: float

    def prefill_s(self, num_new: int, num_cached: int, chunk: int, beside_s: float = 0.0) -> float:
        """Seconds to compute `num_new` tokens behind `num_cached` in steps of at most `chunk` tokens.

        `beside_s` is what else each of these steps computes: the decoding sequences of a mixed node.
        """
        if num_new <= 0:
            return 0.0
        num_steps = -(-num_new // max(1, chunk))
        num_attended = num_new * (num_cached + num_new / 2)
        return (
            num_steps * (self.chunk_base_s + beside_s)
            + num_new * self.prefill_token_s
            + num_attended * self.attended_token_s
        )

    def queue_s(self, num_tokens: int, mean_tokens: float, chunk: int, beside_s: float) -> float:
        """Of a queue of so many tokens, in prompts of about `mean_tokens`, steps shared between them."""
        one_prompt_s = self.prefill_s(num_tokens, 0, chunk, beside_s)
        return max(0.0, one_prompt_s + num_tokens * (mean_tokens - num_tokens) / 2 * self.attended_token_s)

    def chunk_beside_s(self, num_sequences: int, num_context_tokens: int, *, is_decode: bool) -> float:
        """What each chunk's step computes besides.

        On a decode node that is a whole step of its own: a block at a time is never as cheap as its rate.
        """
        whole_s = self.base_s - self.chunk_base_s if is_decode else 0.0
        return whole_s + self.beside_s(num_sequences, num_context_tokens)

    def decode_step_s(self, num_sequences: int, num_context_tokens: int) -> float:
        """Seconds of a step that gives each sequence one token."""
        return self.base_s + self.beside_s(num_sequences, num_context_tokens)

    def beside_s(self, num_sequences: int, num_context_tokens: int) -> float:
        """What decoding sequences add to a step that runs anyway."""
        return num_sequences * self.sequence_s + num_context_tokens * self.context_token_s

    def chunk_within(self, step_s: float, num_sequences: int, num_context_tokens: int) -> int:
        """How many prompt tokens a step may compute beside the decoding sequences and end within `step_s`."""
        left_s = step_s - self.decode_step_s(num_sequences, num_context_tokens)
        return max(0, int(left_s / self.prefill_token_s))


def speed_of(report: LoadReport) -> Speed:
    """From the fit that the node reports; from its plain rates what is missing in it."""
    rate = report.prefill_tokens_per_s or DEFAULT_PREFILL_TOKENS_PER_S
    step_s = report.decode_step_s or DEFAULT_DECODE_STEP_S
    fit = report.step
    if fit is None:
        return Speed(step_s, 0.0, 1 / rate, 0.0, step_s / max(1, report.max_num_seqs), 0.0)
    return Speed(
        base_s=fit.base_s or step_s,
        chunk_base_s=fit.base_s,
        prefill_token_s=fit.prefill_token_s or 1 / rate,
        attended_token_s=fit.attended_token_s,
        sequence_s=fit.sequence_s,
        context_token_s=fit.context_token_s,
    )
