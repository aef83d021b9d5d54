"""A service that can't start says why in the last line of its log, and whoever started it shows that line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flowkv.processes import ClusterError, Process
from flowkv_common.config import NodeSettings, load_settings
from tests.every_model import tiny_config
from tests.nats_server import NatsServer
from tests.tiny_models import make_tiny_model


def last_words(*command: str, env: dict[str, str] | None = None) -> str:
    """The message of the only error in the log of a service that ends by itself, with 1."""
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=120, env=env
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    *before, last = [json.loads(line) for line in done.stderr.splitlines()]
    assert {line["level"] for line in before} <= {"info", "warning"}
    assert last["level"] == "error"
    return str(last["message"])


def test_a_node_with_a_model_that_is_not_served(tmp_path: Path) -> None:
    tiny_config("doge").save_pretrained(tmp_path / "m")
    said = last_words("flowkv_prefill", "--model-path", str(tmp_path / "m"))
    why = "its attention has a mask of its own, other than the causal one"
    assert said == f"prefill ended: {tmp_path / 'm'} (doge) can't be served: {why}"


def test_a_node_with_a_connector_that_there_is_not(nats_server: NatsServer, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m")
    flags = ["--model-path", str(folder), "--nats-url", nats_server.url, "--kv-cache-bytes", str(16 << 20)]
    said = last_words("flowkv_prefill", *flags, "--connectors", "shm,rdma")
    choice = "choose of shm, tcp, nixl for a KV cache in host memory"
    assert said == f"prefill ended: unknown connector 'rdma': {choice}"


def without(module: str, folder: Path) -> dict[str, str]:
    """The environment of processes in which `module` is not installed. `folder` is empty."""
    (folder / f"{module}.py").write_text(f"raise ModuleNotFoundError(name={module!r})")
    return {**os.environ, "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}


@pytest.mark.parametrize("role", ["prefill", "decode", "mixed"])
def test_a_node_where_only_the_control_plane_is_installed(role: str, tmp_path: Path) -> None:
    said = last_words("flowkv", role, "--model-path", "m", env=without("torch", tmp_path))
    assert said == f"{role} ended: torch is not installed: pip install 'flowkv[engine]'"


def test_a_model_is_fetched_where_only_the_control_plane_is_installed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flowkv_engine.engine.fetch", "--model", "org/m"]
    env = without("huggingface_hub", tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["huggingface_hub is not installed: pip install 'flowkv[engine]'"]


def test_a_gateway_without_a_tokenizer(tmp_path: Path) -> None:
    said = last_words("flowkv_gateway", "--model-path", str(tmp_path))
    assert said.startswith(f"gateway ended: {tmp_path} has no tokenizer.json")
    (tmp_path / "tokenizer.model").touch()
    said = last_words("flowkv_gateway", "--model-path", str(tmp_path))
    assert "reads; make it of tokenizer.model: pip install sentencepiece" in said
    said = last_words("flowkv_gateway", "--model-path", str(tmp_path / "none"))
    assert said == f"gateway ended: there is no model folder at {tmp_path / 'none'}"
    (tmp_path / "tokenizer.json").write_text("{}")
    said = last_words("flowkv_gateway", "--model-path", str(tmp_path))
    assert said.startswith(f"gateway ended: the tokenizer in {tmp_path} can't be used: ")


def test_a_scheduler_whose_port_others_have(nats_server: NatsServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = last_words("flowkv_scheduler", "--nats-url", nats_server.url, "--http-port", port)
    assert said.startswith("scheduler ended: ")
    assert "ddress already in use" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "settings: FLOWKV_MODEL_PATH (or --model-path) is not set"),
        (["--model-path", ""], "settings: FLOWKV_MODEL_PATH (or --model-path) is not set"),
        (
            ["--model-path", "m", "--block-size", "x"],
            "settings: FLOWKV_BLOCK_SIZE (or --block-size): Expected `int`",
        ),
    ],
)
def test_a_setting_is_called_as_its_user_calls_it(flags: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(NodeSettings, flags, {})
    assert str(caught.value).startswith(said)


def test_a_node_that_is_stopped_ends_without_a_report_of_leaks(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Triton, which torch imports where it is installed, would print one."""
    folder = make_tiny_model(tmp_path / "m")
    flags = ["--model-path", str(folder), "--attention", "torch", "--kv-cache-bytes", "1000000"]
    command = [sys.executable, "-m", "flowkv_decode", *flags, "--nats-url", nats_server.url]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as node:
        assert node.stderr is not None
        while "is ready" not in (line := node.stderr.readline()):
            assert line, "it ended"
        node.send_signal(signal.SIGTERM)
        rest = node.stderr.read()
    assert node.returncode == 0
    assert [json.loads(line)["level"] for line in rest.splitlines()] == ["info"] * len(rest.splitlines())


NO_ROOM = '{"level": "error", "message": "no room"}\n{"level": "info", "message": "bye"}\n'
TRACEBACK = """Traceback (most recent call last):
  File "a.py", line 1, in <module>
KeyError: 1

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "a.py", line 3, in <module>
ValueError: a sentence
that goes on
"""
IN_A_GROUP = """  + Exception Group Traceback (most recent call last):
  |   File "a.py", line 1, in <module>
  | ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception)
  +-+---------------- 1 ----------------
    | Traceback (most recent call last):
    |   File "a.py", line 2, in task
    | KeyError: 2
    +------------------------------------
"""


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (NO_ROOM, "no room"),
        ("settings: unknown variable FLOWKV_X", "settings: unknown variable FLOWKV_X"),
        (NO_ROOM + TRACEBACK, "ValueError: a sentence"),
        (NO_ROOM + IN_A_GROUP, "KeyError: 2"),
        ('[7] [FTL] no such file\n{"level": "info", "message": "bye"}\n', "[7] [FTL] no such file"),
        ('{"level": "info", "message": "bye"}\n', "its log does not say why"),
    ],
)
def test_who_started_a_service_shows_its_last_error_and_the_log(
    tmp_path: Path, log: str, reason: str
) -> None:
    (tmp_path / "prefill-0.log").write_text('{"level": "error", "message": "of a former life"}\n')
    (tmp_path / "written").write_text(log)
    command = [sys.executable, "-c", f"import sys; sys.exit(open({str(tmp_path / 'written')!r}).read())"]
    process = Process.start("prefill-0", command, {}, tmp_path / "prefill-0.log")
    process.wait(20)
    expected = f"prefill-0 ended with 1: {reason}\n(all it said is in {tmp_path / 'prefill-0.log'})"
    assert process.why_ended() == expected
    assert str(ClusterError(process.why_ended())) == expected


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (signal.SIGKILL, "someone killed it, or the kernel did for want of memory, which `dmesg` tells"),
        (signal.SIGSEGV, "a fault in compiled code"),
        (signal.SIGUSR1, "someone sent it"),
    ],
)
def test_who_was_ended_by_a_signal_has_not_said_why(
    tmp_path: Path, sent: signal.Signals, reason: str
) -> None:
    """An error that it lived through, or lines about its work, are not the reason."""
    program = f"import os; print({NO_ROOM!r}, flush=True); os.kill(os.getpid(), {sent.value})"
    process = Process.start("decode-0", [sys.executable, "-c", program], {}, tmp_path / "decode-0.log")
    process.wait(20)
    expected = f"decode-0 was ended by {sent.name}: {reason}\n(all it said is in {tmp_path / 'decode-0.log'})"
    assert process.why_ended() == expected
