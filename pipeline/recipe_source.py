"""Where a recipe's raw keys come from: the YAML file and the command line's overrides."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from pipeline.recipe_yaml import parse_yaml

__all__ = ["ROOT", "apply_override", "changed_keys", "find_recipe", "flatten", "parse_yaml", "read_recipe"]

ROOT = Path(__file__).resolve().parent.parent
# `zero=2` is short for `engine.zero=2`; the other three name a whole group by its first key.
_SHORTHAND = {"zero": "engine.zero", "order": "order.name"}
_WHOLE_GROUP = {"method": "name", "adapter": "kind"}
_UNNAMED = (
    "seed",
    "output",
    "output.dir",
    "evaluation.references",
    "evaluation.retention",
)  # the seed ends the folder's name
_BY_VALUE = ("method", "method.name", "adapter", "order", "order.name")  # their values say enough
_SEVERAL = ("name", "order", "path", "tasks")  # keys of more than one group
_LONGEST_WORD, _LONGEST_NAME = 40, 100


def find_recipe(path: str | Path) -> Path:
    """The recipe file: as given from the current folder, else from the checkout's root."""
    candidates = [Path(path)] if Path(path).is_absolute() else [Path.cwd() / path, ROOT / path]
    for candidate in candidates:
        try:
            if candidate.is_file():
                return candidate.resolve()
        except OSError as error:
            raise UserError(f"recipe {path}: cannot be read ({error.strerror})") from error
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
    if not equals or not re.fullmatch(r"\w+(\.[\w+-]+)*", key):
        raise UserError(f"override {text!r}: an override is key.path=value, such as training.epochs=2")
    try:
        return key, parse_yaml(value)
    except UserError as error:
        raise UserError(f"override {text!r:.200}: {error}") from error


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


def changed_keys(overrides: Sequence[str]) -> list[str]:
    """A short, file-name-safe word for each override but the seed, for the name of the run's folder.

    Together they take at most about 100 characters: of more, a hash stands for the last ones.
    """
    words: dict[str, str] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        key = _SHORTHAND.get(key, key)
        if key not in _UNNAMED:
            words[key] = _safe(value if key in _BY_VALUE else f"{_short_key(key)}{value}", _LONGEST_WORD)
    kept = list(words.values())
    while len("-".join(kept)) > _LONGEST_NAME:
        kept.pop()
    rest = list(words.items())[len(kept) :]
    return kept + ([_hash(repr(rest))] if rest else [])


def _short_key(key: str) -> str:
    """The last part of a key, with the one before it where that is needed to tell it from other keys."""
    parts = key.split(".")
    return ".".join(parts[-2:] if len(parts) > 2 or parts[-1] in _SEVERAL else parts[-1:])


def _safe(text: str, longest: int) -> str:
    word = re.sub(r"[^\w.+]+", "_", text).strip("_")
    return word if len(word) <= longest else f"{word[: longest - 9]}_{_hash(text)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def flatten(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted keys, for comparing two recipes key by key."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
