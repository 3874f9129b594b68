"""DeepSpeed's configuration: a stage's file under recipes/zero/, and what the recipe decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from pipeline.recipe import Engine, Training
from pipeline.recipe_source import ROOT

# Decided by the recipe; in a file under recipes/zero/ they would contradict it silently.
REFUSED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "bfloat16",
    "fp16",
    "amp",
    "data_types",
    "communication_data_type",
    "optimizer",
    "scheduler",
)


def zero_file(settings: Engine) -> Path:
    """The DeepSpeed file of a stage and offload: `recipes/zero/stageN.json` or `stageN_<offload>.json`."""
    suffix = "" if settings.offload == "none" else f"_{settings.offload}"
    return ROOT / "recipes" / "zero" / f"stage{settings.zero}{suffix}.json"


def deepspeed_config(settings: Engine, training: Training, world: int) -> dict[str, Any]:
    """The complete DeepSpeed configuration: the stage's file and what the recipe decides."""
    path = zero_file(settings)
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"engine.zero: {path} is missing or no JSON ({error}); restore it") from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise UserError(f"{path}: holds no object of DeepSpeed's keys with a group zero_optimization; restore it")
    if wrong := [key for key in REFUSED_KEYS if key in config]:
        raise UserError(f"{path}: {', '.join(wrong)} belong in the recipe, not in this file; remove them")
    stage = config.get("zero_optimization", {}).get("stage")
    if stage != settings.zero:
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}; this file must set {settings.zero}")
    bucket = config.get("zero_optimization", {}).get("reduce_bucket_size", 1)
    if not isinstance(bucket, int | float) or bucket < 1:
        raise UserError(f"{path}: zero_optimization.reduce_bucket_size is {bucket!r}; give a number, or leave it out")
    config |= {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": micro_batches_per_rank(training, world),
        "gradient_clipping": training.gradient_clipping,  # DeepSpeed clips at 1.0 where the key is missing
        "steps_per_print": 10**9,
        # Named optimizers compile fused kernels; a client optimizer is exact and needs no compiler.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if settings.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"  # else ranks add up gradients rounded to bf16
    return config


def micro_batches_per_rank(training: Training, world: int) -> int:
    """How many micro-batches of a global batch each of `world` ranks runs; `UserError` where they do not share."""
    micro_batches = training.global_batch_size // training.micro_batch_size
    if micro_batches % world:
        raise UserError(
            f"training.global_batch_size: {training.global_batch_size} rows are {micro_batches} micro-batches of "
            f"{training.micro_batch_size}, which {world} ranks cannot share evenly; choose a global batch that "
            f"is a multiple of {world * training.micro_batch_size}, or other ranks or micro-batches"
        )
    return micro_batches // world
