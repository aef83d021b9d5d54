"""What people are shown of a cluster follows from what was heard."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from flowkv_common.cluster_view import (
    ASK_PERIOD_S,
    GONE_AFTER_QUESTIONS,
    LOCAL_CONNECTORS,
    ClusterView,
    ServiceInfo,
)
from flowkv_common.wire.nodes import PROTOCOL, RegimeChanged, ScaleWanted
from flowkv_engine.transport.mapped import CudaIpcConnector, ShmConnector
from flowkv_engine.transport.nccl import NcclConnector
from flowkv_engine.transport.nixl import NixlConnector
from flowkv_engine.transport.tcp import TcpConnector
from tests.described_nodes import BLOCK_SIZE, MODEL, PERIOD_S, TOKEN_BUDGET, descriptor, report


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def view(clock: Clock) -> ClusterView:
    view = ClusterView(clock)
    nodes = (descriptor("d0", "decode"), descriptor("d1", "decode"), descriptor("p0", "prefill"))
    view.on_nodes({node.node.node_id: node for node in nodes})
    return view


def hear(view: ClusterView, node_id: str, **changes: Any) -> None:
    view.on_report(report(node_id, "prefill" if node_id == "p0" else "decode", **changes))


def states(view: ClusterView) -> dict[str, str]:
    return {node.node_id: node.state for node in view.nodes()}


def test_prefill_nodes_come_first(view: ClusterView) -> None:
    assert list(states(view)) == ["p0", "d0", "d1"]


def test_states(view: ClusterView, clock: Clock) -> None:
    hear(view, "p0")
    clock.now += 3.5 * PERIOD_S
    hear(view, "d0", draining=True, ready=False)
    hear(view, "d1", ready=False)
    assert states(view) == {"p0": "silent", "d0": "draining", "d1": "not ready"}
    view.on_service(ServiceInfo("node", "d1", "1.0.0", {"state": "a step takes too long"}))
    assert states(view)["d1"] == "a step takes too long"
    hear(view, "d0", incarnation="another life")
    assert states(view)["d0"] == "unheard"


def test_pairs_are_ready_and_alike_and_follow_the_chunk_budget(view: ClusterView) -> None:
    for node_id in ("p0", "d0", "d1"):
        hear(view, node_id)
    assert view.pairs() == [("p0", "d0"), ("p0", "d1")]
    hear(view, "d1", ready=False)
    hear(view, "d0", max_prefill_tokens_per_step=TOKEN_BUDGET // 2)  # lent: it also prefills
    assert view.pairs() == [("p0", "d0"), ("d0", "d0")]
    other = descriptor("d0", "decode", block_size=2 * BLOCK_SIZE)
    view.on_nodes({"p0": descriptor("p0", "prefill"), "d0": other})
    assert view.pairs() == [("d0", "d0")]


def test_a_pair_speaks_one_protocol(view: ClusterView) -> None:
    for node_id in ("p0", "d0", "d1"):
        hear(view, node_id)
    nodes = (descriptor("p0", "prefill"), descriptor("d0", "decode", protocol=PROTOCOL + 1))
    view.on_nodes({node.node.node_id: node for node in nodes})
    assert view.pairs() == []


def test_links_by_the_usual_connector_and_by_others(view: ClusterView) -> None:
    hear(view, "p0", num_links=2, usual_connector="shm", links={"d1": "tcp"})
    hear(view, "d0", num_links=1, usual_connector="shm")
    links = {node.node_id: node.links for node in view.nodes()}
    assert links["p0"] == {"d0": "shm", "d1": "tcp"}
    assert links["d0"] == {"d1": "", "p0": ""}  # one of them, and nobody says which
    assert links["d1"] == {}  # not heard


def test_which_connectors_reach_no_other_host() -> None:
    connectors = (ShmConnector, TcpConnector, NixlConnector, CudaIpcConnector, NcclConnector)
    assert [one.name for one in connectors if one.is_local] == list(LOCAL_CONNECTORS)


def test_the_regime_is_the_leaders_and_then_what_it_announces(view: ClusterView, clock: Clock) -> None:
    metadata = {"state": "leader", "regime": "normal", "regime_reason": "", "epoch": "3"}
    view.on_service(ServiceInfo("scheduler", "s0", "1.0.0", metadata))
    view.on_service(ServiceInfo("scheduler", "s1", "1.0.0", {"state": "standby", "epoch": "3"}))
    assert view.regime == "normal"
    view.on_event(RegimeChanged(epoch=3, before="normal", after="overload", reason="too much"))
    assert (view.regime, view.regime_reason) == ("overload", "too much")
    assert view.leader is not None
    assert view.leader.id == "s0"
    clock.now += GONE_AFTER_QUESTIONS * ASK_PERIOD_S
    assert view.leader is None
    assert view.services("scheduler") == []


def test_of_several_models_the_worst_regime_is_shown(
    view: ClusterView,
) -> None:
    other = msgspec.structs.replace(MODEL, name="other", fingerprint="g")
    view.on_nodes({"d0": descriptor("d0", "decode"), "o0": descriptor("o0", "decode", model=other)})
    view.on_event(RegimeChanged(epoch=3, before="normal", after="overload", reason="much", model="m"))
    view.on_event(RegimeChanged(epoch=3, before="imbalance", after="normal", reason="", model="other"))
    assert view.regime == "overload"
    metadata = {"state": "leader", "regime": "normal", "regime_reason": ""}
    view.on_service(ServiceInfo("scheduler", "s0", "1.0.0", metadata))
    assert view.regime == "normal"


def test_nodes_that_are_wanted_are_told_by_model(view: ClusterView) -> None:
    view.on_event(ScaleWanted(epoch=3, role="prefill", change=2, reason="much", model="m"))
    view.on_event(ScaleWanted(epoch=3, role="prefill", change=0, reason="", model="other"))
    assert view.wishes() == ["+2 prefill: much"]
    other = msgspec.structs.replace(MODEL, name="other", fingerprint="g")
    view.on_nodes({"d0": descriptor("d0", "decode"), "o0": descriptor("o0", "decode", model=other)})
    assert view.wishes() == ["+2 prefill of m: much"]


def test_it_is_complete_when_all_that_runs_was_heard(view: ClusterView) -> None:
    for node_id in ("p0", "d0", "d1"):
        hear(view, node_id)
    assert not view.is_complete
    view.on_service(ServiceInfo("scheduler", "s0", "1.0.0", {"state": "leader"}))
    assert not view.is_complete
    view.on_service(ServiceInfo("gateway", "g0", "1.0.0"))
    assert view.is_complete
    hear(view, "d1", incarnation="another life")
    assert not view.is_complete
