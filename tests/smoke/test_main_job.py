"""The main command from start to end, on one and on two ranks."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from commands import ROOT, events, launch, results, run, small, train


def schema() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "eval" / "results.schema.json").read_text())
    return content


def test_a_run_leaves_what_is_promised(reference: Path) -> None:
    content = json.loads((reference / "results.json").read_text())
    jsonschema.validate(content, schema())
    matrix = content["matrix"]["exact_match"]
    assert len(matrix) == 2
    assert all(isinstance(score, float) for row in matrix for score in row), "lower_and_next of two tasks is full"
    first, second = content["order"]
    for after in ("untrained", f"01-{first}", f"02-{second}"):
        lines = (reference / "predictions" / after / f"{first}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == 12
        assert all(row.keys() >= {"id", "prediction", "label", "correct"} for row in rows)
        assert [row["id"] for row in rows] == sorted(row["id"] for row in rows), "rows keep their order"
    kinds = {event["event"] for event in events(reference)}
    assert kinds >= {"step", "task", "evaluation", "save"}
    peaks = [event["peak_bytes"] for event in events(reference) if event["event"] == "task"]
    by_part = [event["peak_bytes_by_part"] for event in events(reference) if event["event"] == "task"]
    assert all(set(found) == {"method", "train", "save"} and min(found.values()) > 0 for found in by_part)
    scored = [event for event in events(reference) if event["event"] == "memory"]
    assert [event["task_index"] for event in scored] == [0, 1, 2], "untrained and after each task"
    assert all(event["part"] == "evaluate" and event["peak_bytes"] > 0 for event in scored)
    assert len(peaks) == 2
    assert all(2**27 < peak < 2**34 for peak in peaks), "of a process that holds torch and a tiny model"
    assert "Average accuracy" in (reference / "report.md").read_text()
    assert (reference / "recipe.yaml").is_file()
    assert not (reference / "pids").exists(), "a finished run has no processes"
    assert [path.name[:3] for path in sorted((reference / "stages").iterdir())] == ["01-", "02-"]


def test_a_finished_run_is_not_trained_again(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    steps = [event for event in events(folder) if event["event"] == "step"]
    done = run(train("recipes/tiny_t5_order1.yaml", *small(f"output.dir={folder}")))
    assert done.returncode == 0, done.stderr
    assert [event for event in events(folder) if event["event"] == "step"] == steps
    assert results(folder) == results(reference)


@pytest.mark.parametrize(
    "engine",
    [
        ["zero=2"],
        pytest.param(["zero=3"], marks=pytest.mark.full),
        pytest.param(["zero=0"], marks=pytest.mark.full),
        ["zero=3", "engine.offload=parameters"],
    ],
    ids=" ".join,
)
def test_two_ranks_give_the_results_of_one(reference: Path, tmp_path: Path, engine: list[str]) -> None:
    overrides = small(f"output.dir={tmp_path / 'run'}", *engine)
    done = run(launch(2, "recipes/tiny_t5_order1.yaml", *overrides))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    two, one = results(tmp_path / "run"), results(reference)
    for result in (two, one):
        assert 0 < result.pop("leak")["max"] <= 1e-5  # itself the size of rounding
    assert two == one
    one, two = (
        [event["loss"] for event in events(folder) if event["event"] == "step"]
        for folder in (reference, tmp_path / "run")
    )
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.full
def test_texts_outside_the_stream_are_scored_alike_by_two_ranks_and_again(tmp_path: Path) -> None:
    essay = tmp_path / "essay.txt"
    essay.write_text("How does moss grow on the northern wall of the mill? " * 40, encoding="utf-8")
    few = ["training.max_steps=1", "data.max_test_rows=2", "evaluation.cells=diagonal_and_last"]
    found = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        overrides = small(f"output.dir={folder}", f"evaluation.retention=[{essay}]", *few)
        done = run(launch(ranks, "recipes/tiny_t5_order1.yaml", *overrides))
        assert done.returncode == 0, done.stderr[-3000:]
        kept = results(folder)["retention"]["essay: perplexity"]
        found.append([kept["untrained"], *kept["after"]])
    assert None not in found[0]
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    content = results(tmp_path / "1")
    (tmp_path / "1" / "retention" / "01-notes" / "essay.json").unlink()
    done = run([sys.executable, "-m", "eval", "--fill", str(tmp_path / "1")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(tmp_path / "1") == content, "what is missing is scored again, and to the bit"


def test_llama_and_the_sequential_method_run_too(tmp_path: Path) -> None:
    overrides = small(f"output.dir={tmp_path / 'run'}", "method=seqlora", "evaluation.cells=diagonal_and_last")
    essay = tmp_path / "essay.txt"
    essay.write_text("How does moss grow on the northern wall of the mill? " * 20, encoding="utf-8")
    overrides += ["evaluation.unseen=[lists]", f"evaluation.retention=[{essay}]"]
    done = run(train("recipes/tiny_llama2_order1.yaml", *overrides), timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    matrix = results(tmp_path / "run")["matrix"]["exact_match"]
    assert matrix[0][1] is None, "a cell that was not measured is null"
    assert None not in (matrix[0][0], *matrix[1])
    content = results(tmp_path / "run")
    jsonschema.validate(json.loads((tmp_path / "run" / "results.json").read_text()), schema())
    for score in ("exact_match", "label_scoring"):
        unseen = content["unseen"]["lists"]
        cells = [tmp_path / "run" / "cells" / after / "lists.json" for after in ("untrained", "01-notes", "02-letters")]
        right = [json.loads(cell.read_text())[f"{score}_correct"] for cell in cells]
        assert [unseen["untrained"][score], *unseen[score]] == pytest.approx([100 * count / 12 for count in right])
    assert content["order"] == ["notes", "letters"], "what is never trained is in no average"
    trained = {event["task"] for event in events(tmp_path / "run") if event["event"] == "step"}
    assert trained == {"notes", "letters"}
    assert "Tasks never trained" in (tmp_path / "run" / "report.html").read_text()

    kept = content["retention"]["essay: perplexity"]
    assert kept["untrained"] > 1
    assert len({kept["untrained"], *kept["after"]}) == 3, "each model has its own"
    assert "Retention of general ability" in (tmp_path / "run" / "report.html").read_text()


def test_scores_are_rebuilt_from_predictions_and_from_the_models(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    (folder / "results.json").unlink()
    done = run([sys.executable, "-m", "eval", str(folder)])
    assert done.returncode == 0, done.stderr
    assert results(folder) == results(reference)

    predictions = {path: path.read_text() for path in folder.glob("predictions/*/*.jsonl")}
    for path in predictions:
        path.write_text("")
    done = run([sys.executable, "-m", "eval", "--rescore", str(folder)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path: path.read_text() for path in predictions} == predictions
    assert results(folder) == results(reference)

    lost, kept = sorted(predictions)[0], sorted(predictions)[1]
    written = kept.stat().st_mtime_ns
    lost.unlink()
    (folder / "cells" / lost.relative_to(folder / "predictions")).with_suffix(".json").unlink()
    done = run([sys.executable, "-m", "eval", "--fill", str(folder)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert lost.read_text() == predictions[lost]
    assert kept.stat().st_mtime_ns == written, "what is there is not scored again"
    assert results(folder) == results(reference)


def test_one_model_a_task_and_one_of_all_are_references(reference: Path, tmp_path: Path) -> None:
    alone, folder = tmp_path / "alone", tmp_path / "run"
    enough = ("training.epochs=8", "training.learning_rate=3.0e-3")  # to learn what the untrained model cannot do
    overrides = small(f"output.dir={alone}", "method=pertask", "evaluation.cells=full", *enough)
    done = run(train("recipes/tiny_t5_order1.yaml", *overrides), timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    for score in ("exact_match", "label_scoring"):
        (first, other), (again, second) = results(alone)["matrix"][score]
        assert first > results(alone)["untrained"][score][0]
        assert first == again, "the second task's training leaves the first one's model alone"
        assert other == results(alone)["untrained"][score][1], "a task without a model yet"
        cell = json.loads((alone / "cells" / "02-letters" / "letters.json").read_text())
        assert second == pytest.approx(100 * cell[f"{score}_correct"] / cell["rows"])

    assert done.stderr.count("the same model as after") == 2, "one task before its model, one after another's"
    before = results(alone)
    done = run([sys.executable, "-m", "eval", "--rescore", str(alone)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the same model" not in done.stderr
    assert results(alone) == before

    joint = tmp_path / "joint"
    done = run(train("recipes/tiny_t5_order1.yaml", *small(f"output.dir={joint}", "method=mtl", *enough)), timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name[:3] for path in (joint / "stages").iterdir()] == ["02-"], "one stage, in the last task's place"
    (none, nothing), (first, second) = results(joint)["matrix"]["label_scoring"]
    assert none is nothing is None
    assert min(first, second) > 25, "both tasks are learnt: four labels each"
    assert sum(event["event"] == "step" for event in events(joint)) == 8 * 2 * 36 // 8, "no rows are left out, or twice"
    assert "Not finished" not in (joint / "report.md").read_text()

    # The finished run of another method, told of its references afterwards: nothing is trained, the scores are added.
    shutil.copytree(reference, folder)
    named = f"evaluation.references=[{alone}, {joint}]"
    done = run(train("recipes/tiny_t5_order1.yaml", *small(f"output.dir={folder}", named)))
    assert done.returncode == 0, done.stderr[-3000:]
    found = results(folder)
    jsonschema.validate(json.loads((folder / "results.json").read_text()), schema())
    assert [(one["run"], one["method"]) for one in found["references"]] == [
        (str(alone), "pertask"),
        (str(joint), "mtl"),
    ]
    for one in found["references"]:
        assert (
            one["average_accuracy"]["label_scoring"] == results(Path(one["run"]))["label_scoring"]["average_accuracy"]
        )
    single = results(alone)["matrix"]["exact_match"]
    learnt = found["matrix"]["exact_match"]
    assert found["transfer_vs_pertask"] == pytest.approx(sum(learnt[i][i] - single[i][i] for i in range(2)) / 2)
    assert results(reference)["transfer_vs_pertask"] is None
    assert "Transfer against one model a task" in (folder / "report.md").read_text()


def test_a_plan_trains_nothing(tmp_path: Path) -> None:
    done = run(train("recipes/tiny_t5_order1.yaml", *small(f"output.dir={tmp_path / 'run'}"), "--plan"))
    assert done.returncode == 0, done.stderr
    for words in ("trainable parameters per task", "GiB", "36", "12", "micro_batch_size: 4"):
        assert words in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_prefix_that_runs_share_is_trained_once(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "first")
    folder = tmp_path / "second"
    tasks = ["notes", "counts"]
    assert json.loads((reference / "results.json").read_text())["order"][0] == tasks[0]
    done = run(train("recipes/tiny_t5_order1.yaml", *small(f"output.dir={folder}", tasks=tasks), "--share"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the same as in" in done.stderr
    assert {event["task_index"] for event in events(folder) if event["event"] == "step"} == {2}
    ours, theirs = results(folder), results(reference)
    assert ours["matrix"]["exact_match"][0][0] == theirs["matrix"]["exact_match"][0][0]
    assert [path.name for path in (folder / "stages").glob("01-*")] == [
        path.name for path in (reference / "stages").glob("01-*")
    ]
