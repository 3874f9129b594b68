"""What a recipe asks for, read and encoded: backbone folder, tokenizer, tasks as token ids, steps per task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from data_prep.batches import Example, encode_labels, encode_rows
from data_prep.errors import UserError
from data_prep.synthetic import ensure_folder
from data_prep.tasks import Task, TaskData, load_tasks
from eval.scoring import normalise
from pipeline.loop import Step, plan_task
from pipeline.models import backbone_folder, fingerprint, load_tokenizer
from pipeline.recipe import SYNTHETIC, Recipe, Training

Value = TypeVar("Value")


@dataclass(frozen=True)
class StreamTask:
    """One task of the stream, ready to train and to score."""

    index: int  # from 1
    data: TaskData
    train: list[Example]
    evaluation: list[Example]
    label_ids: list[tuple[int, ...]]
    training: Training

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
    model_folder: Any
    tokenizer: PreTrainedTokenizerBase
    tasks: list[StreamTask]

    @cached_property
    def model_fingerprint(self) -> str:
        """Hash of the backbone's files."""
        return fingerprint(self.model_folder)

    def steps(self, task: StreamTask) -> list[Step]:
        """The task's optimizer steps."""
        recipe = self.recipe
        return plan_task(task.train, task.training, recipe.batching, seed=recipe.seed, task_index=task.index)

    def training_influences(self, task: StreamTask, method: Mapping[str, Any]) -> dict[str, Any]:
        """All that decides a task's trained weights beside the stage before it: the stage's address."""
        recipe = self.recipe
        data = recipe.data
        training = task.training.model_dump(mode="json", exclude={"micro_batch_size", "per_task"})
        return {
            "backbone": self.model_fingerprint,
            "family": recipe.model.family,
            "rows": task.data.fingerprints["train"],
            "prompt": [data.max_source_tokens, data.truncation, data.add_task_name, data.add_dataset_name],
            "names": [task.name, task.data.task.family],
            "adapter": recipe.adapter.model_dump(mode="json"),
            "training": training,
            "batching": recipe.batching.model_dump(mode="json"),
            "precision": recipe.engine.precision,
            "method": dict(method),
            "seed": recipe.seed,
            "index": task.index,
        }

    def cell_influences(self, task: StreamTask) -> dict[str, Any]:
        """All that decides a score beside the weights: a cell's address."""
        recipe = self.recipe
        return {
            "rows": task.data.fingerprints["evaluation"],
            "prompt": [
                recipe.data.max_source_tokens,
                recipe.data.truncation,
                recipe.data.add_task_name,
                recipe.data.add_dataset_name,
            ],
            "names": [task.name, task.data.task.family],
            "decoding": [recipe.evaluation.decoding, recipe.evaluation.max_new_tokens],
            "label_scoring": recipe.evaluation.label_scoring,
        }


def _refuse_alike(task: Task) -> None:
    """Labels that exact match cannot tell apart would be scored as one."""
    labels_by_text: dict[str, list[str]] = {}
    for label in task.labels:
        labels_by_text.setdefault(normalise(label), []).append(label)
    for text, labels in labels_by_text.items():
        if not text or len(labels) > 1:
            raise UserError(
                f"task {task.name}: exact match ignores case and punctuation, so the label(s) "
                f"{', '.join(map(repr, labels))} read {text!r}; rename them in words"
            )


def _at_once(action: Callable[[], Value]) -> Value:
    return action()


def load_workload(recipe: Recipe, on_first: Callable[[Callable[[], Any]], Any] = _at_once) -> Workload:
    """Read and encode what `recipe` names; `on_first` runs on one rank what makes files on first use."""
    if recipe.data.path == SYNTHETIC:
        on_first(ensure_folder)
    folder = on_first(lambda: backbone_folder(recipe.model))
    family = recipe.model.family
    tokenizer = load_tokenizer(folder, family)
    names = recipe.task_names
    tasks = []
    for index, data in enumerate(
        load_tasks(recipe.data, names, split=recipe.evaluation.split, seed=recipe.seed), start=1
    ):
        _refuse_alike(data.task)
        if not data.train or not data.evaluation:
            raise UserError(f"task {data.task.name}: no rows are left to {'score' if data.train else 'train on'}")
        tasks.append(
            StreamTask(
                index=index,
                data=data,
                train=encode_rows(data.task, data.train, tokenizer, family=family, data=recipe.data),
                evaluation=encode_rows(data.task, data.evaluation, tokenizer, family=family, data=recipe.data),
                label_ids=encode_labels(data.task, tokenizer, family=family),
                training=recipe.training.for_task(data.task.name),
            )
        )
    return Workload(recipe, folder, tokenizer, tasks)
