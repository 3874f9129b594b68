"""Running the user's commands, as the user types them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "pipeline" / "train.py")
LAUNCHER = str(Path(sys.executable).with_name("deepspeed"))
# Small enough for seconds, large enough that every part runs: two tasks, several steps, a short last batch.
# eps 1e-4: see methods.md 8.7; with 1e-8 Adam turns rounding noise into steps of full size.
SMALL = [
    "order.tasks=[TASKS]",
    "data.max_train_rows=36",
    "data.max_test_rows=12",
    "training.epochs=1",
    "training.max_steps=null",
    "training.per_task={}",
    "training.global_batch_size=8",
    "training.micro_batch_size=4",
    "training.adam_eps=1.0e-4",
    "evaluation.max_new_tokens=8",
]


def small(*more: str, tasks: Sequence[str] | None = None) -> list[str]:
    """Overrides of a small run over the first two synthetic tasks."""
    from pipeline.recipe import Recipe

    names = tasks or Recipe.load("recipes/tiny_t5_order1.yaml").task_names[:2]
    return [text.replace("TASKS", ",".join(names)) for text in SMALL] + list(more)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


def run(command: Sequence[str], *, cwd: Path = ROOT, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in a process group of its own, which a timeout kills whole."""
    process = start(command, cwd=cwd)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"{command} took more than {timeout} s:\n{out[-3000:]}\n{err[-3000:]}") from None
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)


def start(command: Sequence[str], *, cwd: Path = ROOT) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(command),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def launcher_flags(ranks: int) -> str:
    """For a port of its own, since other runs may be under way on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"--num_accelerators {ranks} --master_port {probe.getsockname()[1]}"


def launch(ranks: int, *arguments: str) -> list[str]:
    """The user's main command."""
    return [LAUNCHER, *launcher_flags(ranks).split(), TRAIN, *arguments]


def train(*arguments: str) -> list[str]:
    return [sys.executable, TRAIN, *arguments]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], *, timeout: float = 180) -> None:
    """Poll until `condition` holds; fails when the process ends or time is up before."""
    deadline = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None:
            out, err = process.communicate()
            raise AssertionError(f"ended early with {process.returncode}:\n{out[-2000:]}\n{err[-2000:]}")
        assert time.monotonic() < deadline, "the awaited moment did not come"
        time.sleep(0.05)


def events(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics; a line being written is not counted."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def results(run_dir: Path) -> dict[str, Any]:
    """A run's results without what depends on the clock or the checkout's state."""
    content = json.loads((run_dir / "results.json").read_text())
    return {key: value for key, value in content.items() if key not in ("timing", "git")}
