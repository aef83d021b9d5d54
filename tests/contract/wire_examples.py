"""One example of every message, with every field set, and the golden file that shows it as JSON.

After a meant change of a message, `python tests/contract/wire_examples.py` writes the golden files anew; the
diff then shows what changes for everyone on the wire.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from flowkv_common.wire import messages, nodes
from flowkv_common.wire import messages as parts
from flowkv_common.wire.messages import (
    Accepted,
    Assignment,
    AttemptTimes,
    Cancel,
    Candidate,
    DecodeRun,
    FindFinished,
    FinishedRequests,
    Grammar,
    Keepalive,
    KeepaliveReply,
    KVTransferred,
    LayerKV,
    Message,
    ModelCard,
    ModelFiles,
    NodeRef,
    NodeSeen,
    NodesSeen,
    NodeTimes,
    Part,
    Phase,
    PoolLayout,
    PrefillRun,
    ReadyReply,
    ReadyRequest,
    Refusal,
    Release,
    RequestFinished,
    Reserve,
    Reserved,
    Resume,
    Resumed,
    Run,
    SamplingParams,
    ScheduleRequest,
    StepTokens,
    TokenChunk,
    TokenIds,
    TokenLogprob,
    Wait,
    encode,
)
from flowkv_common.wire.nodes import (
    BlockCounts,
    BlockList,
    BlocksChanged,
    CapMoved,
    Check,
    Checked,
    Cordon,
    Drain,
    Leader,
    LinkOffer,
    LinkRequest,
    ListBlocks,
    LoadReport,
    NodeDescriptor,
    OutputForecast,
    RegimeChanged,
    ResumeNode,
    ScaleWanted,
    SetPrefillCap,
    StepFit,
    Wedge,
)

GOLDEN = Path(__file__).with_name("golden")

# All that the protocol has; tests may define more, which are none of it.
MODULES = (messages.__name__, nodes.__name__, parts.__name__)
MESSAGES = [kind for kind in Message.__subclasses__() if kind.__module__ in MODULES]
PARTS = [kind for kind in Part.__subclasses__() if kind.__module__ in MODULES]

REQUEST_ID = "chatcmpl-5f2a"
TRANSFER_ID = "chatcmpl-5f2a.1"
GATEWAY_ID = "gateway-0c11"
PREFILL = NodeRef(node_id="prefill-0", incarnation="a1b2c3d4")
DECODE = NodeRef(node_id="decode-0", incarnation="99887766")
LAYOUT = PoolLayout.of([LayerKV(4, 256), LayerKV(1, 512)], block_size=16, dtype="float32")
CARD = ModelCard(
    name="SmolLM2-135M-Instruct",
    fingerprint="3bb4e6a0",
    max_model_len=8192,
    vocab_size=49152,
    eos_token_ids=[2],
    files=ModelFiles(tokenizer="9f0c2d51", config="61e7a8b2", weights="c4d3b0aa"),
    folder="/models/smollm2",
)
SAMPLING = SamplingParams(
    max_tokens=32,
    seed=7,
    temperature=0.5,
    top_p=0.75,
    top_k=40,
    min_p=0.125,
    frequency_penalty=0.25,
    presence_penalty=0.5,
    repetition_penalty=1.25,
    logit_bias={42: -1.5},
    min_tokens=2,
    ignore_eos=True,
    stop_token_ids=[42],
    num_logprobs=2,
    grammar=Grammar(kind="regex", text="yes|no"),
    allowed_token_ids=[42, 43],
    bad_words=[[43], [42, 43]],
    num_prompt_logprobs=1,
)
BLOCKS = BlockCounts(total=1024, free=900, cached=100, leased=20, quarantined=4, longest_free_run=880)
FULL = Refusal(code=429, message="no room for 5 blocks", field="num_tokens", retry_after_s=0.05)
PHASES_S = {"queue": 0.25, "prefill": 0.5}
SEND = Phase(
    name="send", at_s=0.25, took_s=0.125, num_tokens=64, num_bytes=1843200, num_copies=2, num_calls=2
)
TIMES = NodeTimes(
    node_id="prefill-0",
    part="handoff",
    total_s=0.75,
    phases=[SEND],
    connector="shm",
)
CHUNK = TokenChunk(
    transfer_id=TRANSFER_ID,
    index=3,
    token_ids=[504, 260],
    logprobs=[
        TokenLogprob(token_id=504, logprob=-0.25, top=[(504, -0.25), (28, -1.75)], rank=1),
        TokenLogprob(token_id=260, logprob=-0.5, top=[(260, -0.5), (253, -1.25)], rank=1),
    ],
    finish_reason="length",
    error=FULL,
    num_cached_tokens=16,
    phases_s=PHASES_S,
    prompt_logprobs=[TokenLogprob(token_id=28, logprob=-1.5, top=[(260, -0.5)], rank=2)],
    prompt_index=2,
    times=[TIMES],
)
ASSIGNMENT = Assignment(
    request_id=REQUEST_ID,
    attempt=1,
    epoch=1,
    prefill=PREFILL,
    decode=DECODE,
    reason="best of 1 pairs",
    prefill_candidates=[Candidate(node_id="prefill-0", predicted_s=0.125, reason="0 tokens ahead")],
    decode_candidates=[Candidate(node_id="decode-0", predicted_s=0.03125, reason="2 of 64 sequences")],
    first_token_in_s=0.125,
    promised_first_token_in_s=0.0625,
    due_in_s=4.5,
    interruptible_for_s=2.25,
    itl_goal_s=0.25,
)
FINISHED = RequestFinished(
    request_id=REQUEST_ID,
    attempts=2,
    outcome="error",
    num_prompt_tokens=70,
    num_output_tokens=5,
    num_cached_tokens=16,
    prefill_node="prefill-0",
    decode_node="decode-0",
    phases_s=PHASES_S,
    error="the request ran out of time",
    predicted_ttft_s=2.5,
    began_at=1767225600.5,
    attempt_times=[
        AttemptTimes(
            began_s=0.125,
            ended_s=8.5,
            turn_s=0.0625,
            num_asks=2,
            wait_reason="all 1 decode nodes are full",
            assigned_s=0.25,
            assignment=ASSIGNMENT,
            first_token_s=1.25,
            second_token_s=1.5,
            last_token_s=8.25,
            gaps=[SEND],
            nodes=[TIMES],
            why_ended="the request ran out of time",
        )
    ],
)

EXAMPLES: list[Message] = [
    Accepted(node_id="prefill-0"),
    FULL,
    ScheduleRequest(
        request_id=REQUEST_ID,
        attempt=1,
        fingerprint=CARD.fingerprint,
        num_prompt_tokens=70,
        max_new_tokens=32,
        num_output_tokens=1,
        priority=-1,
        age_s=0.75,
        avoid=["decode-1"],
        deadline_in_s=599.25,
        block_hashes=["00112233445566778899aabbccddeeff"],
        ttft_goal_s=1.5,
        itl_goal_s=0.0625,
        is_batch=True,
        runs_on="decode-1",
        overdue_s=0.5,
        gap_s=0.375,
    ),
    ASSIGNMENT,
    Wait(retry_in_s=0.25, reason="all 1 decode nodes are full", first_token_in_s=2.5),
    ReadyRequest(fingerprint=CARD.fingerprint),
    ReadyReply(epoch=1, why_not="no node of the model is ready", doubted=[DECODE]),
    PrefillRun(
        request_id=REQUEST_ID,
        attempt=1,
        epoch=1,
        node=PREFILL,
        fingerprint=CARD.fingerprint,
        decode=DECODE,
        gateway_id=GATEWAY_ID,
        prompt_ids=TokenIds.of([1, 4093, 28]),
        output_ids=TokenIds.of([504]),
        sampling=SAMPLING,
        deadline_in_s=599.5,
        due_in_s=3.5,
        interruptible_for_s=1.25,
    ),
    Reserve(
        transfer_id=TRANSFER_ID,
        node=DECODE,
        fingerprint=CARD.fingerprint,
        prefill=PREFILL,
        gateway_id=GATEWAY_ID,
        num_tokens=71,
        block_hashes=["00112233445566778899aabbccddeeff"],
        run_lengths=[4, 1],
        expires_in_s=30.0,
        again=True,
        token="secret",
    ),
    Reserved(transfer_id=TRANSFER_ID, token="secret", runs=[Run(8, 4), Run(2, 1)], num_cached_blocks=1),
    Release(transfer_id=TRANSFER_ID, token="secret"),
    DecodeRun(
        request_id=REQUEST_ID,
        attempt=1,
        epoch=1,
        node=DECODE,
        fingerprint=CARD.fingerprint,
        prefill=PREFILL,
        token="secret",
        gateway_id=GATEWAY_ID,
        prompt_ids=TokenIds.of([1, 4093, 28]),
        output_ids=TokenIds.of([504, 260]),
        sampling=SAMPLING,
        deadline_in_s=599.0,
        handoff=TIMES,
    ),
    Resume(transfer_id=TRANSFER_ID, from_index=3),
    Resumed(chunk=CHUNK),
    Cancel(transfer_id=TRANSFER_ID, reason="not wanted any more", goes_on=True),
    StepTokens(node_id="decode-0", chunks=[CHUNK]),
    Keepalive(node=DECODE, states={TRANSFER_ID: "decode"}),
    KeepaliveReply(unknown=[TRANSFER_ID]),
    NodesSeen(
        gateway_id=GATEWAY_ID,
        nodes=[
            NodeSeen(
                node=DECODE,
                num_prompts=2,
                promised_s=0.25,
                taken_s=0.375,
                num_gaps=40,
                gaps_s=1.25,
                prompt_stall_s=0.5,
                step_stall_s=0.03125,
            )
        ],
    ),
    NodeDescriptor(
        node=DECODE,
        role="decode",
        model=CARD,
        layout=LAYOUT,
        num_blocks=1024,
        token_budget=512,
        max_prefill_tokens_per_step=16,
        hosted_roles=["decode", "prefill"],
        connectors=["shm", "tcp"],
        memory="gpu",
        host="10.0.0.7",
        pid=4711,
        metrics_url="http://10.0.0.7:9102/metrics",
        version="0.1.0",
        protocol=2,
        has_data_tls=True,
        boot_id="945ac35a-b79c-4359-95f0-22261494e0e7",
        num_cores=2.5,
        num_host_cores=8,
    ),
    LoadReport(
        node=DECODE,
        seq=12,
        period_s=0.5,
        ready=True,
        draining=False,
        max_prefill_tokens_per_step=16,
        queued_prefill_tokens=128,
        num_waiting=1,
        num_running=2,
        max_num_seqs=64,
        blocks=BLOCKS,
        prefill_tokens_per_s=1200.0,
        decode_step_s=0.03125,
        num_handoffs=1,
        handoff_bytes=1843200,
        links={"prefill-0": "shm"},
        num_prompts=3,
        num_context_tokens=1024,
        num_prompts_accepted=9,
        num_rooms_given=6,
        num_sequences_accepted=4,
        step=StepFit(
            base_s=0.015625,
            prefill_token_s=0.0009765625,
            attended_token_s=0.00000095367431640625,
            sequence_s=0.00390625,
            context_token_s=0.0000019073486328125,
        ),
        epoch=3,
        forecast=OutputForecast(
            tokens_left=192.5, first_ends_in=3.5, stop_rate=0.00390625, by_length={7: (5.0, 960.5)}
        ),
        num_links=3,
        usual_connector="tcp",
        interruptible_prefill_tokens=96,
        queued_attended=10496,
        interruptible_attended=7728,
        pool="902700",
        is_cordoned=True,
    ),
    SetPrefillCap(node=DECODE, epoch=3, max_prefill_tokens_per_step=512, reason="prefill is short of nodes"),
    BlocksChanged(
        node=DECODE,
        seq=7,
        stored=["00112233445566778899aabbccddeeff"],
        removed=["ffeeddccbbaa99887766554433221100"],
    ),
    ListBlocks(node=DECODE, page=1),
    BlockList(node=DECODE, seq=7, num_pages=2, block_hashes=["00112233445566778899aabbccddeeff"]),
    Leader(scheduler_id="scheduler-0c11", epoch=3),
    LinkRequest(node=DECODE, peer=PREFILL, layout=LAYOUT, fingerprint="3bb4e6a0", protocol=2),
    LinkOffer(node=DECODE, num_blocks=1024, token="secret", addresses={"tcp": "10.0.0.7:40123"}),
    Drain(reason="maintenance"),
    Cordon(reason="maintenance"),
    ResumeNode(),
    Check(),
    Checked(node=DECODE, blocks=BLOCKS, num_requests=2, num_reservations=1),
    Wedge(for_s=10.0),
    FINISHED,
    FindFinished(request_id=REQUEST_ID, last=20),
    FinishedRequests(gateway_id=GATEWAY_ID, requests=[FINISHED]),
    KVTransferred(
        transfer_id=TRANSFER_ID,
        prefill_node="prefill-0",
        decode_node="decode-0",
        connector="shm",
        num_bytes=1843200,
        num_copies=2,
        num_calls=2,
        total_s=0.0625,
        exposed_s=0.03125,
        hidden_s=0.03125,
    ),
    RegimeChanged(
        epoch=3, before="normal", after="overload", reason="all prefill nodes are over 0.9", model=CARD.name
    ),
    CapMoved(node=DECODE, epoch=3, after=512, reason="prefill is short of nodes", before=16),
    ScaleWanted(epoch=3, role="prefill", change=2, reason="all prefill nodes are over 0.9", model=CARD.name),
]


def golden_file(kind: type[Message]) -> Path:
    return GOLDEN / f"{kind.__name__}.json"


def as_golden(message: Message) -> bytes:
    """The message's JSON, laid out for people."""
    return msgspec.json.format(encode(message), indent=2) + b"\n"


if __name__ == "__main__":
    for example in EXAMPLES:
        golden_file(type(example)).write_bytes(as_golden(example))
