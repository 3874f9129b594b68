"""Runs that are killed, told to stop, or lose their launcher: nothing half-written, and they go on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from commands import ROOT, events, launch, launcher_flags, results, run, small, start, train, wait_for
from safetensors.torch import load_file
from torch import Tensor

RECIPE = "recipes/tiny_t5_order1.yaml"


def in_task(folder: Path, index: int, step: int = 1) -> bool:
    return any(
        event["event"] == "step" and event["task_index"] == index and event["step"] >= step for event in events(folder)
    )


def kill_group(process: subprocess.Popen[str], number: int) -> tuple[int, str]:
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def ranks_of(folder: Path) -> list[psutil.Process]:
    return [psutil.Process(int(line.split()[2])) for line in (folder / "pids").read_text().splitlines()]


def whole(folder: Path) -> bool:
    """Every JSON file parses, and nothing temporary is left visible under a final name."""
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())
    return not any(
        stage.name.startswith(".") is False and not (stage / "stage.json").is_file()
        for stage in (folder / "stages").glob("*")
    )


def test_a_run_killed_in_task_two_ends_with_the_same_results(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(train(RECIPE, *small(f"output.dir={folder}")))
    wait_for(lambda: in_task(folder, 2), process)
    kill_group(process, signal.SIGKILL)
    assert whole(folder)
    assert not (folder / "results.json").exists()
    done = run(train(RECIPE, *small(f"output.dir={folder}")))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "taken from its stage" in done.stderr
    assert results(folder) == results(reference)
    first_task = [event for event in events(folder) if event["event"] == "step" and event["task_index"] == 1]
    assert [event["step"] for event in first_task] == [1, 2, 3, 4, 5], "task 1 is trained and told once"


# 15 steps a task, so that bases are made anew before and after the kill; few cells, since weights are compared.
GORP = [
    *("method=gorp", "method.core_rank=4", "method.refresh_every=4", "method.full_rank_lr=1.0e-3"),
    *("training.epochs=3", "data.max_test_rows=4", "evaluation.cells=diagonal_and_last"),
    "evaluation.label_scoring=false",
]


def last_stage(folder: Path) -> dict[str, Tensor]:
    """All tensors of the second task's stage, trained ones and the method's memory."""
    (stage,) = folder.glob("stages/02-*")
    files = sorted(path.relative_to(stage) for path in stage.rglob("*.safetensors"))
    return {f"{file}: {name}": tensor for file in files for name, tensor in load_file(stage / file).items()}


LBCL = ["method=lbcl", *GORP[4:]]


@pytest.mark.parametrize(
    ("method", "kept"),
    [
        pytest.param(GORP, {"A", "B", "W", "C"}, id="gorp", marks=pytest.mark.full),
        pytest.param(LBCL, {"U", "sigma", "V"}, id="lbcl", marks=pytest.mark.full),
    ],
)
def test_a_method_killed_in_task_two_ends_with_the_same_weights(
    tmp_path: Path, method: list[str], kept: set[str]
) -> None:
    """methods.md 8.6: bases, cores, moments and injection begin anew with a task, so the stage before holds all."""
    uninterrupted, folder = tmp_path / "uninterrupted", tmp_path / "run"
    done = run(train(RECIPE, *small(f"output.dir={uninterrupted}", *method)))
    assert done.returncode == 0, done.stderr[-3000:]
    process = start(train(RECIPE, *small(f"output.dir={folder}", *method)))
    wait_for(lambda: in_task(folder, 2, step=5), process)
    kill_group(process, signal.SIGKILL)
    assert not list(folder.glob("stages/02-*")), "killed too late to be in the middle of the task"
    done = run(train(RECIPE, *small(f"output.dir={folder}", *method)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "taken from its stage" in done.stderr
    found, wanted = last_stage(folder), last_stage(uninterrupted)
    assert {name.rpartition(".")[2] for name in wanted} >= kept, "factors, whole weights, spaces"
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert results(folder) == results(uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.full)])
def test_a_run_told_to_stop_leaves_with_75(reference: Path, tmp_path: Path, number: int) -> None:
    folder = tmp_path / "run"
    process = start(train(RECIPE, *small(f"output.dir={folder}")))
    wait_for(lambda: in_task(folder, 1), process)
    code, err = kill_group(process, number)
    assert code == 75, err
    assert "Traceback" not in err
    assert "run the same command again" in err
    assert whole(folder)
    done = run(train(RECIPE, *small(f"output.dir={folder}", "zero=1")))
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(folder) == results(reference)


def test_the_launch_script_passes_a_signal_on_to_the_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [str(ROOT / "docker" / "launch.sh"), RECIPE, *small(f"output.dir={folder}")]
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LAUNCHER_FLAGS": launcher_flags(2), "PATH": paths}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for(lambda: in_task(folder, 1), process)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "stopped: signal SIGTERM" in err
    assert whole(folder)


def test_ranks_stop_when_their_launcher_has_gone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # Many epochs, so that the run cannot end by itself.
    overrides = small(f"output.dir={folder}", "training.epochs=500")
    process = start(launch(2, RECIPE, *overrides))
    wait_for(lambda: in_task(folder, 1), process)
    ranks = ranks_of(folder)
    assert len(ranks) == 2
    process.kill()  # the launcher's front end alone, and in a way that it cannot pass on
    _, err = process.communicate(timeout=60)
    gone, alive = psutil.wait_procs(ranks, timeout=60)
    for rank in alive:
        rank.kill()
    assert len(gone) == 2, "ranks are left without a launcher"
    assert "has gone; run the same command again to go on" in err
    assert "Traceback" not in err
    assert whole(folder)


@pytest.mark.parametrize("moment", ["training", "scoring"])
def test_all_ranks_leave_with_75_when_one_is_told(reference: Path, tmp_path: Path, moment: str) -> None:
    folder = tmp_path / "run"
    overrides = small(f"output.dir={folder}")
    process = start(launch(2, RECIPE, *overrides))
    wait_for(lambda: in_task(folder, 1) if moment == "training" else (folder / "pids").exists(), process)
    ranks_of(folder)[1].terminate()  # rank 1 alone; scoring the untrained model comes right after the pids
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err[-3000:]
    assert "Traceback" not in err
    assert whole(folder)
    done = run(train(RECIPE, *overrides))
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(folder) == results(reference)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(train(RECIPE, *small(f"output.dir={folder}", "training.epochs=500")))
    try:
        wait_for(lambda: in_task(folder, 1), process)
        done = run(train(RECIPE, *small(f"output.dir={folder}", "training.epochs=500")))
    finally:
        kill_group(process, signal.SIGKILL)
    assert done.returncode == 2
    assert f"is being written by another run (process {process.pid}" in done.stderr


def test_the_first_moments_of_a_killed_run_do_not_block_its_folder(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".tmp-12-ab").write_text("half a rec")
    (folder / ".lock").touch()
    done = run(train(RECIPE, *small(f"output.dir={folder}", "evaluation.cells=diagonal_and_last"), "--share"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (folder / ".tmp-12-ab").exists()
    before, after = results(reference)["matrix"]["exact_match"], results(folder)["matrix"]["exact_match"]
    assert after[1] == before[1]
