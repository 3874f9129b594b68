"""Finished runs for tests of their comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from eval.__main__ import main

ORDER = ["soil", "rivers"]
LABELS = ["yes", "no"]
SHA = "a" * 64
RIGHT = {"soil": [True, False, True, True], "rivers": [True, False]}


def make_run(
    folder: Path, right: Mapping[str, Sequence[bool]], *, recipe: Mapping[str, Any] | None = None, **changes: Any
) -> Path:
    """A finished run whose last row's predictions are right where `right` says so; options are right everywhere."""
    counts = {task: len(right[task]) for task in ORDER}
    run = {
        "order": ORDER,
        "method": "inclora",
        "model": "models/mini-x",
        "seed": 1,
        "recipe_sha256": SHA,
        "settings": {"cells": "diagonal_and_last", "split": "test", "steps": {"soil": 3, "rivers": 3}},
        "data": {
            task: {"labels": LABELS, "train_rows": 9, "evaluation_rows": counts[task], "unmatchable": 0}
            | {"train_fingerprint": "0" * 64, "evaluation_fingerprint": "1" * 64, "dropped": {}}
            for task in ORDER
        },
    }
    run |= changes
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(dict(recipe or {"method": {"name": run["method"]}})))
    for after, task in (("01-soil", "soil"), ("02-rivers", "soil"), ("02-rivers", "rivers")):
        rows = [
            {"id": index, "prediction": "yes" if hit else "no", "label": "yes", "option": "yes"}
            for index, hit in enumerate(right[task])
        ]
        path = folder / "predictions" / after / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))  # ids pair rows, not lines
    assert main([str(folder)]) == 0
    return folder
