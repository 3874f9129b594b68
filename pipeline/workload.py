"""What a recipe asks for, read and encoded: backbone folder, tokenizer, tasks as token ids, steps per task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import PreTrainedTokenizerBase

from data_prep.batches import Example, encode_labels, encode_rows
from data_prep.errors import UserError
from data_prep.synthetic import ensure_folder
from data_prep.tasks import TaskData, load_tasks
from pipeline.adapter_kinds import adapter_kind, check_max_rank
from pipeline.adapters.base import AdapterKind
from pipeline.adapters.lora import LoraKind
from pipeline.checkpoints import backbone_folder, check_weights, fingerprint
from pipeline.loop import Step, plan_joint, plan_task
from pipeline.models import load_tokenizer, skeleton
from pipeline.recipe import SYNTHETIC, Recipe, Training

if TYPE_CHECKING:
    from pipeline.engine import Ranks

Value = TypeVar("Value")


JOINT_PLAN = "each epoch deals a share of every task"  # so that stages of another dealing are not taken for these


@dataclass(frozen=True)
class StreamTask:
    """One task of the stream, ready to train and to score."""

    index: int  # from 1; 0: outside the order
    data: TaskData
    train: list[Example]
    evaluation: list[Example]
    label_ids: list[tuple[int, ...]]
    training: Training
    joined: Sequence[StreamTask] = ()  # the tasks that are trained together as this one, itself among them

    @property
    def name(self) -> str:
        """The task's name."""
        return self.data.task.name

    def facts(self) -> dict[str, Any]:
        """What reports say of the task's data."""
        return {
            "family": self.data.task.family,
            "labels": list(self.data.task.labels),
            "train_rows": len(self.train),
            "evaluation_rows": len(self.evaluation),
            "train_fingerprint": self.data.fingerprints["train"],
            "evaluation_fingerprint": self.data.fingerprints["evaluation"],
            "dropped": {split: dict(counts) for split, counts in self.data.dropped.items()},
            "unmatchable": self.data.unmatchable,
            "truncated_train": sum(example.truncated for example in self.train),
            "truncated_evaluation": sum(example.truncated for example in self.evaluation),
        }


@dataclass(frozen=True)
class Workload:
    """A recipe with everything that it names, read."""

    recipe: Recipe
    model_folder: Path
    model_fingerprint: str  # hash of the backbone's files
    kind: AdapterKind
    targets: Sequence[str]  # layers whose weights change: those with a LoRA, and full-rank modules
    tokenizer: PreTrainedTokenizerBase
    tasks: list[StreamTask]  # the order
    unseen: list[StreamTask]  # outside the order, of index 0: scored, never trained

    def steps(self, task: StreamTask) -> list[Step]:
        """The task's optimizer steps."""
        recipe = self.recipe
        if task.joined:
            parts = [(part.train, part.training.epochs) for part in task.joined]
            return plan_joint(parts, recipe.training, recipe.batching, seed=recipe.seed, task_index=task.index)
        return plan_task(task.train, task.training, recipe.batching, seed=recipe.seed, task_index=task.index)

    @property
    def trained_tasks(self) -> list[StreamTask]:
        """The tasks as they are trained: the order, or all of it together in the last one's place."""
        if not self.recipe.method.joint:
            return self.tasks
        rows = [example for task in self.tasks for example in task.train]
        return [replace(self.tasks[-1], train=rows, training=self.recipe.training, joined=tuple(self.tasks))]

    def training_influences(self, task: StreamTask, method: Mapping[str, Any]) -> dict[str, Any]:
        """All that decides a task's trained weights beside the stage before it: the stage's address."""
        recipe = self.recipe
        training = task.training.model_dump(mode="json", exclude={"micro_batch_size", "per_task"})
        return {
            "backbone": self.model_fingerprint,
            **self._quantization(),
            "family": recipe.model.family,
            "rows": self._trained_rows(task),
            **self._prompt_influences(task),
            "adapter": recipe.adapter.model_dump(mode="json"),
            "training": training,
            "batching": recipe.batching.model_dump(mode="json"),
            "precision": recipe.engine.precision,
            "method": dict(method),
            "seed": recipe.seed,
            "index": task.index,
        }

    def _trained_rows(self, task: StreamTask) -> Any:
        """The fingerprint of a task's rows; of tasks trained together theirs, with names and epochs."""
        if not task.joined:
            return task.data.fingerprints["train"]
        parts = [
            [part.data.fingerprints["train"], part.name, part.data.task.family, part.training.epochs]
            for part in task.joined
        ]
        return [JOINT_PLAN, *parts]

    def cell_influences(self, task: StreamTask) -> dict[str, Any]:
        """All that decides a score beside the weights: a cell's address."""
        recipe = self.recipe
        return {
            "rows": task.data.fingerprints["evaluation"],
            **self._quantization(),
            **self._prompt_influences(task),
            "decoding": [recipe.evaluation.decoding, recipe.evaluation.max_new_tokens],
            "label_scoring": recipe.evaluation.label_scoring,
        }

    def _quantization(self) -> dict[str, Any]:
        chosen = self.recipe.model.quantization
        return {} if chosen is None else {"quantization": chosen}

    def _prompt_influences(self, task: StreamTask) -> dict[str, Any]:
        data = self.recipe.data
        return {
            "prompt": [data.max_source_tokens, data.truncation, data.add_task_name, data.add_dataset_name],
            "names": [task.name, task.data.task.family],
        }


