"""Where a recipe's raw keys come from: the YAML file, the command line's overrides, the environment in paths."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from data_prep.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PATH_VARIABLES = ("CL_BENCHMARK_DIR", "CL_BENCHMARK_MINI_DIR", "CL_MODEL_DIR")
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}")
# `zero=2` is short for `engine.zero=2`; the other three name a whole group by its first key.
_SHORTHAND = {"zero": "engine.zero", "order": "order.name"}
_WHOLE_GROUP = {"method": "name", "adapter": "kind"}
# PyYAML follows YAML 1.1, where 1e-3 is a string; recipes read it as YAML 1.2 does, as a number.
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")


class _Loader(yaml.SafeLoader):
    """Safe YAML with YAML 1.2 floats, in which a key given twice is a fault and not a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise UserError(f"line {line}: the key {key!r} stands twice; remove one of the two")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str) -> Any:
    """Parse YAML text; raises `UserError` with the line on a syntax fault."""
    try:
        return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader: builds plain values only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{where}not valid YAML ({error.problem}); mend the file") from error
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML ({error}); mend the file") from error


def find_recipe(path: str | Path) -> Path:
    """The recipe file: as given from the current folder, else from the checkout's root."""
    candidates = [Path(path)] if Path(path).is_absolute() else [Path.cwd() / path, ROOT / path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    looked = " and ".join(str(candidate) for candidate in dict.fromkeys(candidates))
    raise UserError(f"recipe {path}: no such file (looked at {looked}); shipped recipes lie in recipes/")


def read_recipe(path: Path) -> dict[str, Any]:
    """The raw mapping of a recipe file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); save the recipe as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        raw = parse_yaml(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a mapping of groups such as model, data, order; see recipes/")
    return raw


def split_override(text: str) -> tuple[str, Any]:
    """`key.path=value` -> the dotted key and the value, parsed as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.[\w-]+)*", key):
        raise UserError(f"override {text!r}: an override is key.path=value, such as training.epochs=2")
    try:
        return key, parse_yaml(value)
    except UserError as error:
        raise UserError(f"override {text!r}: {error}") from error


def apply_override(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set one dotted key in `raw`, in place, with the shorthands of the command line."""
    if key in _WHOLE_GROUP and not isinstance(value, dict):
        raw[key] = {_WHOLE_GROUP[key]: value}
        return
    if key == "order" and isinstance(value, list):
        raw[key] = {"tasks": value}
        return
    if not isinstance(value, dict):
        key = _SHORTHAND.get(key, key)
    *groups, last = key.split(".")
    place = raw
    for group in groups:
        child = place.get(group)
        if not isinstance(child, dict):
            child = place[group] = {}
        place = child
    place[last] = value
    if groups == ["order"] and last in ("name", "tasks"):
        place.pop("tasks" if last == "name" else "name", None)


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


def changed_keys(overrides: Sequence[str]) -> list[str]:
    """A short, file-name-safe word for each override but the seed, for the name of the run's folder."""
    words: dict[str, str] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        if key not in ("seed", "output.dir"):
            word = value if key in (*_WHOLE_GROUP, "order", "method.name") else f"{key.split('.')[-1]}{value}"
            words[key] = re.sub(r"[^\w.+]+", "_", word).strip("_")[:40]
    return list(words.values())


def flatten(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted keys, for comparing two recipes key by key."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
