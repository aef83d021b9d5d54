"""A cluster whose model says what a script has: NATS, scheduler, gateway and nodes are real processes.

`nodes` is a process with a prefill and a decode node. Their KV cache holds the tokens themselves, so a decode
node knows the conversation from what was handed over to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor

from flowkv.local_cluster import Cluster
from flowkv.roles import ROLES
from flowkv_common.aio import stop_on_signals
from flowkv_common.config import NodeSettings, load_settings
from flowkv_common.grammar import Grammars
from flowkv_common.telemetry import setup_logs
from flowkv_common.wire.messages import ModelCard, PoolLayout
from flowkv_engine.engine.batch import PackedBatch
from flowkv_engine.engine.grammar import Constraints
from flowkv_engine.engine.runner import EngineThread, Runner
from flowkv_node.host import ServedModel, serve_node
from tests.clients.script import answer_to

ROOT = Path(__file__).resolve().parents[2]
MODEL_NAME = "scripted"
READY_TIMEOUT_S = 120.0
SETTINGS = {
    "FLOWKV_KV_CACHE_BYTES": str(4 << 20),  # 64 bytes a token
    "FLOWKV_RESPONSE_STORE": "100",
}
MAX_MODEL_LEN = 32768
_EOS_TOKEN = "<|im_end|>"
_MAX_TOKEN_CHARS = 16
# Over any temperature: what the script says is certain, as far as a grammar allows it.
_CERTAIN = 1000.0
_AS_VOCABULARY = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@contextlib.contextmanager
def scripted_cluster(run_dir: Path, model_path: str) -> Iterator[Cluster]:
    """Ready to serve. `model_path` has the tokenizer. Raises ClusterError when it does not get ready."""
    folder = run_dir / "model"
    folder.mkdir(parents=True, exist_ok=True)
    for source in (
        *Path(model_path).glob("tokenizer*.json"),
        Path(__file__).with_name("chat_template.jinja"),
    ):
        (folder / source.name).write_bytes(source.read_bytes())
    with Cluster(run_dir, str(folder), nodes={}, model_name=MODEL_NAME, settings=SETTINGS) as cluster:
        cluster.start_process("nodes", [sys.executable, "-m", "tests.clients.scripted"])
        cluster.wait_ready(READY_TIMEOUT_S)
        yield cluster


class Speaker:
    """Knows what comes next in a conversation. Its texts are in the letters of the vocabulary, one a byte."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = tokenizer.get_vocab()
        self._eos = self._vocabulary[_EOS_TOKEN]

    def next_tokens(self, prompt_ids: list[int], output_ids: list[int]) -> list[int]:
        """The tokens that go on with the script, the longest last; the end's if it is over."""
        answer = answer_to(self._tokenizer.decode(prompt_ids, skip_special_tokens=False))
        [(letters, _)] = _AS_VOCABULARY.pre_tokenize_str(answer)
        output = "".join(self._tokenizer.id_to_token(one) or "" for one in output_ids)
        rest = letters.removeprefix(output)
        if len(rest) == len(letters) - len(output) and rest:
            beginnings = (rest[:length] for length in range(1, _MAX_TOKEN_CHARS + 1))
            return [self._vocabulary[one] for one in dict.fromkeys(beginnings) if one in self._vocabulary]
        return [self._eos]


class ScriptedRunner(Runner):
    """A runner with a speaker in the place of a model: grammars, sampling and log probabilities are real."""

    def __init__(self, pool: Tensor, speaker: Speaker, grammars: Grammars, card: ModelCard) -> None:
        """`pool` is of `scripted_layout`: two floats of each token hold its id."""
        self._eos_token_ids = card.eos_token_ids
        self._constraints = Constraints(grammars, card.vocab_size, card.eos_token_ids)
        self._device = pool.device
        self._speaker = speaker
        self._vocab_size = card.vocab_size
        keys = pool.numpy().view(np.int64).reshape(len(pool), 2, -1, 4)[:, 0]
        self._ids = keys[..., 0]  # [num_blocks, block_size]

    def _logits(self, batch: PackedBatch) -> Tensor:
        block_size = self._ids.shape[1]
        self._ids[batch.slots // block_size, batch.slots % block_size] = batch.token_ids
        rows = []
        for sample, blocks, length in zip(batch.samples, batch.block_tables, batch.context_lens, strict=True):
            if sample is not None:
                context = self._ids[blocks].reshape(-1)[:length].tolist()
                num_prompt = len(context) - sample.output_index
                following = self._speaker.next_tokens(context[:num_prompt], context[num_prompt:])
                row = torch.zeros(self._vocab_size)
                row[following] = _CERTAIN * torch.arange(1.0, len(following) + 1)
                rows.append(row)
        return torch.stack(rows) if rows else torch.empty((0, self._vocab_size))


def scripted_layout(block_size: int) -> PoolLayout:
    return PoolLayout(num_layers=1, block_size=block_size, num_kv_heads=1, head_dim=8, dtype="float32")


async def serve(settings: NodeSettings) -> None:
    """Both nodes, until SIGTERM."""
    stop = stop_on_signals()
    file = Path(settings.model_path, "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(file))
    speaker = Speaker(tokenizer)
    card = ModelCard(
        name=MODEL_NAME,
        fingerprint=MODEL_NAME,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=tokenizer.get_vocab_size(),
        eos_token_ids=[tokenizer.get_vocab()[_EOS_TOKEN]],
    )
    async with asyncio.TaskGroup() as tasks:
        for role in ("prefill", "decode"):
            grammars = Grammars(file, card.eos_token_ids)

            def make_engine(pool: Tensor, grammars: Grammars = grammars) -> EngineThread:
                return EngineThread(ScriptedRunner(pool, speaker, grammars, card))

            layout = scripted_layout(settings.block_size)
            served = ServedModel(card, layout, make_engine, grammars=grammars)
            mine = load_settings(NodeSettings, ["--node-id", f"{role}-0"])
            tasks.create_task(serve_node(mine, role, served, ROLES, stop))


if __name__ == "__main__":
    setup_logs("scripted")
    torch.set_num_threads(1)
    asyncio.run(serve(load_settings(NodeSettings, sys.argv[1:])))
