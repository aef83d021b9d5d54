"""The settings of each service: one struct, read from flags and `FLOWKV_*` variables, checked once at start.

Flags win over variables, variables over defaults. An unknown flag or `FLOWKV_` variable is refused: a typo
must not be silent. `tests/contract/settings_page.py` writes docs/settings.md from this file.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, TypeVar, get_args, get_origin

import msgspec

from flowkv_common.errors import invalid_input
from flowkv_common.wire.subjects import DEFAULT_NAMESPACE

SUBJECT_CHARACTERS = "A-Za-z0-9_-"  # of one part of a subject
DTYPES = ("float32", "bfloat16", "float16")
# Those that no struct holds, with what they mean.
OTHER_VARIABLES = {
    "FLOWKV_CACHE": "folder for downloaded models and compiled kernels; default `~/.cache/flowkv`",
    "FLOWKV_NATS_SERVER": "the `nats-server` that `flowkv up` starts; default the one on `PATH`",
}

# A setting is annotated with its unit, if it has one, and with what it means.
Seconds = Annotated[float, "s"]
Bytes = Annotated[int, "bytes"]
Tokens = Annotated[int, "tokens"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
KVDType = Literal["auto", "float32", "bfloat16", "float16", "float8_e4m3fn"]


def wants_traces(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether OpenTelemetry's own variables name a collector for traces. Its SDK reads all others."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return False
    return any(
        environ.get(name) for name in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    )


def listed(setting: str) -> list[str]:
    """The parts of a setting that has commas between them."""
    return [part.strip() for part in setting.split(",") if part.strip()]


class NatsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a process reaches NATS, and how its buckets are kept there.

    Files are read anew for each attempt to connect: what they hold may change (`bus/access.py`).
    """

    nats_url: Annotated[str, "NATS, or several servers of one cluster with commas between"] = (
        "nats://127.0.0.1:4222"
    )
    namespace: Annotated[
        str, "first part of all subjects and buckets: clusters of other namespaces at the same NATS are apart"
    ] = DEFAULT_NAMESPACE
    nats_url_file: Annotated[str, "file with that URL, a secret if it holds a password; wins over it"] = ""
    nats_credentials: Annotated[
        str, "file that says who we are: a `.creds` file, or the seed of an nkey; needs the extra `nkeys`"
    ] = ""
    nats_ca: Annotated[
        str, "PEM file with the authority that the servers' certificates come from; empty: the system's"
    ] = ""
    nats_cert: Annotated[str, "PEM file with the certificate that we show NATS, and those above it"] = ""
    nats_key: Annotated[str, "PEM file with that certificate's private key"] = ""
    nats_replicas: Annotated[
        int, "servers that keep each bucket: 3 or 5 in a cluster of at least as many, so that one may die"
    ] = 1
    nats_storage: Annotated[
        Literal["memory", "file"], "where they keep it; file: it also outlives the end of all servers"
    ] = "memory"
    nats_give_up_s: Annotated[
        Seconds, "NATS has refused us for so long: the service ends with an error, for another to start"
    ] = 60.0

    def __post_init__(self) -> None:
        if not re.fullmatch(f"[{SUBJECT_CHARACTERS}]+", self.namespace):
            raise ValueError(
                f"FLOWKV_NAMESPACE is {self.namespace!r}: it is part of NATS subjects, only letters, digits, "
                "- and _ may stand in it"
            )
        for name in self.__struct_fields__:
            if name.endswith("_s") and not (seconds := getattr(self, name)) >= 0:  # NaN neither
                raise ValueError(f"FLOWKV_{name.upper()} is {seconds} seconds, it must be 0 or more")
        if bool(self.nats_cert) != bool(self.nats_key):
            raise ValueError("FLOWKV_NATS_CERT and FLOWKV_NATS_KEY: one needs the other")
        if self.nats_replicas not in (1, 3, 5):
            raise ValueError(f"FLOWKV_NATS_REPLICAS is {self.nats_replicas}: choose 1, 3 or 5")


class ServiceSettings(NatsSettings, frozen=True, kw_only=True):
    """What all services share."""

    host: Annotated[str, "address that the service listens on"] = "127.0.0.1"


