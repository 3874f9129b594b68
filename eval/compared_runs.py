"""Finished runs side by side: what each is called, by the settings in which they differ, and what it scored."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.errors import UserError
from eval.accuracy import cells_for
from eval.published import backbone_name, order_name
from eval.right_rows import Hits, read_hits, unpack
from eval.run_files import read_object

# Groups of a recipe that name a run beside its method; of training, not how it is dealt to ranks.
_NAMING = ("method", "adapter", "training", "batching", "data", "engine.precision", "evaluation.split")
_NEVER = (
    "method.name",
    "method.feature_drift",
    "training.micro_batch_size",
    "training.per_task",
    "data.path",
    "data.tasks",
)
_KIND = "adapter.kind"


@dataclass(frozen=True)
class ComparedRun:
    """One run among others."""

    folder: Path
    label: str  # its method, and what of its settings differs between runs of that method
    backbone: str
    order: str  # a published order's name, or the tasks
    seed: int
    results: Mapping[str, Any]  # results.json

    @property
    def place(self) -> tuple[str, str, int]:
        """Where it can be paired with a run of another method."""
        return self.backbone, self.order, self.seed

    def scalar(self, key: str, score: str) -> float | None:
        """A scalar of results.json under one score."""
        value: float | None = (self.results if score == "exact_match" else self.results["label_scoring"])[key]
        return value

    def last_row(self, score: str) -> list[float | None]:
        """The score on every task after the last one."""
        row: list[float | None] = self.results["matrix"][score][-1]
        return row

    def missing(self) -> list[str]:
        """Stages whose planned cells are not all there: "untrained: <task>, ...", "after <task>: <task>, ..."."""
        order, cells = self.results["order"], self.results["settings"].get("cells", "diagonal_and_last")
        matrix, unseen = self.results["matrix"]["exact_match"], self.results.get("unseen", {})
        planned = list(enumerate(cells_for(cells, len(order))))
        if self.results["settings"].get("joint"):  # there is one stage alone, the last
            planned = planned[-1:]
        untrained = zip(order, self.results["untrained"]["exact_match"], strict=True)
        wanted = [("untrained", [task for task, value in untrained if value is None])]
        wanted[0][1].extend(task for task, found in unseen.items() if found["untrained"]["exact_match"] is None)
        for t, row in planned:
            beside = [task for task, found in unseen.items() if found["exact_match"][t] is None]
            wanted.append((f"after {order[t]}", [*(order[i] for i in row if matrix[t][i] is None), *beside]))
        return [f"{stage}: {', '.join(tasks)}" for stage, tasks in wanted if tasks]

    def hits(self, score: str) -> dict[str, Hits] | None:
        """By task, the rows that are right after the last task, from predictions or results.json; None without both."""
        order = self.results["order"]
        kept = self.results.get("right_rows", {}).get(score)
        counts = dict(zip(order, self.results["counts"], strict=True))
        return read_hits(self.folder, order, score) or unpack(kept, counts)


def expand(patterns: Sequence[str]) -> list[Path]:
    """The folders that `patterns` name, each once; a glob that matches nothing is a `UserError`."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) and not Path(pattern).exists() else [pattern]
        folders = [Path(match) for match in matches if glob.escape(pattern) == pattern or Path(match).is_dir()]
        if not folders:
            raise UserError(f"{pattern}: matches no folder; give folders of runs")
        found |= dict.fromkeys(folders)
    return list(found)


def load_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """The runs, named by what they differ in. `UserError` where two are of one name, backbone, order and seed."""
    read = [(folder, read_object(folder / "results.json"), _settings(folder)) for folder in folders]
    labels = _labels([(results["method"], backbone_name(results["model"]), settings) for _, results, settings in read])
    runs = [
        ComparedRun(
            folder=folder,
            label=label,
            backbone=backbone_name(results["model"]),
            order=order_name(results["order"]) or ", ".join(results["order"]),
            seed=results["seed"],
            results=results,
        )
        for (folder, results, _), label in zip(read, labels, strict=True)
    ]
    first: dict[tuple[str, ...], ComparedRun] = {}
    for run in runs:
        same = first.setdefault((run.label, *map(str, run.place)), run)
        if same is not run:
            raise UserError(
                f"{run.folder}: the same method, settings, backbone, order and seed as {same.folder}; give one of them"
            )
    return runs


def _settings(folder: Path) -> dict[str, str]:
    """The settings of the run's recipe that may name it, by dotted key; none where it has no recipe."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({error}); restore it") from error
    flat = dict(_flat(content if isinstance(content, dict) else {}))
    return {
        key: json.dumps(value).strip('"')
        for key, value in flat.items()
        if key.startswith(_NAMING) and not key.startswith(_NEVER)
    }


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _labels(named: Sequence[tuple[str, str, Mapping[str, str]]]) -> list[str]:
    """A method's name, its adapter where its runs have several, and the keys in which runs of both differ.

    Runs on different backbones may have different settings without being called differently for it.
    """
    kinds: dict[str, set[str]] = {}
    values: dict[tuple[str, str, str, str], set[str]] = {}  # of each key, for runs that could be taken for each other
    for method, backbone, settings in named:
        kind = settings.get(_KIND, "")
        kinds.setdefault(method, set()).add(kind)
        for key, value in settings.items():
            values.setdefault((method, kind, backbone, key), set()).add(value)
    differing = {(method, kind, key) for (method, kind, _, key), found in values.items() if len(found) > 1}
    labels = []
    for method, _, settings in named:
        kind = settings.get(_KIND, "")
        words = [method, *([kind] if len(kinds[method]) > 1 else [])]
        words += [f"{key.rpartition('.')[2]}={settings[key]}" for key in settings if (method, kind, key) in differing]
        labels.append(" ".join(words))
    return labels
