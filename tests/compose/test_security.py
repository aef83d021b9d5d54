"""What a stranger on the compose network gets, what a container may do, who holds which password."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import pytest

from flowkv.accounts import RIGHTS
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import NodeRef
from flowkv_common.wire.nodes import LinkOffer, LinkRequest
from tests.compose.composed import Composed, docker
from tests.e2e.observer import observe

pytestmark = pytest.mark.compose

SERVICES = ("nats", "scheduler", "gateway", "prefill", "decode")


async def data_address(composed: Composed) -> str:
    """Where a node takes KV by TCP, as it tells a peer that may know."""
    async with observe(composed.nats_url) as observer:
        node = (await observer.descriptors())[0]
        peer = NodeRef(node_id="nobody", incarnation=secrets.token_hex(4))
        request = LinkRequest(
            node=node.node, peer=peer, layout=node.layout, fingerprint=node.model.fingerprint
        )
        subject = subjects.at(subjects.NODE_LINK, node.node.node_id)
        offer = await observer.bus.request(subject, request, LinkOffer, timeout_s=5)
        return offer.addresses["tcp"]


async def test_a_stranger_on_the_network_gets_nothing(composed: Composed) -> None:
    composed.up()
    script = Path(__file__).with_name("intruder.py").read_text()
    network = ["run", "--rm", "-i", "--network", f"{composed.project}_default"]
    address = await data_address(composed)
    said = docker(*network, "--entrypoint", "python", "flowkv-control", "-", address, stdin=script)
    got = json.loads(said)
    for door in ("nats", "nats with a guess", "monitoring"):
        assert got[door].startswith("refused"), got
    assert got["pool"] == got["pool without a token"] == "wrong link token"


def test_each_service_holds_its_own_password_alone(composed: Composed) -> None:
    composed.up()
    urls = {user: composed.nats_url_of(user).split("@")[0] for user in RIGHTS}
    assert len(set(urls.values())) == len(RIGHTS)
    for service, user in [("gateway", "gateway"), ("scheduler", "scheduler"), ("prefill", "node")]:
        seen = composed.compose("exec", "-T", service, "sh", "-c", "cat /keys/*/nats_url")
        assert seen.split("@")[0] == urls[user]


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_has_no_more_rights_than_it_needs(composed: Composed, service: str) -> None:
    composed.up()
    [container] = composed.containers(service)
    [shown] = json.loads(docker("inspect", container))
    host, config = shown["HostConfig"], shown["Config"]
    assert config["User"] == "10001:10001"
    assert (host["ReadonlyRootfs"], host["Init"], host["Privileged"]) == (True, True, False)
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert (host["IpcMode"], host["PidMode"]) == ("private", "")


@pytest.mark.parametrize("image", ["flowkv-control", "flowkv-engine"])
def test_an_image_says_what_it_is(images: None, image: str) -> None:
    labels = json.loads(docker("image", "inspect", "--format", "{{json .Config.Labels}}", image))
    assert labels["org.opencontainers.image.title"] == image
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert set(labels) >= {f"org.opencontainers.image.{name}" for name in ("version", "revision")}


def test_the_control_image_has_no_torch(images: None) -> None:
    listed = "import importlib.util as u; print([m for m in ('torch', 'numpy') if u.find_spec(m)])"
    found = docker("run", "--rm", "--entrypoint", "python", "flowkv-control", "-c", listed)
    assert found.strip() == "[]"
