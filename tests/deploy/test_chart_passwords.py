"""Passwords are made once and change when told to: what Helm finds in a cluster at an upgrade.

The cluster is a server with the two answers of Kubernetes' API that Helm's `lookup` asks for.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import helm_python
import pytest
import yaml

from tests.deploy.chart import NAMESPACE, RELEASE, Values, secrets_of

Secrets = dict[str, dict[str, str]]  # by name, what they hold


class ClusterWithSecrets:
    """Keeps what an upgrade has rendered. A context: it listens while it lasts."""

    def __init__(self) -> None:
        self.secrets: Secrets = {}
        cluster = self

        class Answers(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = cluster.answer(urlsplit(self.path).path)
                encoded = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(encoded)))
                self.end_headers()
                self.wfile.write(encoded)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)

    def answer(self, path: str) -> tuple[int, dict[str, Any]]:
        if path == "/api/v1":
            kind = {"name": "secrets", "kind": "Secret", "namespaced": True, "verbs": ["get"]}
            return 200, {"kind": "APIResourceList", "groupVersion": "v1", "resources": [kind]}
        folder, _, name = path.rpartition("/")
        if folder == f"/api/v1/namespaces/{NAMESPACE}/secrets" and name in self.secrets:
            data = {key: base64.b64encode(text.encode()).decode() for key, text in self.secrets[name].items()}
            metadata = {"name": name, "namespace": NAMESPACE}
            return 200, {"kind": "Secret", "apiVersion": "v1", "metadata": metadata, "data": data}
        return 404, {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "code": 404,
            "reason": "NotFound",
        }

    @contextlib.contextmanager
    def listening(self) -> Iterator[str]:
        """Gives its address."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{self._server.server_port}"
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()


@pytest.fixture
def upgrade(chart: Path) -> Iterator[Upgrade]:
    cluster = ClusterWithSecrets()
    with cluster.listening() as address:
        yield Upgrade(chart, cluster, address)


class Upgrade:
    """`helm upgrade` with values, as far as it concerns Secrets."""

    def __init__(self, chart: Path, cluster: ClusterWithSecrets, address: str) -> None:
        self._chart = chart
        self._cluster = cluster
        self._address = address

    def __call__(self, **bus: object) -> Secrets:
        values: Values = {"bus": bus}
        with (
            helm_python.Config(kube_apiserver=self._address, namespace=NAMESPACE) as config,
            helm_python.Chart.load(str(self._chart)) as chart,
        ):
            files = config.render(chart, values, name=RELEASE, namespace=NAMESPACE)
        rendered = yaml.safe_load_all(files["flowkv/templates/accounts.yaml"])
        secrets = secrets_of([one for one in rendered if one])
        self._cluster.secrets = secrets
        return secrets


def users_of(secrets: Secrets) -> dict[str, str]:
    """Passwords by the user that the server knows."""
    accounts = json.loads(secrets[f"{RELEASE}-nats-server"]["accounts.conf"])
    return {one["user"]: one["password"] for one in accounts["authorization"]["users"]}


def login_of(secrets: Secrets, service: str) -> tuple[str | None, str | None]:
    url = urlsplit(secrets[f"{RELEASE}-nats-{service}"]["nats_url"].split(",")[0])
    return url.username, url.password


def test_an_upgrade_keeps_them(upgrade: Upgrade) -> None:
    before = upgrade()
    assert upgrade() == before
    assert upgrade(storage="memory") == before


def test_new_ones_come_beside_the_former(upgrade: Upgrade) -> None:
    before = upgrade()
    rotated = upgrade(rotation=2)
    user, password = login_of(rotated, "gateway")
    assert user == "gateway-2"
    assert password not in users_of(before).values()
    assert users_of(rotated).items() > users_of(before).items()
    assert users_of(rotated)["gateway-2"] == password
    assert upgrade(rotation=2) == rotated
    after = upgrade(rotation=2, formerValid=False)
    assert login_of(after, "gateway") == (user, password)
    assert users_of(after) == {f"{name}-2": users_of(rotated)[f"{name}-2"] for name in users_of(before)}
    assert after[f"{RELEASE}-nats-server"]["password"] == before[f"{RELEASE}-nats-server"]["password"]


def test_the_next_ones_come_beside_those(upgrade: Upgrade) -> None:
    upgrade()
    upgrade(rotation=2)
    assert {name for name in users_of(upgrade(rotation=3)) if name.startswith("node")} == {"node-2", "node-3"}
