"""A run's folder for tests of its page: every kind of event, and outputs that would be markup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval.__main__ import main

ORDER = ["soil", "rivers"]
LABELS = ["Clay", "<b>Sand</b>"]
SHA = "b" * 64


def make_run(folder: Path, **changes: Any) -> Path:
    """A run with every kind of event, and outputs that would be markup."""
    run = {
        "order": ORDER,
        "method": "lbcl",
        "model": "models/mini-x",
        "seed": 3,
        "recipe_sha256": SHA,
        "settings": {"cells": "lower", "split": "test", "add_dataset_name": True},
        "data": {
            task: {"labels": LABELS, "train_rows": 9, "evaluation_rows": 4, "unmatchable": 0}
            | {"train_fingerprint": SHA, "evaluation_fingerprint": SHA, "dropped": {"train": {"empty label": 2}}}
            | {"truncated_train": 5, "truncated_evaluation": 1}
            for task in ORDER
        },
        "timing": {"soil": {"train_s": 30.0, "evaluate_s": 10.0}, "rivers": {"train_s": 60.0}},
        "leak": {"max": 2.5e-8, "per_task": {}},
    }
    written = ["Clay", "<script>alert('x')</script>", "", "<b>sand</b>"]
    for after, task in (("01-soil", "soil"), ("02-rivers", "soil"), ("02-rivers", "rivers")):
        path = folder / "predictions" / after / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {"id": index, "prediction": text, "label": LABELS[index % 2], "option": LABELS[index % 2]}
            for index, text in enumerate(written)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [
        {"event": "step", "task": task, "step": step, "loss": 4 / step} for task in ORDER for step in range(1, 301)
    ]
    spaces = [
        {"event": "subspace", "task_index": task, "space": f"encoder.block.0.q.{part}", "width": 10, "rank": 3 * task}
        for task in (1, 2)
        for part in "UV"
    ]
    others: list[dict[str, Any]] = [
        {"event": "subspace", "task_index": 2, "space": "encoder.block.0.q.U", "drift_of": 1, "share": 0.875},
        {"event": "subspace", "task_index": 2, "sensitivity_of": "encoder.block.0.q", "mean": 2.0, "fisher": 4.0},
        {"event": "subspace", "task_index": 2, "sensitivity_of": "decoder.block.1.q", "mean": 1.0, "fisher": 0.5},
        {"event": "subspace", "task_index": 2, "sensitivity_of": "decoder.block.0.q", "mean": 3.0, "fisher": 0.25},
    ]
    before = {"rows": 64, "loss_at_random": 5.5, "loss_injected": 6.25, "right_at_random": 0.125, "right_injected": 0.0}
    unscored = {"rows": 8, "loss_at_random": 5.0, "loss_injected": 7.0, "right_at_random": None, "right_injected": None}
    for rows, jump in (("seed_samples", unscored), ("other_rows", before)):
        others.append({"event": "subspace", "task_index": 2, "jump_on": rows} | jump)
    peaks = {"method": 2**30, "train": 3 * 2**30}
    others.append({"event": "memory", "task_index": 0, "task": "untrained", "part": "evaluate", "peak_bytes": 2**29})
    others.append(
        {"event": "task", "task_index": 1, "task": "soil", "peak_bytes": 3 * 2**30, "peak_bytes_by_part": peaks}
    )
    lines = [json.dumps(event) for event in [*steps, *spaces, *others]]
    (folder / "run.json").write_text(json.dumps(run | changes))
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"event": "step", "task": "riv']))  # torn by a kill
    (folder / "recipe.yaml").write_text("method: {name: lbcl}  # <recipe>\n")
    assert main([str(folder)]) == 0
    return folder
