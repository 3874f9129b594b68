"""Tasks of lm-evaluation-harness, where it is installed and their data is there."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import logging
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
    except ImportError as error:
        raise UserError(
            f"{place}: a task of lm-evaluation-harness, which cannot be imported ({error}); install it (pip install "
            "lm-eval), or name a text (.txt, .jsonl) instead"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    asked = _own_task(Path(entry)) if entry.endswith(TASK_FILES) else entry
    try:
        loaded = tasks.TaskManager().load([asked])
    except Exception as error:  # thousands of task files, each with a download of its own: it can be anything
        raise UserError(
            f"{place}: lm-evaluation-harness cannot load it ({type(error).__name__}: {error}); `lm_eval ls tasks` "
            "lists what it knows, and its data must be on this machine or in reach"
        ) from error
    identity = json.dumps([importlib.metadata.version("lm_eval"), asked], sort_keys=True)
    name = entry if isinstance(asked, str) else str(asked["task"])
    return HarnessTask(name, hashlib.sha256(identity.encode()).hexdigest(), loaded)


def _own_task(path: Path) -> dict[str, Any]:
    """A user's task: plain YAML, without tags that name Python code."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"evaluation.retention: {path}: cannot be read as plain YAML ({error}); mend it") from error
    if not isinstance(content, dict) or not isinstance(content.get("task"), str):
        raise UserError(f'evaluation.retention: {path}: defines no task; it needs a key "task" with its name')
    return content


def scores(
    task: HarnessTask, model: Any, tokenizer: Any, *, family: Literal["t5", "llama2"], batch_size: int
) -> dict[str, float]:
    """Each metric's value, as the harness gives it: "task: metric" -> value."""
    harness = importlib.import_module("lm_eval.models.huggingface")
    backend = "seq2seq" if family == "t5" else "causal"
    wrapped = harness.HFLM(pretrained=model, tokenizer=tokenizer, backend=backend, batch_size=batch_size)
    evaluate = importlib.import_module("lm_eval.evaluator").evaluate
    found = evaluate(lm=wrapped, task_dict=dict(task.loaded), bootstrap_iters=0, log_samples=False)
    return {
        f"{name}: {metric.split(',')[0]}": float(value)
        for name, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "_stderr" not in metric
    }
