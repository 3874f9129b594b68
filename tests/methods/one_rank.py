"""A stream of tasks on random backbones, as the pipeline runs it, in one process without DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from plain_engine import PlainEngine
from plain_reference import Float64
from random_backbones import PAD, random_examples
from safetensors.torch import load, save
from torch import Tensor, nn

from data_prep.batches import Example
from pipeline.adapter_kinds import adapter_kind
from pipeline.checkpoints import Checkpoint
from pipeline.context import Context
from pipeline.engine import Ranks
from pipeline.label_loss import LabelLoss
from pipeline.layers import merge, target_modules
from pipeline.loop import plan_task, train_task
from pipeline.methods import METHODS
from pipeline.models import Quantization, load_backbone, prepare_for_training
from pipeline.recipe import (
    Batching,
    Gorp,
    IncLora,
    LbCl,
    LoraAdapter,
    OLora,
    Pegp,
    PerTask,
    SeqLora,
    Training,
)
from pipeline.runlog import RunLog
from pipeline.stopping import StopRequest

SETTINGS = {
    "seqlora": SeqLora,
    "inclora": IncLora,
    "pertask": PerTask,
    "olora": OLora,
    "pegp": Pegp,
    "gorp": Gorp,
    "lbcl": LbCl,
}
TRAINING = Training(
    epochs=2, learning_rate=3e-2, global_batch_size=4, micro_batch_size=2, weight_decay=0.1, gradient_clipping=1.0
)
LORA = LoraAdapter(rank=3, alpha=6, dropout=0.0, target_modules="all_linear")
ROWS = 8
SEED = 7


def new_method(folder: Path, family: str, name: str, adapter: Any = LORA, *, tasks: int = 3, **settings: Any) -> Any:
    model = load_backbone(folder, family, dtype=torch.float32)
    chosen = SETTINGS[name].model_validate({"name": name, **settings})
    return METHODS[name](chosen, adapter_kind(adapter, model, family, chosen), task_count=tasks)


def rows_of(task: int, family: str) -> list[Example]:
    return random_examples(ROWS, family, seed=task)


def context(
    folder: Path,
    family: str,
    method: Any,
    task: int,
    rows: Sequence[Sequence[Example]] | None = None,
    *,
    training: Training = TRAINING,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
) -> Context:
    """The task's context, the past merged; `rows`: of every task up to this one."""
    model = load_backbone(folder, family, dtype=dtype, quantization=quantization)
    rows = rows or [rows_of(index, family) for index in range(1, task + 1)]
    targets = target_modules(model, family, "all_linear")
    merge(model, folder, targets, method.frozen(), method.matrices())
    return Context(
        model,
        ranks=Alone(0, 1, torch.device("cpu")),
        family=family,
        pad_id=PAD,
        targets=targets,
        task_index=task,
        examples=rows[task - 1],
        micro_batch_size=training.micro_batch_size,
        seed=SEED,
        steps=plan_task(rows[task - 1], training, Batching(), seed=SEED, task_index=task),
        checkpoint=Checkpoint(folder),
        earlier=rows[: task - 1],
    )


class Alone(Ranks):
    """The only rank: what it would tell others it keeps."""

    def all_sum(self, tensor: Tensor) -> Tensor:
        return tensor.detach().clone()

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor.detach().clone()

    def on_first(self, action: Any) -> Any:
        return action()

    def together(self, action: Any) -> Any:
        return action()

    def gather(self, value: Any) -> list[Any]:
        return [value]


def learn(
    folder: Path,
    family: str,
    method: Any,
    task: int,
    *,
    training: Training = TRAINING,
    rows: Any = None,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    quantization: Quantization | None = None,
) -> dict[str, Tensor]:
    """One task from its start to its end; the method has taken what it trained."""
    ctx = context(folder, family, method, task, rows, training=training, dtype=dtype, quantization=quantization)
    prepare_for_training(ctx.model, gradient_checkpointing=checkpointing)
    with Float64() if dtype == torch.float64 else nullcontext():  # GORP runs backward before training
        method.begin_task(ctx)
    if any(parameter.requires_grad for parameter in ctx.model.parameters()):
        accumulation = training.global_batch_size // training.micro_batch_size
        module = LabelLoss(ctx.model, family)
        ctx.started(PlainEngine(module, training, accumulation=accumulation, groups=method.groups()))
        method.engine_started(ctx)
        train_task(
            ctx,
            method,
            ctx._steps,
            training,
            name=f"task {task}",
            examples=ctx._examples,
            seed=SEED,
            log=RunLog(None, console=False),
            stop=StopRequest(),
        )
    tensors: dict[str, Tensor] = method.end_task(ctx)
    method.load_trained(task, tensors)
    return tensors


def learns_alike_from_its_stage(folder: Path, family: str, learning: Any, taking: Any) -> dict[str, Tensor]:
    """methods.md 8.6: `learning` learns two tasks, `taking` takes the first one from files and learns the second.

    Asserts that both end alike, bit for bit; the second task's tensors.
    """
    tensors = learn(folder, family, learning, 1)
    state, values = learning.state_dict()
    saved, state_bytes, text = save({n: t.contiguous() for n, t in tensors.items()}), save(state), json.dumps(values)
    taking.load_state_dict(load(state_bytes), json.loads(text))
    taking.load_trained(1, load(saved))
    second, again = (learn(folder, family, method, 2) for method in (learning, taking))
    assert second.keys() == again.keys()
    assert all(torch.equal(second[name], again[name]) for name in second)
    assert learning.leaks() == taking.leaks() != {}
    assert learning.records() == taking.records()
    (spaces, kept), (other_spaces, other_kept) = learning.state_dict(), taking.state_dict()
    assert kept == other_kept
    assert spaces.keys() == other_spaces.keys() != set()
    assert all(torch.equal(spaces[name], other_spaces[name]) for name in spaces)
    return second


def tensors_of(method: Any) -> dict[str, nn.Parameter]:
    return dict(method._attached.parameters)
