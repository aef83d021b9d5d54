"""What an answer tells of its prompt: its text, and the log probabilities of its tokens."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from flowkv_common.wire.messages import TokenLogprob
from flowkv_gateway.request_state import RequestState
from flowkv_gateway.schemas import ChatRequest, CompletionRequest
from flowkv_gateway.tokenizer import Vocabulary


@dataclass(frozen=True)
class ToldPrompt:
    """One for all answers to a prompt.

    `request` is the one that asks for its log probabilities: they have all come when an answer begins.
    """

    request: RequestState
    text: str = ""  # that is echoed
    text_offsets: Sequence[int] = ()  # where each token begins in it
    num_echoed: int | None = None  # best tokens that are echoed with each; None: no log probabilities are
    num_ranked: int | None = None  # the same of vLLM's `prompt_logprobs`

    @property
    def echoes_logprobs(self) -> bool:
        return self.num_echoed is not None

    def echoed(self) -> list[TokenLogprob]:
        """Log probabilities as OpenAI tells them, from the second token on."""
        return [_with_top(entry, self.num_echoed or 0) for entry in self.request.prompt_logprobs]

    def ranked(self) -> list[TokenLogprob]:
        """As vLLM tells them."""
        return [_with_top(entry, self.num_ranked or 0) for entry in self.request.prompt_logprobs]


def _with_top(entry: TokenLogprob, num_top: int) -> TokenLogprob:
    return msgspec.structs.replace(entry, top=entry.top[:num_top]) if len(entry.top) > num_top else entry


def told_prompt(
    body: ChatRequest | CompletionRequest,
    place: int,
    tokens: Sequence[int],
    request: RequestState,
    vocabulary: Vocabulary,
) -> ToldPrompt | None:
    """Of the prompt with this place in the body and these `tokens`; None if nothing is told of it.

    `request` is the first for it.
    """
    if not isinstance(body, CompletionRequest) or not body.echo:
        return None if body.prompt_logprobs is None else ToldPrompt(request, num_ranked=body.prompt_logprobs)
    given = body.prompt if isinstance(body.prompt, str) else body.prompt[place]
    is_whole = len(tokens) == len(request.prompt_ids)
    text, offsets = spelled(
        request.prompt_ids,
        vocabulary,
        given if isinstance(given, str) and is_whole else None,
        shows_special=body.skip_special_tokens is False,
    )
    return ToldPrompt(request, text, offsets, body.logprobs, body.prompt_logprobs)


def spelled(
    token_ids: Sequence[int], vocabulary: Vocabulary, text: str | None, *, shows_special: bool
) -> tuple[str, list[int]]:
    """The text of a prompt and where each token begins in it.

    A text that the client has given is told as it was. It may differ from that of its tokens: in special
    tokens that were added, in a space that the tokenizer puts in front.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pieces, offsets, length = [], [], 0
    for token_id in token_ids:
        offsets.append(length)
        if token_id not in vocabulary.special_ids:
            piece = utf8.decode(vocabulary.token_bytes(token_id))
        else:
            special = vocabulary.token_text(token_id)
            is_shown = shows_special if text is None else text.startswith(special, length)
            piece = special if is_shown else ""
        pieces.append(piece)
        length += len(piece)
    pieces.append(utf8.decode(b"", final=True))
    if text is None:
        return "".join(pieces), offsets
    surplus = length - len(text)  # at the front
    return text, [min(max(offset - surplus, 0), len(text)) for offset in offsets]
