"""A live scheduler with scripted nodes is recorded; the replay decides the same."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from benchmarks import replay
from benchmarks.baselines import make_planner
from benchmarks.record import NODE_PREFIX, Recorder, read_lines, recording
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.config import SchedulerSettings
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Assignment, NodeRef
from flowkv_common.wire.nodes import CapMoved
from flowkv_scheduler.app import serve
from flowkv_scheduler.cluster import Goals
from tests.described_nodes import ReportingNode, reporting, request, schedule, until_answer
from tests.nats_server import NatsServer

ROOT = Path(__file__).resolve().parents[2]


async def ask_in_bursts(bus: Bus, p0: ReportingNode) -> list[tuple[str, str]]:
    """Requests of many lengths while loads change; the pairs that they got."""
    pairs = []
    for burst in range(4):
        p0.changes["queued_prefill_tokens"] = 150 * burst
        await p0.report()
        for i in range(8):
            wanted = request(request_id=f"r{burst}-{i}", num_prompt_tokens=10 + 23 * i)
            answer = await schedule(bus, wanted)
            assert isinstance(answer, Assignment)
            pairs.append((answer.prefill.node_id, answer.decode.node_id))
    return pairs


async def test_recording_of_a_live_scheduler_replays_to_the_same_choices(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    path, stop = tmp_path / "events.jsonl", asyncio.Event()
    roles = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
    with path.open("wb") as out:
        async with connect(nats_server.url, name="test") as bus, connect(nats_server.url, name="rec") as ears:
            # A long period: no choice is forgotten and no node falls silent at a moment that two clocks see
            # differently. Places for all, since none is given back.
            kept = {"period_s": 30.0, "max_num_seqs": 64}
            nodes = {name: ReportingNode(bus, name, role, **kept) for name, role in roles.items()}
            async with recording(ears, Recorder(out)), asyncio.TaskGroup() as tasks:
                tasks.create_task(serve(SchedulerSettings(nats_url=nats_server.url), stop))
                async with reporting(*nodes.values()):
                    await until_answer(
                        bus, lambda m: isinstance(m, Assignment) and len(m.decode_candidates) == 2
                    )
                    live = await ask_in_bursts(bus, nodes["p0"])
                    event = CapMoved(
                        node=NodeRef(node_id="d0", incarnation="i1"), epoch=1, after=512, reason="by hand"
                    )
                    await bus.publish(subjects.event("cap_moved", "d0"), event)
                    await bus.nc.flush(5)
                stop.set()
    done = replay.Replay(make_planner("flowkv", Goals(), 0))
    done.run(read_lines(path))
    questions = [question for question in done.questions if question.request.request_id.startswith("r")]
    assert len(set(live)) >= 4  # else any policy would do
    assert [question.replayed.pair for question in questions[-32:]] == live
    assert {question.outcome for question in questions[-32:]} == {"alike"}
    kinds = {line.subject for line in read_lines(path)}
    assert kinds >= {
        NODE_PREFIX + "p0",
        subjects.load("p0"),
        subjects.SCHEDULE,
        "flowkv.v1.event.cap_moved.d0",
    }
    other = replay.Replay(make_planner("round_robin", Goals(), 0))
    other.run(read_lines(path))
    assert [question.replayed.pair for question in other.questions[-32:]] != live


async def test_recorder_as_a_process_ends_by_itself_with_all_it_heard(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    path = tmp_path / "events.jsonl"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "benchmarks", "record", "--nats", nats_server.url, "--out", str(path), "--seconds", "1.5"),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(20), connect(nats_server.url, name="test") as bus:
        async with reporting(ReportingNode(bus, "p0", "prefill")):
            _, said = await process.communicate()
    lines = list(read_lines(path))
    assert process.returncode == 0
    assert f"{len(lines)} lines in {path}".encode() in said
    assert {line.subject for line in lines} == {NODE_PREFIX + "p0", subjects.load("p0")}
    assert [line.t for line in lines] == sorted(line.t for line in lines)
