"""Whatever a user gets wrong: one message with place and remedy, no traceback, exit code 2, nothing written."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from commands import launch, run, small, train

RECIPE = "recipes/tiny_t5_order1.yaml"


def refused(done, *words: str) -> None:
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    said = done.stderr + done.stdout
    assert "Traceback" not in said
    assert said.count("error: ") == 1
    for word in words:
        assert word in said, said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=pegpp", "adapter.rank=0"], ["2 problems", "adapter.rank", "method.name"]),
        (["order.tasks=[no_such_task]"], ["no_such_task", "data.tasks"]),
        (["data.path=no/such/folder"], ["data.path", "no/such/folder"]),
        (["model.path=./no/such/model"], ["model.path", "no such folder"]),
        (["adapter.target_modules=[query]"], ["adapter.target_modules", "'query'", "all_linear"]),
        (["data.max_source_tokens=3"], ["data.max_source_tokens", "raise it"]),
        (["training.warmup_steps=500"], ["training.warmup_steps", "500", "120 steps in all"]),
        (["method.energy=1.2", "method.feature_samples=0"], ["2 problems", "method.energy: 1.2", "feature_samples: 0"]),
        (["method.max_rank=65"], ["method.max_rank: 65 directions", "has 64; legal are 1 to 64"]),
        (["method=inclora", "adapter=prompt"], ["adapter.kind: prompt", "method=seqlora"]),
    ],
    ids=[
        "typos",
        "unknown task",
        "missing data",
        "missing model",
        "unknown module",
        "too short",
        "long warm-up",
        "no share",
        "rank above width",
        "one module a task",
    ],
)
def test_a_wrong_key_is_told_and_nothing_written(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    folder = tmp_path / "run"
    refused(run(train(RECIPE, f"output.dir={folder}", *overrides)), *words)
    assert not folder.exists()


def test_a_model_folder_without_weights_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    done = run(train(RECIPE, f"model.path={model}", f"output.dir={tmp_path / 'run'}"))
    refused(done, "safetensors", str(model))


def test_a_label_outside_the_set_names_file_and_row(tmp_path: Path) -> None:
    rows = [{"sentence": f"the lamp number {i} is on", "label": "on" if i % 2 else "off"} for i in range(8)]
    (tmp_path / "train.json").write_text(json.dumps([*rows, {"sentence": "it blinks", "label": "blinking"}]))
    (tmp_path / "test.json").write_text(json.dumps([{"sentence": "another lamp is on", "label": "on"}]))
    files = f"train: {tmp_path / 'train.json'}, test: {tmp_path / 'test.json'}"
    task = f"data.tasks.lamps={{labels: ['on', 'off'], {files}}}"
    done = run(train(RECIPE, task, "order.tasks=[lamps]", f"output.dir={tmp_path / 'run'}"))
    refused(done, "train.json", "blinking")


def test_a_world_size_that_does_not_divide_is_refused_by_every_rank_at_once(tmp_path: Path) -> None:
    overrides = small(f"output.dir={tmp_path / 'run'}", "training.global_batch_size=12")
    done = run(launch(2, RECIPE, *overrides))
    refused(done, "3 micro-batches of 4", "2 ranks cannot share")
    assert not (tmp_path / "run").exists()


def test_the_folder_of_another_recipe_is_refused_with_the_difference(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = run(train(RECIPE, *small(f"output.dir={folder}", "training.learning_rate=0.5")))
    refused(done, "another recipe", "training.learning_rate", "0.5")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    refused(run(train(RECIPE, *small(f"output.dir={tmp_path}"))), "is not the folder of a run")
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_damaged_stage_is_named(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    factors = next(folder.glob("stages/01-*/trained/factors.safetensors"))
    content = bytearray(factors.read_bytes())
    content[-1] ^= 1
    factors.write_bytes(content)
    refused(run(train(RECIPE, *small(f"output.dir={folder}"))), "factors.safetensors")


def test_rows_changed_since_the_run_began_are_refused(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    facts = json.loads((folder / "run.json").read_text())
    task = facts["order"][1]
    facts["data"][task]["train_fingerprint"] = "0" * 64
    (folder / "run.json").write_text(json.dumps(facts))
    refused(run(train(RECIPE, *small(f"output.dir={folder}"))), task, "not what this run began with")


def test_a_loss_that_is_not_finite_stops_with_rows_and_advice(tmp_path: Path) -> None:
    overrides = small(
        f"output.dir={tmp_path / 'run'}", "training.learning_rate=1.0e+30", "training.gradient_clipping=0"
    )
    refused(run(train(RECIPE, *overrides)), "not finite", "training.learning_rate")
    assert not list((tmp_path / "run").glob("stages/*/stage.json"))


@pytest.mark.parametrize("module", ["eval", "data_prep", "pipeline.sweep"])
def test_the_other_commands_refuse_in_the_same_way(tmp_path: Path, module: str) -> None:
    done = run([sys.executable, "-m", module, str(tmp_path / "nothing")])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "nothing" in done.stderr
