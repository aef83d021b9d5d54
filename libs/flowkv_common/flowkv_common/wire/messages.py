"""Every message on the bus but those of nodes and of the leader (`wire/nodes.py`), and their common parts.

JSON objects with the class name under `type`. Times are durations in seconds: two hosts don't share a clock.
Fields are only ever added, with a default, so that versions can run side by side (docs/protocol.md).
"""

from __future__ import annotations

import functools
import math
import sys
from array import array
from collections.abc import Sequence
from typing import Annotated, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

# JSON has no infinity and no NaN.
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Amount = Annotated[float, Meta(ge=0)]


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all that travels inside a message."""


class Run(NamedTuple):
    """Consecutive blocks of one pool: `start, start + 1, ... start + length - 1`."""

    start: int
    length: int


class LayerKV(NamedTuple):
    """What one layer keeps of a token: `num_sides` times `num_kv_heads` vectors of `head_dim` numbers."""

    num_kv_heads: Positive
    head_dim: Positive
    num_sides: Positive = 2  # keys and values; 1: latents, which are both (MLA)


class PoolLayout(Part, frozen=True, repr_omit_defaults=True, dict=True):
    """What a block holds: of each layer in turn `[num_sides, block_size, num_kv_heads, head_dim]` of `dtype`.

    Two pools can exchange blocks only when their layouts are equal; connectors compare their `repr`. Raises
    ValueError where `layers` are not `num_layers`.
    """

    num_layers: Positive
    block_size: Positive
    num_kv_heads: Positive
    head_dim: Positive
    dtype: str
    # Empty: each keeps keys and values of the sizes above. Else those are of the first layer.
    layers: tuple[LayerKV, ...] = ()

    @classmethod
    def of(cls, layers: Sequence[LayerKV], block_size: int, dtype: str) -> PoolLayout:
        """`layers`: of each layer that keeps something, in order."""
        first = layers[0]
        is_plain = all(layer == LayerKV(first.num_kv_heads, first.head_dim) for layer in layers)
        return cls(
            num_layers=len(layers),
            block_size=block_size,
            num_kv_heads=first.num_kv_heads,
            head_dim=first.head_dim,
            dtype=dtype,
            layers=() if is_plain else tuple(layers),
        )

    def __post_init__(self) -> None:
        if self.layers and len(self.layers) != self.num_layers:
            raise ValueError(f"{len(self.layers)} layers are described, of {self.num_layers}")

    @property
    def each_layer(self) -> tuple[LayerKV, ...]:
        return self.layers or (LayerKV(self.num_kv_heads, self.head_dim),) * self.num_layers

    @functools.cached_property
    def block_bytes(self) -> int:
        item = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}[self.dtype]
        return self.block_size * sum(math.prod(layer) for layer in self.each_layer) * item

    def blocks_for_prompt(self, num_tokens: int) -> int:
        """Blocks for a prompt of `num_tokens` tokens and its first output token, on either node."""
        return num_tokens // self.block_size + 1


class NodeRef(Part, frozen=True):
    """One incarnation of a node: a restarted process keeps its `node_id`, never its `incarnation`."""

    node_id: str
    incarnation: str


class ModelFiles(Part, frozen=True):
    """Digests of a model folder's files; a gateway compares them with those of its own folder.

    Empty where there is no such file, or where it is not used (random weights).
    """

    tokenizer: str = ""  # tokenizer.json
    config: str = ""  # config.json
    weights: str = ""  # all files with weights


class ModelCard(Part, frozen=True):
    """What a gateway must know of a model. `fingerprint` names weights and dtype; it seeds block hashes."""

    name: str
    fingerprint: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    files: ModelFiles = ModelFiles()
    folder: str = ""  # where the node has it: a gateway that finds the same there reads its tokenizer


class TokenIds(Part, frozen=True):
    """Packed token ids: how many, and each as 4 little-endian bytes, which JSON shows in base64.

    Raises ValueError where the two don't agree.
    """

    count: int
    packed: bytes = b""

    @classmethod
    def of(cls, token_ids: Sequence[int]) -> TokenIds:
        """`token_ids`: each from 0 to 2**32 - 1."""
        return cls(count=len(token_ids), packed=_little_endian(array("I", token_ids)).tobytes())

    def __post_init__(self) -> None:
        if len(self.packed) != 4 * self.count:
            raise ValueError(f"{len(self.packed)} bytes are not {self.count} token ids of 4 bytes")

    def __len__(self) -> int:
        return self.count

    def unpack(self) -> list[int]:
        token_ids = array("I")
        token_ids.frombytes(self.packed)
        return _little_endian(token_ids).tolist()


def _little_endian(token_ids: array[int]) -> array[int]:
    if sys.byteorder == "big":
        token_ids.byteswap()
    return token_ids


# A lower temperature is greedy in all but name, and to divide logits by it overflows.
GREEDY_BELOW = 1e-5


class Grammar(Part, frozen=True):
    """What an answer must look like. Whoever samples derives its state from the output ids.

    `kind`: "json_schema", "regex", "lark" or "ebnf": how `text` is read (`flowkv_common/grammar.py`).
    """

    kind: str
    text: str


class SamplingParams(Part, frozen=True):
    """How tokens are chosen. These and the prompt determine the text, whichever node samples."""

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] = []  # end the text as EOS does, also where EOS is ignored
    num_logprobs: int | None = None  # None: none; 0: of the chosen token; k: and of the k best
    grammar: Grammar | None = None
    allowed_token_ids: list[int] = []  # empty: all
    bad_words: list[list[int]] = []  # token sequences that the output may not have in it
    num_prompt_logprobs: int | None = None  # the same as `num_logprobs`, of the prompt's tokens


class TokenLogprob(Part, frozen=True):
    """Log probability of a token, and of the best ones as `(token id, log probability)`."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []
    rank: int = 0  # of a prompt's token among all, from 1


