"""eval.comparison over many runs: what orders, seeds and rows add to an interval; against statsmodels and scipy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparison_runs import RIGHT, make_run
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape
from scipy.stats import ttest_1samp
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.proportion import proportion_confint

from eval.compared_runs import ComparedRun, load_runs
from eval.comparison import Difference, average, mcnemar, mean_difference, paired, row_interval, sign_flips
from eval.comparison_page import format_comparison
from eval.comparison_report import compare
from eval.comparison_tables import to_csv, to_markdown
from eval.intervals import wilson
from eval.published import source_legend

MANY = 10**7  # rows: their own draws change nothing


def compared(score: float, order: str, seed: int = 1, rows: int = MANY) -> ComparedRun:
    results: dict[str, Any] = {"order": ["soil"], "counts": [rows], "matrix": {"exact_match": [[score]]}}
    return ComparedRun(Path("x"), "inclora", "mini", order, seed, results)


@given(st.integers(1, 500), st.data())
def test_wilson_is_statsmodels_s(rows: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, rows))
    low, high = proportion_confint(correct, rows, method="wilson")
    assert wilson(correct, rows) == pytest.approx((100 * low, 100 * high), abs=1e-6)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_statsmodels_s(rows: list[tuple[bool, bool]]) -> None:
    table = [[sum(row == (a, b) for row in rows) for b in (True, False)] for a in (True, False)]
    ours, theirs = ({"soil": np.array([row[side] for row in rows], dtype=np.int8)} for side in (0, 1))
    if table[0][1] + table[1][0]:
        assert mcnemar(ours, theirs) == pytest.approx(reference_mcnemar(table, exact=True).pvalue)
    else:
        assert mcnemar(ours, theirs) == 1.0


def test_orders_are_drawn_before_their_seeds() -> None:
    """Orders at 40, 50 and 60, three seeds each: a draw of three orders has all at 40 in 1 of 27, above 2.5 %.

    Nine runs drawn as if each were an order of its own would reach down to 44.
    """
    runs = [
        compared(score, name, seed) for name, score in zip("abc", (40.0, 50.0, 60.0), strict=True) for seed in "123"
    ]
    found = average(runs, "exact_match")
    assert found is not None
    assert (found.mean, found.low, found.high) == tuple(pytest.approx(value, abs=0.05) for value in (50, 40, 60))


def test_seeds_are_drawn_in_their_order() -> None:
    """One order, seeds at 40 and 60: both draws are of one of them in a quarter of the draws each."""
    found = average([compared(40.0, "a", 1), compared(60.0, "a", 2)], "exact_match")
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(40, abs=0.05), pytest.approx(60, abs=0.05))
    uneven = average([compared(40.0, "a", 1), *(compared(60.0, "b", seed) for seed in range(9))], "exact_match")
    assert uneven is not None
    assert (uneven.mean, uneven.low, uneven.high) == tuple(pytest.approx(value, abs=0.05) for value in (58, 40, 60))


def test_rows_are_drawn_in_their_run() -> None:
    found = average([compared(50.0, "a", rows=100)], "exact_match")
    assert found is not None
    low, high = proportion_confint(50, 100, method="normal")
    assert (found.low, found.high) == (pytest.approx(100 * low, abs=1), pytest.approx(100 * high, abs=1))


def pairs_of(tmp_path: Path, changes: Sequence[tuple[int, int]], *, rows: int = 400) -> list[Any]:
    """Pairs of runs with so many rows gained and lost in each of two tasks, an order each."""
    pairs = []
    for number, (gained, lost) in enumerate(changes):
        ours = [place < gained for place in range(rows)]
        theirs = [gained <= place < gained + lost for place in range(rows)]
        folders = [
            make_run(tmp_path / f"{method}{number}", {"soil": right, "rivers": right}, method=method, seed=number)
            for method, right in (("pegp", ours), ("inclora", theirs))
        ]
        first, second = load_runs(folders)
        found = paired(first, second, "exact_match")
        assert found is not None
        pairs.append((first, second, found))
    return pairs


def test_a_mean_difference_of_one_pair_is_that_of_its_rows(tmp_path: Path) -> None:
    ((ours, theirs, one),) = pairs_of(tmp_path, [(60, 20)])
    found = mean_difference([(ours, theirs, one)], "exact_match")
    assert found is not None
    hits = ours.hits("exact_match"), theirs.hits("exact_match")
    assert hits[0] is not None
    assert hits[1] is not None
    low, high = row_interval(hits[0], hits[1])
    assert (found.mean, found.sd, found.pairs, found.better, found.p_value) == (pytest.approx(10), None, 1, 1, None)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.3), pytest.approx(high, abs=0.3))


def test_a_mean_difference_over_runs(tmp_path: Path) -> None:
    """+10, -2 and +4 points."""
    found = mean_difference(pairs_of(tmp_path, [(60, 20), (10, 18), (16, 0)]), "exact_match")
    assert found is not None
    assert (found.mean, found.sd, found.better) == (pytest.approx(4), pytest.approx(6), 2)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0 < found.high, "an order of +10 may be drawn, or one of -2, three times"
    assert found.p_value == pytest.approx(sign_flips([10, -2, 4]))


def test_without_predictions_orders_and_seeds_alone_give_the_interval() -> None:
    bare = [
        (compared(0, name), compared(0, name), Difference(change, None, None, None))
        for name, change in (("a", 1.0), ("b", 2.0), ("c", 3.0))
    ]
    found = mean_difference(bare, "exact_match")
    assert found is not None
    assert (found.mean, found.low, found.high) == (2.0, 1.0, 3.0)
    single = mean_difference(bare[:1], "exact_match")
    assert single is not None
    assert (single.mean, single.low, single.high) == (1.0, None, None)
    assert mean_difference([], "exact_match") is None


def test_signs_are_flipped_in_every_way() -> None:
    assert sign_flips([1, 2, 3]) == pytest.approx(2 / 8)
    assert sign_flips([5.0] * 8) == pytest.approx(2 / 256)
    assert sign_flips([1, -1]) == pytest.approx(1.0)
    drawn = np.random.default_rng(1).normal(0.5, 1, size=40)
    assert sign_flips(list(drawn)) == pytest.approx(float(ttest_1samp(drawn, 0).pvalue), abs=0.01)


def test_one_table_holds_orders_averages_differences_and_what_is_published(tmp_path: Path) -> None:
    orders = {"order1": ["dbpedia", "amazon", "yahoo", "agnews"], "order2": ["dbpedia", "amazon", "agnews", "yahoo"]}
    folders = []
    for name, order in orders.items():
        for method, right in (("inclora", [True, False, False]), ("pegp", [True, True, False])):
            for seed in (1, 2):
                folder = tmp_path / f"{name}-{method}-{seed}"
                make_run(folder, RIGHT, method=method, seed=seed, model={"path": "models/t5-large"})
                rename_tasks(folder, order, right)
                folders.append(folder)
    content = compare(load_runs(folders), against="inclora")
    text = to_markdown(content)
    header, _, first, second = text.partition("| method |")[2].splitlines()[:4]
    assert "order1, EM / LS | order2, EM / LS | AA EM" in header
    assert "EM against inclora | LS against inclora | published AA over three orders" in header
    assert first.startswith(
        "| inclora | t5-large | 2 | 2 | 33.3 ± 0.0 / 33.3 ± 0.0 | 33.3 ± 0.0 / 33.3 ± 0.0 | 33.3 ± 0.0 ["
    )
    assert "63.6 (LB-CL); 66.4 (CoDe)" in first
    assert "| +33.3 [" in second
    assert "], better in 4 of 4, p = 0.125 |" in second
    assert content["averages"][0]["by_order"]["order1"]["exact_match"]["runs"] == 2
    assert "micro AA EM" in to_csv(content)
    published = text.partition("## Published figures")[2]
    assert "**Not like for like**, the data differ: dbpedia (9/3 rows, published " in published
    assert all(f"- {line}" in published for line in source_legend())
    page = format_comparison(content)
    assert "the data differ: dbpedia (9/3 rows, published " in page
    assert str(escape(source_legend()[0])) in page


def rename_tasks(folder: Path, order: list[str], right: list[bool]) -> None:
    """Results of four tasks in the place of the run's own, with `right` rows of each and no predictions."""
    results = json.loads((folder / "results.json").read_text())
    score = 100 * sum(right) / len(right)
    scalars = {key: score for key in ("average_accuracy", "learning_accuracy", "micro_average_accuracy")}
    matrix = [[score] * 4] * 4
    results |= {
        "order": order,
        "counts": [len(right)] * 4,
        **scalars,
        "label_scoring": results["label_scoring"] | scalars,
    }
    results["matrix"] = {"exact_match": matrix, "label_scoring": matrix}
    results["untrained"] = {"exact_match": [0.0] * 4, "label_scoring": [0.0] * 4}
    results["data_fingerprints"] = dict.fromkeys(order)
    results["rows"] = {task: {"train": 9, "evaluation": len(right), "unmatchable": 0} for task in order}
    del results["right_rows"]
    (folder / "results.json").write_text(json.dumps(results))


def test_rows_that_no_label_can_match_have_a_column_of_their_own(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / method, RIGHT, method=method) for method in ("inclora", "pegp")]
    assert "AA matchable" not in to_markdown(compare(load_runs(folders), against=None)).partition("## Every run")[2]
    results = json.loads((folders[0] / "results.json").read_text())
    results["without_unmatchable"] = results | {"average_accuracy": 75.0}
    (folders[0] / "results.json").write_text(json.dumps(results))
    content = compare(load_runs(folders), against=None)
    assert [row["AA matchable EM"] for row in content["runs"]] == [75.0, 62.5]
    assert "micro AA, EM / LS | AA matchable, EM / LS |" in to_markdown(content)
