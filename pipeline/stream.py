"""The stream: for each task, take its stage or train it, then score every task that the recipe asks for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from eval.accuracy import cells_for
from eval.report import write_results
from eval.run_files import UNTRAINED, read_run, stage_names
from eval.summary import format_summary
from pipeline.adapters.lora import Factors
from pipeline.cells import CellBook
from pipeline.context import Context
from pipeline.engine import Ranks, TaskEngine, deepspeed_config
from pipeline.loop import train_task
from pipeline.methods import METHODS, Method
from pipeline.models import LabelLoss, load_backbone, merge, prepare_for_training, target_modules
from pipeline.recipe import Recipe
from pipeline.run_folder import RunFolder, run_facts, this_process
from pipeline.runlog import RunLog
from pipeline.stages import Stage, StageStore, stage_key
from pipeline.stopping import StopRequest
from pipeline.workload import StreamTask, Workload, load_workload


def run(recipe: Recipe, stop: StopRequest, *, share: bool = False) -> dict[str, Any]:
    """Learn the stream, score it, report it; returns the results. Goes on where an earlier run stopped.

    `share`: take over stages of equal address from the runs beside this one, instead of training them again.
    """
    ranks = Ranks.start()
    deepspeed_config(recipe.engine, recipe.training, ranks.world)  # a wrong world size fails here, early
    workload = load_workload(recipe, ranks.on_first)
    folder = RunFolder(recipe.run_dir)
    resumed = ranks.on_first(lambda: folder.open(recipe))
    facts = run_facts(workload)
    ranks.on_first(lambda: folder.check_data(facts))
    processes = ranks.gather(this_process())
    ranks.on_first(lambda: folder.write_pids(processes))
    log = RunLog(folder.path / "metrics.jsonl" if ranks.first else None, console=ranks.first)
    log.say(f"{'going on with' if resumed else 'starting'} {folder.path} on {ranks.world} rank(s), {ranks.device}")
    try:
        _Stream(recipe, workload, ranks, folder, log, stop, facts, share=share).run()
        results = ranks.on_first(lambda: write_results(folder.path))
    finally:
        if ranks.first:
            folder.remove_pids()
    log.say(format_summary(results))
    log.say(f"report: {folder.path / 'report.md'}")
    ranks.barrier()
    return results


def rescore(run_dir: Path) -> None:
    """Score every stage of a finished or unfinished run again, with its own recipe."""
    read_run(run_dir)  # a folder that is no run is named as such
    recipe = Recipe.load(run_dir.resolve() / "recipe.yaml", [f"output.dir={run_dir.resolve()}"])
    ranks = Ranks.start()
    workload = load_workload(recipe, ranks.on_first)
    folder = RunFolder(recipe.run_dir)
    facts = run_facts(workload)
    folder.check_data(facts)
    log = RunLog(folder.path / "metrics.jsonl", console=True)
    _Stream(recipe, workload, ranks, folder, log, StopRequest(), facts).score_again()


@dataclass
class _Weights:
    """The one clean copy of the backbone: what a training engine gets is given away and loaded anew."""

    workload: Workload
    device: torch.device
    _model: nn.Module | None = None

    def __post_init__(self) -> None:
        recipe = self.workload.recipe
        self._dtype = torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32
        self.targets: list[str] = []

    def model(self, updates: Mapping[str, Sequence[Factors]]) -> nn.Module:
        """The backbone with `updates` merged, in evaluation mode, on the device."""
        recipe, folder = self.workload.recipe, self.workload.model_folder
        if self._model is None:
            model = load_backbone(folder, recipe.model.family, dtype=self._dtype)
            self.targets = target_modules(model, recipe.model.family, recipe.adapter.target_modules)
            self._model = model.to(self.device)
        merge(self._model, folder, self.targets, updates)
        return self._model.eval()

    def give_away(self, updates: Mapping[str, Sequence[Factors]]) -> nn.Module:
        """The same, for an engine that changes the model beyond repair."""
        model = self.model(updates)
        self._model = None
        return model


class _Stream:
    """One run of a stream on this rank."""

    def __init__(
        self,
        recipe: Recipe,
        workload: Workload,
        ranks: Ranks,
        folder: RunFolder,
        log: RunLog,
        stop: StopRequest,
        facts: dict[str, Any],
        *,
        share: bool = False,
    ) -> None:
        self.share = share
        self.recipe, self.workload, self.ranks, self.folder = recipe, workload, ranks, folder
        self.log, self.stop, self.facts = log, stop, facts
        self.stages = StageStore(folder.path / "stages")
        self.cells = CellBook(folder.path, workload, ranks, log, stop)
        self.weights = _Weights(workload, ranks.device)
        self.method: Method[Any] = METHODS[recipe.method.name](recipe.method, recipe.adapter)
        self.names = stage_names([task.name for task in workload.tasks])
        self.plan = cells_for(recipe.evaluation.cells, len(workload.tasks))
        old = ranks.on_first(folder.read_facts)
        facts["timing"] = old.get("timing", {})
        facts["trainable_parameters"] = old.get("trainable_parameters")
        ranks.on_first(self._write_facts)

    def run(self) -> None:
        """Every stage and cell that is missing."""
        self.ranks.on_first(self.stages.clean)
        untrained = stage_key(None, {"untrained": self.workload.model_fingerprint})
        self._score(UNTRAINED, untrained, self.workload.tasks)
        key: str | None = None
        for task in self.workload.tasks:
            key = self._key(key, task)
            self._take_or_train(task, key)
            self._score(self.names[task.index], key, [self.workload.tasks[i] for i in self.plan[task.index - 1]])

    def score_again(self) -> None:
        """Every cell of every stage that is there."""
        untrained = stage_key(None, {"untrained": self.workload.model_fingerprint})
        self._score(UNTRAINED, untrained, self.workload.tasks, again=True)
        key: str | None = None
        for task in self.workload.tasks:
            key = self._key(key, task)
            stage = self.stages.find(task.index, key)
            if stage is None:
                return
            self.method.load_trained(task.index, stage.load_trained())
            planned = [self.workload.tasks[i] for i in self.plan[task.index - 1]]
            self._score(self.names[task.index], key, planned, again=True)

    def _key(self, previous: str | None, task: StreamTask) -> str:
        influences = self.workload.training_influences(task, self.method.influences(task.index))
        return stage_key(previous, influences)

    def _take_or_train(self, task: StreamTask, key: str) -> None:
        saved = self.ranks.on_first(lambda: self._read_stage(task, key))
        if saved is None:
            self.ranks.on_first(lambda: self.log.truncate_after(task.index))
            tensors = self._train(task, key)
        else:
            tensors, method_tensors, method_values = saved
            self.method.load_state_dict(method_tensors, method_values)
            self.log.say(f"task {task.index} {task.name}: taken from its stage")
        self.method.load_trained(task.index, tensors)

    def _read_stage(self, task: StreamTask, key: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Any] | None:
        stage = self.stages.find(task.index, key) or self._shared_stage(task, key)
        return None if stage is None else (stage.load_trained(), *stage.load_method(self.recipe.method.name))

    def _shared_stage(self, task: StreamTask, key: str) -> Stage | None:
        """A sibling run's stage of the same address, when sharing: equal keys are equal training."""
        if not self.share:
            return None
        for other in sorted(self.folder.path.parent.glob("*/stages")):
            stage = self.stages.adopt(other, task.index, key, self.recipe.method.name)
            if stage is not None:
                self.log.say(f"task {task.index} {task.name}: the same as in {other.parent}, taken over")
                return stage
        return None

    def _train(self, task: StreamTask, key: str) -> dict[str, Tensor]:
        """Train one task and publish its stage."""
        recipe, method = self.recipe, self.method
        clock = _Clock()
        model = self.weights.give_away(method.frozen())
        ctx = Context(
            model,
            ranks=self.ranks,
            family=recipe.model.family,
            pad_id=int(self.workload.tokenizer.pad_token_id),
            targets=self.weights.targets,
            task_index=task.index,
            examples=task.train,
            micro_batch_size=task.training.micro_batch_size,
            seed=recipe.seed,
        )
        method.begin_task(ctx)
        prepare_for_training(model, gradient_checkpointing=recipe.engine.gradient_checkpointing)
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        engine = TaskEngine(LabelLoss(model, recipe.model.family), recipe.engine, task.training, self.ranks)
        ctx.started(engine)
        clock.lap("method_s")
        summary = train_task(
            ctx,
            method,
            self.workload.steps(task),
            task.training,
            name=task.name,
            examples=task.train,
            seed=recipe.seed,
            log=self.log,
            stop=self.stop,
        )
        clock.lap("train_s")
        tensors = method.end_task(ctx)
        engine.close()
        self._refuse_not_finite(task, tensors)
        clock.lap("method_s")
        self.ranks.on_first(lambda: self._publish(task, key, tensors))
        clock.lap("save_s")
        self.facts["timing"][task.name] = clock.seconds
        self.facts["trainable_parameters"] = trainable
        self.ranks.on_first(self._write_facts)
        self.log.event(
            "task",
            task_index=task.index,
            task=task.name,
            steps=summary.steps,
            last_loss=summary.last_loss,
            trainable_parameters=trainable,
            **clock.seconds,
        )
        return tensors

    def _refuse_not_finite(self, task: StreamTask, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise UserError(
                    f"task {task.name}: training diverged, {name} holds values that are not finite; nothing of this "
                    f"task was saved. Try a lower training.learning_rate (now {task.training.learning_rate:g})"
                )

    def _publish(self, task: StreamTask, key: str, tensors: Mapping[str, Tensor]) -> None:
        method_tensors, method_values = self.method.state_dict()
        recipe = self.recipe
        info = {
            "recipe": recipe.model_dump(mode="json"),
            "data": self.facts["data"][task.name],
            "model_fingerprint": self.workload.model_fingerprint,
            # Every random number is drawn from a seed derived from these; no generator's state outlives a task.
            "rng": {"seed": recipe.seed, "task_index": task.index},
            "versions": self.facts["versions"],
        }
        stage = self.stages.publish(
            task.index,
            task.name,
            key,
            trained=tensors,
            method_name=recipe.method.name,
            method_tensors=method_tensors,
            method_state=method_values,
            info=info,
        )
        self.log.event("save", task_index=task.index, task=task.name, stage=stage.path.name)

    def _score(self, after: str, key: str, tasks: Sequence[StreamTask], *, again: bool = False) -> None:
        """Score the tasks whose cells are missing (or all, `again`)."""
        start = time.monotonic()
        missing = [task for task in tasks if again or not self.cells.exists(after, key, task)]
        if not missing:
            return
        model = self.weights.model({} if after == UNTRAINED else self.method.active())
        for task in missing:
            self.stop.check()
            self.method.begin_evaluation(task.name)
            self.cells.score(model, after, key, task)
        timing = self.facts["timing"].setdefault(after if after == UNTRAINED else after[3:], {})
        timing["evaluate_s"] = round(timing.get("evaluate_s", 0.0) + time.monotonic() - start, 3)
        self.ranks.on_first(self._write_facts)

    def _write_facts(self) -> None:
        self.folder.write_facts(self.facts)


class _Clock:
    """Seconds by part of a task."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def lap(self, part: str) -> None:
        """Count the time since the last lap as `part`."""
        now = time.monotonic()
        self.seconds[part] = round(self.seconds.get(part, 0.0) + now - self._last, 3)
        self._last = now
