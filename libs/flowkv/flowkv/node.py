"""A node's process: `flowkv prefill`, `flowkv decode`, `flowkv mixed`. It loads the model, then serves."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flowkv_common import __version__
from flowkv_common.config import NodeSettings, load_settings
from flowkv_common.errors import CannotStart
from flowkv_common.telemetry import reason_in_one_line, setup_logs
from flowkv_engine.engine.fetch import default_cache_dir


def main(role: str) -> None:
    """Load the model, then serve until SIGTERM.

    `role`: prefill, decode or mixed; it only sets the prefill chunk budget that the node starts with.
    """
    settings = load_settings(NodeSettings, sys.argv[1:])
    setup_logs(role)
    set_variables()
    with reason_in_one_line(role):
        _load_and_serve(settings, role)


def set_variables() -> None:
    """Those that libraries read when they are imported."""
    # Compute threads spin some 50 us for the next kernel, or each of a step's would wake them anew; not for
    # milliseconds, the default: nodes may share cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # Compiled kernels are kept where the model is; another version's are not ours.
    os.environ.setdefault("NUMBA_CACHE_DIR", str(default_cache_dir() / f"numba-{__version__}"))
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Each block of a copy takes a multiprocessor from the engine's kernels, of which an H100 has 132.
    os.environ.setdefault("NCCL_MAX_CTAS", "8")
    # UCX, below NIXL, would warn of each connection that ends under a read.
    os.environ.setdefault("UCX_LOG_LEVEL", "error")


def import_libraries() -> None:
    """All that a node on a CPU needs: 4 s of a core."""
    with _importing():
        for module in (
            "torch",
            "transformers.models.llama.modeling_llama",
            "flowkv.roles",
            "flowkv_node.host",
            "flowkv_engine.engine.model",
            "flowkv_engine.engine.cpu.forward",  # last: numba may not be installed
        ):
            importlib.import_module(module)


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Without garbage collections, which take a tenth of the time: what is imported stays."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _load_and_serve(settings: NodeSettings, role: str) -> None:
    with _importing():
        try:
            import torch
            import transformers
        except ModuleNotFoundError as error:
            raise CannotStart(f"{error.name} is not installed: pip install 'flowkv[engine]'") from None

        from flowkv.roles import ROLES
        from flowkv_common.aio import freeze_objects, stop_on_signals
        from flowkv_engine.engine.gpu.devices import claimed
        from flowkv_engine.engine.model import load_model
        from flowkv_node.host import serve_node, served_model

    # Its log goes where ours goes, in the same form.
    transformers.logging.disable_default_handler()
    transformers.logging.enable_propagation()
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    with claimed(settings.device, Path(settings.socket_dir or tempfile.gettempdir())) as device:
        model = load_model(
            settings.model_path,
            name=settings.model_name or None,
            dtype=settings.dtype,
            device=device,
            load_format=settings.load_format,
            overrides=settings.hf_overrides,
            longest=settings.max_model_len,
        )
        freeze_objects()  # else the exit walks through the model, too (1 s)
        atexit.register(_end_without_leak_reports)

        async def run() -> None:
            await serve_node(settings, role, served_model(model, settings), ROLES, stop_on_signals())

        asyncio.run(run())


def _end_without_leak_reports() -> None:
    """Libraries with nanobind, like Triton, print what is left when the interpreter ends: what was frozen.

    They have no switch for it. All of our own lines have been written by then.
    """
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
