"""Sweeps: the product and its parsing, and real processes that end, fail, are skipped and are stopped."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from pipeline.recipe import Recipe
from pipeline.sweep import find_launcher, main, parse_seeds, plan, product, split_values

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
model: {family: t5, path: synthetic}
data: {path: synthetic}
order: {tasks: [notes, letters]}
method: {name: seqlora}
training: {epochs: 2}
"""
# Takes the place of pipeline/train.py: what a run does is chosen by its seed.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, os.environ["CHECKOUT"])
from pipeline.recipe import Recipe
recipe = Recipe.load(sys.argv[1], [word for word in sys.argv[2:] if not word.startswith("--")])
folder = recipe.run_dir
folder.mkdir(parents=True, exist_ok=True)
def finish(**changes):
    results = {"recipe_sha256": recipe.sha256, "average_accuracy": 61.257, "backward_transfer": -4.5}
    (folder / "results.json").write_text(json.dumps(results | changes))
def wait_for(path):
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)
def mark(name, text=""):
    new = folder.parent / f".new-{os.getpid()}"
    new.write_text(text)
    new.rename(folder.parent / name)
print("this is seed", recipe.seed, "with", os.environ.get("OMP_NUM_THREADS"), "threads", flush=True)
"""
ENDING = (
    STAND_IN
    + """
with (folder.parent / "started").open("a") as file:
    file.write(folder.name + chr(10))
if recipe.seed == 1:
    finish()
if recipe.seed == 2:
    sys.exit("the second seed fails")
if recipe.seed == 3:
    finish(average_accuracy=None)
if recipe.seed == 4:
    finish(recipe_sha256="another")
