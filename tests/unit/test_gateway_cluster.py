"""What the gateway makes of the nodes' descriptors and reports."""

from __future__ import annotations

import msgspec

from flowkv_common.wire.messages import ModelCard, ModelFiles
from flowkv_common.wire.nodes import NodeDescriptor
from flowkv_gateway.cluster import Cluster, ModelNodes, OwnModel
from tests.described_nodes import BLOCK_SIZE, MODEL, descriptor, report

OWN = OwnModel(ModelFiles())


def test_the_context_is_no_longer_than_the_largest_kv_cache() -> None:
    """Or a chat without max_tokens would ask for more than any node can ever hold."""
    cluster = ModelNodes(OWN)
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
    cluster = ModelNodes(OWN, clock=lambda: 0.0)
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
    cluster = ModelNodes(OWN, clock=lambda: now)
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
    cluster = ModelNodes(OWN, clock=lambda: now)
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


def join(cluster: ModelNodes, *nodes: tuple[str, str, ModelCard], ready: bool = True) -> None:
    """All that the registry has: id, role and model."""
    cluster.on_nodes({node_id: descriptor(node_id, role, model=model) for node_id, role, model in nodes})
    for node_id, role, _ in nodes:
        cluster.on_report(report(node_id, role, ready=ready))


def fingerprint_of(cluster: ModelNodes) -> str | None:
    model = cluster.model
    return model.fingerprint if model else None


def everyone(*nodes: tuple[str, str, ModelCard]) -> dict[str, NodeDescriptor]:
    """What the registry has: id, role and model."""
    return {node_id: descriptor(node_id, role, model=model) for node_id, role, model in nodes}


def test_nodes_of_another_model_are_as_if_they_were_not_there() -> None:
    mine = ModelNodes(OwnModel(ModelFiles(weights="a")))
    cluster = Cluster([mine])
    other = of_model("fb", "other", weights="b")
    cluster.on_nodes(everyone(("p", "prefill", other), ("d", "decode", other)))
    for node_id, role in (("p", "prefill"), ("d", "decode")):
        cluster.on_report(report(node_id, role))
    assert (mine.model, mine.block_size("fb"), mine.has_ready_node()) == (None, None, False)
    assert {name: why for name, (_, why) in cluster.others.items()} == dict.fromkeys(
        "pd", "its weights differ"
    )
    own = of_model("fa", "mine", weights="a")
    cluster.on_nodes(everyone(("d", "decode", other), ("d0", "decode", own)))
    cluster.on_report(report("d0", "decode"))
    assert (fingerprint_of(mine), mine.has_ready_node(), list(cluster.others)) == ("fa", True, ["d"])
    cluster.on_nodes(everyone(("d", "decode", other)))
    assert fingerprint_of(mine) == "fa"  # clients may still ask what it is
    assert not mine.has_ready_node()
    assert cluster.of("fa") is mine


def test_each_node_serves_the_model_that_it_fits() -> None:
    """If it fits several, as folders without weights, the one whose files it has."""
    loose = ModelNodes(OwnModel(ModelFiles(tokenizer="t")))
    exact = ModelNodes(OwnModel(ModelFiles(tokenizer="t", weights="b")))
    cluster = Cluster([loose, exact])
    one, two = of_model("fa", tokenizer="t", weights="a"), of_model("fb", tokenizer="t", weights="b")
    cluster.on_nodes(everyone(("p", "mixed", one), ("q", "mixed", two)))
    cluster.on_report(report("q", "mixed"))
    assert (fingerprint_of(loose), fingerprint_of(exact)) == ("fa", "fb")
    assert (loose.has_ready_node(), exact.has_ready_node()) == (False, True)
    assert (cluster.of("fa"), cluster.of("fb"), cluster.others) == (loose, exact, {})


def test_a_model_that_is_added_gets_its_nodes_and_one_that_is_removed_loses_them() -> None:
    cluster = Cluster([])
    card = of_model("fa", weights="a")
    cluster.on_nodes(everyone(("m", "mixed", card)))
    assert list(cluster.others) == ["m"]
    nodes = ModelNodes(OwnModel(ModelFiles(weights="a")))
    cluster.add(nodes)
    assert (fingerprint_of(nodes), cluster.others, cluster.of("fa")) == ("fa", {}, nodes)
    cluster.on_report(report("m", "mixed"))
    assert nodes.has_ready_node()
    cluster.remove(nodes)
    assert list(cluster.others) == ["m"]
    cluster.add(ModelNodes(OwnModel(ModelFiles(weights="b"))))
    cluster.add(ModelNodes(OwnModel(ModelFiles(weights="c"))))
    assert cluster.of("fa") is None


def test_a_report_may_come_before_its_node_is_in_the_registry() -> None:
    nodes = ModelNodes(OWN)
    cluster = Cluster([nodes])
    cluster.on_report(report("m", "mixed"))
    cluster.on_nodes(everyone(("m", "mixed", MODEL)))
    assert nodes.has_ready_node()


def test_while_the_weights_change_most_pairs_decide_and_a_tie_changes_nothing() -> None:
    cluster = ModelNodes(OwnModel(ModelFiles(tokenizer="t")))
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
    cluster = ModelNodes(OwnModel(ModelFiles(tokenizer="t")))
    mine = of_model("a", "mine", tokenizer="t", weights="1")
    tuned = of_model("z", "tuned", tokenizer="t", weights="2")
    join(cluster, ("d", "decode", mine))
    many = [("p1", "prefill", tuned), ("d1", "decode", tuned), ("d2", "decode", tuned)]
    join(cluster, ("d", "decode", mine), *many)
    assert fingerprint_of(cluster) == "a"
    cluster.on_report(report("d", "decode", ready=False))
    assert fingerprint_of(cluster) == "z"


def test_the_model_is_called_as_most_of_its_nodes_say() -> None:
    cluster = ModelNodes(OWN)
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
    cluster = ModelNodes(OWN)
    cluster.on_nodes({"m": descriptor("m", "mixed", incarnation="i2")})
    cluster.on_report(report("m", "mixed", incarnation="i1"))
    assert not cluster.has_ready_node()
    cluster.on_report(report("m", "mixed", incarnation="i2"))
    assert cluster.has_ready_node()
