"""The system as `docker compose` runs it, for tests: started, scaled and taken down by its commands."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from flowkv.local_cluster import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = ("compose.yaml", "tests/compose/override.yaml")
UP_TIMEOUT_S = 400


class Composed:
    """One project: its containers, networks and volumes. They go when the context ends."""

    def __init__(self, project: str, files: Sequence[str] = FILES, **variables: str) -> None:
        """`variables` are those of compose.yaml."""
        self.project = project
        self.port = free_port()
        self._files = files
        self.processes: dict[str, object] = {}  # none that a test may end as it ends those of a local cluster
        self._nats_port = free_port()
        self._urls: dict[str, str] = {}
        self._env = {
            **os.environ,
            "PORT": str(self.port),
            "NATS_PORT": str(self._nats_port),
            "PROMETHEUS_PORT": str(free_port()),
            **variables,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "5")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def nats_url(self) -> str:
        """The operator's, at the port of this host."""
        return self.nats_url_of("operator")

    def nats_url_of(self, user: str) -> str:
        if user not in self._urls:
            mount = f"{self.project}_keys-{user}:/keys:ro"
            reading = ["run", "--rm", "--network", "none", "--volume", mount, "--entrypoint", "cat"]
            url, *_ = docker(*reading, "flowkv-control", "/keys/nats_url").strip().split(",")
            self._urls[user] = url.replace("nats:4222", f"127.0.0.1:{self._nats_port}")
        return self._urls[user]

    def up(self, *services: str, **scale: int) -> None:
        """Start or scale, and wait until all is healthy. What is not named in `scale` has one container."""
        scales = [part for name, count in scale.items() for part in ("--scale", f"{name}={count}")]
        self.compose("up", "--detach", "--wait", *scales, *services)

    def set(self, **variables: str) -> None:
        """For what is started from now on."""
        self._env.update(variables)

    def containers(self, service: str) -> list[str]:
        """Ids of those that run, oldest first."""
        listed = self.compose("ps", "--format", "json", service).splitlines()
        found = [json.loads(line) for line in listed]
        return [one["ID"] for one in sorted(found, key=lambda one: int(one["Name"].rpartition("-")[2]))]

    def logs(self, service: str) -> str:
        return self.compose("logs", "--no-log-prefix", service)

    def compose(self, *arguments: str, stdin: str | None = None) -> str:
        command = ["compose", "--project-name", self.project]
        command += [part for file in self._files for part in ("--file", str(ROOT / file))]
        return docker(*command, *arguments, env=self._env, stdin=stdin)


def docker(*arguments: str, env: dict[str, str] | None = None, stdin: str | None = None) -> str:
    """What the command prints on stdout. Raises AssertionError with stderr when it fails."""
    command = ["docker", *arguments]
    done = subprocess.run(command, env=env, input=stdin, capture_output=True, text=True, timeout=UP_TIMEOUT_S)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
    return done.stdout
