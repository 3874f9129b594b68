"""Tasks of lm-evaluation-harness, where it is installed and their data is there."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from data_prep.errors import UserError

TASK_FILES = (".yaml", ".yml")


@dataclass(frozen=True)
class HarnessTask:
    """One task, or group of tasks, of the harness with its data."""

    name: str
    fingerprint: str  # of what it is and by which version it is scored
    loaded: Mapping[str, Any]


def load_task(entry: str) -> HarnessTask:
    """The harness's task of this name, or that the YAML file at this path defines, and its data.

    Raises `UserError` where the harness is not installed, knows no such task, or cannot get its data.
    """
    place = f"evaluation.retention: {entry}"
    try:
        tasks = importlib.import_module("lm_eval.tasks")
        importlib.import_module("lm_eval.models.huggingface")  # what it needs is missed now, not after training
    except ImportError as error:
        raise UserError(
            f"{place}: a task of lm-evaluation-harness, which cannot be imported ({error}); install it (pip install "
            "lm-eval), or name a text (.txt, .jsonl) instead"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    asked = _own_task(Path(entry)) if entry.endswith(TASK_FILES) else entry
    try:
        loaded = tasks.TaskManager().load([asked])
        fingerprint = _fingerprint(asked, loaded["tasks"])
    except Exception as error:  # thousands of task files, each with a download of its own: it can be anything
        raise UserError(
            f"{place}: lm-evaluation-harness cannot load it ({type(error).__name__}: {error}); `lm_eval ls tasks` "
            "lists what it knows, and its data must be on this machine or in reach"
        ) from error
    return HarnessTask(asked if isinstance(asked, str) else str(asked["task"]), fingerprint, loaded)


def _fingerprint(asked: str | dict[str, Any], tasks: Mapping[str, Any]) -> str:
    """SHA-256 over the harness's version, the task and its rows."""
    found = hashlib.sha256(json.dumps([importlib.metadata.version("lm_eval"), asked], sort_keys=True).encode())
    for name in sorted(tasks):
        for row in tasks[name].eval_docs:
            found.update(json.dumps(row, sort_keys=True, default=str).encode())
    return found.hexdigest()


def _own_task(path: Path) -> dict[str, Any]:
    """A user's task: plain YAML, without tags that name Python code."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"evaluation.retention: {path}: cannot be read as plain YAML ({error}); mend it") from error
    name = content.get("task") if isinstance(content, dict) else None
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise UserError(
            f'evaluation.retention: {path}: defines no task; it needs a key "task" with its name, of letters, digits, '
            f"_ and -, and has {name!r:.80}"
        )
    found: dict[str, Any] = content
    return found


def scores(
    task: HarnessTask, model: Any, tokenizer: Any, *, family: Literal["t5", "llama2"], batch_size: int
) -> dict[str, float | None]:
    """Each metric's value, as the harness gives it: "task: metric" -> value, None where it is no finite number.

    Raises `UserError` where the harness cannot score the task with this model.
    """
    harness = importlib.import_module("lm_eval.models.huggingface")
    evaluate = importlib.import_module("lm_eval.evaluator").evaluate
    backend = "seq2seq" if family == "t5" else "causal"
    try:
        wrapped = harness.HFLM(pretrained=model, tokenizer=tokenizer, backend=backend, batch_size=batch_size)
        found = evaluate(lm=wrapped, task_dict=dict(task.loaded), bootstrap_iters=0, log_samples=False)
    except Exception as error:  # a task's own code, and its demands on a model
        raise UserError(
            f"evaluation.retention: {task.name}: lm-evaluation-harness cannot score it with this model "
            f"({type(error).__name__}: {error}); drop it, and run the same command again"
        ) from error
    return {
        f"{name}: {metric.removesuffix(',none')}": float(value) if math.isfinite(value) else None
        for name, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "_stderr" not in metric
    }
