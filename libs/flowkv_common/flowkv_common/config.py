"""Settings of every service: one struct each, read from `FLOWKV_*` and from flags, checked once at start.

Flags win over the environment. An unknown flag or `FLOWKV_` variable is refused: a typo must not be silent.
What holds a password can come from a file: `FLOWKV_NATS_URL_FILE` names one with the URL in it.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

# Read outside the services: by the model download and by scripts/up.py.
_OTHER_VARIABLES = {"FLOWKV_CACHE", "FLOWKV_NATS_SERVER"}
NODE_ID_CHARACTERS = "A-Za-z0-9_-"
DTYPES = ("float32", "bfloat16", "float16")
_SECRETS = ("nats_url",)


class ServiceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What all services share. Addresses are loopback unless said otherwise."""

    nats_url: str = "nats://127.0.0.1:4222"  # or several, of one cluster, with commas between
    host: str = "127.0.0.1"  # what the HTTP server (and a node's data socket) binds to

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if name.endswith("_s") and not (seconds := getattr(self, name)) >= 0:  # NaN neither
                raise ValueError(f"FLOWKV_{name.upper()} is {seconds} seconds, it must be 0 or more")


class GatewaySettings(ServiceSettings, frozen=True, kw_only=True):
    model_path: str  # folder with tokenizer.json and the chat template
    port: int = 8000
    model_name: str = ""  # that clients use; if empty the nodes', or the folder's before one has joined
    request_timeout_s: float = 600.0
    max_body_bytes: int = 4 * 1024 * 1024
    send_timeout_s: float = 30.0  # a client that reads nothing for so long is cut off
    keep_alive_s: float = 75.0  # an idle connection is kept for so long: longer than proxies keep theirs
    ping_s: float = 10.0  # a stream silent for so long gets a comment, or proxies cut it off; 0: never
    shutdown_delay_s: float = 0.0  # told to stop: not ready, but serving for so long: clients go elsewhere
    drain_timeout_s: float = 30.0  # after that open answers have so long to end
    log_requests: bool = True  # a line for each request that has ended or was refused, without its text
    generation_config: str = "auto"  # none: the model's own generation_config.json sets no sampling defaults

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generation_config not in ("auto", "none"):
            raise ValueError(f"FLOWKV_GENERATION_CONFIG is {self.generation_config!r}, not auto or none")


class SchedulerSettings(ServiceSettings, frozen=True, kw_only=True):
    http_port: int = 0  # 0: any free port
    ttft_goal_s: float = 5.0  # what users are to see: time to the first token, and between two tokens
    itl_goal_s: float = 0.25
    max_wait_s: float = 60.0  # who would wait longer for the first token is refused at the door
    lending: bool = True  # move prefill caps when the two sides are out of balance


