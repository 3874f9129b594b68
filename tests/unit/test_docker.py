"""What clusters start: checked by the linters and schemas of their own kinds, and against this checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
SCRIPTS = sorted([*DOCKER.rglob("*.sh"), *DOCKER.rglob("*.sbatch")])
MANIFESTS = list(yaml.safe_load_all((DOCKER / "kubernetes" / "order.yaml").read_text()))


def linter(name: str) -> str:
    """A linter that the development environment installs beside this Python."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found is not None, f"{name} is not installed: run make, or pip install -e '.[dev]'"
    return found


def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run([linter("shellcheck"), *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(SCRIPTS) == 4


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([linter("hadolint"), str(DOCKER / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_manifests_fit_the_schema_of_kubernetes(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, "1.31", strict=True)


def test_the_job_starts_as_many_ranks_as_it_says() -> None:
    (job,) = (manifest["spec"] for manifest in MANIFESTS if manifest["kind"] == "Job")
    (container,) = job["template"]["spec"]["containers"]
    values = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    assert values["NODES"] == str(job["completions"]) == str(job["parallelism"])
    assert values["GPUS"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert (ROOT / container["command"][0]).is_file()
    assert (ROOT / container["args"][0]).is_file()


def test_bases_are_pinned_and_the_user_is_not_root() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", text, flags=re.MULTILINE)
    assert {base for base in bases if "/" in base or ":" in base} == {
        "python:${PYTHON_TAG}@${PYTHON_DIGEST}",
        "nvidia/cuda:${CUDA_TAG}@${CUDA_DIGEST}",
    }
    assert all(
        re.fullmatch(r"sha256:[0-9a-f]{64}", digest)
        for digest in re.findall(r"^ARG \w+_DIGEST=(\S+)", text, flags=re.M)
    )
    images = text.split("# --- the images")[1]
    assert images.count("\nFROM ") == images.count("\nUSER 10001") == images.count("\nHEALTHCHECK ") == 2


def test_what_images_copy_is_there_and_holds_no_data() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all(list(ROOT.glob(name)) for name in allowed)
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert all((ROOT / name).exists() for line in copied for name in line.split())
    assert not {"runs", ".cache", ".venv", ".git"} & set(allowed)


def test_requirements_are_the_projects_own_without_torch() -> None:
    done = subprocess.run([sys.executable, str(DOCKER / "requirements.py")], capture_output=True, text=True, check=True)
    needs = done.stdout.split("\n")
    assert any(need.startswith("deepspeed") for need in needs)
    assert not any(need.startswith("torch") for need in needs)


def test_compose_names_the_targets_of_the_dockerfile() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    targets = {service["build"]["target"] for service in compose["services"].values()}
    stages = set(re.findall(r" AS (\S+)$", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE))
    assert targets == {"cpu", "gpu"} <= stages
    for service in compose["services"].values():
        assert (ROOT / service["command"][0]).is_file()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_can_be_started_and_say_what_they_are_for(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[1].startswith("# ")
    assert script.suffix == ".sbatch" or script.stat().st_mode & 0o111


def test_the_launch_script_tells_how_it_is_used() -> None:
    for arguments, told in ((), "usage: "), (("--hostfile", "nowhere", "recipe"), "not nowhere"):
        done = subprocess.run([str(DOCKER / "launch.sh"), *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert told in done.stderr


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder of commands in the place of a cluster's, that `PATH` may begin with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    return folder


def command(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def test_a_signal_before_the_ranks_have_begun_leaves_nothing_running(stand_ins: Path, tmp_path: Path) -> None:
    """A launcher that has started something, tells it nothing, and of which no rank has begun yet."""
    child = tmp_path / "child"
    command(stand_ins / "deepspeed", f"sleep 300 & echo $! >{child}.new; mv {child}.new {child}; wait")
    path = f"{stand_ins}:{os.environ['PATH']}"
    launch = [str(DOCKER / "launch.sh"), "recipes/tiny_t5_order1.yaml", f"output.dir={tmp_path / 'run'}"]
    process = subprocess.Popen(launch, cwd=ROOT, env={**os.environ, "PATH": path})
    try:
        for _ in range(600):
            if child.exists():
                break
            time.sleep(0.1)
        process.terminate()
        assert process.wait(timeout=60) == 75
        assert not psutil.pid_exists(int(child.read_text()))
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("restarts", "finishes", "left_s", "code", "requeued"),
    [
        ("0", False, 600, 75, True),
        ("1", True, 600, 75, True),
        ("1", False, 600, 1, False),
        ("1", False, 9000, 75, True),
    ],
)
def test_a_job_is_requeued_while_it_comes_further(
    stand_ins: Path, tmp_path: Path, restarts: str, finishes: bool, left_s: int, code: int, requeued: bool
) -> None:
    """srun, whose ranks were told to stop, as time is up or by preemption, with and without a score of theirs."""
    cells = tmp_path / "run-3" / "cells"
    cells.mkdir(parents=True)
    told = tmp_path / "told"
    command(stand_ins / "srun", f'echo "$@" >{told}; {f"touch {cells}/new;" if finishes else ""} exit 75')
    command(stand_ins / "scontrol", f"[ $1 = show ] && echo first || echo $1 >>{tmp_path / 'asked'}")
    environment = {
        **os.environ,
        "PATH": f"{stand_ins}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "first",
        "SLURM_JOB_ID": "41",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_RESTART_COUNT": restarts,
        "SLURM_JOB_END_TIME": str(int(time.time()) + left_s),
    }
    job = [str(DOCKER / "slurm" / "order.sbatch"), "recipes/tiny_t5_order1.yaml", f"output.dir={tmp_path / 'run-%a'}"]
    done = subprocess.run(["bash", *job], env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert told.read_text().endswith(f"recipes/tiny_t5_order1.yaml output.dir={tmp_path / 'run-3'}\n")
    assert (tmp_path / "asked").exists() == requeued
    assert ("give it more --time" in done.stderr) == (code == 1)
