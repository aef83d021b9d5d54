"""The command line as a whole: it teaches, is quick to load, and completes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flowkv.__main__ import GROUPS, names, usage

HEAVY = ("torch", "numpy", "transformers", "tokenizers", "uvicorn")
# Imports what the commands import, then says which of the heavy modules that has loaded.
PROBE = (
    "import importlib, sys\n"
    "for name in sys.argv[1].split(','): importlib.import_module(name)\n"
    "print(*(name for name in sys.argv[2].split(',') if name in sys.modules))"
)

# Asks each command for its help, then says after which one a heavy module was there.
HELP_PROBE = """
import contextlib, io, sys
from flowkv.__main__ import main
for command in sys.argv[1].split(","):
    words, sys.argv = sys.argv, ["flowkv", command, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main()
    sys.argv = words
    assert "usage: " in said.getvalue(), command
    if loaded := [name for name in words[2].split(",") if name in sys.modules]:
        print(command, *loaded)
        break
"""


def python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


def test_commands_load_nothing_heavy() -> None:
    modules = {
        function.partition(":")[0] for commands in GROUPS.values() for function, _ in commands.values()
    }
    assert python("-c", PROBE, ",".join(modules), ",".join((*HEAVY, "benchmarks"))) == ""


def test_no_help_loads_anything_heavy() -> None:
    """It is there in a moment, and the Tab key asks for it."""
    commands = [name for group in GROUPS.values() for name in group]
    assert python("-c", HELP_PROBE, ",".join(["up", *commands]), ",".join(HEAVY)) == ""


def test_the_usage_names_each_command_once() -> None:
    shown = [line.split()[0] for line in usage().splitlines() if line.startswith("  ")]
    assert shown == names()
    assert len(set(names())) == len(names())


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this host")
@pytest.mark.parametrize(
    ("typed", "offered"), [("do", {"doctor"}), ("dr", {"drain"}), ("status --j", {"--json"})]
)
def test_bash_completes_commands_and_options(typed: str, offered: set[str], tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(python("-m", "flowkv", "completion", "bash"))
    words = ["flowkv", *typed.split()]
    asks = (
        f'flowkv() {{ {sys.executable} -m flowkv "$@"; }}; source {script}; COMP_WORDS=({" ".join(words)}); '
        f"COMP_CWORD={len(words) - 1}; _flowkv; echo ${{COMPREPLY[@]}}"
    )
    done = subprocess.run(["bash", "-c", asks], capture_output=True, text=True, timeout=60, check=True)
    assert set(done.stdout.split()) == offered
