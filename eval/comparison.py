"""Numbers over many runs: means with intervals over orders, seeds and rows; paired differences by row and by run.

Legend: n rows of a task; h[i] a task's rows that are right (0 or 1); AA the mean over tasks of their means; r runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, bootstrap, permutation_test

from eval.compared_runs import ComparedRun
from eval.right_rows import Hits

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0  # intervals do not change from one look to the next
Replicates = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Average:
    """A score of one method over orders and seeds."""

    mean: float
    sd: float | None  # over runs; None for one run
    low: float  # a bootstrap interval over orders, over seeds in them and over rows in those
    high: float
    runs: int


@dataclass(frozen=True)
class MeanDifference:
    """AA of one method minus another's, over the orders and seeds that both have."""

    mean: float
    sd: float | None  # over pairs of runs; None for one
    low: float | None  # as an average's; None for one pair without predictions
    high: float | None
    pairs: int
    better: int  # pairs in which the first is better
    p_value: float | None  # of the exact sign-flip permutation test over pairs; None for one


@dataclass(frozen=True)
class Difference:
    """AA of a run minus that of the run that it is paired with, on the same rows."""

    difference: float
    low: float | None  # a bootstrap interval over rows, task by task; None without predictions
    high: float | None
    p_value: float | None  # of the exact McNemar test over all rows


Pair = tuple[ComparedRun, ComparedRun, Difference]


def average(runs: Sequence[ComparedRun], score: str) -> Average | None:
    """AA over runs that have it; None where none has.

    The interval draws orders with replacement, in each of them as many of its seeds, and in each of those as many rows
    of each task as it has: of a task with share p right, a draw of n rows has Binomial(n, p) right ones.
    """
    found = [(run, row) for run in runs if None not in (row := run.last_row(score))]
    if not found:
        return None
    values = [float(np.mean([value for value in row if value is not None])) for _, row in found]
    draw = np.random.default_rng(SEED)
    replicates = [_replicates(np.array(row, dtype=float), np.array(run.results["counts"]), draw) for run, row in found]
    low, high = _interval(np.stack(replicates), [run.order for run, _ in found], draw)
    return Average(statistics.fmean(values), _sd(values), low, high, len(values))


def _replicates(percent: Replicates, counts: npt.NDArray[np.int64], draw: np.random.Generator) -> Replicates:
    """AA of resampled rows [RESAMPLES]."""
    right = draw.binomial(counts, percent / 100, size=(RESAMPLES, len(counts)))
    means: Replicates = (100 * right / counts).mean(axis=1)
    return means


def _interval(replicates: Replicates, orders: Sequence[str], draw: np.random.Generator) -> tuple[float, float]:
    """The interval of the mean over runs from `replicates` [r, RESAMPLES], each run's over its rows; `orders` [r].

    By hand, since scipy's bootstrap draws at one level alone.
    """
    groups = [[place for place, of in enumerate(orders) if of == order] for order in dict.fromkeys(orders)]
    total, runs = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    drawn_orders = draw.integers(len(groups), size=(len(groups), RESAMPLES))
    for drawn in drawn_orders:
        for number, group in enumerate(groups):
            (where,) = np.nonzero(drawn == number)
            seeds = np.array(group)[draw.integers(len(group), size=(len(group), len(where)))]
            total[where] += replicates[seeds, draw.integers(RESAMPLES, size=seeds.shape)].sum(axis=0)
            runs[where] += len(group)
    low, high = np.percentile(total / runs, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def _sd(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def mean_difference(pairs: Sequence[Pair], score: str) -> MeanDifference | None:
    """The first run of each pair against the second, of the same backbone; None where there is no pair.

    The interval is drawn as an average's, rows in pairs; over orders and seeds alone where a run has no predictions.
    """
    if not pairs:
        return None
    values = [found.difference for _, _, found in pairs]
    draw = np.random.default_rng(SEED)
    replicates = [
        np.full(RESAMPLES, found.difference) if found.low is None else _paired_replicates(run, other, score, draw)
        for run, other, found in pairs
    ]
    low, high = _interval(np.stack(replicates), [run.order for run, _, _ in pairs], draw)
    bare = len(pairs) == 1 and pairs[0][2].low is None
    return MeanDifference(
        mean=statistics.fmean(values),
        sd=_sd(values),
        low=None if bare else low,
        high=None if bare else high,
        pairs=len(values),
        better=sum(value > 0 for value in values),
        p_value=sign_flips(values) if len(values) > 1 else None,
    )


def _paired_replicates(run: ComparedRun, other: ComparedRun, score: str, draw: np.random.Generator) -> Replicates:
    """The difference in AA of resampled rows [RESAMPLES]: of n rows, some are gained, some lost, the others neither."""
    ours, theirs = run.hits(score), other.hits(score)
    assert ours is not None, "the caller has seen the interval of these rows"
    assert theirs is not None
    means = []
    for task in ours:
        change = ours[task].astype(int) - theirs[task]
        shares = [float(np.mean(change == kind)) for kind in (1, -1, 0)]
        gained, lost, _ = draw.multinomial(len(change), shares, size=RESAMPLES).T
        means.append(100 * (gained - lost) / len(change))
    replicates: Replicates = np.mean(means, axis=0)
    return replicates


def sign_flips(differences: Sequence[float]) -> float:
    """Two-sided p of the mean where each difference could as well be its negative: exact up to 13 of them."""
    found = permutation_test(
        (np.array(differences),),
        lambda drawn, axis: np.mean(drawn, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        rng=np.random.default_rng(SEED),
    )
    return float(found.pvalue)


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
