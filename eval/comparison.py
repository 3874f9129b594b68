"""Numbers over many runs: means with intervals over rows, orders and seeds; paired differences by row.

Legend: n rows of a task; h[i] a task's rows that are right (0 or 1); AA the mean over tasks of their means.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, bootstrap

from eval.compared_runs import ComparedRun, Hits

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0  # intervals do not change from one look to the next


@dataclass(frozen=True)
class Average:
    """A score of one method over orders and seeds."""

    mean: float
    sd: float | None  # over runs; None for one run
    low: float  # a bootstrap interval over runs (orders and seeds) and over rows in them
    high: float
    runs: int


@dataclass(frozen=True)
class Difference:
    """AA of a run minus that of the run that it is paired with, on the same rows."""

    difference: float
    low: float | None  # a bootstrap interval over rows, task by task; None without predictions
    high: float | None
    p_value: float | None  # of the exact McNemar test over all rows


def average(runs: Sequence[ComparedRun], score: str) -> Average | None:
    """AA over runs that have it; None where none has.

    The interval draws runs with replacement and, in each, as many rows of each task as it has: of a task with share p
    right, a draw of n rows has Binomial(n, p) right ones.
    """
    rows = [(row, run.results["counts"]) for run in runs if None not in (row := run.last_row(score))]
    if not rows:
        return None
    values = [float(np.mean([value for value in row if value is not None])) for row, _ in rows]
    draw = np.random.default_rng(SEED)
    replicates = np.stack([_replicates(np.array(row, dtype=float), np.array(counts), draw) for row, counts in rows])
    chosen = draw.integers(len(rows), size=(RESAMPLES, len(rows)))
    means = replicates[chosen, draw.integers(RESAMPLES, size=chosen.shape)].mean(axis=1)
    low, high = np.percentile(means, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Average(statistics.fmean(values), sd, float(low), float(high), len(values))


def _replicates(percent: np.ndarray, counts: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """AA of resampled rows [RESAMPLES]."""
    right = draw.binomial(counts, percent / 100, size=(RESAMPLES, len(counts)))
    means: np.ndarray = (100 * right / counts).mean(axis=1)
    return means


def paired(run: ComparedRun, other: ComparedRun, score: str) -> Difference | None:
    """`run` against `other`, of the same backbone, order and seed; None where one has no AA."""
    ours, theirs = run.scalar("average_accuracy", score), other.scalar("average_accuracy", score)
    if ours is None or theirs is None:
        return None
    hits = run.hits(score), other.hits(score)
    if hits[0] is None or hits[1] is None:
        return Difference(ours - theirs, None, None, None)
    return Difference(ours - theirs, *row_interval(hits[0], hits[1]), mcnemar(hits[0], hits[1]))


def row_interval(ours: Mapping[str, Hits], theirs: Mapping[str, Hits]) -> tuple[float, float]:
    """The percentile bootstrap interval of the difference in AA, in points, rows drawn task by task in pairs."""
    changes = tuple(ours[task].astype(float) - theirs[task] for task in ours)
    if all(np.ptp(change) == 0 for change in changes):  # no row differs from another: nothing to draw
        same = 100 * float(np.mean([change.mean() for change in changes]))
        return same, same

    def difference(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        means: np.ndarray = np.mean([100 * change.mean(axis=axis) for change in drawn], axis=0)
        return means

    found = bootstrap(
        changes,
        difference,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def mcnemar(ours: Mapping[str, Hits], theirs: Mapping[str, Hits]) -> float:
    """The exact two-sided McNemar test over all rows: are rows right in one run alone equally many on both sides?"""
    changes = np.concatenate([ours[task].astype(int) - theirs[task] for task in ours])
    gained, lost = int((changes > 0).sum()), int((changes < 0).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
