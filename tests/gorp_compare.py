"""A GORP stream beside `gorp_reference`: the same tasks, and how far their changes of the weights lie apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from gorp_reference import GorpSettings, Steps, TaskEnd, gorp_plain
from torch import Tensor

from data_prep.batches import Example
from pipeline.adapters.core import CoreLoraKind
from pipeline.checkpoints import Checkpoint
from pipeline.models import load_backbone
from pipeline.recipe import Gorp, Training
from pipeline.seeds import generator


def reference(
    folder: Path,
    family: str,
    settings: Gorp,
    kind: CoreLoraKind,
    *,
    training: Training,
    tasks: Sequence[tuple[Sequence[Example], Steps]],
    seed: int,
) -> list[TaskEnd]:
    """What plain PyTorch makes of `tasks`, from the LoRA that the recipe's seed gives."""
    model = load_backbone(folder, family, dtype=torch.float32)
    chosen = settings.model_dump(include={field.name for field in fields(GorpSettings)})
    return gorp_plain(
        folder,
        family,
        tasks=tasks,
        start=kind.starts(model, generator(seed, "task", 1, "lora")),
        scale=kind.scale,
        cores=list(kind.cores),
        training=training,
        settings=GorpSettings(**chosen),
    )


def updates(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    """All dW since the stream's start by layer, float64: LoRA's products ("lora"), whole matrices ("full").

    `tensors`: as a stage keeps them.
    """
    checkpoint = Checkpoint(folder)
    found: dict[str, dict[str, Tensor]] = {"lora": {}, "full": {}}
    for name, tensor in tensors.items():
        layer, part = name.rpartition(".")[::2]
        if part == "A":
            scale = tensors[f"{layer}.scale"].double()
            found["lora"][layer] = scale * tensors[f"{layer}.B"].double() @ tensor.double()
        if part == "W":
            found["full"][layer] = tensor.double() - checkpoint.read(f"{layer}.weight").double()
    return {kind: layers for kind, layers in found.items() if layers}


def differences(tensors: Mapping[str, Tensor], end: TaskEnd, folder: Path) -> dict[str, float]:
    """Relative Frobenius norms of all dW since the stream's start, of LoRA's products and of whole matrices.

    `tensors`: as a stage keeps them, after the task that ended in `end`.
    """
    scales = {name: scale for name, scale in tensors.items() if name.endswith(".scale")}
    whole = {f"{layer}.W": W for layer, W in end.full.items() if f"{layer}.W" in tensors}
    wanted = updates(end.lora | scales | whole, folder)
    return {kind: relative(layers, wanted[kind]) for kind, layers in updates(tensors, folder).items()}


def relative(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """`||found - wanted|| / ||wanted||` over all of `wanted` together."""
    ours, theirs = (torch.cat([side[name].flatten() for name in wanted]) for side in (found, wanted))
    return float((ours - theirs).norm() / theirs.norm())


def space_differences(bases: Mapping[str, Tensor], end: TaskEnd) -> dict[str, float]:
    """`||QQ^T - Q_ref Q_ref^T|| / ||Q_ref Q_ref^T||` of each space; infinite where their ranks differ."""
    found = {}
    for name, wanted in end.spaces.items():
        Q = bases[name].double()
        difference = (Q @ Q.mT - wanted @ wanted.mT).norm() / wanted.norm() if Q.shape == wanted.shape else torch.inf
        found[name] = float(difference)
    return found