class Phase(Part, frozen=True):
    """A stretch of an attempt's time. `at_s` counts from when the attempt came to the one who tells it."""

    name: str  # queue | reserve | chunk | send | step | gap
    at_s: Amount
    took_s: Amount
    num_tokens: Count = 0  # of a chunk: computed in it
    num_bytes: Count = 0  # of a send, as the next two
    num_copies: Count = 0
    num_calls: Count = 0


class NodeTimes(Part, frozen=True):
    """What an attempt did on one node, all by that node's clock; told with the first token that follows.

    `part`: prefill (from its arrival to its first token), handoff (from the same arrival to its commit) or
    decode (from the commit to the node's first token).
    """

    node_id: str
    part: str
    total_s: Amount
    phases: list[Phase] = []  # in order; what lies between them was a wait
    connector: str = ""  # of the sends


class Candidate(Part, frozen=True):
    """A node that the scheduler considered, and the predicted seconds until it could serve."""

    node_id: str
    predicted_s: float
    reason: str


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """Base of all that travels on its own."""


M = TypeVar("M")

# From 0. Small, since a node looks up all older attempts of a request.
AttemptNumber = Annotated[int, Meta(ge=0, le=99)]
# As `transfer_id` makes it.
TransferId = Annotated[str, Meta(pattern=r"\.(0|[1-9][0-9]?)\Z")]


def encode(message: msgspec.Struct) -> bytes:
    """The JSON bytes of a message."""
    return msgspec.json.encode(message)


def decode(payload: bytes, kind: type[M]) -> M:
    """The message in `payload`. Raises `msgspec.DecodeError` if it is not a `kind`."""
    try:
        return msgspec.json.decode(payload, type=kind)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(str(error)) from None


def transfer_id(request_id: str, attempt: int) -> str:
    """The name of an attempt, everywhere (docs/architecture.md, rule 2)."""
    return f"{request_id}.{attempt}"


# --- replies and errors --------------------------------------------------------------------------


class Accepted(Message, frozen=True):
    """The node has accepted the request; tokens or an error will follow."""

    node_id: str


class Refusal(Message, frozen=True):
    """The body of every error reply; `code` is HTTP-like, `field` names what was wrong with the input."""

    code: int
    message: str
    field: str | None = None
    retry_after_s: float | None = None


# --- scheduling ----------------------------------------------------------------------------------


class ScheduleRequest(Message, frozen=True):
    """Asks for a pair of nodes. Lengths only: the scheduler never sees the text."""

    request_id: str
    attempt: AttemptNumber
    fingerprint: str  # of the model: nodes of another are not for this request
    num_prompt_tokens: int
    max_new_tokens: int
    num_output_tokens: int = 0  # those of the prompt that the client has seen: such a request is never shed
    priority: int = 0  # smaller is more urgent
    age_s: float = 0.0
    avoid: list[str] = []  # nodes that failed this request before
    deadline_in_s: float = 600.0
    block_hashes: list[str] = []  # of the prompt's full blocks: a node that has them need not compute them
    ttft_goal_s: float = 0.0  # 0: that of the cluster, as the next one
    itl_goal_s: float = 0.0
    is_batch: bool = False  # served with what others leave
    # The decode node of the attempt before, while that still runs: a pair is the answer only if a move pays.
    runs_on: str = ""
    overdue_s: Amount = 0.0  # nothing has come of it for so long, from when its next token was due
    gap_s: Amount = 0.0  # between the last two tokens from that node; 0: fewer have come


