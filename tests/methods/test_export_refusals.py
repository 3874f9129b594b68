"""What `python -m pipeline.export` refuses: one message, exit code 2, nothing written."""

from __future__ import annotations

import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from export_runs import Run, new_backbone
from torch import Tensor, nn

from pipeline.export import main

CORE = "decoder.block.0.layer.1.EncDecAttention.q"
TARGET = "encoder.block.0.layer.0.SelfAttention.q"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_backbone(tmp_path_factory.mktemp("backbones") / "t5", "t5", 1)


def lora() -> dict[str, Tensor]:
    return {
        f"{TARGET}.A": torch.ones(2, 15),
        f"{TARGET}.B": torch.ones(12, 2),
        f"{TARGET}.scale": torch.tensor(4.0),
    }


def new_run(tmp_path: Path, backbone: Path, *overrides: str, stages: int = 2) -> Run:
    run = Run(tmp_path / "run", backbone, "t5", *overrides)
    for index in range(1, stages + 1):
        run.finish(lora(), index=index)
    return run


@pytest.fixture
def finished(tmp_path: Path, backbone: Path) -> Run:
    return new_run(tmp_path, backbone)


def refused(capsys: pytest.CaptureFixture[str], run_dir: Path, *arguments: str) -> str:
    """Exporting fails by the user's fault and leaves no trace; the message."""
    before = sorted(run_dir.rglob("*")) if run_dir.is_dir() else None
    assert main([str(run_dir), *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err
    assert (sorted(run_dir.rglob("*")) if run_dir.is_dir() else None) == before
    return said.err


def test_a_folder_that_is_no_run(tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere: no such folder" in refused(capsys, tmp_path / "nowhere")
    assert "holds no recipe.yaml" in refused(capsys, backbone)
    run = new_run(tmp_path, backbone, stages=0)
    assert "no task is finished yet" in refused(capsys, run.folder)
    (run.folder / "stages" / ".tmp-1-ab").mkdir(parents=True)
    assert "no task is finished yet" in refused(capsys, run.folder)
    (run.folder / "recipe.yaml").write_text("model: {}\n")
    assert "recipe.yaml" in refused(capsys, run.folder)


def test_a_task_that_is_unknown_or_not_finished(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(tmp_path, backbone)
    first, second, third = run.tasks[:3]
    message = refused(capsys, run.folder, "--after", third)
    assert f"{third} is not finished" in message
    assert f"finished: {first}, {second};" in message
    message = refused(capsys, run.folder, "--after", f"{second}s")
    assert f'no task "{second}s"; the stream is {", ".join(run.tasks)}; did you mean "{second}"?' in message


def test_stages_that_are_missing_damaged_or_too_many(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(tmp_path, backbone, stages=1)
    third = run.finish(lora(), index=3)
    assert f"the stage of task 2 ({run.tasks[1]}) is missing" in refused(capsys, run.folder)
    assert main([str(run.folder), "--part", "task"]) == 0, "the third task alone needs no second"
    capsys.readouterr()

    other = run.finish(lora(), index=1, seed="other")
    message = refused(capsys, run.folder, "--after", run.tasks[0])
    assert f"task 1 ({run.tasks[0]}) has 2 stages" in message
    assert str(other.path) in message
    shutil.rmtree(other.path)

    factors = third.path / "trained" / "factors.safetensors"
    content = bytearray(factors.read_bytes())
    content[-1] ^= 1
    factors.write_bytes(content)
    message = refused(capsys, run.folder, "--part", "task", "--out", str(tmp_path / "elsewhere"))
    assert "does not match its checksum" in message
    assert str(factors) in message
    assert main([str(run.folder), "--after", run.tasks[0]]) == 0, "damage to a later stage is none to this one"
    capsys.readouterr()
    factors.unlink()
    assert "is missing, so this stage is damaged" in refused(
        capsys, run.folder, "--part", "task", "--out", str(tmp_path / "elsewhere")
    )
    shutil.copytree(run.folder / "stages" / next(run.folder.glob("stages/01-*")).name, third.path, dirs_exist_ok=True)
    assert "belongs to another stage" in refused(
        capsys, run.folder, "--part", "task", "--out", str(tmp_path / "elsewhere")
    )


def test_a_place_that_is_taken(tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(tmp_path, backbone)
    out = tmp_path / "out"
    out.mkdir()
    assert f"{out}: exists already" in refused(capsys, run.folder, "--out", str(out))
    assert not list(out.iterdir())
    assert main([str(run.folder)]) == 0
    capsys.readouterr()
    assert "exists already" in refused(capsys, run.folder)
    assert main([str(run.folder), "--out", str(out / "deep" / "er")]) == 0


@pytest.mark.parametrize(
    ("method", "tensors", "arguments", "reason"),
    [
        ("seqlora", "bottleneck", [], "a bottleneck adapter cannot be exported: PEFT has no such adapter"),
        ("seqlora", "bottleneck", ["--merged"], "keeps it from being merged into a linear layer"),
        ("seqlora", "prompt", ["--merged"], "--merged: a prompt is no part of any weight"),
        ("seqlora", "prefix", ["--merged"], "--merged: a prefix is no part of any weight"),
        ("seqlora", "prompt", ["--part", "task"], "trains one prompt through the stream"),
        ("pegp", "prefix", ["--part", "task"], "trains one prefix through the stream"),
        ("seqlora", "lora", ["--part", "task"], "trains one LoRA through the stream"),
        ("seqlora", "lora", ["--part", "task", "--merged"], "trains one LoRA through the stream"),
        ("seqlora", "unknown", [], "what method seqlora trains has no form that PEFT or transformers knows"),
        ("inclora", "nothing", [], "no layer had a free direction left"),
        ("gorp", "whole", [], f"changed 1 whole weights, such as {CORE}, which no PEFT adapter holds; add --merged"),
        ("gorp", "whole", ["--part", "task"], f"changed whole weights, such as {CORE}, which hold all tasks up to"),
    ],
)
def test_what_has_no_such_form(
    tmp_path: Path,
    backbone: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    tensors: str,
    arguments: list[str],
    reason: str,
) -> None:
    kinds: dict[str, dict[str, Tensor]] = {
        "lora": lora(),
        "bottleneck": {f"encoder.block.0.layer.1.DenseReluDense.{part}": torch.ones(4, 4) for part in ("down", "up")},
        "prompt": {"prompt": torch.ones(4, 15)},
        "prefix": {f"decoder.block.0.layer.0.SelfAttention.{part}": torch.ones(3, 4, 4) for part in ("key", "value")},
        "unknown": {f"{TARGET}.gain": torch.ones(4)},
        "nothing": {},
        "whole": lora() | {f"{CORE}.W": torch.ones(12, 15)},
    }
    run = new_run(tmp_path, backbone, f"method={method}", stages=0)
    run.finish(kinds[tensors], index=1)
    assert reason in refused(capsys, run.folder, *arguments)


def test_shared_lora_of_pegp_is_no_tasks_own(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(tmp_path, backbone, "method=pegp", "method.lora=shared")
    assert "trains one LoRA through the stream" in refused(capsys, run.folder, "--part", "task")


@pytest.mark.parametrize("form", [[], ["--merged"]], ids=["adapter", "merged"])
def test_whole_weights_are_no_tasks_own(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str], form: list[str]
) -> None:
    """Though each task has a LoRA of its own."""
    run = new_run(tmp_path, backbone, "method=gorp", "method.lora=per_task", stages=1)
    run.finish(lora() | {f"{CORE}.W": torch.ones(12, 15)}, index=2)
    message = refused(capsys, run.folder, "--part", "task", *form)
    assert f"--part task: the method gorp changed whole weights, such as {CORE}" in message
    assert main([str(run.folder), "--after", run.tasks[0], "--part", "task"]) == 0, "where none was changed, it is"
    capsys.readouterr()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_beside_a_quantized_backbone_nothing_is_merged(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the line that loads the adapter quantizes its backbone."""
    run = new_run(tmp_path, backbone, "model.quantization=nf4")
    assert "beside a backbone quantized to nf4" in refused(capsys, run.folder, "--merged")
    assert main([str(run.folder)]) == 0
    found: dict[str, Any] = {}
    exec(capsys.readouterr().out.splitlines()[1], found)
    weights = [layer.weight for layer in found["model"].modules() if isinstance(layer, nn.Linear)]
    assert any(weight.dtype == torch.uint8 for weight in weights)


def test_merging_needs_the_same_backbone(tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = shutil.copytree(backbone, tmp_path / "backbone")
    run = new_run(tmp_path, mine)
    config = mine / "config.json"
    config.write_text(config.read_text() + "\n")
    assert "not the backbone that this run was trained on" in refused(capsys, run.folder, "--merged")
    shutil.rmtree(mine)
    assert re.search(r"model.path: \S+backbone: no such folder", refused(capsys, run.folder, "--merged"))
    assert main([str(run.folder)]) == 0, "an adapter is written without its backbone"


@contextmanager
def full_disk(longest: int) -> Iterator[None]:
    """Inside, no file of this process grows beyond `longest` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (longest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# 8000 bytes hold the configuration, and not the weights, whose writer has errors of its own.
@pytest.mark.parametrize(("form", "longest"), [([], 500), (["--merged"], 500), (["--merged"], 8000)])
def test_a_full_disk_leaves_nothing(
    finished: Run, capsys: pytest.CaptureFixture[str], form: list[str], longest: int
) -> None:
    with full_disk(longest):
        assert main([str(finished.folder), *form]) == 2
    assert f"export/{finished.tasks[1]}{'-merged' if form else ''}: cannot be written" in capsys.readouterr().err
    assert not list((finished.folder / "export").iterdir())


def test_a_bad_word_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), "--part", "tasks"])
    assert stopped.value.code == 2
    assert "--part" in capsys.readouterr().err
