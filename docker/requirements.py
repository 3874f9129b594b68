"""Prints what the project needs but torch, a line each, with the extras that are named as arguments."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]
needs = [
    *project["dependencies"],
    *(need for extra in sys.argv[1:] for need in project["optional-dependencies"][extra]),
]
print("\n".join(need for need in needs if not need.startswith("torch")))
