"""Small CL_Benchmark folders and data settings for the tests of data_prep, with sentences of our own."""

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LABELS = ("Good", "Bad")


@dataclass(frozen=True)
class Settings:
    """What load_tasks reads of a recipe's data group."""

    path: str | None
    max_train_rows: int | None = None
    max_test_rows: int | None = None
    bad_rows: str = "refuse"
    tasks: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Custom:
    """A user's own task."""

    labels: Sequence[str]
    train: str
    test: str
    dev: str | None = None
    family: str = "Custom"
    instruction: str | None = None
    text_key: str = "sentence"
    label_key: str = "label"


def some_rows(split: str, count: int, labels: Sequence[str] = LABELS) -> list[dict[str, str]]:
    """Rows whose sentences differ within and across splits, labels in turn."""
    return [
        {"label": labels[k % len(labels)], "sentence": f"Text: the {split} kettle number {k} \n"} for k in range(count)
    ]


def write_json(path: Path, content: Any, *, packed: bool = False) -> Path:
    """Write JSON, plain or as <path>.gz."""
    data = json.dumps(content, ensure_ascii=False).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    if packed:
        path = path.with_name(path.name + ".gz")
        data = gzip.compress(data)
    path.write_bytes(data)
    return path


def write_task(
    root: Path,
    name: str = "kettles",
    family: str = "SC",
    *,
    labels: Sequence[str] = LABELS,
    packed: bool = False,
    **splits: Any,
) -> Path:
    """One task under root/CL_Benchmark; splits not given are 20 train and 6 test rows. Returns its folder."""
    folder = root / "CL_Benchmark" / family / name
    splits = {"train": some_rows("train", 20, labels), "test": some_rows("test", 6, labels)} | splits
    write_json(folder / "labels.json", list(labels))
    for split, rows in splits.items():
        if rows is not None:
            write_json(folder / f"{split}.json", rows, packed=packed)
    return folder