class NodeSettings(ServiceSettings, frozen=True, kw_only=True):
    """A prefill, decode or mixed node. `role` only sets the prefill cap the node starts with."""

    model_path: str
    model_name: str = ""
    node_id: str = ""  # `<role>-<host>-<4 random>` if empty
    load_format: str = "auto"  # auto | dummy (random weights from config.json)
    device: str = "cpu"  # cpu | cuda (a GPU that no other node of this host has) | cuda:1
    dtype: str = "auto"  # of the weights; auto: float32 on a CPU, the checkpoint's own on a GPU
    attention: str = "auto"  # auto | triton | cpu | torch
    num_threads: int = 0  # 0: torch's own choice
    kv_cache_bytes: int = 0  # 0: 1 GiB, or on a GPU what `gpu_memory_share` leaves beside the weights
    gpu_memory_share: float = 0.9  # of the GPU's memory, for all that this node needs
    block_size: int = 16  # tokens
    kv_dtype: str = "auto"  # of the KV cache; auto: that of the weights
    token_budget: int = 512  # tokens per engine step
    max_num_seqs: int = 64
    connectors: str = ""  # in order of preference; if empty shm,tcp, or cuda_ipc,nccl on a GPU
    overlap_transfer: bool = True  # send blocks while later chunks compute; off: all after the last chunk
    advertise_host: str = ""  # where others reach this node; if empty `host`, or this host's name for 0.0.0.0
    data_port: int = 0  # of the TCP socket for KV; 0: any free port
    advertise_port: int = 0  # where others reach that socket, behind NAT say; 0: its own port
    socket_dir: str = ""  # shared by the nodes of one host, for shared memory; the temporary folder if empty
    http_port: int = 0
    load_period_s: float = 0.5
    wedge_timeout_s: float = 8.0  # an engine step longer than this is called wedged
    drain_timeout_s: float = 30.0
    max_handoffs: int = 16  # handoffs in flight per node, and their bytes: apart from the batch size
    max_handoff_bytes: int = 0  # of KV; 0: a quarter of the pool, or a step's tokens for each of them if more
    test_hooks: bool = False

    @property
    def connector_names(self) -> list[str]:
        return (self.connectors or ("cuda_ipc,nccl" if self.is_on_gpu else "shm,tcp")).split(",")

    @property
    def is_on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def __post_init__(self) -> None:
        super().__post_init__()
        if re.search(f"[^{NODE_ID_CHARACTERS}]", self.node_id):
            raise ValueError(
                f"FLOWKV_NODE_ID is {self.node_id!r}: it is part of NATS subjects, only letters, digits, "
                "- and _ may stand in it"
            )
        for name in ("host", "advertise_host"):
            try:
                getattr(self, name).encode("idna")
            except UnicodeError as error:
                raise ValueError(
                    f"FLOWKV_{name.upper()} is {getattr(self, name)!r}, no name of a host: between the dots "
                    "there must be 1 to 63 characters"
                ) from error
        for name in ("dtype", "kv_dtype"):
            if getattr(self, name) not in ("auto", *DTYPES):
                raise ValueError(
                    f"FLOWKV_{name.upper()} is {getattr(self, name)!r}, not one of auto, {', '.join(DTYPES)}"
                )
        if not 0.0 < self.gpu_memory_share <= 1.0:
            raise ValueError(f"FLOWKV_GPU_MEMORY_SHARE is {self.gpu_memory_share}: over 0, at most 1")
        # A node that serves both sides has a cap of over one block, and that must be less than all.
        if self.token_budget <= 2 * self.block_size:
            raise ValueError(
                f"FLOWKV_TOKEN_BUDGET is {self.token_budget}, it must be more than two blocks: "
                f"FLOWKV_BLOCK_SIZE is {self.block_size}"
            )


S = TypeVar("S", bound=ServiceSettings)


def load(kind: type[S], argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> S:
    """The settings from flags over environment over defaults.

    Raises SystemExit with a message for an unknown name, a missing one or a value that can't be.
    """
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    _refuse_unknown(environ)
    parser = argparse.ArgumentParser(prog=kind.__name__.removesuffix("Settings").lower())
    for field in fields.values():
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS)
    values: dict[str, str] = {
        name: environ[f"FLOWKV_{name.upper()}"] for name in fields if f"FLOWKV_{name.upper()}" in environ
    }
    values.update(_secrets(fields, environ))
    values.update(vars(parser.parse_args(argv)))
    for field in fields.values():
        if field.required and not values.get(field.name):
            raise SystemExit(f"settings: {_names(field.name)} is not set")
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$.")
        where = f"{_names(place.rstrip('`'))}: " if place else ""
        raise SystemExit(f"settings: {where}{what}") from None


def _names(name: str) -> str:
    """How a setting is given."""
    return f"FLOWKV_{name.upper()} (or --{name.replace('_', '-')})"


def _secrets(fields: Container[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The settings whose values lie in files. Raises SystemExit for one that can't be read."""
    paths = {name: environ.get(f"FLOWKV_{name.upper()}_FILE") for name in _SECRETS if name in fields}
    try:
        return {name: Path(path).read_text().strip() for name, path in paths.items() if path}
    except OSError as error:
        raise SystemExit(f"settings: {error}") from None


def _refuse_unknown(environ: Mapping[str, str]) -> None:
    known = _OTHER_VARIABLES | {f"FLOWKV_{name.upper()}_FILE" for name in _SECRETS}
    for kind in (GatewaySettings, SchedulerSettings, NodeSettings):
        known.update(f"FLOWKV_{field.name.upper()}" for field in msgspec.structs.fields(kind))
    for name in environ:
        if name.startswith("FLOWKV_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise SystemExit(f"settings: unknown variable {name}{hint}")
