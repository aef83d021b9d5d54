"""Which of the gateway's models a request is for."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest

from flowkv_common.aio import running
from flowkv_common.config import GatewaySettings
from flowkv_common.errors import BadRequest
from flowkv_common.fingerprint import model_files
from flowkv_common.wire.messages import ModelFiles
from flowkv_gateway import models as models_module
from flowkv_gateway.cluster import Cluster, ModelNodes, OwnModel
from flowkv_gateway.errors import ModelNotFound
from flowkv_gateway.models import Model, Models
from flowkv_gateway.tokenizer import Tokenizer
from tests.described_nodes import MODEL, descriptor, report
from tests.gateway_support import model_in_memory, write_tokenizer
from tests.waiting import until


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def model(tokenizer: Tokenizer, folder: str, nodes_name: str = "", *, set_name: str = "") -> Model:
    """With a node that calls it `nodes_name`, if that is given; the node has not reported yet."""
    nodes = ModelNodes(OwnModel(ModelFiles()))
    if nodes_name:
        card = msgspec.structs.replace(MODEL, name=nodes_name, fingerprint=folder)
        nodes.on_nodes({folder: descriptor(folder, "mixed", model=card)})
    settings = GatewaySettings(model_path=folder, model_name=set_name)
    return model_in_memory(settings, tokenizer, nodes)


def test_one_model_needs_no_name(tokenizer: Tokenizer) -> None:
    only = model(tokenizer, "/models/folder", "name")
    models = Models([only])
    assert {models.find(name) for name in (None, "name", "folder")} == {only}
    assert list(models.by_name()) == ["name"]
    for name in ("other", "/models/folder", ""):
        with pytest.raises(ModelNotFound, match="does not exist") as refused:
            models.find(name)
        assert refused.value.field == "model"


def test_of_several_models_a_request_names_one(tokenizer: Tokenizer) -> None:
    a, b = model(tokenizer, "a", "name-a"), model(tokenizer, "b", set_name="name-b")
    models = Models([a, b])
    assert (models.find("name-a"), models.find("name-b"), models.find("a")) == (a, b, a)
    with pytest.raises(
        BadRequest, match="Several models are served here, say which: name-a, name-b"
    ) as refused:
        models.find(None)
    assert refused.value.field == "model"
    assert models.by_name() == {"name-a": a, "name-b": b}


def test_a_name_counts_more_than_a_folder(tokenizer: Tokenizer) -> None:
    a, b = model(tokenizer, "current", "a"), model(tokenizer, "b", "current")
    assert Models([a, b]).find("current") is b


def test_of_two_models_of_one_name_the_first_with_a_ready_node_has_it(tokenizer: Tokenizer) -> None:
    """New weights of the same name, while they are exchanged: no client has to know."""
    old, new = model(tokenizer, "old", "m"), model(tokenizer, "new", "m")
    models = Models([old, new])
    assert (models.find("m"), models.find(None), list(models.by_name())) == (old, old, ["m"])
    new.nodes.on_report(report("new", "mixed"))
    assert (models.find("m"), models.find(None)) == (new, new)
    old.nodes.on_report(report("old", "mixed"))
    assert models.find("m") is old


async def test_a_model_of_nodes_is_read_in_one_of_its_folders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where they have it on several hosts. Of those that are not here none is missed."""
    (tmp_path / "here").mkdir()
    write_tokenizer(tmp_path / "here")
    (tmp_path / "same").symlink_to(tmp_path / "here")
    cluster, models = Cluster([]), Models([])
    card = msgspec.structs.replace(MODEL, files=model_files(tmp_path / "here"))
    folders = ["/nowhere", *map(str, (tmp_path / "here", tmp_path / "same")), "/neither"]
    cluster.on_nodes(
        {
            folder: descriptor(folder, "mixed", model=msgspec.structs.replace(card, folder=folder))
            for folder in folders
        }
    )
    caplog.set_level(logging.INFO, models_module.__name__)
    async with models, running(models.follow(cluster, GatewaySettings(model_path=""))):
        await until(lambda: models.all and not cluster.changed.is_set())
        assert list(models.by_name()) == [MODEL.name]
    told = [record.getMessage() for record in caplog.records if record.name == models_module.__name__]
    assert told == [f"m of nodes is served, too, from {tmp_path / 'here'}"]