class Assignment(Message, frozen=True):
    """The pair for one attempt, and the best candidates of each role, which explain the choice."""

    request_id: str
    attempt: AttemptNumber
    epoch: int
    prefill: NodeRef
    decode: NodeRef
    reason: str
    prefill_candidates: list[Candidate]
    decode_candidates: list[Candidate]
    first_token_in_s: float = 0.0  # predicted, from now
    promised_first_token_in_s: float | None = None  # the same by the node's own word, however it is believed
    due_in_s: float = 0.0  # the first token: later for requests that are late
    interruptible_for_s: float = 0.0  # by prompts in time, while it is not computed
    itl_goal_s: Amount = 0.0  # the pair was chosen for this time between tokens; 0: unknown


class Wait(Message, frozen=True):
    """No pair can take the request now: ask again in `retry_in_s`, with the request's age."""

    retry_in_s: float
    reason: str
    first_token_in_s: float = 0.0  # predicted, from now; 0: unknown


class ReadyRequest(Message, frozen=True):
    """Gateway to scheduler, twice a second: does this model have nodes for both roles, even if full?"""

    fingerprint: str


class ReadyReply(Message, frozen=True):
    """The answer of the leading scheduler. `why_not` is None if the model has nodes."""

    epoch: int
    why_not: str | None = None
    doubted: list[NodeRef] = []  # that are far slower than they say: what runs there may ask to move


# --- the life of a request -----------------------------------------------------------------------


class PrefillRun(Message, frozen=True):
    """Gateway to prefill node: compute the prompt, then hand over to `decode`.

    `output_ids` are the tokens of earlier attempts; generation continues after them.
    """

    request_id: str
    attempt: AttemptNumber
    epoch: int
    node: NodeRef
    fingerprint: str  # of the model: a node that serves another refuses
    decode: NodeRef
    gateway_id: str
    prompt_ids: TokenIds
    output_ids: TokenIds
    sampling: SamplingParams
    deadline_in_s: float
    due_in_s: float = 0.0  # its first token: a node computes the prompt first that is due first
    interruptible_for_s: float = 0.0  # prompts in time that come by then are due before it


class Reserve(Message, frozen=True):
    """Prefill to decode node: reserve blocks for `num_tokens` tokens, or with a `token` renew a reservation.

    `block_hashes` are of the full blocks, so that decode can pin those it has; `run_lengths` are the runs of
    the sender's blocks, so that decode can choose runs to match. A renewal needs neither.
    """

    transfer_id: TransferId
    node: NodeRef
    fingerprint: str  # of the model: a node that serves another refuses
    prefill: NodeRef
    gateway_id: str
    num_tokens: int
    block_hashes: list[str]
    run_lengths: list[int]
    expires_in_s: float
    again: bool = False  # after a `Release`: this reservation was counted before
    token: str = ""  # of the reservation to renew: a late renewal must not open another


class Reserved(Message, frozen=True):
    """Decode's answer: the blocks in order; the first `num_cached_blocks` already hold their KV.

    Every write into these blocks must carry `token`.
    """

    transfer_id: str
    token: str
    runs: list[Run]
    num_cached_blocks: int


class Release(Message, frozen=True):
    """Prefill to decode node: free the reservation. The request has ended, or begins to reserve again."""

    transfer_id: TransferId
    token: str


class DecodeRun(Message, frozen=True):
    """Prefill to decode node: the KV cache has landed, continue after the last of `output_ids`.

    This is the commit: prefill sends it only if its own blocks were leased throughout every copy.
    """

    request_id: str
    attempt: AttemptNumber
    epoch: int
    node: NodeRef
    fingerprint: str  # of the model: a node that serves another refuses
    prefill: NodeRef
    token: str
    gateway_id: str
    prompt_ids: TokenIds
    output_ids: TokenIds
    sampling: SamplingParams
    deadline_in_s: float
    handoff: NodeTimes | None = None  # for the gateway, with decode's first token


class Resume(Message, frozen=True):
    """Gateway to decode node: a message was lost, send the output again from `from_index`."""

    transfer_id: TransferId
    from_index: int