"""
)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture
def sweep(tmp_path, recipe, monkeypatch):
    """Runs a sweep of `recipe` in this process, with a stand-in for the training script."""
    monkeypatch.setenv("CHECKOUT", str(ROOT))

    def run(script, *arguments):
        path = tmp_path / "stand_in.py"
        path.write_text(script)
        return main([recipe, "--out", str(tmp_path / "out"), *arguments], _train_script=path)

    return run


def states(table):
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in cells[2:]}


# --- the product ---

plain = st.text(st.characters(codec="utf-8", exclude_characters=",[]{}"), min_size=1).map(str.strip).filter(bool)
nested = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda parts: f"[{','.join(parts)}]")
        | st.lists(inner, max_size=3).map(lambda parts: f"{{{', '.join(parts)}}}")
    ),
    max_leaves=6,
)


@given(st.lists(nested, min_size=1, max_size=5, unique=True), st.sampled_from([",", ", ", " ,"]))
def test_values_are_split_at_outer_commas_alone(values, comma):
    assert split_values(comma.join(values)) == values


@pytest.mark.parametrize("text", ["[a", "a]", "{a,b", "[a}", "a,[{b]}", "", "a,,b", "a,", ",", " "])
def test_values_that_cannot_be_meant_are_refused(text):
    with pytest.raises(UserError):
        split_values(text)


keys = st.from_regex(r"[a-z]{1,5}(\.[a-z]{1,5})?", fullmatch=True).filter(lambda key: key != "seed")


@given(
    recipes=st.lists(st.text("ab.", min_size=1), min_size=1, max_size=3, unique=True),
    axes=st.dictionaries(keys, st.lists(plain, min_size=1, max_size=3, unique=True), max_size=3),
    seeds=st.lists(st.integers(0, 9), max_size=3, unique=True),
)
def test_the_product_holds_every_choice_once_in_order(recipes, axes, seeds):
    pairs = product(recipes, [f"{key}={','.join(values)}" for key, values in axes.items()], seeds)
    axes = axes | ({"seed": [str(seed) for seed in seeds]} if seeds else {})
    expected = [(recipe, ()) for recipe in recipes]
    for key, values in axes.items():
        expected = [(path, (*chosen, f"{key}={value}")) for path, chosen in expected for value in values]
    assert pairs == expected


@pytest.mark.parametrize(
    ("settings", "seeds", "message"),
    [
        (["a.yaml"], [], "recipes come before --set"),
        (["=1"], [], "a setting is key=value"),
        (["zero=1", "zero=2"], [], "zero=a,b"),
        (["seed=1,2"], [3], "keep --seeds"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, seeds, message):
    with pytest.raises(UserError, match=message):
        product(["r.yaml"], settings, seeds)


def test_seeds_are_whole_numbers():
    assert parse_seeds("3, 1,3") == [3, 1]
    assert parse_seeds(None) == []
    for text in ("1,x", "-1", "1.5", ""):
        with pytest.raises(UserError):
            parse_seeds(text)


def test_a_plan_knows_each_runs_folder_and_hash(tmp_path, recipe):
    pairs = product([recipe], ["method=seqlora,inclora", "training.epochs=3"], [7])
    here = plan(pairs, None)
    assert [it.run_dir for it in here] == [Recipe.load(*pair).run_dir for pair in pairs]
    there = plan(pairs, tmp_path / "it's a folder: [1]")
    assert [it.run_dir.name for it in there] == [it.run_dir.name for it in here]
    assert {it.run_dir.parent for it in there} == {tmp_path / "it's a folder: [1]"}
    assert [it.recipe_sha256 for it in there] == [it.recipe_sha256 for it in here]
    assert [Recipe.load(it.recipe_path, it.overrides).run_dir for it in there] == [it.run_dir for it in there]


def test_faults_of_all_combinations_are_told_at_once_before_anything_runs(tmp_path, sweep, capsys):
    code = sweep(ENDING, "--set", "training.epochs=1,0", "method=seqlora,inclorra", "--seeds", "1,2")
    told = capsys.readouterr().err
    assert told.startswith("error: nothing was run")
    assert code == 2
    assert "training.epochs: 0 is not greater than 0" in told
    assert 'did you mean "inclora"' in told
    assert told.count("seed=1 and 1 more") == 3  # epochs alone, method alone, both
    assert not (tmp_path / "out").exists()


def test_two_combinations_of_one_folder_are_refused(tmp_path, recipe):
    Path(recipe).write_text(RECIPE + "output: {dir: runs/always_here}\n")
    with pytest.raises(UserError, match=r"always_here: more than one.*--out FOLDER"):
        plan(product([recipe], [], [1, 2]), None)
    assert len(plan(product([recipe], [], [1, 2]), tmp_path)) == 2


@pytest.mark.parametrize("text", ["no-such-launcher-here -n 2", "'unbalanced"])
def test_a_launcher_that_cannot_be_started_is_refused(text, sweep, capsys):
    assert sweep(ENDING, "--launcher", text) == 2
    assert "--launcher" in capsys.readouterr().err


def test_a_program_beside_python_is_found(monkeypatch):
    monkeypatch.setenv("PATH", "")
    name = Path(sys.executable).name
    assert find_launcher(f"{name} -m 'a b'") == [str(Path(sys.executable).parent / name), "-m", "a b"]
    assert find_launcher("") == []


# --- running ---


def test_what_is_unfinished_runs_and_failures_stop_nothing(tmp_path, sweep, capsys):
    out = tmp_path / "out"
    assert sweep(ENDING, "--seeds", "1,2,3,4,5") == 1
    told = capsys.readouterr().out
    rows = states(told)
    assert {name: row[0] for name, row in rows.items()} == {
        "small-s1": "done",
        "small-s2": "failed",
        "small-s3": "failed",  # the last row of its matrix is not whole
        "small-s4": "failed",  # results of another recipe
        "small-s5": "failed",  # no results at all
    }
    assert rows["small-s1"][1:4] == ["0", "61.26", "-4.50"]
    assert rows["small-s2"][1:4] == ["1", "", ""]
    assert "small-s2: the second seed fails" in told
    assert "4 of 5 runs are not finished" in told
    assert rows["small-s2"][5] == str(out / "small-s2.log")
    log = (out / "small-s2.log").read_text().splitlines()
    assert log[0].startswith("$ ")
    assert "seed=2" in log[0]
    assert log[1].startswith("this is seed 2")
    assert log[-1] == "the second seed fails"

    assert sweep(ENDING, "--seeds", "1,2") == 1
    assert {name: row[0] for name, row in states(capsys.readouterr().out).items()} == {
        "small-s1": "skipped",
        "small-s2": "failed",
    }
    started = (out / "started").read_text().split()
    assert started == [f"small-s{seed}" for seed in (1, 2, 3, 4, 5, 2)]
    assert sweep(ENDING, "--seeds", "1") == 0
    assert states(capsys.readouterr().out)["small-s1"][:4] == ["skipped", "", "61.26", "-4.50"]


def test_a_dry_run_prints_the_commands_and_runs_nothing(tmp_path, sweep, recipe, capsys):
    assert sweep(ENDING, "--set", "method=seqlora,inclora", "--seeds", "1", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith(f"small-inclora-s1: {sys.executable} {tmp_path / 'stand_in.py'} {recipe} ")
    assert " method=inclora seed=1 " in lines[1]
    assert not (tmp_path / "out").exists()


MEETING = (
    STAND_IN
    + """
mark(f"here-{recipe.seed}")
wait_for(folder.parent / f"here-{3 - recipe.seed}")
finish()
"""
)


@pytest.mark.parametrize("threads", [None, "7"])
def test_jobs_run_side_by_side_and_share_the_cores(tmp_path, sweep, monkeypatch, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert sweep(MEETING, "--seeds", "1,2", "--jobs", "2") == 0  # each waits until the other is there
    share = threads or str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert f"with {share} threads" in (tmp_path / "out" / "small-s1.log").read_text()


ALONE = (
    STAND_IN
    + """
