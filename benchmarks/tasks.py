"""The recipe's model and rows, and tasks of its stream set up by the pipeline's own code without DeepSpeed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from data_prep.batches import Example
from pipeline.context import Context
from pipeline.engine import Ranks
from pipeline.loop import plan_task
from pipeline.methods import METHODS
from pipeline.models import LabelLoss, load_backbone, merge, prepare_for_training
from pipeline.recipe import IncLora, Recipe
from pipeline.workload import Alone, StreamTask, Workload, load_workload

Value = TypeVar("Value")
Batch = dict[str, Tensor]
METHOD = "method={name: pegp, energy: 0.99, feature_samples: 96}"  # the recipes' own
# dbpedia first, agnews last: what is protected at task 2 comes from dbpedia, at task 15 from all but agnews.
STREAM = [
    *("dbpedia", "MNLI", "CB", "WiC", "COPA", "QQP", "BoolQA", "RTE", "IMDB", "yelp", "amazon", "SST-2"),
    *("MultiRC", "yahoo", "agnews"),
]


class OneRank(Ranks):
    """The only rank: what it would tell others it keeps."""

    def __init__(self) -> None:
        super().__init__(0, 1, torch.device("cpu"))

    def all_sum(self, tensor: Tensor) -> Tensor:
        """A copy."""
        return tensor.detach().clone()

    def broadcast(self, tensor: Tensor) -> Tensor:
        """A copy."""
        return tensor.detach().clone()

    def on_first(self, action: Callable[[], Value]) -> Value:
        """Run it."""
        return action()


class PlainTraining:
    """Forward, backward and AdamW without DeepSpeed; to a context, the task's engine."""

    forwards_together = False

    def __init__(self, module: LabelLoss, recipe: Recipe) -> None:
        self.module = module
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        settings = recipe.training
        self._optimizer = torch.optim.AdamW(
            trained, lr=settings.learning_rate, eps=settings.adam_eps, weight_decay=settings.weight_decay
        )

    def step(self, micro_batches: Sequence[Batch]) -> None:
        """One optimizer step of the mean loss per label token."""
        tokens = sum(int((batch["labels"] != -100).sum()) for batch in micro_batches)
        for batch in micro_batches:
            (self.module(**batch) / tokens).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def master(self, parameter: nn.Parameter) -> Tensor:
        """The trained tensor."""
        return parameter.detach().clone()


class Bench:
    """One model with the stream's rows."""

    def __init__(self, model: str, tasks: Sequence[str], *, order: str = "order1", **adapter: Any) -> None:
        """`tasks` as the recipe of `order` reads them; `adapter`: other values for its adapter.

        Raises `UserError` where model or data are not there.
        """
        overrides = [METHOD, f"order={{tasks: [{', '.join(tasks)}]}}"]
        recipe = Recipe.load(f"recipes/{model}_{order}.yaml", overrides)
        recipe = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update=adapter)})
        self.name, self.recipe = model, recipe
        self.workload: Workload = load_workload(recipe, Alone())
        self.tasks: dict[str, StreamTask] = {task.name: task for task in self.workload.tasks}

    def method(self, name: str, state: tuple[Any, Any] | None = None) -> Any:
        """`inclora`, or `pegp` as the recipe has it, with the memory `state`."""
        settings: Any = self.recipe.method if name == "pegp" else IncLora(name="inclora")
        method: Any = METHODS[name](settings, self.workload.kind, task_count=len(STREAM))
        if state is not None:
            method.load_state_dict(*state)
        return method

    def begin(self, method: Any, task: str, index: int) -> tuple[Context, PlainTraining]:
        """`task` as the stream's task `index`, its adapter attached and ready to train."""
        workload, family = self.workload, self.recipe.model.family
        model = load_backbone(workload.model_folder, family, dtype=torch.float32)
        merge(model, workload.model_folder, workload.targets, method.frozen())
        ctx = Context(
            model,
            ranks=OneRank(),
            family=family,
            pad_id=int(workload.tokenizer.pad_token_id or 0),
            targets=workload.targets,
            task_index=index,
            examples=self.tasks[task].train,
            micro_batch_size=self.recipe.training.micro_batch_size,
            seed=self.recipe.seed,
        )
        method.begin_task(ctx)
        prepare_for_training(model, gradient_checkpointing=False)
        training = PlainTraining(LabelLoss(model, family), self.recipe)
        engine: Any = training  # all of an engine that a context asks for here
        ctx.started(engine)
        return ctx, training

    def remember(self, method: Any, task: str, index: int) -> None:
        """End the task untrained: its features are the backbone's, and the memory grows by them."""
        ctx, _ = self.begin(method, task, index)
        method.load_trained(index, method.end_task(ctx))

    def steps(self, ctx: Context, task: str, *, micro_batch: int) -> list[list[Batch]]:
        """The steps of an epoch as collated micro-batches."""
        training = self.recipe.training.model_copy(update={"micro_batch_size": micro_batch, "epochs": 1})
        rows: list[Example] = self.tasks[task].train
        plan = plan_task(rows, training, self.recipe.batching, seed=self.recipe.seed, task_index=ctx.task_index)
        return [[ctx.collate(part) for part in step] for step in plan]


def copied(state: tuple[dict[str, Tensor], dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A method's memory as it stands now, whatever the method does later."""
    return copy.deepcopy(state)
