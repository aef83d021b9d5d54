"""Messages about nodes (descriptors, reports, orders, links) and from the leading scheduler.

The rules are those of `wire/messages.py`.
"""

from __future__ import annotations

import math

import msgspec

from flowkv_common.wire.messages import Amount, Count, Message, ModelCard, NodeRef, Part, PoolLayout, Positive


class BlockCounts(Part, frozen=True):
    """Where a pool's blocks are: `total` is the sum of the next four (docs/architecture.md, rule 5)."""

    total: Count
    free: Count
    cached: Count
    leased: Count
    quarantined: Count
    longest_free_run: Count


class StepFit(Part, frozen=True):
    """A node's own estimate of the seconds of one engine step: a sum of costs, each 0 until measured.

    base_s + prefill_token_s x prompt tokens + attended_token_s x their pairs of token and context token
           + sequence_s x decoding sequences + context_token_s x tokens in their KV caches
    """

    base_s: Amount
    prefill_token_s: Amount
    attended_token_s: Amount
    sequence_s: Amount
    context_token_s: Amount


# Before any output was seen: one of a chat's usual length, to nodes and schedulers alike. In tokens.
PRIOR_TOKENS = 256


class OutputForecast(Part, frozen=True):
    """How many more tokens a node expects of the sequences that decode there."""

    tokens_left: Amount  # of all of them together
    first_ends_in: Amount  # steps until the first of them ends
    stop_rate: Amount  # outputs that end by a stop or a cancel, per token
    # By class of prompt length (`length_class`): outputs and their tokens, so that the ratio is the mean.
    by_length: dict[int, tuple[Amount, Amount]] = {}


def length_class(num_prompt_tokens: int) -> int:
    """Prompts of one class differ in length by at most a factor of two."""
    return num_prompt_tokens.bit_length()


def num_attended(num_new: int, num_cached: int = 0) -> int:
    """Pairs of a prompt token that is to be computed and one that it attends to, itself included."""
    return num_new * num_cached + num_new * (num_new + 1) // 2


def expected_tokens(max_tokens: float, stop_rate: float) -> float:
    """Expected length of an output of at most `max_tokens` that ends at `stop_rate` per token."""
    return -math.expm1(-stop_rate * max_tokens) / stop_rate if stop_rate > 0.0 else max_tokens


# One number makes a node a prefill or a decode node: its prefill chunk budget, the most prompt tokens that it
# computes per engine step. All of the step's tokens: no room for decode. One block, the least: it prefills
# only what it has preempted itself. In between it serves both sides.


