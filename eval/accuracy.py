"""The accuracy matrix of a stream of tasks and the scalars of the field, each NaN where a cell is missing.

a[t, i]: score in percent on task i after training task t; b[i]: the untrained model's; T tasks. Indices count
from 0 in the code and from 1 in the definitions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]

CELL_MODES = ("diagonal_and_last", "lower", "lower_and_next", "full")

# Printed with the numbers: a scalar's key in results.json, its name, its definition.
DEFINITIONS: tuple[tuple[str, str, str], ...] = (
    ("average_accuracy", "Average accuracy (AA)", "mean_i a[T, i]"),
    ("backward_transfer", "Backward transfer (BWT)", "1/(T-1) sum_{i<T} (a[T, i] - a[i, i])"),
    ("bwt_over_T", "BWT over T", "1/T sum_{i<T} (a[T, i] - a[i, i])"),
    ("forgetting", "Forgetting", "1/(T-1) sum_{i<T} (max_{i<=t<T} a[t, i] - a[T, i])"),
    ("learning_accuracy", "Learning accuracy (LA)", "mean_i a[i, i]"),
    ("forward_transfer", "Forward transfer (FWT)", "1/(T-1) sum_{i>1} (a[i-1, i] - b[i])"),
    (
        "transfer_vs_pertask",
        "Transfer against one model a task",
        "mean_i (a[i, i] - s[i]), s[i]: a model of task i alone (evaluation.references)",
    ),
    (
        "micro_average_accuracy",
        "Micro average accuracy",
        "sum_i n[i] a[T, i] / sum_i n[i], n[i] rows of task i",
    ),
)


def cells_for(mode: str, tasks: int) -> list[list[int]]:
    """For each of `tasks` tasks t, those to evaluate after training t, ascending; `mode` of `CELL_MODES`."""
    assert tasks > 0
    last = tasks - 1
    if mode == "diagonal_and_last":
        return [[t] for t in range(last)] + [list(range(tasks))]
    if mode == "lower":
        return [list(range(t + 1)) for t in range(tasks)]
    if mode == "lower_and_next":
        return [list(range(min(t + 1, last) + 1)) for t in range(tasks)]
    if mode == "full":
        return [list(range(tasks)) for _ in range(tasks)]
    raise ValueError(f"cells: got {mode!r}; legal are {', '.join(CELL_MODES)}")


class AccuracyMatrix:
    """Scores after each task of a stream; a cell that was not recorded is NaN, never zero."""

    def __init__(self, tasks: Sequence[str]) -> None:
        assert tasks, "a stream has at least one task"
        self.tasks = tuple(tasks)
        self._values: Scores = np.full((len(self.tasks), len(self.tasks)), np.nan)
        self._untrained: Scores = np.full(len(self.tasks), np.nan)

    def record(self, t: int, i: int, score: float) -> None:
        """Set a[t, i], the score in percent on task `i` after training task `t`, both counted from 0."""
        self._values[self._index(t), self._index(i)] = _percent(score)

    def record_untrained(self, i: int, score: float) -> None:
        """Set b[i], the untrained model's score in percent on task `i`."""
        self._untrained[self._index(i)] = _percent(score)

    @property
    def values(self) -> Scores:
        """A copy of a, [T, T]."""
        return self._values.copy()

    @property
    def untrained(self) -> Scores:
        """A copy of b, [T]."""
        return self._untrained.copy()

    def average_accuracy(self) -> float:
        """Mean over the tasks of the last row."""
        return _mean(self._values[-1])

    def learning_accuracy(self) -> float:
        """Mean of the diagonal: each task right after it was trained."""
        return _mean(self._values.diagonal())

    def backward_transfer(self) -> float:
        """Mean over all but the last task of last row minus diagonal; NaN for fewer than two tasks."""
        return _mean(self._change_since_trained())

    def bwt_over_T(self) -> float:  # the published variant's own name
        """The sum of backward transfer over T instead of T - 1 (the last task's change is 0)."""
        change = self._change_since_trained()
        return float(change.sum() / len(self.tasks)) if len(change) else float("nan")

    def forgetting(self) -> float:
        """Mean over all but the last task of its best score before the last task minus its last score."""
        last = len(self.tasks) - 1
        drops = [self._values[i:last, i].max() - self._values[last, i] for i in range(last)]
        return _mean(np.array(drops, dtype=np.float64))

    def forward_transfer(self) -> float:
        """Mean over all but the first task of the score just before training it minus the untrained score."""
        before = self._values.diagonal(offset=1)
        return _mean(before - self._untrained[1:])

    def transfer_vs_pertask(self, alone: Sequence[float | None]) -> float:
        """Mean of the diagonal minus `alone`, the scores in percent of models that learnt one task each.

        Above zero where what was learnt before helps to learn; NaN where a task has no such score.
        """
        assert len(alone) == len(self.tasks), f"{len(alone)} scores for {len(self.tasks)} tasks"
        single = np.array([np.nan if score is None else _percent(score) for score in alone], dtype=np.float64)
        return _mean(self._values.diagonal() - single)

    def micro_average_accuracy(self, counts: Sequence[int | None]) -> float:
        """Last row weighted by `counts`, the rows of each task: the score over all rows together."""
        assert len(counts) == len(self.tasks), f"{len(counts)} counts for {len(self.tasks)} tasks"
        weights = np.array([np.nan if count is None else count for count in counts], dtype=np.float64)
        return float((self._values[-1] * weights).sum() / weights.sum())

    def scalars(
        self, counts: Sequence[int | None], alone: Sequence[float | None] | None = None
    ) -> dict[str, float | None]:
        """Every scalar of `DEFINITIONS` by its key, None where cells are missing.

        `counts`: rows of each task; `alone`: scores of one model a task, None where there are none.
        """
        values = {
            "average_accuracy": self.average_accuracy(),
            "backward_transfer": self.backward_transfer(),
            "bwt_over_T": self.bwt_over_T(),
            "forgetting": self.forgetting(),
            "learning_accuracy": self.learning_accuracy(),
            "forward_transfer": self.forward_transfer(),
            "transfer_vs_pertask": self.transfer_vs_pertask(alone or [None] * len(self.tasks)),
            "micro_average_accuracy": self.micro_average_accuracy(counts),
        }
        return {key: _null_if_nan(value) for key, value in values.items()}

    def to_json(self) -> dict[str, Any]:
        """`{"tasks", "matrix", "untrained"}` with null where not measured."""
        return {
            "tasks": list(self.tasks),
            "matrix": [[_null_if_nan(value) for value in row] for row in self._values.tolist()],
            "untrained": [_null_if_nan(value) for value in self._untrained.tolist()],
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "AccuracyMatrix":
        """The matrix that `to_json` wrote."""
        matrix = cls(content["tasks"])
        for t, row in enumerate(content["matrix"]):
            for i, score in enumerate(row):
                if score is not None:
                    matrix.record(t, i, score)
        for i, score in enumerate(content["untrained"]):
            if score is not None:
                matrix.record_untrained(i, score)
        return matrix

    def _change_since_trained(self) -> Scores:
        """a[T, i] - a[i, i] for i < T, [T - 1]."""
        change: Scores = self._values[-1, :-1] - self._values.diagonal()[:-1]
        return change

    def _index(self, index: int) -> int:
        assert 0 <= index < len(self.tasks), f"task index {index} outside 0..{len(self.tasks) - 1}"
        return index


def _percent(score: float) -> float:
    assert 0.0 <= score <= 100.0, f"a score of {score} is no percentage"
    return score


def _mean(values: Scores) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _null_if_nan(value: float) -> float | None:
    return None if np.isnan(value) else value
