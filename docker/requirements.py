"""`requirements.py [EXTRA ...]`: prints what `pyproject.toml` asks for, one requirement per line.

An image holds these in a layer that a change of our code leaves alone.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
print("\n".join(project["dependencies"]))
for extra in sys.argv[1:]:
    print("\n".join(project["optional-dependencies"][extra]))