def starting_chunk_budget(role: str, token_budget: int, block_size: int) -> int:
    """The prefill chunk budget of a node that starts as `role`: prefill, decode or mixed. In tokens."""
    budgets = {"prefill": token_budget, "decode": block_size}
    return budgets.get(role, max(block_size, token_budget // 2))


def serves_prefill(chunk_budget: int, block_size: int) -> bool:
    return chunk_budget > block_size


def serves_decode(chunk_budget: int, token_budget: int) -> bool:
    return chunk_budget < token_budget


# What nodes say to each other, links and KV included. Only nodes of one number work together. It grows when
# those before could not live with a change; all others are fields with defaults (docs/protocol.md).
PROTOCOL = 1

# A node is silent when this many load reports in a row are missing: two may be lost by chance.
SILENT_AFTER_PERIODS = 3.0


class NodeDescriptor(Message, frozen=True):
    """What a node is; a record in the bucket `flowkv_nodes`, renewed while the node lives."""

    node: NodeRef
    role: str
    model: ModelCard
    layout: PoolLayout
    num_blocks: Positive
    token_budget: Positive
    max_prefill_tokens_per_step: Positive
    # Prefill and decode; `role` is what it starts as. Version 0.1.0 has this name on the wire.
    hosted_roles: list[str] = msgspec.field(name="guests")
    connectors: list[str]
    host: str
    pid: int
    metrics_url: str
    version: str
    memory: str = "host"  # of its KV cache, host or gpu: blocks move within one kind
    protocol: Positive = 1  # that of version 0.1.0, which does not tell
    has_data_tls: bool = False  # KV over TCP is encrypted
    boot_id: str = ""  # of the host's kernel: alike in all containers of one host
    num_cores: Amount = 0.0  # that its engine keeps busy; 0: it computes on a GPU, or does not tell
    num_host_cores: Count = 0


class LoadReport(Message, frozen=True):
    """The state of a node, published every `period_s` and on change; the latest wins."""

    node: NodeRef
    seq: Count
    period_s: Amount
    ready: bool
    draining: bool
    max_prefill_tokens_per_step: Positive
    queued_prefill_tokens: Count
    num_waiting: Count  # sequences that decode here: prompts count apart
    num_running: Count
    max_num_seqs: Positive
    blocks: BlockCounts
    prefill_tokens_per_s: Amount  # 0: nothing measured yet
    decode_step_s: Amount
    num_handoffs: Count
    handoff_bytes: Count
    links: dict[str, str] = {}  # by another connector than `usual_connector`: node_id -> connector
    num_prompts: Count = 0  # not computed yet
    num_context_tokens: Count = 0  # in the KV caches of the sequences that decode here
    # Since the node's start. They tell a scheduler which of its choices the report includes. A sequence gets
    # its blocks, counted as leased in `blocks`, when its prompt begins; it is accepted when its KV has come.
    num_prompts_accepted: Count = 0
    num_rooms_given: Count = 0
    num_sequences_accepted: Count = 0
    step: StepFit | None = None
    epoch: Count = 0  # the highest that this node has heard of
    forecast: OutputForecast | None = None
    num_links: Count = 0
    usual_connector: str = ""  # in use to most of the linked peers; "": to none yet, or all are in `links`
    interruptible_prefill_tokens: Count = 0  # of those queued: a prompt in time that comes now is before them
    queued_attended: Count = 0  # `num_attended` of those queued; 0: not known
    interruptible_attended: Count = 0
    # From the first block to the last in at most 64 cells: ninths of each that are leased, then cached. Empty
    # in a report that did not wait for its period: the one before holds.
    pool: str = ""
    is_cordoned: bool = False  # an operator has said so: it takes nothing new


class SetPrefillCap(Message, frozen=True):
    """Scheduler to node: the prefill chunk budget from the next step on.

    This lends a node to the other role and takes it back. Refused from a leader of an older epoch.
    """

    node: NodeRef
    epoch: int
    max_prefill_tokens_per_step: int
    reason: str


class BlocksChanged(Message, frozen=True):
    """The blocks that a node's prefix cache has gained and lost since its message `seq - 1`.

    A reader that missed one asks for the whole list with `ListBlocks`.
    """

    node: NodeRef
    seq: int
    stored: list[str]
    removed: list[str]


class ListBlocks(Message, frozen=True):
    """To a node: list your prefix cache, in pages counted from 0."""

    node: NodeRef
    page: int


class BlockList(Message, frozen=True):
    """One page. `seq` is of the last `BlocksChanged` before it: apply those after the first page's `seq`."""

    node: NodeRef
    seq: int
    num_pages: int
    block_hashes: list[str]


class LinkRequest(Message, frozen=True):
    """Node to node, at discovery: let me send KV to you.

    Refused unless layout, model and protocol are equal.
    """

    node: NodeRef
    peer: NodeRef
    layout: PoolLayout
    fingerprint: str
    protocol: Positive = 1


class LinkOffer(Message, frozen=True):
    """How to reach the peer's pool: per connector its address, and the secret that opens it."""

    node: NodeRef
    num_blocks: int
    token: str
    addresses: dict[str, str]  # connector -> address


class Drain(Message, frozen=True):
    """Operator to node: accept nothing new and finish what is here, until `ResumeNode`."""

    reason: str = ""


class Cordon(Message, frozen=True):
    """Operator to node: accept nothing new and keep what is here, however long, until `ResumeNode`."""

    reason: str = ""


class ResumeNode(Message, frozen=True):
    """Operator to node: drain or cordon is over, accept new work again."""


class Check(Message, frozen=True):
    """To a node: count your blocks and check that none is lost."""


class Checked(Message, frozen=True):
    """The counts, after `check_integrity()` passed, and what the node holds."""

    node: NodeRef
    blocks: BlockCounts
    num_requests: int
    num_reservations: int


class Wedge(Message, frozen=True):
    """Test hook, only with `FLOWKV_TEST_HOOKS=1`: block the engine thread."""

    for_s: float


class Leader(Message, frozen=True):
    """The leading scheduler; a record in the bucket `flowkv_leader`, renewed while it leads.

    It stays when its writer dies. An empty `scheduler_id` says that none leads.
    """

    scheduler_id: str
    epoch: int


REGIMES = "normal", "imbalance", "overload"  # the worst last


class RegimeChanged(Message, frozen=True):
    """The leading scheduler sees a model's nodes in another state: normal, imbalance or overload."""

    epoch: int
    before: str
    after: str
    reason: str
    model: str = ""  # its name; version 0.1.0 has one state for all


class CapMoved(Message, frozen=True):
    """A node has accepted another prefill chunk budget, in tokens."""

    node: NodeRef
    epoch: int
    after: int
    reason: str
    before: int | None = None  # None: its last report is not known


class ScaleWanted(Message, frozen=True):
    """`change` more nodes of a role (fewer if negative) would meet the goals.

    Holds until the next one for that role and model (0: the need has ended), or until another scheduler
    leads.
    """

    epoch: int
    role: str
    change: int
    reason: str
    model: str = ""  # its name; version 0.1.0 does not tell
