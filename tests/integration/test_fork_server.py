"""Nodes are forked from one process that has imported, and are processes of their own in all else."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flowkv import fork_server
from flowkv.fork_server import ForkServer
from flowkv.processes import ClusterError

TIMEOUT_S = 30
SCHEDULER = ["scheduler", "--nats-url", "nats://127.0.0.1:9"]  # it waits for NATS, and needs no library


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a torch and `transformers` that import in no time, and note it in the file `log`."""
    folder = tmp_path_factory.mktemp("libraries")
    note = f"open({str(folder / 'log')!r}, 'a').write(__name__ + '\\n')"
    for library in ("torch", "transformers"):
        (folder / f"{library}.py").write_text(note)
    return folder


@pytest.fixture(scope="module")
def env(imported: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{imported}:{os.environ.get('PYTHONPATH', '')}"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str]) -> Iterator[ForkServer]:
    with ForkServer(tmp_path_factory.mktemp("server") / "log", env) as server:
        yield server


def test_libraries_are_imported_once(
    server: ForkServer, imported: Path, env: dict[str, str], tmp_path: Path
) -> None:
    nodes = [
        server.fork(role, [role, "--model-path", "m"], env, tmp_path / role) for role in ("prefill", "decode")
    ]
    assert [node.wait(TIMEOUT_S) for node in nodes] == [1, 1]  # for want of a real torch
    assert Counter((imported / "log").read_text().split()) == {"torch": 1, "transformers": 1}


def test_a_fork_has_its_own_variables_log_and_exit_code(
    server: ForkServer, env: dict[str, str], tmp_path: Path
) -> None:
    mistaken = {**env, "FLOWKV_BLOKC_SIZE": "1"}
    first = server.fork("first", ["decode", "--model-path", "m"], mistaken, tmp_path / "first")
    second = server.fork("second", ["no-such"], env, tmp_path / "second")
    assert (first.wait(TIMEOUT_S), second.wait(TIMEOUT_S)) == (1, 2)
    assert "FLOWKV_BLOKC_SIZE" in (tmp_path / "first").read_text()
    assert "unknown command 'no-such'" in (tmp_path / "second").read_text()


def test_a_fork_is_a_child_that_can_be_frozen_and_killed(
    server: ForkServer, env: dict[str, str], tmp_path: Path
) -> None:
    child = server.fork("prefill-7", SCHEDULER, env, tmp_path / "log")
    seen = psutil.Process(child.pid)
    assert (os.getsid(child.pid), seen.ppid(), seen.num_threads()) == (child.pid, os.getpid(), 1)
    child.send_signal(signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
    assert seen.name() == "prefill-7"
    assert seen.cmdline()[1:] == ["-m", "flowkv", *SCHEDULER]
    assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    assert child.wait(TIMEOUT_S) == child.poll() == -signal.SIGKILL
    child.send_signal(signal.SIGKILL)  # to no one


def test_the_end_of_the_fork_server_ends_no_node(env: dict[str, str], tmp_path: Path) -> None:
    others = set(psutil.Process().children())
    with ForkServer(tmp_path / "server", env) as server:
        (process,) = set(psutil.Process().children()) - others
        child = server.fork("decode-0", SCHEDULER, env, tmp_path / "log")
        process.kill()
        said = "decode-1 can't be forked .*: start the cluster again\nfork-server was ended by SIGKILL"
        with pytest.raises(ClusterError, match=said):
            server.fork("decode-1", SCHEDULER, env, tmp_path / "none")
    assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait(TIMEOUT_S)


def test_a_fork_that_is_not_given_to_its_starter_says_so_at_once(
    server: ForkServer, env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(fork_server, "_adopts_orphans", contextlib.nullcontext)
        with pytest.raises(ClusterError, match=f"decode-0 can't be forked: .* not to {os.getpid()}"):
            server.fork("decode-0", SCHEDULER, env, tmp_path / "log")
    child = server.fork("decode-0", SCHEDULER, env, tmp_path / "log")  # the fork server is as good as before
    child.send_signal(signal.SIGKILL)
    child.wait(TIMEOUT_S)


def test_only_the_imports_may_take_long(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = set(psutil.Process().children())
    with ForkServer(tmp_path / "server", env) as server:
        (process,) = set(psutil.Process().children()) - others
        server.fork("decode-0", ["no-such"], env, tmp_path / "log").wait(TIMEOUT_S)
        assert fork_server.FORK_TIMEOUT_S < fork_server.IMPORT_TIMEOUT_S / 10
        monkeypatch.setattr(fork_server, "FORK_TIMEOUT_S", 0.1)
        process.suspend()
        with pytest.raises(ClusterError, match=r"decode-1 can't be forked \(timed out\)"):
            server.fork("decode-1", ["no-such"], env, tmp_path / "log")


def test_what_libraries_read_at_import_is_not_changed(env: dict[str, str], tmp_path: Path) -> None:
    server = ForkServer(tmp_path / "log", env)
    assert server.suits({**env, "FLOWKV_BLOCK_SIZE": "32"})
    assert not server.suits({**env, "OMP_NUM_THREADS": "1"})
    assert not server.suits({**env, "FLOWKV_CACHE": "/elsewhere"})
    assert not server.suits({key: env[key] for key in env if key != "PATH"})
