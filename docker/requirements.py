"""Prints what the project needs, a line each, so that an image's environment is built before its code is copied."""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
print("\n".join(need for need in project["project"]["dependencies"] if not need.startswith("torch")))