class GatewaySettings(ServiceSettings, frozen=True, kw_only=True):
    model_path: Annotated[
        str, "folder with tokenizer.json and the chat template; of several models with commas between"
    ]
    port: Annotated[int, "port of the API"] = 8000
    model_name: Annotated[
        str, "name that clients use for the first model; empty: the nodes' name, until then the folder's"
    ] = ""
    model_names: Annotated[
        str, "several such names, with commas between; answers have the first; empty: `model_name`"
    ] = ""
    generation_config: Annotated[
        Literal["auto", "none"], "none: the model's generation_config.json sets no sampling defaults"
    ] = "auto"
    tool_parser: Annotated[
        str,
        "how the first model writes tool calls and reasoning, by vLLM's name; empty: its chat template tells",
    ] = ""
    trust_request_chat_template: Annotated[
        bool, "take a `chat_template` from requests: a program, which can hold the gateway up"
    ] = False
    trust_typed_special_tokens: Annotated[
        bool, "take special tokens that are typed in a chat for the tokens: a text can then begin other turns"
    ] = False
    response_store: Annotated[
        int, "the newest responses of `/v1/responses` that are kept in memory, up to 256 MiB; 0: none"
    ] = 0
    request_timeout_s: Annotated[Seconds, "longest time that an answer may take"] = 600.0
    max_body_bytes: Annotated[Bytes, "a longer body of a request gets 413"] = 4 * 1024 * 1024
    send_timeout_s: Annotated[Seconds, "a stream that is not read for this long is cut off"] = 30.0
    keep_alive_s: Annotated[
        Seconds, "an idle connection is closed after this; keep it longer than your proxy's"
    ] = 75.0
    ping_s: Annotated[
        Seconds, "a stream silent for this long gets a comment, or proxies would cut it off; 0: never"
    ] = 10.0
    shutdown_delay_s: Annotated[
        Seconds, "when told to stop: not ready but serving for this long, so that clients go elsewhere"
    ] = 0.0
    drain_timeout_s: Annotated[Seconds, "after shutdown_delay_s: open answers have this long to end"] = 30.0
    live_page: Annotated[
        Literal["auto", "on", "off"],
        "serve a page at `/` that shows the cluster; auto: where a key is needed, or only this host can ask",
    ] = "auto"
    log_requests: Annotated[bool, "a log line per request, without its text"] = True
    api_keys_file: Annotated[
        str, "file with a `name key` per line: a client needs one of the keys; empty: none is needed"
    ] = ""
    open_health: Annotated[
        bool, "serve `/health*` (not `/health/deep`), `/ping` and `/metrics` without a key"
    ] = True
    key_max_requests: Annotated[int, "requests that a key's name may have open; 0: no limit"] = 0
    key_tokens_per_minute: Annotated[
        int, "tokens of prompts and answers that a key's name may use; 0: no limit"
    ] = 0
    tls_cert: Annotated[str, "PEM file with the certificate and those above it: serve HTTPS"] = ""
    tls_key: Annotated[str, "PEM file with the certificate's private key"] = ""
    allowed_origins: Annotated[
        str, "origins whose web pages may use the API, with commas between; `*`: all; empty: none"
    ] = ""
    allowed_hosts: Annotated[
        str,
        "names of hosts that requests may be for, beside localhost and addresses, with commas between, also "
        "`*.example.com`; `*`: all; empty: all, none where `host` is this host's own address",
    ] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("FLOWKV_TLS_CERT and FLOWKV_TLS_KEY: one needs the other")
        for name in ("key_max_requests", "key_tokens_per_minute", "response_store"):
            if (limit := getattr(self, name)) < 0:
                raise ValueError(f"FLOWKV_{name.upper()} is {limit}, it must be 0 or more")
            if limit and name.startswith("key_") and not self.api_keys_file:
                raise ValueError(f"FLOWKV_{name.upper()} needs FLOWKV_API_KEYS_FILE: it limits keys")


class SchedulerSettings(ServiceSettings, frozen=True, kw_only=True):
    http_port: Annotated[int, "port of health and metrics; 0: any free one"] = 0
    ttft_goal_s: Annotated[Seconds, "target for the time to first token (TTFT)"] = 5.0
    itl_goal_s: Annotated[Seconds, "target for the time between two tokens (ITL)"] = 0.25
    max_wait_s: Annotated[
        Seconds,
        "a request whose first token is predicted later gets 429; a waiting one, after 1.5 times this; "
        "0: 12 times ttft_goal_s",
    ] = 0.0
    lending: Annotated[
        bool, "lend nodes to the other side when prefill and decode load are out of balance"
    ] = True


