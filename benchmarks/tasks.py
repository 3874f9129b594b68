"""The recipe's model and rows, and tasks of its stream set up by the pipeline's own code without DeepSpeed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from data_prep.batches import Example
from pipeline.adapter_kinds import adapter_kind
from pipeline.checkpoints import Checkpoint
from pipeline.context import Context
from pipeline.engine import Ranks
from pipeline.label_loss import LabelLoss
from pipeline.layers import merge
from pipeline.loop import Step, plan_task
from pipeline.methods import METHODS, Method
from pipeline.models import load_backbone, prepare_for_training, skeleton
from pipeline.optimizer_groups import ParameterGroup, optimizer_groups
from pipeline.recipe import Gorp, IncLora, LbCl, LoraAdapter, OLora, Recipe, Training, TripletAdapter
from pipeline.workload import Alone, StreamTask, Workload, load_workload

Value = TypeVar("Value")
Batch = dict[str, Tensor]
METHOD = "method={name: pegp, energy: 0.99, feature_samples: 96}"  # the recipes' own
SETTINGS: Mapping[str, Any] = {
    "inclora": IncLora(name="inclora"),
    "olora": OLora(name="olora"),
    "gorp": Gorp(name="gorp", energy=0.95, full_rank_lr=3e-3),  # as in recipes/ablations
    "lbcl": LbCl(name="lbcl"),
}
MANY_EPOCHS = 1000  # no timing reaches a task's last step, after which nothing is refreshed
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


class PlainOptimizer:
    """AdamW on whole float32 tensors: what a context asks of an engine, without DeepSpeed."""

    forwards_together = False

    def __init__(self, trained: Sequence[nn.Parameter], groups: Sequence[ParameterGroup], settings: Training) -> None:
        for parameter in trained:
            parameter.grad = None  # what `run_rows` left there is no part of the first step
        found = optimizer_groups(trained, groups, settings)
        rate = settings.learning_rate
        for group in found:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.optimizer = torch.optim.AdamW(found, lr=rate, eps=settings.adam_eps)

    def update(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def master(self, parameter: nn.Parameter) -> Tensor:
        """The trained tensor."""
        return parameter.detach().clone()

    def first_moment(self, parameter: nn.Parameter) -> Tensor:
        """Adam's `exp_avg`."""
        moment: Tensor = self.optimizer.state[parameter]["exp_avg"]
        return moment.clone()

    def second_moment(self, parameter: nn.Parameter) -> Tensor:
        """Adam's `exp_avg_sq`."""
        moment: Tensor = self.optimizer.state[parameter]["exp_avg_sq"]
        return moment.clone()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a trained tensor."""
        parameter.data.copy_(value)

    def write_frozen(self, weight: Tensor, value: Tensor) -> None:
        """Set a frozen weight."""
        weight.data.copy_(value)

    def write_moments(self, parameter: nn.Parameter, first: Tensor, second: Tensor) -> None:
        """Set Adam's moments."""
        state = self.optimizer.state[parameter]
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)

    def restart_group(self, name: str) -> None:
        """Begin a group's step count anew."""
        for group in self.optimizer.param_groups:
            if group.get("name") == name:
                for parameter in group["params"]:
                    self.optimizer.state[parameter]["step"].zero_()


