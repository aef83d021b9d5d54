"""What `flowkv top` draws follows from what was heard."""

from __future__ import annotations

import io
import re

import msgspec
import pytest
from rich.console import Console

from flowkv.top import BAR_WIDTH, phase_bar, screen
from flowkv_common.cluster_view import ClusterView
from flowkv_common.wire.messages import RequestFinished
from flowkv_common.wire.nodes import CapMoved
from tests.described_nodes import MODEL, descriptor, report
from tests.played_cluster import transferred


def finished(number: int, **phases_s: float) -> RequestFinished:
    return RequestFinished(
        request_id=f"cmpl-{number}",
        attempts=1,
        outcome="length",
        num_prompt_tokens=40,
        num_output_tokens=4,
        num_cached_tokens=32,
        prefill_node="p0",
        decode_node="d0",
        phases_s=phases_s,
    )


@pytest.fixture
def view() -> ClusterView:
    view = ClusterView()
    nodes = (descriptor("p0", "prefill"), descriptor("d0", "decode"))
    view.on_nodes({node.node.node_id: node for node in nodes})
    view.on_report(report("p0", "prefill"))
    view.on_report(report("d0", "decode", num_running=3, decode_step_s=0.03))
    for number in range(30):
        view.on_event(finished(number, ttft=0.25, queue=0.1, prefill=0.1, decode=0.8, total=1.0))
    node = nodes[1].node
    view.on_event(CapMoved(node=node, epoch=1, before=16, after=512, reason="prompts wait"))
    view.on_event(transferred(transfer_id="cmpl-29.0", num_bytes=5_000_000, total_s=0.1, exposed_s=0.1))
    return view


def drawn(view: ClusterView, width: int, height: int) -> list[str]:
    paper = Console(width=width, record=True, file=io.StringIO())
    paper.print(screen(view, height))
    return paper.export_text().splitlines()


def test_the_newest_requests_come_first_and_the_screen_is_not_overfull(view: ClusterView) -> None:
    lines = drawn(view, width=160, height=30)
    assert len(lines) <= 30
    requests = [line for line in lines if "cmpl-" in line]
    assert [re.search(r"cmpl-(\d+)", line)[1] for line in requests[:2]] == ["29", "28"]  # type: ignore[index]
    assert "40 (32) + 4" in requests[0]
    assert "p0 > d0 shm 5.0 MB" in requests[0]
    shown = "\n".join(lines)
    assert "100 tokens/s, 3 decoding" in shown
    assert "d0 chunk 16 > 512: prompts wait" in shown


def test_a_bar_has_a_scale_for_all_requests() -> None:
    short = finished(0, prefill=0.25, decode=0.25, total=0.5)
    cells = re.findall(r"\[(\w+)\](\S+?)\[/\]", phase_bar(short, longest_s=1.0))
    assert [(colour, len(blocks)) for colour, blocks in cells] == [
        ("blue", BAR_WIDTH // 4),
        ("green", BAR_WIDTH // 4),
        ("dim", BAR_WIDTH // 2),
    ]
    assert phase_bar(finished(0), longest_s=0.0) == ""


def test_of_several_models_each_node_has_its_own(view: ClusterView) -> None:
    assert not any("other-model" in line for line in drawn(view, 160, 40))
    other = descriptor("o0", "decode", model=msgspec.structs.replace(MODEL, name="other-model"))
    view.on_nodes({"p0": descriptor("p0", "prefill"), "o0": other})
    shown = drawn(view, 160, 40)
    assert [line.split()[:2] for line in shown if line.strip().startswith(("p0 ", "o0 "))][:2] == [
        ["p0", MODEL.name],
        ["o0", "other-model"],
    ]
