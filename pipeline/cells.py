"""Scoring one task with the weights as they stand: each rank its share of the rows, one file of predictions."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from data_prep.files import write_atomic, write_json
from data_prep.tasks import Row
from eval.decode import Prediction, predict
from eval.run_files import UNTRAINED, cell_path, predictions_path
from eval.scoring import exact_match
from pipeline.engine import Ranks
from pipeline.runlog import RunLog
from pipeline.stages import stage_key
from pipeline.stopping import Stopped, StopRequest
from pipeline.workload import StreamTask, Workload


class CellBook:
    """The cells of one run: which exist, and how a missing one is made."""

    def __init__(self, run_dir: Path, workload: Workload, ranks: Ranks, log: RunLog, stop: StopRequest) -> None:
        self._run_dir = run_dir
        self._workload = workload
        self._ranks = ranks
        self._log = log
        self._stop = stop

    def key(self, stage: str, task: StreamTask) -> str:
        """The cell's address: weights, evaluation settings, rows."""
        return stage_key(stage, self._workload.cell_influences(task))

    def exists(self, after: str, stage: str, task: StreamTask) -> bool:
        """Whether the cell is there, for these weights, settings and rows. Collective."""
        path = cell_path(self._run_dir, after, task.name)

        def look() -> bool:
            try:
                return bool(json.loads(path.read_text(encoding="utf-8"))["key"] == self.key(stage, task))
            except (OSError, ValueError, KeyError, TypeError):
                return False

        return self._ranks.on_first(look)

    def score(self, model: nn.Module, after: str, stage: str, task: StreamTask) -> None:
        """Score `task` and write its predictions and cell. Collective."""
        recipe = self._workload.recipe
        start = time.monotonic()
        mine = task.evaluation[self._ranks.rank :: self._ranks.world]
        predictions: list[Prediction] = []
        # A rank told to stop leaves its share unfinished; all ranks meet below and stop together.
        with suppress(Stopped):
            predictions = predict(
                model,
                self._workload.tokenizer,
                mine,
                family=recipe.model.family,
                labels=task.data.task.labels,
                label_ids=task.label_ids,
                max_new_tokens=recipe.evaluation.max_new_tokens,
                batch_size=recipe.evaluation.batch_size,
                label_scoring=recipe.evaluation.label_scoring,
                on_batch=self._stop.check,
            )
        self._ranks.check_stop(self._stop)
        shares = self._ranks.gather(predictions)
        self._ranks.on_first(lambda: self._write(after, stage, task, _interleaved(shares), time.monotonic() - start))

    def _write(self, after: str, stage: str, task: StreamTask, predictions: list[Prediction], seconds: float) -> None:
        rows = task.data.evaluation
        lines = [
            _line(row, prediction, task.data.task.labels) for row, prediction in zip(rows, predictions, strict=True)
        ]
        write_atomic(
            predictions_path(self._run_dir, after, task.name),
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
        )
        cell = {
            "key": self.key(stage, task),
            "after": after,
            "task": task.name,
            "rows": len(rows),
            "exact_match_correct": sum(line["correct"] for line in lines),
            "label_scoring_correct": (
                sum(line["option_correct"] for line in lines)
                if self._workload.recipe.evaluation.label_scoring
                else None
            ),
            "unmatchable": task.data.unmatchable,
            "seconds": round(seconds, 3),
        }
        write_json(cell_path(self._run_dir, after, task.name), cell)
        self._log.event("evaluation", task_index=_index_of(after), **cell)
        self._log.say(_told(cell))


def _index_of(after: str) -> int:
    return 0 if after == UNTRAINED else int(after.split("-")[0])


def _told(cell: Mapping[str, Any]) -> str:
    scores = f"exact match {100 * cell['exact_match_correct'] / cell['rows']:.1f}"
    if cell["label_scoring_correct"] is not None:
        scores += f", label scoring {100 * cell['label_scoring_correct'] / cell['rows']:.1f}"
    return f"after {cell['after']}: {cell['task']}: {scores} ({cell['rows']} rows, {cell['seconds']:.1f} s)"


def _interleaved(shares: list[list[Prediction]]) -> list[Prediction]:
    """Undo the dealing of rows to ranks: row i was rank (i mod ranks)'s."""
    world = len(shares)
    total = sum(len(share) for share in shares)
    return [shares[index % world][index // world] for index in range(total)]


def _line(row: Row, prediction: Prediction, labels: tuple[str, ...]) -> dict[str, Any]:
    assert row.id == prediction.row_id, "predictions keep the order of the rows"
    option = None if prediction.option is None else labels[prediction.option]
    return {
        "id": row.id,
        "prediction": prediction.text,
        "label": row.label,
        "correct": exact_match(prediction.text, row.label),
        "stopped": prediction.stopped,
        "option": option,
        "option_correct": None if option is None else option == row.label,
        "tokens": prediction.tokens,
    }
