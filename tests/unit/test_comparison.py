"""eval.comparison: averages over runs, differences paired by row, what runs are called, the command's report."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparison_runs import ORDER, RIGHT, make_run
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.orders import ORDERS
from eval.__main__ import main
from eval.compared_runs import ComparedRun, expand, load_runs
from eval.comparison import average, mcnemar, paired, row_interval
from eval.comparison_page import format_comparison
from eval.comparison_report import compare
from eval.comparison_tables import to_markdown
from eval.published import figures_for


def hits(*right: Sequence[int]) -> dict[str, Any]:
    return {task: np.array(row, dtype=np.int8) for task, row in zip(ORDER, right, strict=True)}


outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


@given(outcomes, outcomes)
def test_mcnemar_is_a_fair_coin_over_the_rows_that_differ(first: list[Any], second: list[Any]) -> None:
    ours, theirs = (hits(*([row[side] for row in task] for task in (first, second))) for side in (0, 1))
    both = [*first, *second]
    gained, lost = sum(a and not b for a, b in both), sum(b and not a for a, b in both)
    n = gained + lost
    likely = comb(n, gained)
    wanted = sum(comb(n, k) for k in range(n + 1) if comb(n, k) <= likely) / 2**n
    assert mcnemar(ours, theirs) == pytest.approx(min(wanted, 1.0))
    assert mcnemar(theirs, ours) == pytest.approx(mcnemar(ours, theirs))


def test_the_paired_interval_is_that_of_the_mean_change() -> None:
    """60 of 400 rows gained, 20 lost, in each of two tasks: +10 points; the standard error of the mean of two such
    means is sqrt((0.2 - 0.1^2) / 400 / 2), and 95 % are 1.96 of it.
    """
    change = [1] * 60 + [-1] * 20 + [0] * 320
    ours = hits([value > 0 for value in change], [value > 0 for value in change])
    theirs = hits([value < 0 for value in change], [value < 0 for value in change])
    low, high = row_interval(ours, theirs)
    half = 100 * 1.96 * (0.19 / 400 / 2) ** 0.5
    assert low == pytest.approx(10 - half, abs=0.25)  # 2000 draws: an end's own error is about 0.06
    assert high == pytest.approx(10 + half, abs=0.25)
    back = row_interval(theirs, ours)
    assert back == (pytest.approx(-high, abs=0.25), pytest.approx(-low, abs=0.25))
    assert row_interval(ours, ours) == (0, 0)


def compared(row: Sequence[float | None], *, seed: int = 1, counts: Sequence[int] = (100, 50)) -> ComparedRun:
    matrix = [[None, None], list(row)]
    results: dict[str, Any] = {
        "order": ORDER,
        "counts": list(counts),
        "matrix": {"exact_match": matrix, "label_scoring": matrix},
        "settings": {},
    }
    return ComparedRun(Path("x"), "inclora", "mini", "order", seed, results)


def test_an_average_over_runs() -> None:
    """AA 50 and 60: mean 55, sd sqrt(50)."""
    found = average(
        [compared([40.0, 60.0]), compared([50.0, 70.0], seed=2), compared([None, 1.0], seed=3)], "exact_match"
    )
    assert found is not None
    assert (found.mean, found.sd, found.runs) == (55.0, pytest.approx(50**0.5), 2)
    # Each run is drawn twice in a quarter of the draws, whose mean then has a standard error of 4.2 / sqrt(2) points:
    # the 2.5 % point is the 10 % point of these, 50 - 1.28 x 3.0.
    assert found.low == pytest.approx(46.2, abs=0.5)
    assert found.high == pytest.approx(63.8, abs=0.5)
    assert average([compared([None, 1.0])], "exact_match") is None


def test_one_run_has_an_interval_over_its_rows_alone() -> None:
    found = average([compared([40.0, 60.0], counts=(1000, 500))], "exact_match")
    assert found is not None
    half = 100 * 1.96 * ((0.24 / 1000 + 0.24 / 500) / 4) ** 0.5
    assert found.sd is None
    assert (found.low, found.high) == (pytest.approx(50 - half, abs=0.3), pytest.approx(50 + half, abs=0.3))
    sure = average([compared([100.0, 0.0])], "label_scoring")
    assert sure is not None
    assert (sure.mean, sure.low, sure.high) == (50, 50, 50)


def test_runs_are_called_by_what_differs(tmp_path: Path) -> None:
    def recipe(**changes: Any) -> dict[str, Any]:
        method = {"name": "gorp", "energy": 0.95, "parts": "B"} | changes.pop("method", {})
        return {"method": method, "adapter": {"kind": "lora", "rank": 8}, "training": {"micro_batch_size": 2}} | changes

    given = {
        "a": recipe(),
        "b": recipe(method={"parts": "B+L"}, training={"micro_batch_size": 4}),
        "c": recipe(adapter={"kind": "prompt", "length": 3}),
    }
    folders = [make_run(tmp_path / name, RIGHT, recipe=found, method="gorp") for name, found in given.items()]
    folders.append(make_run(tmp_path / "d", RIGHT))
    labels = [run.label for run in load_runs(folders)]
    assert labels == ["gorp lora parts=B", "gorp lora parts=B+L", "gorp prompt", "inclora"]
    other = make_run(tmp_path / "e", RIGHT, recipe=recipe(method={"energy": 0.5}), method="gorp", model="models/other")
    assert load_runs([folders[0], other])[0].label == "gorp", "each backbone may have settings of its own"


def test_a_quantized_backbone_is_another_one(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a", RIGHT, model={"path": "models/t5-large", "quantization": None})]
    folders.append(make_run(tmp_path / "b", RIGHT, model={"path": "models/t5-large", "quantization": "nf4"}))
    whole, packed = load_runs(folders)
    assert (whole.backbone, packed.backbone) == ("t5-large", "t5-large (nf4)")
    assert figures_for(whole.backbone, ORDERS["order1"]), "16 bits have published figures"
    assert figures_for(packed.backbone, ORDERS["order1"]) == []


def test_two_runs_of_the_same_are_refused(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, RIGHT) for name in "ab"]
    with pytest.raises(UserError, match=f"the same method, settings, backbone, order and seed as {folders[0]}"):
        load_runs(folders)


def test_globs_name_folders_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    assert expand([f"{tmp_path}/*", f"{tmp_path}/two"]) == [tmp_path / "one", tmp_path / "two"]
    assert expand([f"{tmp_path}/absent"]) == [tmp_path / "absent"], "named as missing when it is read"
    with pytest.raises(UserError, match="matches no folder"):
        expand([f"{tmp_path}/x*"])


def test_rows_are_paired_by_their_ids(tmp_path: Path) -> None:
    ours = make_run(tmp_path / "a", {"soil": [True, True, False, False], "rivers": [True, True]}, method="pegp")
    theirs = make_run(tmp_path / "b", {"soil": [False, False, False, True], "rivers": [True, True]})
    first, second = load_runs([ours, theirs])
    found = paired(first, second, "exact_match")
    assert found is not None
    assert found.difference == pytest.approx(12.5)
    assert found.p_value == pytest.approx(1.0), "two gained, one lost"
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0 < found.high
    (ours / "predictions" / "02-rivers" / "soil.jsonl").unlink()
    assert paired(first, second, "exact_match") == found, "results.json keeps which rows are right"
    bare = replace(first, results={key: value for key, value in first.results.items() if key != "right_rows"})
    without = paired(bare, second, "exact_match")
    assert without is not None
    assert (without.difference, without.low, without.p_value) == (pytest.approx(12.5), None, None)


def test_the_command_compares_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "runs" / "a", {"soil": [True] * 4, "rivers": [True, True]}, method="pegp")
    make_run(tmp_path / "runs" / "b", RIGHT)
    make_run(tmp_path / "runs" / "c", {"soil": [False] * 4, "rivers": [True, True]}, seed=2)
    unfinished = make_run(tmp_path / "runs" / "d", RIGHT, method="olora")
    for place in ("cells", "predictions"):
        for path in (unfinished / place / "02-rivers").iterdir():
            path.unlink()
    capsys.readouterr()
    assert main([f"{tmp_path}/runs/*", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text in printed
    assert "| pegp | mini-x | soil, rivers | 1 | 100.0 / 100.0 | 0.0 / 0.0 | 100.0 / 100.0 | 100.0 / 100.0 |" in text
    assert "| inclora | mini-x | 1 | 2 | 56.2 ± 8.8 [" in text
    assert "## AA against inclora, run by run" in text
    assert re.search(r"\| pegp \| mini-x \|.* \| \+37.5 \[\+\d.*\], better in 1 of 1 \|", text)
    assert "| pegp | mini-x | soil, rivers | 1 | +37.5 [" in text
    assert "p = 0.500" in text, "two rows gained, none lost"
    assert f"- {unfinished}: untrained: soil, rivers; after rivers: soil, rivers" in text
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [run["AA EM"] for run in content["runs"] if run["method"] == "inclora"] == [62.5, 50.0]
    with (tmp_path / "out" / "averages.csv").open() as file:
        inclora, _, pegp = csv.DictReader(file)
    assert (inclora["method"], inclora["AA EM mean"], inclora["AA EM runs"]) == ("inclora", "56.25", "2")
    assert (pegp["difference EM mean"], pegp["difference EM pairs"], pegp["against"]) == ("37.5", "1", "inclora")
    with (tmp_path / "out" / "comparison.csv").open() as file:
        assert [row["AA EM"] for row in csv.DictReader(file) if row["method"] == "olora"] == [""]

    assert main([f"{tmp_path}/runs/*", "--against", "gorp"]) == 2
    assert "--against: no run of 'gorp'; there are inclora, olora, pegp" in capsys.readouterr().err
    assert main([f"{tmp_path}/absent*"]) == 2
    assert "matches no folder" in capsys.readouterr().err


def test_models_of_a_task_each_give_the_transfer(tmp_path: Path) -> None:
    model = {"path": "models/mini-x", "family": "t5", "fingerprint": "f" * 64}
    settings = {"cells": "diagonal_and_last", "split": "test", "steps": {"soil": 3, "rivers": 3}}
    settings |= dict.fromkeys(("decoding", "add_task_name", "add_dataset_name", "max_source_tokens", "truncation"))
    alone = {"soil": [True, False, False, False], "rivers": [False, False]}
    make_run(tmp_path / "run", RIGHT, model=model, settings=settings)
    make_run(tmp_path / "alone", alone, model=model, settings=settings, method="pertask")
    make_run(tmp_path / "other", RIGHT, model=model | {"fingerprint": "e" * 64}, settings=settings, seed=2)
    make_run(tmp_path / "old", RIGHT, seed=3)
    folders = [tmp_path / name for name in ("run", "alone", "other", "old")]
    content = compare(load_runs(folders), against=None)
    found = {Path(run["folder"]).name: (run["Tr EM"], run["Tr LS"]) for run in content["runs"]}
    gained = np.mean([100 * np.mean(RIGHT[task]) - 100 * np.mean(alone[task]) for task in ORDER])
    assert found["run"] == (pytest.approx(gained), 0.0)
    assert found["alone"] == found["other"] == found["old"] == (None, None)
    assert "LA, EM / LS | Tr, EM / LS | micro AA, EM / LS |" in to_markdown(content)


def test_runs_unlike_each_other_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", RIGHT)
    make_run(tmp_path / "b", RIGHT, method="pegp", settings={"split": "test", "steps": {"soil": 3, "rivers": 9}})
    capsys.readouterr()
    assert main([f"{tmp_path}/[ab]"]) == 0
    assert f"- {tmp_path}/b and {tmp_path}/a differ in steps: not like for like" in capsys.readouterr().out


@pytest.mark.parametrize(("joint", "alike"), [(118, True), (100, False)])
def test_joint_training_has_the_steps_of_all_tasks(tmp_path: Path, *, joint: int, alike: bool) -> None:
    steps = {"a": {"soil": 60, "rivers": 60}, "b": {"rivers": joint}}
    for (name, of), method in zip(steps.items(), ("inclora", "mtl"), strict=True):
        settings = {"split": "test", "steps": of, "joint": method == "mtl"}
        make_run(tmp_path / name, RIGHT, method=method, settings=settings)
    assert (compare(load_runs(expand([f"{tmp_path}/*"])), against=None)["notes"] == []) == alike


def test_results_without_their_run_are_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, method in (("a", "inclora"), ("b", "pegp")):
        folder = make_run(tmp_path / name, RIGHT, method=method)
        (folder / "run.json").unlink()
    kept = (tmp_path / "a" / "results.json").read_bytes()
    capsys.readouterr()
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "| pegp | mini-x | soil, rivers | 1 | 62.5 / 100.0 |" in capsys.readouterr().out
    assert (tmp_path / "a" / "results.json").read_bytes() == kept


def test_runs_that_other_methods_have_are_named(tmp_path: Path) -> None:
    for name, method, seed in (("a", "inclora", 1), ("b", "inclora", 2), ("c", "pegp", 2), ("d", "olora", 3)):
        make_run(tmp_path / name, RIGHT, method=method, seed=seed)
    content = compare(load_runs(expand([f"{tmp_path}/*"])), against=None)
    assert content["absent"] == [
        "inclora on mini-x: soil, rivers, seed 3",
        "olora on mini-x: soil, rivers, seed 1, 2",
        "pegp on mini-x: soil, rivers, seed 1, 3",
    ]
    assert "## Runs that are missing\n\n- inclora on mini-x: soil, rivers, seed 3\n" in to_markdown(content)
    whole = compare(load_runs([tmp_path / "a", tmp_path / "b"]), against=None)
    assert (whole["absent"], "Runs that are missing" in to_markdown(whole)) == ([], False)


def test_matrices_and_times_are_means_over_runs(tmp_path: Path) -> None:
    timings = [{"soil": {"train_s": 3.0}, "rivers": {"train_s": 5.0, "save_s": 1.0}}, {"soil": {"train_s": 4.0}}]
    for seed, (right, timing) in enumerate(
        zip((RIGHT, {"soil": [True] * 4, "rivers": [False, False]}), timings, strict=True)
    ):
        make_run(tmp_path / str(seed), right, seed=seed, timing=timing)
    content = compare(load_runs(expand([f"{tmp_path}/*"])), against=None)
    (matrix,) = content["matrices"]
    assert matrix["exact_match"] == [[87.5, None], [87.5, 25.0]]
    assert (matrix["runs"], matrix["tasks"]) == (2, ORDER)
    assert content["times"][0]["seconds"] == {"train_s": 6.0, "save_s": 0.5}
    assert "| inclora | mini-x | 2 | 6.0 | 0.5 | 6.5 |" in to_markdown(content)
    page = format_comparison(content)
    assert "inclora on mini-x, soil, rivers, mean of 2 runs" in page
    assert re.search(r'<td class="cell s8">87.5</td>', page)
    assert page.count("<svg") == 4, "two intervals of AA, no differences, tasks after the last, AA so far"
