"""What a rank does for each kind of case. Results are plain values and tensors; every rank returns its own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
from gorp_runs import gorp_moments, gorp_tasks
from pegp_runs import two_tasks
from plain_engine import PlainEngine
from random_backbones import PAD
from rank_cases import L2, SEED, TRAINING, WRITE_AFTER, Case
from torch import Tensor, nn

from data_prep.errors import UserError
from pipeline.context import Context
from pipeline.engine import Ranks, TaskEngine
from pipeline.from_host import blocks_from_host
from pipeline.label_loss import LabelLoss
from pipeline.layers import target_modules
from pipeline.loop import train_task
from pipeline.methods import METHODS
from pipeline.methods.inclora import IncrementalLora
from pipeline.models import load_backbone, prepare_for_training
from pipeline.recipe import IncLora, SeqLora
from pipeline.runlog import RunLog
from pipeline.stopping import Stopped, StopRequest

Result = dict[str, Any]


@dataclass
class Job:
    """One task in the hands of one rank."""

    case: Case
    ranks: Ranks
    backbones: Path
    scratch: Path
    dtype: torch.dtype = torch.float32
    training: Any = TRAINING
    result: Result = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.backbones / self.case.backbone

    @property
    def log(self) -> Path:
        return self.scratch / "metrics.jsonl"

    def context(self) -> Context:
        dtype = torch.bfloat16 if self.case.precision == "bf16" else self.dtype
        model = load_backbone(self.folder, self.case.family, dtype=dtype)
        return Context(
            model,
            ranks=self.ranks,
            family=self.case.family,
            pad_id=PAD,
            targets=target_modules(model, self.case.family, None),
            task_index=1,
            examples=self.case.examples,
            micro_batch_size=self.training.micro_batch_size,
            seed=SEED,
            running=self.running,
        )

    def running(self, model: Any) -> AbstractContextManager[None]:
        resting = self.case.offload == "parameters" and not self.case.bits
        return blocks_from_host(model, self.ranks.device) if resting else nullcontext()

    def method(self, kind: type[Any] | None = None) -> Any:
        kind = kind or METHODS[self.case.method]
        settings = SeqLora(name="seqlora") if self.case.method == "seqlora" else IncLora(name="inclora")
        model = load_backbone(self.folder, self.case.family, dtype=torch.float32)
        targets = target_modules(model, self.case.family, None)
        return kind(settings, self.case.kind(targets), task_count=1)

    def start(self, ctx: Context, method: Any, *, begun: bool = False) -> Any:
        """From a bare backbone, or where the task has begun, to a started engine."""
        if not begun:
            method.begin_task(ctx)
        self.result["start"] = {name: value.detach().clone() for name, value in adapter_tensors(method).items()}
        prepare_for_training(ctx.model, gradient_checkpointing=self.case.checkpointing)
        engine = TaskEngine(LabelLoss(ctx.model, self.case.family), self.case.engine, self.training, self.ranks)
        ctx.started(engine)
        return engine

    def train(self, method: Any, *, ctx: Context | None = None, engine: Any = None) -> Result:
        """Train the task to its end; the result says where it started, ended, and what the log holds."""
        ctx = ctx or self.context()
        engine = engine or self.start(ctx, method)
        self.log.unlink(missing_ok=True)
        try:
            train_task(
                ctx,
                method,
                self.case.steps,
                self.training,
                name="letters",
                examples=self.case.examples,
                seed=SEED,
                log=RunLog(self.log if self.ranks.first else None, console=False),
                stop=StopRequest(),
            )
            self.result["trained"] = method.end_task(ctx)
        finally:
            engine.close()
            self.result["steps"] = ctx.step
        if self.ranks.first:
            events = [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]
            for name in ("loss", "gradient_norm", "learning_rate", "rows"):
                self.result[name] = [event[name] for event in events]
        return self.result


def adapter_tensors(method: Any) -> dict[str, nn.Parameter]:
    """The trained tensors by the names that `end_task` gives them."""
    return dict(method._attached.parameters)


def train(job: Job) -> Result:
    """A task from start to end."""
    return job.train(job.method())


class _Access(IncrementalLora):
    """Reads whatever a method may read, at every step, and writes once."""

    def __init__(self, *settings: Any, **more: Any) -> None:
        super().__init__(*settings, **more)
        self.seen: dict[str, list[dict[str, Tensor]]] = {"gradients": [], "moments": [], "masters": []}
        self.written: dict[str, dict[str, Tensor]] = {}

    def before_step(self, ctx: Any) -> None:
        self._read("gradients", ctx.gradient)

    def after_step(self, ctx: Any) -> None:
        if ctx.step == WRITE_AFTER:
            self._write(ctx)
        self._read("moments", ctx.first_moment)
        self._read("masters", ctx.master)

    def _read(self, what: str, read: Callable[[nn.Parameter], Tensor]) -> None:
        values = {name: read(parameter).cpu().clone() for name, parameter in adapter_tensors(self).items()}
        self.seen[what].append(values)

    def _write(self, ctx: Any) -> None:
        random = ctx.generator("written")
        for name, parameter in adapter_tensors(self).items():
            shape = ctx.master(parameter).shape
            value = torch.empty(shape).uniform_(-0.3, 0.3, generator=random)
            ctx.write(parameter, value)
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                forward = parameter.detach().clone()
            self.written[name] = {"value": value, "master": ctx.master(parameter), "forward": forward}


def access(job: Job) -> Result:
    """Gradients, moments and masters at every step, and a write in the middle."""
    method = job.method(_Access)
    result = job.train(method)
    return result | method.seen | {"written": method.written}


class _PullToZero(IncrementalLora):
    """L2 on every A: a penalty whose gradient is known."""

    def penalty(self, ctx: Any) -> Tensor:
        return (
            L2
            * torch.stack(
                [value.square().sum() for name, value in adapter_tensors(self).items() if name.endswith(".A")]
            ).sum()
        )


def penalty(job: Job) -> Result:
    """A penalty, once a step whatever the accumulation."""
    return job.train(job.method(_PullToZero))


def float64(job: Job) -> Result:
    """The loop outside DeepSpeed, in float64: micro-batches accumulated."""
    job.dtype = torch.float64
    method = job.method()
    ctx = job.context()
    method.begin_task(ctx)
    job.result["start"] = {name: value.detach().clone() for name, value in adapter_tensors(method).items()}
    engine = PlainEngine(LabelLoss(ctx.model, job.case.family), job.training, accumulation=4)
    ctx.started(engine)
    return job.train(method, ctx=ctx, engine=engine)


@dataclass
class _Moments:
    """Second moments of what a layer is given and of the gradients of what it gives."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def watch(self, model: nn.Module, names: list[str]) -> list[Any]:
        handles = []
        for name in names:
            layer = model.get_submodule(name)
            handles.append(layer.register_forward_hook(self._forward(name)))
        return handles

    def _forward(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            _add(self.inputs, name, inputs[0])
            if output.requires_grad:
                output.register_hook(lambda gradient: _add(self.gradients, name, gradient))

        return hook


def _add(sums: dict[str, Tensor], name: str, values: Tensor) -> None:
    rows = values.detach().double().flatten(0, -2)
    sums[name] = sums.get(name, 0) + rows.T @ rows


def run_rows(job: Job) -> Result:
    """Rows through the model before training (with backward) and after it, under hooks."""
    # 7 micro-batches, which two ranks cannot share evenly; in the order in which `run_rows` batches them
    rows = sorted(range(13), key=lambda row: len(job.case.examples[row].input_ids))
    ctx, method = job.context(), job.method()
    names = [str(name) for name in ctx.targets]
    before, idle = _Moments(), _Moments()
    handles = before.watch(ctx.model, names)
    loss_before = ctx.run_rows(rows, backward=True)
    for handle in handles:
        handle.remove()
    method.begin_task(ctx)
    ctx.run_rows(rows, backward=True)  # leaves gradients in the adapter, which training must not start from
    assert any(parameter.grad.any() for parameter in adapter_tensors(method).values())
    embedded = ctx.model.get_input_embeddings()(torch.tensor([[5]]))
    engine = job.start(ctx, method, begun=True)
    try:
        handles = idle.watch(ctx.model, names)
        loss_started = ctx.run_rows(rows, backward=False)
        for handle in handles:
            handle.remove()
    except BaseException:
        engine.close()
        raise
    training = ctx.model.training
    result = job.train(method, ctx=ctx, engine=engine)
    return result | {
        "rows": rows,
        "loss_before": loss_before,
        "loss_started": loss_started,
        "training_again": training,
        "embeddings_differentiable": embedded.requires_grad,
        "inputs_before": {name: ctx.all_sum(before.inputs[name]) for name in names},
        "gradients_before": {name: ctx.all_sum(before.gradients[name]) for name in names},
        "inputs_started": {name: ctx.all_sum(idle.inputs[name]) for name in names},
    }


class _DiskFillsUp(IncrementalLora):
    """From the second step on rank 0 cannot write its log."""

    log: Path

    def before_step(self, ctx: Any) -> None:
        if ctx.step == 1 and ctx.ranks.first:
            self.log.unlink(missing_ok=True)
            self.log.symlink_to("/dev/full")


def disk_full(job: Job) -> Result:
    """What every rank raises when rank 0's disk is full."""
    method = job.method(_DiskFillsUp)
    method.log = job.log
    return _outcome(job, lambda: job.train(method))


class _ToldOnLastRank(IncrementalLora):
    """The last rank, and no other, gets a signal during its second step."""

    def before_step(self, ctx: Any) -> None:
        if ctx.step == 1 and ctx.ranks.rank == ctx.ranks.world - 1:
            os.kill(os.getpid(), signal.SIGUSR1)


def told_to_stop(job: Job) -> Result:
    """What every rank raises when one is told to stop."""
    return _outcome(job, lambda: job.train(job.method(_ToldOnLastRank)))


def not_finite(job: Job) -> Result:
    """What every rank raises on a loss that is no number: one token's embedding is infinite."""
    ctx, method = job.context(), job.method()
    step = 4
    row = next(row for row in job.case.steps[step][1] if row >= 0)
    token = job.case.examples[row].input_ids[1]
    ctx.model.get_input_embeddings().weight.data[token] = float("inf")
    job.result["token"] = token
    return _outcome(job, lambda: job.train(method, ctx=ctx))


def diverged(job: Job) -> Result:
    """What every rank raises when a trained tensor was made infinite after the second step."""

    class Broken(IncrementalLora):
        def after_step(self, ctx: Any) -> None:
            if ctx.step == 2:
                parameter = adapter_tensors(self)[f"{ctx.targets[0]}.B"]
                ctx.write(parameter, torch.full_like(ctx.master(parameter), float("inf")))

    return _outcome(job, lambda: job.train(job.method(Broken)))


class _SteepGradient(IncrementalLora):
    """The first tensor's gradient is infinite in the third step, the loss is not."""

    def begin_task(self, ctx: Any) -> None:
        super().begin_task(ctx)
        first = next(iter(adapter_tensors(self).values()))
        first.register_hook(lambda gradient: gradient / 0 if ctx.step == 2 else gradient)


def steep(job: Job) -> Result:
    """What every rank raises on a gradient that is no number, where the loss is one."""
    return _outcome(job, lambda: job.train(job.method(_SteepGradient)))


def messages(job: Job) -> Result:
    """Ranks talking: sums, broadcasts, what rank 0 alone does."""
    ranks = job.ranks
    mine = torch.tensor([1.0, float(ranks.rank)])
    calls: list[int] = []

    def count() -> str:
        calls.append(ranks.rank)
        return f"from {ranks.rank}"

    def refuse() -> None:
        raise UserError("data.path: /nowhere: no such folder")

    def refuse_on_last() -> int:
        if ranks.rank == ranks.world - 1:
            raise UserError("output.dir: disk full")
        return ranks.rank

    said, done = ranks.on_first(count), ranks.together(lambda: ranks.rank)
    stop = StopRequest()
    ranks.check_stop(stop)
    outcome = {"last_refuses": _raised(lambda: ranks.together(refuse_on_last))}
    if ranks.rank == ranks.world - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    outcome["last_told"] = _raised(lambda: ranks.check_stop(stop))
    outcome["first_refuses"] = _raised(lambda: ranks.on_first(refuse))
    return outcome | {
        "done": done,
        "sum": ranks.all_sum(mine),
        "mine": mine,
        "broadcast": ranks.broadcast(torch.tensor([ranks.rank + 5])),
        "gathered": ranks.gather({"rank": ranks.rank}),
        "said": said,
        "calls": calls,
    }


def wrong_world(job: Job) -> Result:
    """What every rank raises where the ranks cannot share the micro-batches."""
    job.training = TRAINING.model_copy(update={"global_batch_size": 3, "micro_batch_size": 1})
    ctx, method = job.context(), job.method()
    return _outcome(job, lambda: job.start(ctx, method).close())


def _outcome(job: Job, action: Callable[[], Any]) -> Result:
    return job.result | {"raised": _raised(action)}


def _raised(action: Callable[[], Any]) -> list[str]:
    """Kind and message of what `action` raises; nothing where it raises nothing."""
    try:
        action()
    except (Stopped, UserError) as error:
        return [type(error).__name__, str(error)]
    return []


RUNS: dict[str, Callable[[Job], Result]] = {
    run.__name__: run
    for run in (
        train,
        access,
        penalty,
        float64,
        run_rows,
        disk_full,
        told_to_stop,
        not_finite,
        diverged,
        steep,
        messages,
        wrong_world,
        two_tasks,
        gorp_tasks,
        gorp_moments,
    )
}
