"""A run, complete: the recipe's groups as frozen pydantic models, and how a recipe file becomes one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_prep.errors import UserError
from data_prep.orders import ORDERS, order_tasks
from pipeline.recipe_faults import near, render_faults
from pipeline.recipe_source import (
    ROOT,
    apply_override,
    changed_keys,
    expand_path,
    find_recipe,
    read_recipe,
    resolve_path,
    split_override,
)

SYNTHETIC = "synthetic"  # the reserved path of tasks and backbones that are made on first use
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Group(BaseModel):
    """Common behaviour of a recipe's groups: frozen, strict types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Model(Group):
    """The backbone: family, folder or hub id, the hub's commit."""

    family: Literal["t5", "llama2"]
    path: str = Field(min_length=1)  # a folder if it exists, else a hub id org/name, or "synthetic"
    revision: str | None = None  # the hub's commit; required for a hub id
    quantization: None = None  # quantized backbones are not built yet: only null is legal


class CustomTask(Group):
    """A user's own task: files of rows, the legal labels, an instruction."""

    family: str = Field(default="Custom", min_length=1)
    labels: Annotated[list[str], Field(min_length=2)]
    instruction: str | None = None
    train: str
    test: str
    dev: str | None = None
    text_key: str = "sentence"
    label_key: str = "label"


class Data(Group):
    """Where rows come from, how many, and how prompts are built."""

    path: str = Field(min_length=1)
    max_train_rows: Positive | None = None
    max_test_rows: Positive | None = None
    max_source_tokens: Positive = 512
    bad_rows: Literal["refuse", "drop"] = "refuse"
    truncation: Literal["passage", "legacy"] = "passage"
    add_task_name: bool = True
    add_dataset_name: bool = True
    tasks: dict[str, CustomTask] = {}


class Order(Group):
    """The stream: a published order by name, or a list of tasks."""

    name: str | None = None
    tasks: Annotated[list[str], Field(min_length=1)] | None = None

    @field_validator("name")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None:
            try:
                order_tasks(name)
            except UserError as error:
                raise ValueError(str(error).removeprefix("order.name: ")) from error
        return name

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.name is None) == (self.tasks is None):
            raise ValueError("has either a name (order1) or a list of tasks, and exactly one of them")
        if self.tasks is not None and len(set(self.tasks)) != len(self.tasks):
            twice = sorted({task for task in self.tasks if self.tasks.count(task) > 1})
            raise ValueError(f"names a task twice ({', '.join(twice)}); each task comes once in a stream")
        return self


class SeqLora(Group):
    """One LoRA through the stream, no reset."""

    name: Literal["seqlora"]


class IncLora(Group):
    """A new LoRA for each task, the past frozen and active, no constraint."""

    name: Literal["inclora"]


MethodSettings = Annotated[SeqLora | IncLora, Field(discriminator="name")]


class Adapter(Group):
    """What is trained, and where it is attached."""

    kind: Literal["lora"] | None = None
    rank: Positive = 8
    alpha: Rate = 32
    dropout: Share = 0.1
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all_linear"] | None = None


class TaskTraining(Group):
    """What `training.per_task` may change for one task; what is left out stays as for all tasks."""

    epochs: Positive | None = None
    max_steps: Positive | None = None
    learning_rate: Rate | None = None


class Training(Group):
    """One task's optimization; `per_task` changes it for some."""

    epochs: Positive = 1
    max_steps: Positive | None = None
    learning_rate: Rate = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    global_batch_size: Positive = 64
    micro_batch_size: Positive = 8
    optimizer: Literal["adamw"] = "adamw"
    adam_eps: Rate = 1e-8
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    gradient_clipping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0  # 0 switches it off
    per_task: dict[str, TaskTraining] = {}

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> Self:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is no multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self

    def for_task(self, name: str) -> Training:
        """The settings with which the task `name` is trained."""
        changes = self.per_task.get(name)
        return self if changes is None else self.model_copy(update=changes.model_dump(exclude_none=True))


class Batching(Group):
    """How rows are dealt to micro-batches."""

    order: Literal["bucketed", "random"] = "bucketed"


class Evaluation(Group):
    """Which cells are scored, and how."""

    cells: Literal["diagonal_and_last", "lower", "lower_and_next", "full"] = "lower_and_next"
    decoding: Literal["greedy"] = "greedy"
    label_scoring: bool = True
    split: Literal["test", "validation"] = "test"
    batch_size: Positive = 32
    max_new_tokens: Positive = 50  # the benchmark's target length
    unseen: Annotated[list[str], Field(max_length=0)] = []  # not built yet: only [] is legal
    references: Annotated[list[str], Field(max_length=0)] = []  # not built yet: only [] is legal


class Engine(Group):
    """How DeepSpeed runs it: none of this but precision changes results."""

    zero: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    offload: Literal["none", "optimizer", "parameters"] = "none"
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _measured_combinations(self) -> Self:
        if self.precision == "bf16" and self.zero < 2:
            raise ValueError(
                f"bf16 with zero {self.zero} trains wrongly under DeepSpeed (a phantom Adam step in stage 0, "
                "silent gradient writes in stage 1); use zero 2 or 3, or precision fp32"
            )
        if self.offload != "none" and self.zero == 0:
            raise ValueError("zero 0 keeps everything on the device; offload needs zero 1, 2 or 3")
        if self.offload == "parameters" and self.zero != 3:
            raise ValueError(f"offload parameters needs zero 3, not {self.zero}")
        return self