(folder.parent / "busy").mkdir()
time.sleep(0.1)
(folder.parent / "busy").rmdir()
finish()
"""
)


def test_one_job_at_a_time_is_the_default(sweep, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert sweep(ALONE, "--seeds", "1,2,3") == 0


def test_runs_under_a_launcher_get_a_port_each(tmp_path, sweep, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    launcher = programs / "deepspeed"
    launcher.write_text(
        f"#!{sys.executable}\nimport runpy, sys\nprint('asked', sys.argv[1:])\n"
        "sys.argv = [word for word in sys.argv[1:] if word[:2] != '--' and word != '2']\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    launcher.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    assert sweep(MEETING, "--seeds", "1,2", "--jobs", "2", "--launcher", "deepspeed --num_accelerators 2") == 0
    logs = [(tmp_path / "out" / f"small-s{seed}.log").read_text() for seed in (1, 2)]
    asked = [re.search(r"asked \['--master_port=(\d+)', '--num_accelerators', '2', '(.*?)'", log) for log in logs]
    assert asked[0][1] != asked[1][1]
    assert asked[0][2] == str(tmp_path / "stand_in.py")


def test_a_log_that_cannot_be_written_fails_its_run_alone(tmp_path, sweep, capsys):
    (tmp_path / "out" / "small-s1.log").mkdir(parents=True)
    assert sweep(ALONE, "--seeds", "1,2") == 1
    rows = states(capsys.readouterr().out)
    assert (rows["small-s1"][0], rows["small-s2"][0]) == ("failed", "done")


# --- stopping ---

STOPPING = (
    STAND_IN
    + """
def stop(number, frame):
    mark(f"told-{recipe.seed}", signal.Signals(number).name)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
mark(f"pid-{recipe.seed}", str(os.getpid()))
time.sleep(60)  # to be stopped; never left behind for long
"""
)
DEAF = (
    STAND_IN
    + """
signal.signal(signal.SIGTERM, lambda *_: mark(f"told-{recipe.seed}"))
mark(f"pid-{recipe.seed}", str(os.getpid()))
time.sleep(60)  # to be stopped; never left behind for long
"""
)
SLOW = (
    STAND_IN
    + """
def stop(number, frame):
    time.sleep(1.5)
    mark(f"whole-{recipe.seed}")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
mark(f"pid-{recipe.seed}", str(os.getpid()))
time.sleep(60)  # to be stopped; never left behind for long
"""
)
# As DeepSpeed's launcher: starts the rank, waits, and dies of a signal without a word to it.
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"


@pytest.fixture
def sweeping(tmp_path, recipe):
    """Starts a sweep as a process of its own; nothing of it outlives the test."""
    processes = []

    def start(script, *arguments):
        path = tmp_path / "stand_in.py"
        path.write_text(script)
        out = tmp_path / "out"
        run_main = (
            "import sys; from pathlib import Path; from pipeline.sweep import main;"
            f"sys.exit(main(sys.argv[1:], _train_script=Path({str(path)!r})))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", run_main, recipe, "--out", str(out), *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT), "CHECKOUT": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process, out

    yield start
    for process in processes:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()
        process.communicate()


def wait_for(path):
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_is_passed_on_as_sigterm_and_waited_for(sweeping, number):
    before = signal.signal(number, signal.SIG_DFL)  # else ignored under nohup or in the background, as a child inherits
    try:
        process, out = sweeping(STOPPING, "--seeds", "1,2,3", "--jobs", "2")
    finally:
        signal.signal(number, before)
    wait_for(out / "pid-1")
    wait_for(out / "pid-2")
    process.send_signal(number)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert [(out / f"told-{seed}").read_text() for seed in (1, 2)] == ["SIGTERM"] * 2
    assert not (out / "pid-3").exists()
    assert {name: row[:2] for name, row in states(told).items()} == {
        "small-s1": ["stopped", "75"],
        "small-s2": ["stopped", "75"],
        "small-s3": ["not run", ""],
    }


def test_ranks_that_outlive_their_launcher_are_told_and_waited_for(tmp_path, sweeping):
    launcher = tmp_path / "launcher.py"
    launcher.write_text(LAUNCHER)
    process, out = sweeping(SLOW, "--seeds", "1", "--launcher", f"{sys.executable} {launcher}")
    wait_for(out / "pid-1")
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert (out / "whole-1").exists()
    assert process.returncode == 75
    assert states(told)["small-s1"][:2] == ["stopped", "-15"]


def test_a_second_signal_kills_what_does_not_stop(sweeping):
    process, out = sweeping(DEAF, "--seeds", "1")
    wait_for(out / "pid-1")
    process.send_signal(signal.SIGTERM)
    wait_for(out / "told-1")
    time.sleep(0.5)
    assert process.poll() is None  # still waiting
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert states(told)["small-s1"][:2] == ["failed", "-9"]
    assert not psutil.pid_exists(int((out / "pid-1").read_text()))


def test_a_signal_that_nohup_ignores_stays_ignored(sweeping, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process, out = sweeping(SLOW, "--seeds", "1")
        wait_for(out / "pid-1")
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (out / "whole-1").exists()  # a heeded hang-up would have made the second signal kill