class PlainTraining(PlainOptimizer):
    """A task's training as `pipeline.loop` does it, but for DeepSpeed and clipping; to a context, its engine."""

    def __init__(self, ctx: Context, method: Method[Any], module: LabelLoss, settings: Training) -> None:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        super().__init__(trained, method.groups(), settings)
        self.ctx, self.method, self.module = ctx, method, module

    def step(self, micro_batches: Sequence[Batch]) -> None:
        """One optimizer step of the mean loss per label token, and what the method does after it."""
        self.learn(micro_batches)
        self.finish()

    def learn(self, micro_batches: Sequence[Batch]) -> None:
        """Forwards, backwards, the optimizer."""
        tokens = sum(int((batch["labels"] != -100).sum()) for batch in micro_batches)
        for index, batch in enumerate(micro_batches, start=1):
            loss = self.module(**batch) / tokens
            if index == len(micro_batches) and (penalty := self.method.penalty(self.ctx)) is not None:
                loss = loss + penalty
            loss.backward()
        self.method.before_step(self.ctx)
        self.update()

    def finish(self) -> None:
        """The method's part after the optimizer."""
        self.ctx.step += 1
        self.method.after_step(self.ctx)


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

    def method(self, name: str, state: tuple[Any, Any] | None = None, **changes: Any) -> Any:
        """A method with the memory `state`; `pegp` as the recipe has it, the others as `SETTINGS` do."""
        settings: Any = self.recipe.method if name == "pegp" else SETTINGS[name]
        settings = settings.model_copy(update=changes)
        kind, adapter, family = self.workload.kind, self.recipe.adapter, self.recipe.model.family
        if name == "lbcl":
            assert isinstance(adapter, LoraAdapter)
            adapter = TripletAdapter(kind="triplet", **adapter.model_dump(exclude={"kind", "alpha"}))
        if name in ("gorp", "lbcl"):
            kind = adapter_kind(adapter, skeleton(self.workload.model_folder, family), family, settings)
        method: Any = METHODS[name](settings, kind, task_count=len(STREAM))
        if state is not None:
            method.load_state_dict(*state)
        return method

    def begin(self, method: Any, task: str, index: int) -> tuple[Context, PlainTraining]:
        """`task` as the stream's task `index`, its adapter attached and ready to train for as long as one likes."""
        workload, family = self.workload, self.recipe.model.family
        model = load_backbone(workload.model_folder, family, dtype=torch.float32)
        merge(model, workload.model_folder, method.kind.layers, method.frozen(), method.matrices())
        micro_batch = self.recipe.training.micro_batch_size
        ctx = Context(
            model,
            ranks=OneRank(),
            family=family,
            pad_id=int(workload.tokenizer.pad_token_id or 0),
            targets=method.kind.layers,
            task_index=index,
            examples=self.tasks[task].train,
            micro_batch_size=micro_batch,
            seed=self.recipe.seed,
            steps=self._plan(task, index, micro_batch) * MANY_EPOCHS,
            checkpoint=Checkpoint(workload.model_folder),
        )
        method.begin_task(ctx)
        prepare_for_training(model, gradient_checkpointing=False)
        training = PlainTraining(ctx, method, LabelLoss(model, family), self.recipe.training)
        engine: Any = training  # all of an engine that a context asks for here
        ctx.started(engine)
        method.engine_started(ctx)
        return ctx, training

    def remember(self, method: Any, task: str, index: int, *, steps: int = 0) -> None:
        """End the task after a few steps, and let the memory grow; untrained, its features are the backbone's."""
        ctx, training = self.begin(method, task, index)
        if steps:
            batches = self.steps(ctx, task, micro_batch=self.recipe.training.micro_batch_size)
            for number in range(steps):
                training.step(batches[number % len(batches)])
        method.load_trained(index, method.end_task(ctx))

    def steps(self, ctx: Context, task: str, *, micro_batch: int) -> list[list[Batch]]:
        """The steps of an epoch as collated micro-batches."""
        plan = self._plan(task, ctx.task_index, micro_batch)
        return [[ctx.collate(part) for part in step] for step in plan]

    def _plan(self, task: str, index: int, micro_batch: int) -> list[Step]:
        training = self.recipe.training.model_copy(update={"micro_batch_size": micro_batch, "epochs": 1})
        rows: list[Example] = self.tasks[task].train
        return plan_task(rows, training, self.recipe.batching, seed=self.recipe.seed, task_index=index)


def copied(state: tuple[dict[str, Tensor], dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A method's memory as it stands now, whatever the method does later."""
    return copy.deepcopy(state)