class Output(Group):
    """The folder of the run."""

    dir: str | None = None  # null: runs/<recipe>-<changed overrides>-s<seed>


class Recipe(Group):
    """One run, complete. Paths are absolute once loaded; `Recipe.load` is the only way in."""

    model: Model
    data: Data
    order: Order
    method: MethodSettings
    adapter: Adapter = Adapter()
    training: Training = Training()
    batching: Batching = Batching()
    evaluation: Evaluation = Evaluation()
    engine: Engine = Engine()
    output: Output = Output()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42

    @model_validator(mode="after")
    def _known_tasks(self) -> Self:
        known = {*self.task_names, *self.data.tasks, *(task for tasks in ORDERS.values() for task in tasks)}
        for name in self.training.per_task:
            if name not in known:
                raise ValueError(
                    f"training.per_task.{name}: no such task{near(name, known)}; the order has "
                    f"{', '.join(self.task_names)}"
                )
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe file, apply `key.path=value` overrides in order, and validate all at once.

        Raises `UserError` with every fault of the recipe in one message.
        """
        source = find_recipe(path)
        raw = read_recipe(source)
        given: dict[str, Any] = {}
        for text in overrides:
            key, value = split_override(text)
            apply_override(raw, key, value)
            given[key] = value
        try:
            # Through JSON: strict types, while a YAML list may still stand for any sequence.
            recipe = cls.model_validate_json(json.dumps(raw, default=str))
        except ValidationError as error:
            raise UserError(render_faults(_shown(path), error, cls)) from error
        return recipe._resolved(source, list(overrides), given)

    @classmethod
    def load_resolved(cls, path: Path) -> Recipe:
        """Read the recipe that a run saved, as it stands: paths are absolute already."""
        try:
            return cls.model_validate_json(json.dumps(read_recipe(path), default=str))
        except (ValidationError, UserError) as error:
            told = render_faults(str(path), error, cls) if isinstance(error, ValidationError) else str(error)
            raise UserError(
                f"{told}\nThis run's recipe was edited, or written by another version; delete the folder {path.parent} "
                "or choose another: output.dir=FOLDER"
            ) from error

    def _resolved(self, source: Path, overrides: list[str], given: dict[str, Any]) -> Recipe:
        """The same recipe with absolute paths."""

        def absolute(text: str, field: str, keys: Sequence[str] = ()) -> str:
            expanded = expand_path(text, field)
            on_command_line = any(key in given for key in (field, *keys))
            return str(resolve_path(expanded, from_command_line=on_command_line))

        model = self.model
        if model.path != SYNTHETIC:
            expanded = expand_path(model.path, "model.path")
            folder = resolve_path(expanded, from_command_line="model.path" in given)
            is_hub_id = not folder.exists() and _looks_like_hub_id(expanded)
            model = model.model_copy(update={"path": expanded if is_hub_id else str(folder)})
        tasks = {
            name: task.model_copy(
                update={
                    part: absolute(value, f"data.tasks.{name}.{part}", ("data.tasks",))
                    for part in ("train", "test", "dev")
                    if (value := getattr(task, part)) is not None
                }
            )
            for name, task in self.data.tasks.items()
        }
        data_path = self.data.path
        if data_path != SYNTHETIC:
            data_path = absolute(data_path, "data.path")
        output = self.output.dir
        if output is None:
            output = str(ROOT / "runs" / "-".join([source.stem, *changed_keys(overrides), f"s{self.seed}"]))
        else:
            start = Path.cwd() if "output.dir" in given else ROOT
            output = str((start / Path(output).expanduser()).resolve())
        return self.model_copy(
            update={
                "model": model,
                "data": self.data.model_copy(update={"path": data_path, "tasks": tasks}),
                "output": Output(dir=output),
            }
        )

    @property
    def task_names(self) -> tuple[str, ...]:
        """The stream's tasks in order."""
        if self.order.tasks is not None:
            return tuple(self.order.tasks)
        assert self.order.name is not None
        return order_tasks(self.order.name)

    @property
    def run_dir(self) -> Path:
        """Absolute folder of the run."""
        assert self.output.dir is not None
        return Path(self.output.dir)

    def influences(self) -> dict[str, Any]:
        """What decides a run's results: everything but paths, ZeRO stage, offload, checkpointing,
        micro-batching and the folder of the run (data and weights are compared by fingerprint instead).
        """
        content = self.model_dump(mode="json")
        content["order"] = list(self.task_names)
        del content["output"], content["model"]["path"], content["data"]["path"]
        del content["training"]["micro_batch_size"], content["evaluation"]["batch_size"]
        content["engine"] = {"precision": self.engine.precision}
        for task in content["data"]["tasks"].values():
            for part in ("train", "test", "dev"):
                del task[part]
        return content

    @property
    def sha256(self) -> str:
        """Hash of `influences`: two recipes of one hash are "the same recipe"."""
        return hashlib.sha256(json.dumps(self.influences(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that `Recipe.load` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def _shown(path: str | Path) -> str:
    """The recipe's path as short as it stays clear."""
    resolved = Path(path)
    return str(resolved.relative_to(ROOT)) if resolved.is_relative_to(ROOT) else str(path)


def _looks_like_hub_id(text: str) -> bool:
    """`org/name` or `name`, as the hub spells ids; never something that starts like a path."""
    parts = text.split("/")
    return len(parts) <= 2 and all(parts) and not text.startswith((".", "~", "/"))