class Alone:
    """The group of ranks of a process that is the only one: what `--plan` and `data_prep` run on."""

    def on_first(self, action: Callable[[], Value]) -> Value:
        """Run `action`."""
        return action()

    def together(self, action: Callable[[], Value]) -> Value:
        """Run `action`."""
        return action()


def load_workload(recipe: Recipe, ranks: Ranks | Alone) -> Workload:
    """Read, encode and check what `recipe` names. What makes files on first use runs on one rank alone.

    Raises `UserError`, on all ranks, before anything of a run is written.
    """
    if recipe.data.path == SYNTHETIC:
        ranks.on_first(ensure_folder)
    folder = ranks.on_first(lambda: backbone_folder(recipe.model))
    model_fingerprint = ranks.on_first(lambda: fingerprint(folder))
    return ranks.together(lambda: _read(recipe, folder, model_fingerprint))


def _read(recipe: Recipe, folder: Path, model_fingerprint: str) -> Workload:
    family = recipe.model.family
    model = skeleton(folder, family)
    kind = adapter_kind(recipe.adapter, model, family, recipe.method)
    targets: Sequence[str] = kind.layers if isinstance(kind, LoraKind) else []
    check_weights(folder, targets)
    check_max_rank(recipe.method, kind, model)
    tokenizer = load_tokenizer(folder, family)
    split = recipe.evaluation.split
    order = recipe.task_names
    tasks = load_tasks(recipe.data, [*order, *recipe.evaluation.unseen], split=split, seed=recipe.seed)
    workload = Workload(
        recipe=recipe,
        model_folder=folder,
        model_fingerprint=model_fingerprint,
        kind=kind,
        targets=targets,
        tokenizer=tokenizer,
        tasks=[_encoded(recipe, index, data, tokenizer) for index, data in enumerate(tasks[: len(order)], start=1)],
        unseen=[_encoded(recipe, 0, data, tokenizer) for data in tasks[len(order) :]],
    )
    for task in workload.trained_tasks:
        steps, warmup = len(workload.steps(task)), task.training.warmup_steps
        if warmup and warmup >= steps:
            raise UserError(
                f"training.warmup_steps: {warmup} steps of warm-up, but task {task.name} has {steps} steps in all and "
                "would never reach its learning rate; choose fewer"
            )
        seeds = getattr(recipe.method, "seed_samples", 0)
        if seeds > len(task.train):
            raise UserError(
                f"method.seed_samples: {seeds}, but task {task.name} has {len(task.train)} training rows; choose fewer"
            )
    return workload


def _encoded(recipe: Recipe, index: int, data: TaskData, tokenizer: PreTrainedTokenizerBase) -> StreamTask:
    family, settings = recipe.model.family, recipe.data
    if not data.train or not data.evaluation:
        raise UserError(f"task {data.task.name}: no rows are left to {'score' if data.train else 'train on'}")
    return StreamTask(
        index=index,
        data=data,
        train=encode_rows(data.task, data.train, tokenizer, family=family, data=settings),
        evaluation=encode_rows(data.task, data.evaluation, tokenizer, family=family, data=settings),
        label_ids=encode_labels(data.task, tokenizer, family=family),
        training=recipe.training.for_task(data.task.name),
    )