class NodeSettings(ServiceSettings, frozen=True, kw_only=True):
    """A prefill, decode or mixed node."""

    model_path: Annotated[str, "folder of the model"]
    model_name: Annotated[str, "name that clients use; empty: as `flowkv up` calls the folder"] = ""
    node_id: Annotated[str, "unique name; empty: `<role>-<host>-<4 random>`"] = ""
    max_model_len: Annotated[Tokens, "longest prompt and answer together; 0: the model's own"] = 0
    hf_overrides: Annotated[str, "JSON object: what counts instead of fields of config.json"] = ""
    load_format: Annotated[Literal["auto", "dummy"], "dummy: random weights, from config.json alone"] = "auto"
    device: Annotated[str, "cpu, cuda (a GPU that no other node of this host has) or cuda:1"] = "cpu"
    dtype: Annotated[DType, "of the weights; auto: float32 on a CPU, the checkpoint's on a GPU"] = "auto"
    attention: Annotated[
        Literal["auto", "triton", "cpu", "torch"], "attention backend; auto: the fastest that runs here"
    ] = "auto"
    num_threads: Annotated[int, "compute threads; 0: torch's choice"] = 0
    kv_cache_bytes: Annotated[Bytes, "KV pool; 0: 1 GiB, on a GPU what gpu_memory_share leaves"] = 0
    gpu_memory_share: Annotated[float, "share of the GPU's memory for all that this node needs"] = 0.9
    block_size: Annotated[Tokens, "tokens of a KV block"] = 16
    kv_dtype: Annotated[
        KVDType, "of the KV cache; auto: that of the weights; float8_e4m3fn: a quarter of float32, not exact"
    ] = "auto"
    token_budget: Annotated[Tokens, "tokens per engine step"] = 512
    max_num_seqs: Annotated[int, "sequences that decode at once"] = 64
    speculation: Annotated[
        Literal["off", "ngram"], "ngram: steps also guess tokens where text repeats; the answers are the same"
    ] = "ngram"
    connectors: Annotated[
        str, "how KV moves, in order of preference; empty: shm,tcp, on a GPU cuda_ipc,nccl"
    ] = ""
    overlap_transfer: Annotated[
        bool, "send blocks while later chunks compute; off: all of them after the last chunk"
    ] = True
    advertise_host: Annotated[
        str,
        "where other nodes reach this one, or several such names with commas between, the best first; empty: "
        "`host`, or this host's name if that is 0.0.0.0",
    ] = ""
    data_port: Annotated[
        str, "TCP port for KV, or a range, as 9201-9299, of which each node takes a free one; 0: any free one"
    ] = "0"
    advertise_port: Annotated[int, "where other nodes reach data_port, as behind NAT; 0: the same port"] = 0
    data_tls_cert: Annotated[
        str, "PEM file with a certificate for `node`: KV goes by TLS, to nodes of the same authority only"
    ] = ""
    data_tls_key: Annotated[str, "PEM file with the private key of data_tls_cert"] = ""
    data_tls_ca: Annotated[str, "PEM file with the authority that signs the nodes' certificates"] = ""
    socket_dir: Annotated[
        str, "folder shared by the nodes of one host, for shared memory; empty: the temporary folder"
    ] = ""
    http_port: Annotated[
        str, "port of health and metrics, or a range of which each node takes a free one; 0: any free one"
    ] = "0"
    load_period_s: Annotated[Seconds, "between two load reports"] = 0.5
    wedge_timeout_s: Annotated[
        Seconds, "an engine step longer than this makes the node unready, and its requests go elsewhere"
    ] = 8.0
    drain_timeout_s: Annotated[Seconds, "requests have this long to end when the node drains"] = 30.0
    max_handoffs: Annotated[int, "handoffs in flight from a node, and open reservations on it"] = 16
    max_handoff_bytes: Annotated[
        Bytes,
        "KV in flight from a node, and as much again of late prompts; 0: a quarter of its pool, or "
        "max_handoffs times the KV of token_budget tokens if that is more",
    ] = 0
    test_hooks: Annotated[bool, "serve the endpoints that tests need"] = False

    @property
    def connector_names(self) -> list[str]:
        return listed(self.connectors) or listed("cuda_ipc,nccl" if self.is_on_gpu else "shm,tcp")

    @property
    def is_on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def data_ports(self) -> range:
        return _ports("data_port", self.data_port)

    @property
    def http_ports(self) -> range:
        return _ports("http_port", self.http_port)

    def __post_init__(self) -> None:
        super().__post_init__()
        if re.search(f"[^{SUBJECT_CHARACTERS}]", self.node_id):
            raise ValueError(
                f"FLOWKV_NODE_ID is {self.node_id!r}: it is part of NATS subjects, only letters, digits, "
                "- and _ may stand in it"
            )
        for name, hosts in (("host", [self.host]), ("advertise_host", listed(self.advertise_host))):
            for host in hosts:
                try:
                    host.encode("idna")
                except UnicodeError as error:
                    raise ValueError(
                        f"FLOWKV_{name.upper()} is {host!r}, no name of a host: between the dots "
                        "there must be 1 to 63 characters"
                    ) from error
        for name in ("data_port", "http_port"):
            _ports(name, getattr(self, name))
        if len(self.data_ports) > 1 and self.advertise_port:
            raise ValueError("FLOWKV_ADVERTISE_PORT is for one FLOWKV_DATA_PORT, not for a range")
        if len({bool(self.data_tls_cert), bool(self.data_tls_key), bool(self.data_tls_ca)}) > 1:
            raise ValueError("FLOWKV_DATA_TLS_CERT, FLOWKV_DATA_TLS_KEY, FLOWKV_DATA_TLS_CA: all or none")
        if not 0.0 < self.gpu_memory_share <= 1.0:
            raise ValueError(f"FLOWKV_GPU_MEMORY_SHARE is {self.gpu_memory_share}: over 0, at most 1")
        # A node with both roles has a prefill chunk budget of over one block, and less than all.
        if self.token_budget <= 2 * self.block_size:
            raise ValueError(
                f"FLOWKV_TOKEN_BUDGET is {self.token_budget}, it must be more than two blocks: "
                f"FLOWKV_BLOCK_SIZE is {self.block_size}"
            )


