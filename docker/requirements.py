"""Prints what packages need from elsewhere, so that an image holds it in a layer that code does not change.

`requirements.py FOLDER[extra,...] ...`: folders with a pyproject.toml; FlowKV's own packages are left out.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(spec: str) -> list[str]:
    folder, _, extras = spec.rstrip("]").partition("[")
    project = tomllib.loads(Path(folder, "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in filter(None, extras.split(",")):
        wanted += project["optional-dependencies"][extra]
    return [requirement for requirement in wanted if not requirement.startswith("flowkv")]


if __name__ == "__main__":
    for spec in sys.argv[1:]:
        print("\n".join(requirements(spec)))
