"""The paths of a recipe, made absolute: the environment in them, and where relative ones start."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.texts import SUFFIXES
from eval.harness import TASK_FILES
from pipeline.recipe_groups import SYNTHETIC
from pipeline.recipe_source import ROOT

PATH_VARIABLES = ("CL_BENCHMARK_DIR", "CL_BENCHMARK_MINI_DIR", "CL_MODEL_DIR")
RETENTION_FILES = (*SUFFIXES, *TASK_FILES)  # anything else is the name of a task
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}")


def resolve_paths(raw: dict[str, Any], given: Sequence[str]) -> list[str]:
    """Make the paths in `raw` absolute, in place; returns the faults, whose paths stay as they are.

    `given` has the dotted keys of the command line: a path under one of them is the command line's.
    """
    faults = []
    for group, key, field in _paths_in(raw):
        on_command_line = any(field == start or field.startswith(f"{start}.") for start in given)
        try:
            group[key] = _resolved(group[key], field, on_command_line)
        except UserError as error:
            faults.append(str(error))
    return faults


def _paths_in(raw: dict[str, Any]) -> list[tuple[Any, Any, str]]:
    """(group or list, key or index, dotted key) of all in `raw` that is a path and not a fault of another kind."""
    tasks = _group(_group(raw, "data"), "tasks")
    places: list[tuple[Any, Any, str]] = [
        (_group(raw, "model"), "path", "model.path"),
        (_group(raw, "data"), "path", "data.path"),
        (_group(raw, "output"), "dir", "output.dir"),
    ]
    places += [
        (_group(tasks, name), part, f"data.tasks.{name}.{part}") for name in tasks for part in ("train", "test", "dev")
    ]
    evaluation = _group(raw, "evaluation")
    if isinstance(references := evaluation.get("references"), list):
        places += [(references, index, "evaluation.references") for index in range(len(references))]
    if isinstance(retention := evaluation.get("retention"), list):
        files = [i for i, entry in enumerate(retention) if isinstance(entry, str) and entry.endswith(RETENTION_FILES)]
        places += [(retention, index, "evaluation.retention") for index in files]
    there = [place for place in places if isinstance(place[0], list) or place[1] in place[0]]
    return [place for place in there if isinstance(place[0][place[1]], str) and place[0][place[1]]]


def _group(raw: dict[str, Any], key: str) -> dict[str, Any]:
    group = raw.get(key)
    return group if isinstance(group, dict) else {}


def _resolved(text: str, field: str, on_command_line: bool) -> str:
    if text == SYNTHETIC and field in ("model.path", "data.path"):
        return text
    expanded = expand_path(text, field)
    try:
        if field == "output.dir":  # it need not exist yet
            path = ((Path.cwd() if on_command_line else ROOT) / Path(expanded).expanduser()).resolve()
        else:
            path = resolve_path(expanded, from_command_line=on_command_line)
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if field == "model.path" and _looks_like_hub_id(expanded):
            return expanded
    except (OSError, RuntimeError, ValueError) as error:  # too long, a ~user that is none, a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{field}: {text!r:.80} is no path to use ({reason}); mend it") from error
    return str(path)


def expand_path(text: str, field: str) -> str:
    """Replace `${CL_...:-default}` in a path; only the three variables of `PATH_VARIABLES` are read."""

    def value(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if name not in PATH_VARIABLES:
            raise UserError(f"{field}: ${{{name}}} is not expanded; legal are {', '.join(PATH_VARIABLES)}")
        found = os.environ.get(name) or default
        if found is None:
            raise UserError(f"{field}: the variable {name} is not set; set it or give {field}=FOLDER")
        return found

    if "${" in _VARIABLE.sub("", text):
        raise UserError(f"{field}: {text!r:.80} is not expanded; write ${{NAME}} or ${{NAME:-default}}")
    return _VARIABLE.sub(value, text)


def resolve_path(text: str, *, from_command_line: bool) -> Path:
    """An absolute path: relative ones start at the checkout's root; from the command line, first at the
    current folder.
    """
    path = Path(text).expanduser()
    if path.is_absolute():
        return path
    here = Path.cwd() / path
    return here.resolve() if from_command_line and here.exists() else (ROOT / path).resolve()


def _looks_like_hub_id(text: str) -> bool:
    """`org/name` or `name`, as the hub spells ids; never something that starts like a path."""
    parts = text.split("/")
    return len(parts) <= 2 and all(parts) and not text.startswith((".", "~", "/"))
