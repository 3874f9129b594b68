"""`python -m data_prep`: what it prints, and one message with exit code 2 for a user's fault."""

import subprocess
import sys
from pathlib import Path

import pytest
from data_folders import some_rows, write_task

from data_prep.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def write_recipe(folder, model="no/such/folder", **data):
    """A recipe for the tasks kettles and teapots of `folder`."""
    lines = [f"  {key}: {value}" for key, value in ({"path": folder} | data).items()]
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {{family: t5, path: {model}}}\ndata:\n"
        + "\n".join(lines)
        + "\norder: {tasks: [kettles, teapots]}\nmethod: {name: seqlora}\n"
    )
    return str(recipe)


def test_rows_fingerprints_and_dropped_rows_are_printed(tmp_path, capsys):
    train = [*some_rows("train", 20), {"label": "Good", "sentence": ""}]
    write_task(tmp_path, "kettles", train=train)
    write_task(tmp_path, "teapots", "TC", labels=("Hot", "Cold"))
    assert main([write_recipe(tmp_path, bad_rows="drop"), "data.max_test_rows=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"data.path: {tmp_path}; seed 42; evaluation on test rows"
    assert lines[1] == "1. kettles (SC): Good, Bad"
    assert lines[2].startswith("   train          20 rows, sha256 ")
    assert lines[3].startswith("   evaluation      4 rows, sha256 ")
    assert lines[4] == "   dropped from train: 1 empty text"
    assert lines[5] == "2. teapots (TC): Hot, Cold"
    assert lines[-1].startswith("truncated rows not counted: model.path: ")


def test_truncated_rows_are_counted_with_a_tokenizer(tmp_path, model_dir, capsys):
    rows = some_rows("test", 5)
    rows[2]["sentence"] = "Text: " + "the kettle sings and " * 99
    write_task(tmp_path, "kettles", test=rows)
    write_task(tmp_path, "teapots", "TC")
    assert main([write_recipe(tmp_path, model_dir / "mini-t5", max_source_tokens=128)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("   train          20 rows, 0 truncated, sha256 ")
    assert lines[3].startswith("   evaluation      5 rows, 1 truncated, sha256 ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["RECIPE"], "1 bad row of 21"),
        (["RECIPE", "order.tasks=[kettels]"], 'order.tasks[0]: no task "kettels"; did you mean "kettles"?'),
        (["RECIPE", "data.path=/no/such/folder"], "data.path: /no/such/folder does not exist"),
        (["RECIPE", "data.max_train_rows=none"], "data.max_train_rows"),
        (["no_such_recipe.yaml"], "no_such_recipe.yaml"),
        (["hub", "--out", "OUT", "--tasks", "RTE,imdb"], 'no task "imdb"; did you mean "IMDB"?'),
        (["hub", "--out", "OUT", "--from-local", "OUT"], "--from-local: no OUT/"),
    ],
)
def test_fault_is_one_message_and_exit_code_two(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path, "kettles", train=[*some_rows("train", 20), {"label": "Good", "sentence": ""}])
    write_task(tmp_path, "teapots", "TC")
    recipe = write_recipe(tmp_path)
    assert main([recipe if argument == "RECIPE" else argument for argument in arguments]) == 2
    output = capsys.readouterr()
    assert words in output.err
    assert output.err.startswith("error: ")
    assert "Traceback" not in output.err
    assert output.out == ""
    assert not (tmp_path / "OUT").exists()


def test_module_runs_from_the_command_line(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "data_prep", str(tmp_path / "none.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "none.yaml" in run.stderr
    assert "Traceback" not in run.stderr