def _ports(name: str, setting: str) -> range:
    """Those that a node may take one of. Raises ValueError for what is neither a port nor a range of them."""
    found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", setting, re.ASCII)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if not first <= last <= 65535 or (first == 0 < last):
        raise ValueError(f"FLOWKV_{name.upper()} is {setting!r}, it must be a port, or a range as 9201-9299")
    return range(first, last + 1)


KINDS: tuple[type[NatsSettings], ...] = (GatewaySettings, SchedulerSettings, NodeSettings)


class Setting(NamedTuple):
    """A setting as its user sees it."""

    name: str
    default: str | None  # None: it must be set
    unit: str
    choices: tuple[str, ...]  # none: anything
    text: str

    @property
    def variable(self) -> str:
        return f"FLOWKV_{self.name.upper()}"

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


def settings_of(kind: type[NatsSettings]) -> list[Setting]:
    """The settings of `kind`, in the order of the struct."""
    settings = []
    for field in msgspec.structs.fields(kind):
        base, *unit, text = get_args(field.type)
        choices = get_args(base) if get_origin(base) is Literal else ("true", "false") if base is bool else ()
        default = format(field.default, "g") if base is float else str(field.default)
        default = default.lower() if base is bool else default
        settings.append(
            Setting(field.name, None if field.required else default, "".join(unit), choices, text)
        )
    return settings


S = TypeVar("S", bound=NatsSettings)


def load_settings(kind: type[S], argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> S:
    """The settings from flags over environment over defaults.

    Raises SystemExit with a message for an unknown name, a missing setting or a bad value.
    """
    _refuse_unknown_variables(environ)
    parser = argparse.ArgumentParser(
        prog=kind.__name__.removesuffix("Settings").lower(),
        epilog="Each setting is also read from its variable. Flags win. See docs/settings.md.",
    )
    settings = {setting.name: setting for setting in settings_of(kind)}
    values: dict[str, str] = {}
    for name, setting in settings.items():
        if setting.variable in environ:
            values[name] = environ[setting.variable]
        default = "required" if setting.default is None else f"default {setting.default or 'empty'}"
        parser.add_argument(
            setting.flag,
            default=argparse.SUPPRESS,
            metavar="|".join(setting.choices) or setting.unit.upper() or "VALUE",
            help=f"{setting.text} ({default}, {setting.variable})".replace("%", "%%"),
        )
    flags = vars(parser.parse_args(argv))
    if "nats_url" in flags:  # a flag wins over a variable, also over that of the file
        values.pop("nats_url_file", None)
    values.update(flags)
    for setting in settings.values():
        if setting.default is None and not values.get(setting.name):
            raise SystemExit(f"settings: {setting.variable} (or {setting.flag}) is not set")
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        found = invalid_input(str(error))
        bad = settings.get(found.field or "")
        if bad is None:  # a complaint of `__post_init__`, which names its setting
            raise SystemExit(f"settings: {error}") from None
        what = found.message.removeprefix(f"{found.field}: ")
        if bad.choices:
            what = f"unknown value {values[bad.name]!r}: choose one of {', '.join(bad.choices)}"
        raise SystemExit(f"settings: {bad.variable} (or {bad.flag}): {what}") from None


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    known = OTHER_VARIABLES.keys() | {setting.variable for kind in KINDS for setting in settings_of(kind)}
    for name in environ:
        if name.startswith("FLOWKV_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise SystemExit(f"settings: unknown variable {name}{hint}")
