"""eval.accuracy: the scalars against the worked example and against sums written out from the definitions."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.accuracy import CELL_MODES, DEFINITIONS, AccuracyMatrix, cells_for

scores = st.floats(0, 100, allow_nan=False)


def matrix_of(rows: list[list[float | None]], untrained: list[float | None] | None = None) -> AccuracyMatrix:
    matrix = AccuracyMatrix([f"task{i}" for i in range(len(rows))])
    for t, row in enumerate(rows):
        for i, score in enumerate(row):
            if score is not None:
                matrix.record(t, i, score)
    for i, score in enumerate(untrained or []):
        if score is not None:
            matrix.record_untrained(i, score)
    return matrix


@st.composite
def full_matrices(draw: st.DrawFn) -> tuple[list[list[float]], list[float], list[int]]:
    size = draw(st.integers(2, 5))
    row = st.lists(scores, min_size=size, max_size=size)
    counts = st.lists(st.integers(1, 9000), min_size=size, max_size=size)
    return draw(st.lists(row, min_size=size, max_size=size)), draw(row), draw(counts)


def test_worked_example() -> None:
    matrix = matrix_of([[80], [70, 85], [65, 80, 90]])
    assert matrix.average_accuracy() == pytest.approx(235 / 3)
    assert matrix.learning_accuracy() == pytest.approx(85)
    assert matrix.backward_transfer() == pytest.approx(-10)
    assert matrix.bwt_over_T() == pytest.approx(-20 / 3)
    assert matrix.forgetting() == pytest.approx(10)
    assert math.isnan(matrix.forward_transfer())


def test_forgetting_is_from_the_best_score_not_from_the_first() -> None:
    matrix = matrix_of([[50], [70, 60], [90, 65, 10], [40, 62, 10, 10]])
    assert matrix.forgetting() == pytest.approx(((90 - 40) + (65 - 62) + (10 - 10)) / 3)
    assert matrix.backward_transfer() == pytest.approx(((40 - 50) + (62 - 60) + 0) / 3)


def test_forgetting_is_negative_where_the_last_score_is_the_best() -> None:
    assert matrix_of([[50], [60, 70]]).forgetting() == pytest.approx(-10)


def test_forward_transfer_compares_the_cell_before_training_with_the_untrained_model() -> None:
    matrix = matrix_of([[80, 30, 99], [70, 85, 40], [65, 80, 90]], [77, 10, 25])
    assert matrix.forward_transfer() == pytest.approx(((30 - 10) + (40 - 25)) / 2)


def test_micro_average_weights_tasks_by_rows() -> None:
    assert matrix_of([[0], [50, 100]]).micro_average_accuracy([300, 100]) == pytest.approx(62.5)
    assert math.isnan(matrix_of([[0], [50, 100]]).micro_average_accuracy([300, None]))


@given(full_matrices())
def test_scalars_are_their_definitions(drawn: tuple[list[list[float]], list[float], list[int]]) -> None:
    rows, untrained, counts = drawn
    alone = untrained[::-1]  # of any scores
    size = len(rows)
    # a(t, i) and b(i) with indices from 1, as in the definitions
    a = {(t + 1, i + 1): rows[t][i] for t in range(size) for i in range(size)}
    b = {i + 1: untrained[i] for i in range(size)}
    backward = forgetting = forward = last = diagonal = weighted = transfer = 0.0
    for i in range(1, size + 1):
        last += a[size, i]
        diagonal += a[i, i]
        transfer += a[i, i] - alone[i - 1]
        weighted += a[size, i] * counts[i - 1]
        if i < size:
            backward += a[size, i] - a[i, i]
            best = a[i, i]
            for t in range(i, size):
                best = max(best, a[t, i])
            forgetting += best - a[size, i]
        if i > 1:
            forward += a[i - 1, i] - b[i]
    got = matrix_of(rows, untrained).scalars(counts, alone)
    assert got == pytest.approx(
        {
            "average_accuracy": last / size,
            "backward_transfer": backward / (size - 1),
            "bwt_over_T": backward / size,
            "forgetting": forgetting / (size - 1),
            "learning_accuracy": diagonal / size,
            "forward_transfer": forward / (size - 1),
            "transfer_vs_pertask": transfer / size,
            "micro_average_accuracy": weighted / sum(counts),
        },
        abs=1e-9,
    )


# Which cells each scalar reads, (t, i) from 0; t = -1 is the untrained model.
READS = {
    "average_accuracy": {(3, 0), (3, 1), (3, 2), (3, 3)},
    "micro_average_accuracy": {(3, 0), (3, 1), (3, 2), (3, 3)},
    "learning_accuracy": {(0, 0), (1, 1), (2, 2), (3, 3)},
    "transfer_vs_pertask": {(0, 0), (1, 1), (2, 2), (3, 3)},
    "backward_transfer": {(0, 0), (1, 1), (2, 2), (3, 0), (3, 1), (3, 2)},
    "bwt_over_T": {(0, 0), (1, 1), (2, 2), (3, 0), (3, 1), (3, 2)},
    "forgetting": {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)},
    "forward_transfer": {(0, 1), (1, 2), (2, 3), (-1, 1), (-1, 2), (-1, 3)},
}


@pytest.mark.parametrize("missing", [(t, i) for t in range(-1, 4) for i in range(4)])
def test_a_scalar_is_null_exactly_where_a_cell_that_it_reads_is_missing(missing: tuple[int, int]) -> None:
    rows: list[list[float | None]] = [[10.0 * t + i for i in range(4)] for t in range(4)]
    untrained: list[float | None] = [1.0, 2.0, 3.0, 4.0]
    t, i = missing
    (untrained if t < 0 else rows[t])[i] = None
    got = matrix_of(rows, untrained).scalars([1, 2, 3, 4], [9.0, 8.0, 7.0, 6.0])
    assert {key for key, value in got.items() if value is None} == {
        key for key, cells in READS.items() if missing in cells
    }
    assert set(got) == {key for key, _, _ in DEFINITIONS}


def test_transfer_against_one_model_a_task_needs_a_score_for_every_task() -> None:
    """Learnt to 80, 85 and 90 where models alone reach 82, 80 and 81: +4 on average."""
    matrix = matrix_of([[80], [70, 85], [65, 80, 90]])
    assert matrix.transfer_vs_pertask([82, 80, 81]) == pytest.approx(4.0)
    assert math.isnan(matrix.transfer_vs_pertask([82, None, 81]))
    assert matrix.scalars([1, 1, 1])["transfer_vs_pertask"] is None


def test_one_task_has_accuracy_and_no_transfer() -> None:
    got = matrix_of([[40]], [5]).scalars([10])
    assert {key for key, value in got.items() if value is not None} == {
        "average_accuracy",
        "learning_accuracy",
        "micro_average_accuracy",
    }


def test_nothing_recorded_is_nan_and_null_never_zero() -> None:
    matrix = AccuracyMatrix(["first", "second"])
    assert np.isnan(matrix.values).all()
    assert np.isnan(matrix.untrained).all()
    assert matrix.to_json() == {
        "tasks": ["first", "second"],
        "matrix": [[None, None]] * 2,
        "untrained": [None, None],
    }
    assert set(matrix.scalars([1, 1]).values()) == {None}


@given(st.data())
def test_json_round_trip(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 4))
    row = st.lists(st.none() | scores, min_size=size, max_size=size)
    matrix = matrix_of(data.draw(st.lists(row, min_size=size, max_size=size)), data.draw(row))
    back = AccuracyMatrix.from_json(json.loads(json.dumps(matrix.to_json(), allow_nan=False)))
    assert back.tasks == matrix.tasks
    np.testing.assert_array_equal(back.values, matrix.values)
    np.testing.assert_array_equal(back.untrained, matrix.untrained)


def test_a_changed_copy_of_the_values_leaves_the_matrix_alone() -> None:
    matrix = matrix_of([[80]], [5])
    matrix.values[0, 0] = 1
    matrix.untrained[0] = 1
    assert matrix.values == [[80]]
    assert matrix.untrained == [5]


@pytest.mark.parametrize("score", [-0.1, 100.1, float("nan")])
def test_only_percentages_are_recorded(score: float) -> None:
    with pytest.raises(AssertionError):
        AccuracyMatrix(["only"]).record(0, 0, score)


def test_a_cell_outside_the_matrix_is_refused() -> None:
    with pytest.raises(AssertionError):
        AccuracyMatrix(["first", "second"]).record(0, -1, 50.0)


@pytest.mark.parametrize(
    ("mode", "cells"),
    [
        ("diagonal_and_last", [[0], [1], [0, 1, 2]]),
        ("lower", [[0], [0, 1], [0, 1, 2]]),
        ("lower_and_next", [[0, 1], [0, 1, 2], [0, 1, 2]]),
        ("full", [[0, 1, 2]] * 3),
    ],
)
def test_cells_for(mode: str, cells: list[list[int]]) -> None:
    assert cells_for(mode, 3) == cells


@pytest.mark.parametrize("mode", CELL_MODES)
def test_cells_for_one_task(mode: str) -> None:
    assert cells_for(mode, 1) == [[0]]


def test_the_default_cells_are_those_that_every_scalar_reads() -> None:
    read = set().union(*READS.values())
    assert {(t, i) for t, row in enumerate(cells_for("lower_and_next", 4)) for i in row} == {
        cell for cell in read if cell[0] >= 0
    }


def test_cells_for_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match=r"'upper'.*lower_and_next"):
        cells_for("upper", 3)
