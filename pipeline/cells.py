"""Scoring one task with the weights as they stand: each rank its share of the rows, one file of predictions."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from data_prep.errors import UserError
from data_prep.files import write_atomic, write_json
from data_prep.tasks import Row
from eval.decode import Prediction, predict
from eval.run_files import UNTRAINED, cell_path, predictions_path, read_object, stage_names
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

    def take_over(self, after: str, stage: str, task: StreamTask, learnt: str) -> bool:
        """Copy the score of an earlier stage whose model is the same in all (`stages.learnt_key`). Collective."""
        return self._ranks.on_first(lambda: self._take_over(after, stage, task, learnt))

    def _take_over(self, after: str, stage: str, task: StreamTask, learnt: str) -> bool:
        wanted = self._same_model(learnt, task)
        for earlier in stage_names([found.name for found in self._workload.tasks]):
            path = cell_path(self._run_dir, earlier, task.name)
            predictions = predictions_path(self._run_dir, earlier, task.name)
            if earlier == after or not (path.is_file() and predictions.is_file()):
                continue
            try:
                cell = read_object(path)
            except UserError:  # whatever it said, it is no help here
                continue
            if cell.get("model") != wanted:
                continue
            write_atomic(predictions_path(self._run_dir, after, task.name), predictions.read_text(encoding="utf-8"))
            cell |= {"key": self.key(stage, task), "after": after, "seconds": 0.0}
            write_json(cell_path(self._run_dir, after, task.name), cell)
            self._log.event("evaluation", task_index=_index_of(after), **cell)
            self._log.say(f"{_told(cell)}: the same model as after {earlier}, not scored again")
            return True
        return False

    def _same_model(self, learnt: str, task: StreamTask) -> str:
        """The address of a score by what the model is, not by when it was."""
        return self.key(stage_key(None, {"backbone": self._workload.model_fingerprint, "learnt": learnt}), task)

    def score(self, model: nn.Module, after: str, stage: str, task: StreamTask, learnt: str) -> None:
        """Score `task` and write its predictions and cell; `learnt`: what stands in the model. Collective."""
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
        seconds, same = time.monotonic() - start, self._same_model(learnt, task)
        self._ranks.on_first(lambda: self._write(after, stage, same, task, _interleaved(shares), seconds))

    def _write(
        self, after: str, stage: str, same: str, task: StreamTask, predictions: list[Prediction], seconds: float
    ) -> None:
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
            "model": same,
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
