"""What the gateway makes of the nodes' descriptors and reports."""

from __future__ import annotations

from imagined_nodes import BLOCK_SIZE, descriptor, report

from flowkv_gateway.cluster import Cluster


def test_the_context_is_no_longer_than_the_largest_kv_cache() -> None:
    """Or a chat without max_tokens would ask for more than any node can ever hold."""
    cluster = Cluster()
    assert cluster.model() is None
    nodes = [descriptor("p", "prefill", num_blocks=20), descriptor("d", "decode", num_blocks=30)]
    cluster.follow({node.node.node_id: node for node in nodes})
    model = cluster.model()
    assert model is not None
    assert model.max_model_len == 30 * BLOCK_SIZE
    cluster.follow({"d": descriptor("d", "decode", num_blocks=1000)})
    model = cluster.model()
    assert model is not None
    assert model.max_model_len == 4096
    cluster.follow({})
    assert cluster.model() == model


def test_a_node_that_leaves_the_registry_leaves_no_report_behind() -> None:
    cluster = Cluster(clock=lambda: 0.0)
    nodes = {"p": descriptor("p", "prefill"), "d": descriptor("d", "decode")}
    cluster.follow(nodes)
    cluster.hear(report("p", "prefill"))
    cluster.hear(report("d", "decode"))
    assert cluster.is_ready()
    cluster.follow({"p": nodes["p"]})
    cluster.follow(nodes)  # its next life has not reported yet
    assert not cluster.is_ready()
    cluster.hear(report("d", "decode"))
    assert cluster.is_ready()


def test_ready_needs_both_sides_and_recent_reports() -> None:
    now = 0.0
    cluster = Cluster(clock=lambda: now)
    cluster.follow({"p": descriptor("p", "prefill"), "d": descriptor("d", "decode")})
    cluster.hear(report("p", "prefill"))
    assert not cluster.is_ready()
    cluster.hear(report("d", "decode"))
    assert cluster.is_ready()
    cluster.hear(report("d", "decode", ready=False))
    assert not cluster.is_ready()
    cluster.hear(report("d", "decode"))
    now = 60.0
    assert not cluster.is_ready()
