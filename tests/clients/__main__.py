"""`make clients`: unmodified clients against a real model and a scripted one.

They are in environments of their own, in the folder `.venv-clients`, which `make` makes. Arguments go to
pytest: `python -m tests.clients -k agent`. Without any, the table in docs/clients.md is written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from flowkv.local_cluster import Cluster
from flowkv_engine.engine.fetch import default_cache_dir, resolve_model
from flowkv_engine.engine.packaged import DEFAULT_MODEL
from tests.clients.page import PAGE, Outcome, page_with, table
from tests.clients.scripted import ROOT, scripted_cluster
from tests.oracle import write_floats

READY_TIMEOUT_S = 300.0
TESTS_TIMEOUT_S = 1800.0
# By environment, the folders of tests that run in it.
FOLDERS = {
    "current": ("current", "node", "agents"),
    "openai2": ("openai2",),
    "lm_eval": ("lm_eval",),
}


def main(arguments: list[str]) -> int:
    outcomes: list[Outcome] = []
    model_path = str(resolve_model(None, default_cache_dir()))
    with tempfile.TemporaryDirectory(prefix="flowkv-clients-") as name:
        run_dir = Path(name)
        nodes = {"prefill": 1, "decode": 1}
        with (
            scripted_cluster(run_dir / "scripted", model_path) as scripted,
            Cluster(run_dir / "model", model_path, nodes=nodes, model_name=DEFAULT_MODEL.name) as model,
        ):
            write_floats(Path(model_path), run_dir / "floats")  # what other engines can read
            model.wait_ready(READY_TIMEOUT_S)
            for environment, folders in FOLDERS.items():
                kept = run_dir / f"{environment}.json"
                served = {"MODEL": model.url, "MODEL_PATH": str(run_dir / "floats"), "SCRIPTED": scripted.url}
                run_tests(environment, folders, arguments, served, kept)
                outcomes += [Outcome(**each) for each in json.loads(kept.read_text())]
    print("\n".join(table(outcomes)))
    has_failed = any(each.outcome == "failed" for each in outcomes)
    if not arguments and not has_failed:
        PAGE.write_text(page_with(outcomes, PAGE.read_text()))
    return int(has_failed or not outcomes)


def run_tests(
    environment: str, folders: tuple[str, ...], arguments: list[str], served: dict[str, str], kept: Path
) -> None:
    """Writes the outcomes to `kept`. Raises TimeoutExpired when the tests don't end."""
    own = {f"FLOWKV_CLIENTS_{name}": value for name, value in {**served, "OUTCOMES": str(kept)}.items()}
    # FlowKV's own packages are no part of a client's environment.
    others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    here = Path(__file__).parent
    subprocess.run(
        [str(ROOT / ".venv-clients" / environment / "bin" / "python"), "-m", "pytest"]
        + ["-c", str(here / "pytest.ini"), *(str(here / folder) for folder in folders), *arguments],
        env={**others, **own},
        timeout=TESTS_TIMEOUT_S,
        check=False,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