class Cancel(Message, frozen=True):
    """Gateway to nodes: stop this attempt and free all it holds. Idempotent; may come before the attempt."""

    transfer_id: TransferId
    reason: str
    goes_on: bool = False  # elsewhere: its output has not ended


class TokenChunk(Part, frozen=True):
    """The tokens of one request from one engine step; the first has place `index` in the output.

    Also in the reply to `Resume`. An `error` ends the attempt, a `finish_reason` the request.
    """

    transfer_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] = []
    finish_reason: str | None = None
    error: Refusal | None = None
    num_cached_tokens: int = 0
    phases_s: dict[str, float] = {}  # seconds per phase on the sending node
    # Of the prompt's tokens from place `prompt_index` on: the first token of all has none. Such chunks have
    # no output, and come in order before the first that has some.
    prompt_logprobs: list[TokenLogprob] = []
    prompt_index: int = 0
    times: list[NodeTimes] = []  # with the first token that a node sends of an attempt


class Resumed(Message, frozen=True):
    """The output from the asked index on."""

    chunk: TokenChunk


class StepTokens(Message, frozen=True):
    """The tokens of one engine step for one gateway."""

    node_id: str
    chunks: list[TokenChunk]


class Keepalive(Message, frozen=True):
    """Node to gateway, once a second: these attempts live here. A gateway that does not answer is gone."""

    node: NodeRef
    states: dict[str, str]  # transfer_id -> queued | prefill | handoff | reserved | decode | preempted


class KeepaliveReply(Message, frozen=True):
    """Those of the attempts that the gateway does not know: their cancel was lost."""

    unknown: list[str]


class NodeSeen(Part, frozen=True):
    """One node, as a gateway saw it since it last said so. The sums are over first tokens, and over gaps."""

    node: NodeRef
    num_prompts: Count = 0  # whose first token has come, or was given up after it was due
    promised_s: Amount = 0.0
    taken_s: Amount = 0.0
    num_gaps: Count = 0  # between two tokens of a sequence that decodes there
    gaps_s: Amount = 0.0
    prompt_stall_s: Amount = 0.0  # since the last first token, or since one is due: the later of both
    step_stall_s: Amount = 0.0  # since the last token, where sequences decode


class NodesSeen(Message, frozen=True):
    """Gateway to schedulers, four times a second: what it saw of nodes that had work of it."""

    gateway_id: str
    nodes: list[NodeSeen]


# --- events --------------------------------------------------------------------------------------


class AttemptTimes(Part, frozen=True):
    """One attempt, as its gateway saw it: seconds since the request began; None: that did not happen.

    `flowkv_common/timeline.py` makes one line of it and of what the nodes told.
    """

    began_s: Amount
    ended_s: Amount
    turn_s: Amount = 0.0  # after `began_s`: waited for the turn of its key
    num_asks: Count = 0  # of a scheduler
    wait_reason: str = ""  # in its last answer that was no pair
    assigned_s: Amount | None = None
    assignment: Assignment | None = None
    first_token_s: Amount | None = None  # the first one of this attempt
    second_token_s: Amount | None = None  # the first one from decode
    last_token_s: Amount | None = None
    gaps: list[Phase] = []  # between tokens, longer than `itl_goal_s` of the assignment
    nodes: list[NodeTimes] = []
    why_ended: str = ""  # before the answer's end


class RequestFinished(Message, frozen=True):
    """One per request, at its end: where it ran and where its time went."""

    request_id: str
    attempts: int
    outcome: str  # stop | length | closed (stop string, or the client left) | error
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    prefill_node: str
    decode_node: str
    phases_s: dict[str, float]
    error: str | None = None
    predicted_ttft_s: float = 0.0  # by the scheduler's first answer; 0: none
    began_at: float = 0.0  # seconds since 1970 by the gateway's clock: for people, nothing is reckoned by it
    attempt_times: list[AttemptTimes] = []


class FindFinished(Message, frozen=True):
    """To all gateways: which requests have ended? Each answers for its own."""

    request_id: str = ""  # this one alone; empty: the last ones
    last: Count = 1


class FinishedRequests(Message, frozen=True):
    """What a gateway remembers of them, the newest first, as far as a message holds them."""

    gateway_id: str
    requests: list[RequestFinished]


class KVTransferred(Message, frozen=True):
    """One per handoff. `total_s` is `hidden_s`, while prefill still computed, plus `exposed_s`."""

    transfer_id: str
    prefill_node: str
    decode_node: str
    connector: str
    num_bytes: int
    num_copies: int
    num_calls: int
    total_s: float
    exposed_s: float
    hidden_s: float = 0.0
