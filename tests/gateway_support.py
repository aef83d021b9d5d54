"""A tiny real tokenizer and a generator that follows a script: what the gateway's tests stand on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from flowkv_common.errors import FlowKVError
from flowkv_common.wire.messages import ModelCard
from flowkv_gateway.dispatch import Generation, Load, Piece
from flowkv_gateway.tokenizer import Tokenizer

MODEL = "tiny/model"
CARD = ModelCard(name=MODEL, fingerprint="f", max_model_len=128, vocab_size=512, eos_token_ids=[0])
EOS = 0  # <|end|>, special
START = 1  # <|start|>, special
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] == 'refuse me' %}{{ raise_exception('no such words') }}{% endif %}"
    "<|start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.get('tool_calls') or [] %}{{ call | tojson }}{% endfor %}<|end|>\n"
    "{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE of a few hundred tokens with a chat template, as a model folder has them."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken("<|end|>", special=True), AddedToken("<|start|>", special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog, hello world, user assistant"], trainer
    )
    raw.add_tokens([AddedToken("<tool call>", special=False)])
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", "bos_token": "<|start|>"})
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def text_pieces(tokenizer: Tokenizer, text: str, finish_reason: str = "stop") -> list[Piece]:
    """One piece per token of `text`; the last one ends the answer."""
    token_ids = tokenizer._encode([text], False)[0]
    pieces = [Piece([token_id], [], None, 0) for token_id in token_ids]
    pieces[-1] = pieces[-1]._replace(finish_reason=finish_reason)
    return pieces


@dataclass
class ScriptedGenerator:
    """Gives every request the same steps: a piece is yielded, an error raised, an event waited for.

    Remembers what it was asked for, and which requests were closed before their script was over.
    """

    script: Iterable[Piece | FlowKVError | Exception | asyncio.Event] = ()
    card: ModelCard | None = CARD
    problem: str | None = None
    open: Load = Load(0, 0, 0.0)
    asked: list[Generation] = field(default_factory=list)
    log: list[str] = field(default_factory=list)  # "ask <n>", "piece <n>" in the order they happened
    cancelled: list[str] = field(default_factory=list)
    was_asked: asyncio.Event = field(default_factory=asyncio.Event)
    was_cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, generation: Generation) -> AsyncGenerator[Piece, None]:
        number = len(self.asked)
        self.asked.append(generation)
        self.log.append(f"ask {number}")
        self.was_asked.set()
        try:
            for step in self.script:
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    self.log.append(f"piece {number}")
                    yield step
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(generation.request_id)
            self.was_cancelled.set()
            raise

    def model(self) -> ModelCard | None:
        return self.card

    def load(self) -> Load:
        return self.open

    def why_not_ready(self) -> str | None:
        return self.problem
