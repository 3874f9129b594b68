"""The DeepSpeed configuration: the stage's file and what the recipe decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from pipeline import deepspeed_config as configuration
from pipeline.deepspeed_config import REFUSED_KEYS, deepspeed_config, zero_file
from pipeline.recipe import Engine, Training

PLACES = [(0, "none"), *((zero, offload) for zero in (1, 2, 3) for offload in ("none", "optimizer"))]
PLACES.append((3, "parameters"))


def training(rows: int = 32, micro: int = 4, **values: Any) -> Training:
    return Training(global_batch_size=rows, micro_batch_size=micro, **values)


@pytest.mark.parametrize(("zero", "offload"), PLACES)
def test_every_stage_and_offload_has_a_file_that_fits(zero: int, offload: str) -> None:
    config = deepspeed_config(Engine(zero=zero, offload=offload), training(), 2)
    group = config["zero_optimization"]
    assert group["stage"] == zero
    assert ("offload_optimizer" in group) == (offload != "none")
    assert ("offload_param" in group) == (offload == "parameters")
    on_host = [group[key] for key in ("offload_optimizer", "offload_param") if key in group]
    assert all(part == {"device": "cpu", "pin_memory": False} for part in on_host)


def test_what_the_recipe_decides_is_always_written() -> None:
    config = deepspeed_config(Engine(zero=2), training(gradient_clipping=0.0), 2)
    assert config["gradient_clipping"] == 0.0, "DeepSpeed clips at 1.0 where the key is missing"
    assert config["train_batch_size"] == 32
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 4
    assert "bf16" not in config
    assert "optimizer" not in config, "a named optimizer compiles kernels"


def test_bf16_accumulates_and_adds_up_in_float32() -> None:
    config = deepspeed_config(Engine(zero=3, precision="bf16"), training(), 1)
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"


@given(accumulation=st.integers(1, 9), world=st.integers(1, 9), micro=st.integers(1, 9), more=st.integers(0, 8))
def test_ranks_share_the_micro_batches_evenly_or_are_refused(
    accumulation: int, world: int, micro: int, more: int
) -> None:
    batches = accumulation * world + more % world
    settings = training(batches * micro, micro)
    if more % world == 0:
        config = deepspeed_config(Engine(zero=0), settings, world)
        assert config["gradient_accumulation_steps"] == accumulation
        assert config["train_batch_size"] == accumulation * world * micro
    else:
        with pytest.raises(UserError, match=r"training\.global_batch_size") as refused:
            deepspeed_config(Engine(zero=0), settings, world)
        assert f"{batches} micro-batches of {micro}, which {world} ranks cannot share" in str(refused.value)
        assert f"a multiple of {world * micro}," in str(refused.value)


@pytest.fixture
def stage_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes the file of stage 2 in a checkout of its own."""
    folder = tmp_path / "recipes" / "zero"
    folder.mkdir(parents=True)
    monkeypatch.setattr(configuration, "ROOT", tmp_path)

    def write(text: str) -> Path:
        path = folder / "stage2.json"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_a_stage_file_may_not_contradict_the_recipe(stage_file: Callable[[str], Path], key: str) -> None:
    path = stage_file(json.dumps({"zero_optimization": {"stage": 2}, key: 1}))
    with pytest.raises(UserError, match=f"{key} belong in the recipe") as refused:
        deepspeed_config(Engine(zero=2), training(), 1)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is missing or no JSON"),
        ('{"zero_optimization": {"stage": 3}}', "zero_optimization.stage is 3; this file must set 2"),
        ("{}", "zero_optimization.stage is None; this file must set 2"),
        ("[]", "holds no object"),
        ('{"zero_optimization": 2}', "holds no object"),
    ],
)
def test_a_damaged_stage_file_is_refused(stage_file: Callable[[str], Path], text: str, message: str) -> None:
    stage_file(text)
    with pytest.raises(UserError, match=message):
        deepspeed_config(Engine(zero=2), training(), 1)


def test_a_missing_stage_file_is_refused(stage_file: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="is missing or no JSON"):
        deepspeed_config(Engine(zero=2), training(), 1)


def test_files_are_named_by_stage_and_offload() -> None:
    assert zero_file(Engine(zero=1)).name == "stage1.json"
    assert zero_file(Engine(zero=3, offload="parameters")).name == "stage3_parameters.json"
