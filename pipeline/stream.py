"""The stream: for each task, take its stage or train it, then score every task that the recipe asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

from torch import Tensor, nn

from data_prep.errors import UserError
from eval.accuracy import cells_for
from eval.run_files import UNTRAINED, stage_names
from pipeline.cells import CellBook
from pipeline.checkpoints import Checkpoint
from pipeline.context import Context
from pipeline.engine import Ranks, TaskEngine
from pipeline.label_loss import LabelLoss
from pipeline.loop import TaskSummary, train_task
from pipeline.methods import METHODS, Method
from pipeline.models import prepare_for_scoring, prepare_for_training
from pipeline.projection.features import FeaturesNotFinite
from pipeline.retention import RetentionBook
from pipeline.run_folder import RunFolder
from pipeline.runlog import RunLog
from pipeline.stages import Stage, StageStore, learnt_key, stage_key
from pipeline.stopping import StopRequest
from pipeline.task_costs import TaskCosts
from pipeline.weights import Weights
from pipeline.workload import StreamTask, Workload

Value = TypeVar("Value")


class Stream:
    """One run of a stream on this rank."""

    def __init__(
        self,
        workload: Workload,
        ranks: Ranks,
        folder: RunFolder,
        log: RunLog,
        stop: StopRequest,
        facts: dict[str, Any],
        retention: RetentionBook,
        *,
        share: bool,
    ) -> None:
        recipe = workload.recipe
        self.recipe, self.workload, self.ranks, self.folder = recipe, workload, ranks, folder
        self.log, self.stop, self.share = log, stop, share
        self.stages = StageStore(folder.path / "stages")
        self.retention = retention
        self.cells = CellBook(folder.path, workload, ranks, log, stop)
        self.weights = Weights(workload, ranks.device)
        self.method: Method[Any] = METHODS[recipe.method.name](
            recipe.method, workload.kind, task_count=len(workload.tasks)
        )
        self.names = stage_names([task.name for task in workload.tasks])
        self.plan = cells_for(recipe.evaluation.cells, len(workload.tasks))
        self.origin = {"versions": facts["versions"], "git": facts["git"]}
        # A run that only goes on to report keeps saying by which code its stages were trained.
        old = ranks.on_first(folder.read_facts)
        kept = ("timing", "trainable_parameters", "versions", "git")
        self.facts = facts | {key: old[key] for key in kept if key in old}
        for beside in ("references", "retention"):
            self.facts[beside] = facts[beside] or old.get(beside, facts[beside])
        ranks.on_first(self._write_facts)

    def close(self) -> None:
        """Give the folder back."""
        if self.ranks.first:
            self.folder.close()

    def run(self) -> None:
        """Every stage and cell that is missing."""
        self.ranks.on_first(self.stages.clean)
        untrained = stage_key(None, {"untrained": self.workload.model_fingerprint})
        self._score(UNTRAINED, untrained, [*self.workload.tasks, *self.workload.unseen])
        key: str | None = None
        for task in self.workload.trained_tasks:
            key = self._key(key, task)
            self._take_or_train(task, key)
            self._score(self.names[task.index], key, self._planned(task))

    def score_again(self, *, missing_only: bool = False) -> None:
        """Every cell of every stage that is there; or those that are missing."""
        untrained = stage_key(None, {"untrained": self.workload.model_fingerprint})
        self._score(UNTRAINED, untrained, [*self.workload.tasks, *self.workload.unseen], again=not missing_only)
        key: str | None = None
        for task in self.workload.trained_tasks:
            key = self._key(key, task)
            if not self._take(task, key):
                self.log.say(f"task {task.index} {task.name}: no stage yet; run the recipe to train it")
                return
            self._score(self.names[task.index], key, self._planned(task), again=not missing_only)

    def _planned(self, task: StreamTask) -> list[StreamTask]:
        """What is scored after `task`."""
        return [*(self.workload.tasks[i] for i in self.plan[task.index - 1]), *self.workload.unseen]

    def _key(self, previous: str | None, task: StreamTask) -> str:
        influences = self.workload.training_influences(task, self.method.influences(task.index))
        return stage_key(previous, influences)

    def _take_or_train(self, task: StreamTask, key: str) -> None:
        if self._take(task, key):
            self.log.say(f"task {task.index} {task.name}: taken from its stage")
            return
        self.ranks.check_stop(self.stop)
        self.ranks.on_first(lambda: self.log.truncate_after(task.index))
        self.method.load_trained(task.index, self._train(task, key))

    def _take(self, task: StreamTask, key: str) -> bool:
        """Give the method what the task's stage holds; False where there is none."""
        saved = self.ranks.on_first(lambda: self._read_stage(task, key))
        if saved is None:
            return False
        tensors, method_tensors, method_values = saved
        self.method.load_state_dict(method_tensors, method_values)
        self.method.load_trained(task.index, tensors)
        self._note_leaks()
        self.ranks.on_first(self._write_facts)
        return True

    def _read_stage(self, task: StreamTask, key: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Any] | None:
        stage = self.stages.find(task.index, key) or self._shared_stage(task, key)
        return None if stage is None else (stage.load_trained(), *stage.load_method(self.recipe.method.name))

    def _shared_stage(self, task: StreamTask, key: str) -> Stage | None:
        """A sibling run's stage of the same address, when sharing: equal keys are equal training."""
        if not self.share:
            return None
        for other in sorted(self.folder.path.parent.glob("*/stages")):
            stage = self.stages.adopt(other, task.index, key, self.recipe.method.name, self.method.memory_influences())
            if stage is not None:
                self.log.say(f"task {task.index} {task.name}: the same as in {other.parent}, taken over")
                return stage
        return None

    def _train(self, task: StreamTask, key: str) -> dict[str, Tensor]:
        """Train one task and publish its stage; returns its trained tensors."""
        recipe, method, costs = self.recipe, self.method, TaskCosts(self.ranks.peak_memory)
        ctx = self._context(task)
        prepare_for_training(ctx.model, gradient_checkpointing=recipe.engine.gradient_checkpointing)
        self._told(task, lambda: method.begin_task(ctx))
        engine = self._start_engine(ctx, task)
        summary = TaskSummary(steps=0, last_loss=math.nan)
        if engine is None:
            self.log.say(f"task {task.index} {task.name}: no direction is left to learn in; nothing is trained")
        else:
            method.engine_started(ctx)
            costs.lap("method")
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
        costs.lap("train")
        tensors = self._told(task, lambda: method.end_task(ctx))
        if engine is not None:
            engine.close()
        self._refuse_not_finite(task, tensors)
        costs.lap("method")
        self.ranks.on_first(lambda: self._publish(task, key, tensors))
        self._note_leaks()
        costs.lap("save")
        self.facts["timing"][task.name] = costs.seconds
        self.facts |= self.origin

        def tell() -> None:
            self._write_facts()
            for record in method.records():
                self.log.event("subspace", task_index=task.index, task=task.name, **record)
            peaks = {"peak_bytes": max(costs.peak_bytes.values()), "peak_bytes_by_part": costs.peak_bytes}
            done = {"steps": summary.steps, "last_loss": summary.last_loss, **peaks, **costs.seconds}
            self.log.event("task", task_index=task.index, task=task.name, **done)

        self.ranks.on_first(tell)
        return tensors

    def _told(self, task: StreamTask, action: Callable[[], Value]) -> Value:
        """What `action` gives. `UserError` where what the method measures on rows is not finite."""
        try:
            return action()
        except FeaturesNotFinite as error:
            source = task if error.task_index is None else self.workload.tasks[error.task_index - 1]
            rows = [source.train[row].row_id for row in error.rows]
            raise UserError(
                f"task {task.name}: the features or gradients of {error.layer} are not finite in {source.name}'s rows "
                f"{', '.join(map(str, rows[:10]))}{' and more' if len(rows) > 10 else ''}; nothing of this task was "
                f"saved. Try a lower training.learning_rate (now {task.training.learning_rate:g}), or precision fp32"
            ) from error

    def _note_leaks(self) -> None:
        """What `results.json` says of the leaks; nothing where the method protects nothing, or nothing yet."""
        found = self.method.leaks()
        per_task: dict[str, dict[str, Any]] = {
            self.workload.tasks[index - 1].name: {"max": max(layers.values()), "per_layer": layers}
            for index, layers in found.items()
        }
        worst = max((max(layers.values()) for layers in found.values()), default=None)
        self.facts["leak"] = None if worst is None else {"max": worst, "per_task": per_task}

    def _context(self, task: StreamTask) -> Context:
        return Context(
            self.weights.give_away(self.method.frozen(), self.method.matrices()),
            ranks=self.ranks,
            family=self.recipe.model.family,
            pad_id=int(self.workload.tokenizer.pad_token_id),
            targets=self.workload.targets,
            task_index=task.index,
            examples=task.train,
            micro_batch_size=task.training.micro_batch_size,
            seed=self.recipe.seed,
            steps=self.workload.steps(task),
            checkpoint=Checkpoint(self.workload.model_folder),
            earlier=[earlier.train for earlier in self.workload.tasks[: task.index - 1]],
            running=self.weights.running,
        )

    def _start_engine(self, ctx: Context, task: StreamTask) -> TaskEngine | None:
        """Hand the model with its adapter to DeepSpeed; None where nothing in it is to be trained."""
        recipe = self.recipe
        trained = [parameter for parameter in ctx.model.parameters() if parameter.requires_grad]
        count = sum(parameter.numel() for parameter in trained)
        # The most of any task: the complement form and closed layers train less.
        self.facts["trainable_parameters"] = max(count, self.facts.get("trainable_parameters") or 0)
        if not trained:
            return None
        if recipe.engine.zero == 3 and not recipe.weights_on_host:
            ctx.model.to("cpu")  # DeepSpeed moves it back whole and scatters it: no second copy meanwhile
        module = LabelLoss(ctx.model, recipe.model.family)
        engine = TaskEngine(module, recipe.engine, task.training, self.ranks, self.method.groups())
        ctx.started(engine)
        return engine

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
            method_influences=self.method.memory_influences(),
            info=info,
        )
        self.log.event("save", task_index=task.index, task=task.name, stage=stage.path.name)

    def _score(self, after: str, key: str, tasks: Sequence[StreamTask], *, again: bool = False) -> None:
        """Score the tasks whose cells are missing (or all, `again`), and what is to be retained."""
        missing = [task for task in tasks if again or not self.cells.exists(after, key, task)]
        retained = self.retention.missing(after, key, again=again)
        if not missing and not retained:
            return
        trained, costs = after != UNTRAINED, TaskCosts(self.ranks.peak_memory)
        model = self._merged() if trained else self.weights.model({})
        prepare_for_scoring(model)
        learnt = self._learnt(trained)
        with self.method.equipped(model) if trained else nullcontext(), self.weights.running(model):
            for task in missing:
                self.ranks.check_stop(self.stop)
                self.method.begin_evaluation(task.name, task.index or None)
                if trained and self.method.weights_by_task:
                    self._merged()  # in place
                    learnt = self._learnt(trained)
                if again or not self.cells.take_over(after, key, task, learnt):
                    self.cells.score(model, after, key, task, learnt)
            if retained:
                self._score_retained(model, after, key, retained)
        costs.lap("evaluate")
        name = self.workload.tasks[self.names.index(after) - 1].name if trained else UNTRAINED
        timing = self.facts["timing"].setdefault(name, {})
        timing["evaluate_s"] = round(timing.get("evaluate_s", 0.0) + costs.seconds["evaluate_s"], 3)

        def tell() -> None:
            self._write_facts()
            peak = {"part": "evaluate", "peak_bytes": costs.peak_bytes["evaluate"]}
            self.log.event("memory", task_index=self.names.index(after), task=name, **peak)

        self.ranks.on_first(tell)

    def _score_retained(self, model: nn.Module, after: str, key: str, names: Sequence[str]) -> None:
        """In the newest task's model, where each has its own."""
        if after != UNTRAINED:
            newest = self.workload.tasks[self.names.index(after) - 1]
            self.method.begin_evaluation(newest.name, newest.index)
            if self.method.weights_by_task:
                self._merged()  # in place
        self.retention.score(model, after, key, names, self.log, self.stop)

    def _learnt(self, trained: bool) -> str:
        """The address of what stands in the model beside its checkpoint, now."""
        method = self.method
        return (
            learnt_key(method.active(), method.matrices(), method.beside_weights())
            if trained
            else learnt_key({}, {}, {})
        )

    def _merged(self) -> nn.Module:
        """The one clean copy of the backbone, with what has been learnt in its weights."""
        return self.weights.model(self.method.active(), self.method.matrices())

    def _write_facts(self) -> None:
        self.folder.write_facts(self.facts)
