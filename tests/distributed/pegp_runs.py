"""What a rank does for PEGP, GORP and O-LoRA: two tasks one after another, as the stream runs them."""

from __future__ import annotations

from typing import Any

import torch
from random_backbones import PAD, random_examples
from rank_cases import ROWS, SEED, Case
from torch import Tensor

from pipeline.adapter_kinds import adapter_kind
from pipeline.checkpoints import Checkpoint
from pipeline.context import Context
from pipeline.engine import TaskEngine
from pipeline.label_loss import LabelLoss
from pipeline.layers import merge, target_modules
from pipeline.loop import plan_task, train_task
from pipeline.methods import METHODS
from pipeline.models import load_backbone, prepare_for_training
from pipeline.recipe import Batching, Gorp, LbCl, OLora, Pegp
from pipeline.recipe_groups import BottleneckAdapter, LoraAdapter, PrefixAdapter, PromptAdapter, TripletAdapter
from pipeline.runlog import RunLog
from pipeline.stopping import StopRequest

ADAPTERS = {
    "lora": LoraAdapter(rank=3, alpha=6, dropout=0.0),
    "shared": LoraAdapter(rank=3, alpha=6, dropout=0.0),
    "wide": LoraAdapter(rank=64, alpha=128, dropout=0.0),  # above 4,096 numbers on either of two ranks
    "bottleneck": BottleneckAdapter(kind="bottleneck", width=7),
    "prompt": PromptAdapter(kind="prompt", length=3),
    "prefix": PrefixAdapter(kind="prefix", length=3),
    "triplet": TripletAdapter(kind="triplet", rank=3, scale=4.0, dropout=0.0),
}


def settings(case: Case) -> Pegp | OLora | Gorp | LbCl:
    """Few features and a low energy: widths of 15, 7 and 3 are full soon."""
    if case.method == "olora":
        return OLora(name="olora", lambda_1=0.5, lambda_2=0.1)
    if case.method == "lbcl":
        common: Any = {"name": "lbcl", "seed_samples": 5, "sigma_lr": 2e-2}
        return (
            LbCl(mode="literal", sensitivity="per_sample", **common)
            if case.mode == "literal"
            else LbCl(project=case.project, **common)
        )
    lora = "shared" if case.adapter == "shared" else "per_task"
    if case.method == "gorp":
        cores: Any = {"core_rank": 3, "refresh_every": 2, "full_rank_lr": 1e-2, "svd": case.svd}
        if case.long:
            cores |= {"refresh_every": 10, "full_rank_lr": 1e-3}
        if case.mode == "literal":  # at a higher energy a core's own space, of three dimensions, is full at once
            return Gorp(name="gorp", lora=lora, mode="literal", energy=0.5, **cores)
        return Gorp(name="gorp", lora=lora, project=case.project, refresh_moments=case.refresh, **cores)
    return Pegp(name="pegp", lora=lora, project=case.project, energy=0.7, feature_samples=13, feature_drift=True)


def two_tasks(job: Any, method: Any = None) -> dict[str, Any]:
    """Train two tasks (LB-CL: three, since one old task's weight is 1 whatever its sensitivity); what each trained, the
    bases between them, the leak that the method measured.
    """
    case = job.case
    method = method or new_method(job, METHODS[case.method])
    result: dict[str, Any] = {}
    for task in range(1, task_count(case) + 1):
        tensors, losses, live = learn(job, method, task)
        method.load_trained(task, tensors)
        result |= {f"trained_{task}": tensors, f"loss_{task}": losses, f"live_{task}": live}
        result[f"stored_{task}"] = _stored_loss(job, method, task)
        if task == 1 and case.method != "olora":
            result["bases"] = method.memory.state_dict()[0]
            result["leaders"] = dict(method.memory.state_dict()[1]["leaders"])
    result["sensitivity"] = {r["sensitivity_of"]: r["per_task"] for r in method.records() if "sensitivity_of" in r}
    result["jump"] = [r[key] for r in method.records() if "jump_on" in r for key in ("loss_at_random", "loss_injected")]
    result["penalty"] = [record["sum"] for record in method.records() if "penalty" in record]
    result["leaks"] = dict(method.leaks().get(2, {}))
    result["drift"] = {r["space"]: r["share"] for r in method.records() if "drift_of" in r}
    return result


def new_method(job: Any, method: Any) -> Any:
    """A method of the class `method` for the case's backbone."""
    case, chosen = job.case, settings(job.case)
    plain = load_backbone(job.folder, case.family, dtype=torch.float32)
    return method(chosen, adapter_kind(ADAPTERS[case.adapter], plain, case.family, chosen), task_count=2)


def task_count(case: Case) -> int:
    """How many tasks are trained."""
    return 3 if case.method == "lbcl" else 2


def rows_of(case: Case) -> list[Any]:
    """All tasks' rows."""
    return [random_examples(ROWS, case.family, seed=seed) for seed in range(1, task_count(case) + 1)]


def steps_of(case: Case, task: int) -> list[Any]:
    """The plan of a task's steps."""
    return plan_task(rows_of(case)[task - 1], case.training, Batching(), seed=SEED, task_index=task)


def _context(job: Any, method: Any, task: int, updates: Any) -> Context:
    """The task's context on a new backbone with `updates` merged."""
    case = job.case
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    model = load_backbone(job.folder, case.family, dtype=dtype, quantization=case.bits)
    targets = getattr(method.kind, "layers", None) or target_modules(model, case.family, None)
    merge(model, job.folder, targets, updates, method.matrices())
    rows = rows_of(case)
    return Context(
        model,
        ranks=job.ranks,
        family=case.family,
        pad_id=PAD,
        targets=targets,
        task_index=task,
        examples=rows[task - 1],
        micro_batch_size=case.training.micro_batch_size,
        seed=SEED,
        steps=steps_of(case, task),
        checkpoint=Checkpoint(job.folder),
        earlier=rows[: task - 1],
    )


def _stored_loss(job: Any, method: Any, task: int) -> float:
    """The loss on the task's rows of what its stage will hold, on a model of its own."""
    ctx = _context(job, method, task, method.active())
    with method.equipped(ctx.model):
        return ctx.run_rows(range(ROWS), backward=False)


def learn(job: Any, method: Any, task: int) -> tuple[dict[str, Tensor], float, float]:
    """Trained tensors, last training loss, and the loss on the task's rows of the engine's own model at the end."""
    case = job.case
    ctx = _context(job, method, task, method.frozen())
    model, rows = ctx.model, ctx._examples
    prepare_for_training(model, gradient_checkpointing=case.checkpointing)
    method.begin_task(ctx)
    engine = TaskEngine(LabelLoss(model, case.family), case.engine, case.training, job.ranks, method.groups())
    try:
        ctx.started(engine)
        method.engine_started(ctx)
        summary = train_task(
            ctx,
            method,
            steps_of(case, task),
            case.training,
            name=f"task {task}",
            examples=rows,
            seed=SEED,
            log=RunLog(None, console=False),
            stop=StopRequest(),
        )
        live = ctx.run_rows(range(ROWS), backward=False)
        return method.end_task(ctx), summary.last_loss, live
    finally:
        engine.close()
