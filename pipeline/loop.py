"""The training loop of one task: micro-batches, the loss over the global batch's label tokens, optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_prep.batches import PADDING_ROW, Example, count_label_tokens, plan_steps
from data_prep.errors import UserError
from pipeline.context import Context
from pipeline.methods import Method
from pipeline.recipe import Batching, Training
from pipeline.runlog import Progress, RunLog
from pipeline.seeds import derive_seed, generator
from pipeline.stopping import Stopped, StopRequest

Step = list[list[int]]  # micro-batches of row positions


@dataclass(frozen=True)
class TaskSummary:
    """What a trained task's log line says."""

    steps: int
    last_loss: float


def plan_task(
    examples: Sequence[Example], training: Training, batching: Batching, *, seed: int, task_index: int
) -> list[Step]:
    """All optimizer steps of a task: its epochs one after another, at most `max_steps`."""
    lengths = [len(example.input_ids) + len(example.label_ids) for example in examples]
    steps: list[Step] = []
    for epoch in range(training.epochs):
        steps += _plan_epoch(lengths, training, batching, seed=seed, task_index=task_index, epoch=epoch)
        if training.max_steps is not None and len(steps) >= training.max_steps:
            return steps[: training.max_steps]
    return steps


def plan_joint(
    parts: Sequence[tuple[Sequence[Example], int]],
    training: Training,
    batching: Batching,
    *,
    seed: int,
    task_index: int,
) -> list[Step]:
    """Steps over the rows of several tasks, each with its epochs; positions count through the rows of all.

    There are as many joint epochs as the most of any task has, and each deals an equal share of every task's passes:
    were tasks of few epochs dealt in the first ones alone, the last ones would train them away.
    """
    starts = [sum(len(rows) for rows, _ in parts[:index]) for index in range(len(parts))]
    lengths = [len(example.input_ids) + len(example.label_ids) for rows, _ in parts for example in rows]
    passes = [
        [start + row for turn in range(epochs) for row in _shuffled(len(rows), seed, task_index, part, turn)]
        for part, ((rows, epochs), start) in enumerate(zip(parts, starts, strict=True))
    ]
    steps: list[Step] = []
    count = max(epochs for _, epochs in parts)
    for epoch in range(count):
        dealt = [row for rows in passes for row in rows[len(rows) * epoch // count : len(rows) * (epoch + 1) // count]]
        of_epoch = [lengths[position] for position in dealt]
        planned = _plan_epoch(of_epoch, training, batching, seed=seed, task_index=task_index, epoch=epoch)
        steps += [[[row if row == PADDING_ROW else dealt[row] for row in part] for part in step] for step in planned]
    return steps


def _shuffled(count: int, seed: int, task_index: int, part: int, turn: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=generator(seed, "joint", task_index, part, turn)).tolist()
    return order


def _plan_epoch(
    lengths: Sequence[int], training: Training, batching: Batching, *, seed: int, task_index: int, epoch: int
) -> list[Step]:
    return plan_steps(
        lengths,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        order=batching.order,
        seed=seed,
        task_index=task_index,
        epoch=epoch,
    )


def learning_rate(training: Training, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then constant or half a cosine."""
    if step < training.warmup_steps:
        return training.learning_rate * ((step + 1) / training.warmup_steps)
    if training.schedule == "constant":
        return training.learning_rate
    progress = (step - training.warmup_steps) / max(1, steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train_task(
    ctx: Context,
    method: Method[Any],
    steps: Sequence[Step],
    training: Training,
    *,
    name: str,
    examples: Sequence[Example],
    seed: int,
    log: RunLog,
    stop: StopRequest,
) -> TaskSummary:
    """Run the task's optimizer steps. Raises `Stopped` when told to stop, `UserError` on a non-finite loss."""
    watch = _Watch(ctx, name, examples, log, stop)
    with log.progress(f"task {ctx.task_index} {name}", len(steps)) as progress:
        for number, micro_batches in enumerate(steps):
            rate = learning_rate(training, number, len(steps))
            report = _step(ctx, method, micro_batches, rate, seed=seed, examples=examples)
            watch.submit(report, micro_batches, rate, progress)
        watch.finish(progress)
    return TaskSummary(steps=len(steps), last_loss=watch.last_loss)


def _step(
    ctx: Context,
    method: Method[Any],
    micro_batches: Step,
    rate: float,
    *,
    seed: int,
    examples: Sequence[Example],
) -> Tensor:
    """One optimizer step; returns this rank's summed loss per micro-batch, zero for those of other ranks.

    Each micro-batch's loss is the sum over its label tokens, scaled so that after DeepSpeed's division by this
    rank's micro-batches and its average over ranks the global batch's mean per label token is what remains.
    """
    engine, ranks = ctx.engine, ctx.ranks
    tokens = _label_tokens(micro_batches, examples)
    report = torch.zeros(len(micro_batches), device=ranks.device)
    mine = range(ranks.rank, len(micro_batches), ranks.world)
    for index in mine:
        # Dropout depends on the micro-batch, not on the rank that runs it.
        torch.manual_seed(derive_seed(seed, "dropout", ctx.task_index, ctx.step, index))
        summed = engine.forward(ctx.collate(micro_batches[index]))
        report[index] = summed.detach()
        loss = summed * (len(micro_batches) / tokens)
        last = index == mine[-1]
        if last and (penalty := method.penalty(ctx)) is not None:
            loss = loss + penalty * len(mine)  # once per step, whatever the accumulation
        engine.backward(loss)
        if last:
            method.before_step(ctx)
        engine.step(rate)
    ctx.step += 1
    method.after_step(ctx)
    return report


def _label_tokens(micro_batches: Step, examples: Sequence[Example]) -> int:
    rows = (row for micro_batch in micro_batches for row in micro_batch if row != PADDING_ROW)
    return count_label_tokens(examples[row] for row in rows)


@dataclass
class _Pending:
    """A step whose losses are on their way from the device."""

    losses: Tensor  # [micro-batches + 2]: summed losses, then how many ranks were told to stop, could not write
    micro_batches: Step
    rate: float
    gradient_norm: Tensor | float | None
    step: int


class _Watch:
    """Looks at each step's losses one step later, so that the device is never waited for.

    All ranks see the same numbers and so stop together.
    """

    def __init__(self, ctx: Context, name: str, examples: Sequence[Example], log: RunLog, stop: StopRequest) -> None:
        self._ctx, self._name, self._examples, self._log, self._stop = ctx, name, examples, log, stop
        self._pending: _Pending | None = None
        self._unwritten: UserError | None = None  # what kept rank 0 from writing its log
        self.last_loss = math.nan

    def submit(self, losses: Tensor, micro_batches: Step, rate: float, progress: Progress) -> None:
        """Take a step's losses; look at those of the step before."""
        flags = losses.new_tensor([self._stop.reason() is not None, self._unwritten is not None])
        summed = self._ctx.ranks.all_sum(torch.cat([losses, flags]))
        previous = self._pending
        self._pending = _Pending(summed, micro_batches, rate, self._ctx.engine.gradient_norm, self._ctx.step)
        self._look(previous, progress)

    def finish(self, progress: Progress) -> None:
        """Look at the last step's losses; a task that is through is kept, so nobody is stopped here any more."""
        self._look(self._pending, progress, last=True)
        self._ctx.ranks.together(self._raise_unwritten)

    def _look(self, step: _Pending | None, progress: Progress, *, last: bool = False) -> None:
        if step is None:
            return
        *losses, told, unwritten = step.losses.tolist()
        if unwritten:
            self._ctx.ranks.together(self._raise_unwritten)
        if not math.isfinite(sum(losses)):
            raise UserError(self._not_finite(step, losses))
        if step.gradient_norm is not None and not math.isfinite(float(step.gradient_norm)):
            # DeepSpeed would leave out this step, and every later one like it, with a warning alone.
            raise UserError(self._refusal(step, "the gradient is not finite, in a step"))
        rows = [row for micro_batch in step.micro_batches for row in micro_batch if row != PADDING_ROW]
        self.last_loss = sum(losses) / _label_tokens(step.micro_batches, self._examples)
        tokens = sum(len(self._examples[row].input_ids) + len(self._examples[row].label_ids) for row in rows)
        progress.advance(loss=self.last_loss, tokens=tokens)
        self._tell(step, len(rows), tokens)
        if told and not last:
            raise Stopped(self._stop.reason() or "another rank was told to stop")

    def _tell(self, step: _Pending, rows: int, tokens: int) -> None:
        try:
            self._log.event(
                "step",
                task_index=self._ctx.task_index,
                task=self._name,
                step=step.step,
                loss=self.last_loss,
                learning_rate=step.rate,
                gradient_norm=step.gradient_norm,
                rows=rows,
                tokens=tokens,
            )
        except UserError as error:  # a full disk, met by rank 0 alone: all ranks are told with the next step's losses
            self._unwritten = error

    def _raise_unwritten(self) -> None:
        if self._unwritten is not None:
            raise self._unwritten

    def _not_finite(self, step: _Pending, losses: Sequence[float]) -> str:
        pairs = zip(step.micro_batches, losses, strict=True)
        bad = [micro_batch for micro_batch, loss in pairs if not math.isfinite(loss)]
        return self._refusal(step, "the loss is not finite, in the micro-batch", bad)

    def _refusal(self, step: _Pending, what: str, micro_batches: Step | None = None) -> str:
        chosen = step.micro_batches if micro_batches is None else micro_batches
        rows = [self._examples[row].row_id for micro_batch in chosen for row in micro_batch if row != PADDING_ROW]
        return (
            f"task {self._name}, step {step.step}: {what} of training rows "
            f"{', '.join(map(str, rows))}; nothing of this task was saved. Try a lower training.learning_rate "
            f"(now {step.rate:g}), training.gradient_clipping=1.0, warm-up steps, or precision fp32 instead of bf16"
        )
