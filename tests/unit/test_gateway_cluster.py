"""What the gateway makes of the nodes' descriptors and reports."""

from __future__ import annotations

import msgspec
import pytest

from flowkv_common.wire.messages import ModelCard, ModelFiles
from flowkv_gateway.cluster import Cluster, OwnModel
from tests.described_nodes import BLOCK_SIZE, MODEL, descriptor, report

OWN = OwnModel(ModelFiles())


def test_the_context_is_no_longer_than_the_largest_kv_cache() -> None:
    """Or a chat without max_tokens would ask for more than any node can ever hold."""
    cluster = Cluster(OWN)
    assert cluster.model is None
    nodes = [descriptor("p", "prefill", num_blocks=20), descriptor("d", "decode", num_blocks=30)]
    cluster.on_nodes({node.node.node_id: node for node in nodes})
    model = cluster.model
    assert model is not None
    assert model.max_model_len == 30 * BLOCK_SIZE
    cluster.on_nodes({"d": descriptor("d", "decode", num_blocks=1000)})
    model = cluster.model
    assert model is not None
    assert model.max_model_len == 4096
    cluster.on_nodes({})
    assert cluster.model == model


def test_a_node_that_leaves_the_registry_leaves_no_report_behind() -> None:
    cluster = Cluster(OWN, clock=lambda: 0.0)
    nodes = {"p": descriptor("p", "prefill")}
    cluster.on_nodes(nodes)
    cluster.on_report(report("p", "prefill"))
    assert cluster.has_ready_node()
    cluster.on_nodes({})
    cluster.on_nodes(nodes)  # its next life has not reported yet
    assert not cluster.has_ready_node()
    cluster.on_report(report("p", "prefill"))
    assert cluster.has_ready_node()


def test_a_ready_node_says_so_and_has_reported_lately() -> None:
    now = 0.0
    cluster = Cluster(OWN, clock=lambda: now)
    cluster.on_nodes({"d": descriptor("d", "decode")})
    assert not cluster.has_ready_node()
    cluster.on_report(report("d", "decode", ready=False))
    assert not cluster.has_ready_node()
    cluster.on_report(report("d", "decode"))
    assert cluster.has_ready_node()
    now = 60.0
    assert not cluster.has_ready_node()


def test_usage_is_of_the_blocks_of_all_nodes_that_report() -> None:
    now = 0.0
    cluster = Cluster(OWN, clock=lambda: now)
    assert cluster.kv_cache_usage() == 0.0
    cluster.on_nodes({"p": descriptor("p", "prefill"), "d": descriptor("d", "decode")})
    blocks = report("p", "prefill").blocks
    held = msgspec.structs.replace(blocks, total=100, leased=20, quarantined=10)
    cluster.on_report(report("p", "prefill", blocks=held))
    assert cluster.kv_cache_usage() == 0.3
    cluster.on_report(report("d", "decode", blocks=msgspec.structs.replace(blocks, total=300, leased=0)))
    assert cluster.kv_cache_usage() == 0.075
    now = 60.0
    assert cluster.kv_cache_usage() == 0.0


def of_model(fingerprint: str, name: str = "m", **files: str) -> ModelCard:
    return msgspec.structs.replace(MODEL, name=name, fingerprint=fingerprint, files=ModelFiles(**files))


def join(cluster: Cluster, *nodes: tuple[str, str, ModelCard], ready: bool = True) -> None:
    """All that the registry has: id, role and model."""
    cluster.on_nodes({node_id: descriptor(node_id, role, model=model) for node_id, role, model in nodes})
    for node_id, role, _ in nodes:
        cluster.on_report(report(node_id, role, ready=ready))


def fingerprint_of(cluster: Cluster) -> str | None:
    model = cluster.model
    return model.fingerprint if model else None


def test_nodes_of_another_model_are_as_if_they_were_not_there(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster(OwnModel(ModelFiles(weights="a")))
    other = of_model("fb", "other", weights="b")
    join(cluster, ("p", "prefill", other), ("d", "decode", other))
    assert (cluster.model, cluster.block_size("fb"), cluster.has_ready_node()) == (None, None, False)
    assert [record.getMessage() for record in caplog.records] == [
        "p serves another model, other: its weights differ",
        "d serves another model, other: its weights differ",
    ]
    mine = of_model("fa", "mine", weights="a")
    join(cluster, ("p", "prefill", other), ("d", "decode", other), ("p0", "prefill", mine))
    assert fingerprint_of(cluster) == "fa"
    assert cluster.has_ready_node()
    join(cluster, ("d", "decode", other), ("p0", "prefill", mine), ("d0", "decode", mine))
    assert cluster.has_ready_node()
    assert cluster.block_size("fa") == BLOCK_SIZE
    assert len(caplog.records) == 2  # each is told once
    join(cluster, ("p", "prefill", other), ("d", "decode", other))
    assert fingerprint_of(cluster) == "fa"  # clients may still ask what it is
    assert not cluster.has_ready_node()


def test_while_the_weights_change_most_pairs_decide_and_a_tie_changes_nothing() -> None:
    cluster = Cluster(OwnModel(ModelFiles(tokenizer="t")))
    old, new = of_model("z-old", tokenizer="t"), of_model("a-new", tokenizer="t")
    old_pair = [("p", "prefill", old), ("d", "decode", old)]
    join(cluster, *old_pair)
    join(cluster, *old_pair, ("d2", "decode", new))
    assert fingerprint_of(cluster) == "z-old"
    join(cluster, *old_pair, ("d2", "decode", new), ("p2", "prefill", new))
    assert fingerprint_of(cluster) == "z-old"
    cluster.on_report(report("d", "decode", ready=False, draining=True))
    assert fingerprint_of(cluster) == "a-new"
    cluster.on_report(report("d", "decode"))
    assert fingerprint_of(cluster) == "a-new"
    assert cluster.block_size("z-old") == BLOCK_SIZE  # who began with it goes on with it
    join(cluster, ("d2", "decode", new), ("p2", "prefill", new))
    assert cluster.block_size("z-old") is None


def test_other_weights_that_fit_too_wait_until_the_nodes_of_the_first_are_gone() -> None:
    """Neither weights nor a name here tell them apart: a tuned model with more nodes must not take over."""
    cluster = Cluster(OwnModel(ModelFiles(tokenizer="t")))
    mine = of_model("a", "mine", tokenizer="t", weights="1")
    tuned = of_model("z", "tuned", tokenizer="t", weights="2")
    join(cluster, ("d", "decode", mine))
    many = [("p1", "prefill", tuned), ("d1", "decode", tuned), ("d2", "decode", tuned)]
    join(cluster, ("d", "decode", mine), *many)
    assert fingerprint_of(cluster) == "a"
    cluster.on_report(report("d", "decode", ready=False))
    assert fingerprint_of(cluster) == "z"


def test_the_model_is_called_as_most_of_its_nodes_say() -> None:
    cluster = Cluster(OWN)
    join(
        cluster,
        ("p", "prefill", of_model("f", "folder")),
        ("d", "decode", of_model("f", "name")),
        ("e", "decode", of_model("f", "name")),
    )
    model = cluster.model
    assert model is not None
    assert model.name == "name"


def test_a_report_of_a_former_life_makes_nobody_ready() -> None:
    cluster = Cluster(OWN)
    cluster.on_nodes({"m": descriptor("m", "mixed", incarnation="i2")})
    cluster.on_report(report("m", "mixed", incarnation="i1"))
    assert not cluster.has_ready_node()
    cluster.on_report(report("m", "mixed", incarnation="i2"))
    assert cluster.has_ready_node()
