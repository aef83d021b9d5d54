"""Coding agents, as their command lines run one task: `claude -p` and `codex exec`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.conftest import Served

HERE = Path(__file__).parent
PINS = json.loads((HERE / "package.json").read_text())["dependencies"]
COUNT = "Count the files here with a command."
CODEX = """\
model = "{model}"
model_provider = "flowkv"
web_search = "disabled"
approval_policy = "never"
sandbox_mode = "danger-full-access"
[model_providers.flowkv]
name = "FlowKV"
base_url = "{url}"
wire_api = "responses"
[analytics]
enabled = false
"""


def claude(served: Served, folder: Path) -> str:
    kinds = ("OPUS", "SONNET", "HAIKU")
    return said_by(
        ["claude", "-p", COUNT, "--allowedTools", "Bash"],
        folder,
        ANTHROPIC_BASE_URL=served.root,
        ANTHROPIC_AUTH_TOKEN="none",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        **{f"ANTHROPIC_DEFAULT_{kind}_MODEL": served.model for kind in kinds},
    )


def codex(served: Served, folder: Path) -> str:
    (folder / "config.toml").write_text(CODEX.format(model=served.model, url=served.url))
    return said_by(["codex", "exec", "--skip-git-repo-check", COUNT], folder, CODEX_HOME=str(folder))


def said_by(command: list[str], folder: Path, **variables: str) -> str:
    """What it says at the end, run in `folder`, which is its home, too."""
    done = subprocess.run(
        [str(HERE / "node_modules" / ".bin" / command[0]), *command[1:]],
        cwd=folder,
        env={**os.environ, "HOME": str(folder), **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def package(name: str) -> pytest.MarkDecorator:
    return pytest.mark.client(f"{name} (Node)", PINS[name])


@pytest.mark.parametrize(
    "agent",
    [
        pytest.param(claude, marks=package("@anthropic-ai/claude-code")),
        pytest.param(codex, marks=package("@openai/codex")),
    ],
)
def test_command_and_what_it_gives(
    agent: Callable[[Served, Path], str], scripted: Served, tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text("one")
    assert "There is 1 file." in agent(scripted, tmp_path)
