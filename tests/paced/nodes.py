"""Paced nodes in one process, on one loop: `python -m tests.paced.nodes --prefill 2 --decode 2 --base-s .05`.

Other flags than its own are settings of all its nodes (`flowkv_common/config.py:NodeSettings`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest.mock import patch

import msgspec
import torch
from tokenizers import Tokenizer
from torch import Tensor

from flowkv.roles import ROLES
from flowkv_common.aio import stop_on_signals
from flowkv_common.config import NodeSettings, load_settings
from flowkv_common.telemetry import setup_logs
from flowkv_common.wire.messages import ModelCard, PoolLayout
from flowkv_common.wire.nodes import StepFit
from flowkv_engine.transport import make_connectors
from flowkv_node import host
from tests.paced.engine import Pace, PacedEngine
from tests.wrapped_links import slowed

MAX_MODEL_LEN = 32_768
FINGERPRINT = "paced"
_EOS_TOKEN = "<|im_end|>"
# Tokens whose text is one whole word: each of them reaches the client by itself.
_WORD = re.compile("Ġ[a-z]+")


@dataclass(slots=True)
class PacedNode:
    """One node. `engine` is there once the node serves; set `stop` to drain it."""

    node_id: str
    role: str
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    engine: PacedEngine | None = None

    async def run(self, settings: NodeSettings, pace: Pace) -> None:
        """Until it has drained."""
        layout = paced_layout(settings.block_size)

        def make_engine(pool: Tensor) -> PacedEngine:
            self.engine = PacedEngine(pool, pace)
            return self.engine

        card = ModelCard(
            name=settings.model_name or "paced",
            fingerprint=FINGERPRINT,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=pace.vocab_size,
            eos_token_ids=[pace.eos_token_id],
        )
        mine = msgspec.structs.replace(settings, node_id=self.node_id)
        await host.serve_node(mine, self.role, host.ServedModel(card, layout, make_engine), ROLES, self.stop)


def paced_layout(block_size: int) -> PoolLayout:
    """The least KV cache: 64 bytes per token."""
    return PoolLayout(num_layers=1, block_size=block_size, num_kv_heads=1, head_dim=8, dtype="float32")


def pace_of(model_path: str, fit: StepFit, eos_after: int | None = None) -> Pace:
    """A pace that speaks in the words of the model's tokenizer."""
    vocabulary = Tokenizer.from_file(str(Path(model_path) / "tokenizer.json")).get_vocab()
    return Pace(
        fit=fit,
        words=sorted(token_id for text, token_id in vocabulary.items() if _WORD.fullmatch(text)),
        vocab_size=len(vocabulary),
        eos_token_id=vocabulary[_EOS_TOKEN],
        eos_after=eos_after,
    )


@contextlib.asynccontextmanager
async def paced_nodes(
    settings: NodeSettings,
    pace: Pace,
    counts: Mapping[str, int],
    *,
    link_byte_s: float = 0.0,
    prefix: str = "",
) -> AsyncIterator[dict[str, PacedNode]]:
    """`counts` nodes of each role, `<prefix><role>-<number>`, while the context lasts; then they drain.

    Links take `link_byte_s` seconds per byte on top of their own time.
    """
    nodes = [PacedNode(f"{prefix}{role}-{i}", role) for role, count in counts.items() for i in range(count)]
    slow = patch.object(host, "make_connectors", slowed(make_connectors, link_byte_s))
    with slow if link_byte_s else contextlib.nullcontext():
        async with asyncio.TaskGroup() as tasks:
            for node in nodes:
                tasks.create_task(node.run(settings, pace), name=node.node_id)
            try:
                yield {node.node_id: node for node in nodes}
            finally:
                for node in nodes:
                    node.stop.set()


async def serve(options: argparse.Namespace, settings: NodeSettings) -> None:
    """Until SIGTERM. Then writes how the pace was kept, by node, to `options.kept`."""
    stop = stop_on_signals()
    counts = {role: getattr(options, role) for role in ("prefill", "decode", "mixed")}
    fit = StepFit(**{name: getattr(options, name) for name in StepFit.__struct_fields__})
    pace = pace_of(settings.model_path, fit)
    async with paced_nodes(
        settings, pace, counts, link_byte_s=options.link_byte_s, prefix=options.prefix
    ) as nodes:
        await stop.wait()
    if options.kept:
        kept = {node_id: asdict(node.engine.kept) for node_id, node in nodes.items() if node.engine}
        options.kept.write_text(json.dumps(kept))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.paced.nodes", description=__doc__)
    for role in ("prefill", "decode", "mixed"):
        parser.add_argument(f"--{role}", type=int, default=0, help="how many")
    for name in StepFit.__struct_fields__:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=0.0, help="seconds of a step")
    parser.add_argument("--link-byte-s", type=float, default=0.0, help="seconds per byte of a transfer")
    parser.add_argument("--prefix", default="", help="of their names")
    parser.add_argument("--kept", type=Path, help="where to write, at the end, how the pace was kept")
    options, others = parser.parse_known_args(argv)
    settings = load_settings(NodeSettings, others)
    setup_logs("paced")
    torch.set_num_threads(1)
    asyncio.run(serve(options, settings))


if __name__ == "__main__":
    main(sys.argv[1:])
