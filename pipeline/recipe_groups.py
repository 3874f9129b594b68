"""The groups of a recipe's keys, as frozen pydantic models."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from data_prep.errors import UserError
from data_prep.orders import order_tasks
from data_prep.task_names import task_name_fault

SYNTHETIC = "synthetic"  # the reserved path of tasks and backbones that are made on first use
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _share(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(f"{value} is not in (0, 1]")
    return value


def _rank(value: int | float) -> int | float:
    if value <= 0 or (isinstance(value, float) and value >= 1):
        raise ValueError(f"{value} is neither a number of directions (1, 2, ...) nor a share of the width in (0, 1)")
    return value


def _layers(value: object) -> object:
    if not re.fullmatch(r"all|top_[1-9][0-9]*", str(value)):
        raise ValueError(f"{value!r} is neither all nor top_<k>, such as top_4: the last k decoder blocks")
    return value


def _word_off(value: object) -> object:
    return "off" if value is False else value  # YAML reads a bare `off` as false


Energy = Annotated[float, AfterValidator(_share)]


class Group(BaseModel):
    """Common behaviour of a recipe's groups: frozen, strict types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _task_name(name: str) -> str:
    fault = task_name_fault(name)
    if fault:
        raise ValueError(fault)
    return name


TaskName = Annotated[str, AfterValidator(_task_name)]
Text = Annotated[str, Field(min_length=1)]


class Model(Group):
    """The backbone: family, folder or hub id, the hub's commit."""

    family: Literal["t5", "llama2"]
    path: Text  # a folder if it exists, else a hub id org/name, or "synthetic"
    revision: str | None = None  # the hub's commit; required for a hub id
    quantization: Literal["nf4", "int8"] | None = None  # of the frozen linear layers, through bitsandbytes


class CustomTask(Group):
    """A user's own task: files of rows, the legal labels, an instruction."""

    family: Text = "Custom"
    labels: Annotated[list[str], Field(min_length=2)]
    instruction: str | None = None
    train: Text
    test: Text
    dev: Text | None = None
    text_key: str = "sentence"
    label_key: str = "label"


class Data(Group):
    """Where rows come from, how many, and how prompts are built."""

    path: Text | None = None  # null: all tasks of the order stand under `tasks`
    max_train_rows: Positive | None = None
    max_test_rows: Positive | None = None
    max_source_tokens: Positive = 512
    bad_rows: Literal["refuse", "drop"] = "refuse"
    truncation: Literal["passage", "legacy"] = "passage"
    add_task_name: bool = True
    add_dataset_name: bool = True
    tasks: dict[TaskName, CustomTask] = {}


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


class AdapterTraining(Group):
    """A method that trains an adapter."""

    @property
    def new_lora_each_task(self) -> bool:
        """Whether a LoRA is one task's, and not one through the stream; other adapters always are the latter."""
        return False

    @property
    def joint(self) -> bool:
        """Whether all tasks of the order are trained together, once, in the place of the last."""
        return False

    @property
    def adds_up(self) -> bool:
        """Whether LoRAs that are one task's all stand in the model together."""
        return True


class SeqLora(AdapterTraining):
    """One adapter of any kind through the stream, no reset."""

    name: Literal["seqlora"]


class IncLora(AdapterTraining):
    """A new LoRA for each task, the past frozen and active, no constraint."""

    name: Literal["inclora"]

    @property
    def new_lora_each_task(self) -> bool:
        """Always."""
        return True


class Mtl(AdapterTraining):
    """One adapter of any kind, trained on all tasks of the order jointly."""

    name: Literal["mtl"]

    @property
    def joint(self) -> bool:
        """Always."""
        return True


class PerTask(AdapterTraining):
    """One model a task: the single-task reference."""

    name: Literal["pertask"]

    @property
    def new_lora_each_task(self) -> bool:
        """Always."""
        return True

    @property
    def adds_up(self) -> bool:
        """Each task's model stands alone."""
        return False


class OLora(AdapterTraining):
    """`inclora` with a penalty on the overlap of a new A with the old ones."""

    name: Literal["olora"]
    lambda_1: Weight = 0.5  # of the sum of |A_old A_new^T|
    lambda_2: Weight = 0.0  # of the sum of the new factors' norms

    @property
    def new_lora_each_task(self) -> bool:
        """Always."""
        return True


class Constrained(AdapterTraining):
    """A method that keeps updates outside protected subspaces."""

    name: str
    papers: ClassVar[dict[str, object]] = {}  # the paper's values, which `mode: literal` sets
    mode: Literal["corrected", "literal"] = "corrected"
    project: Annotated[Literal["exact", "gradient", "off"], BeforeValidator(_word_off)] = "exact"

    @model_validator(mode="before")
    @classmethod
    def _literal(cls, raw: object) -> object:
        """The paper's values stand for keys that are not given."""
        if isinstance(raw, dict) and raw.get("mode") == "literal":
            return cls.papers | raw
        return raw


class Projecting(Constrained):
    """One whose subspaces grow by the energy of what old tasks depend on."""

    lora: Literal["per_task", "shared"] = "per_task"
    energy: Energy = 0.95
    max_rank: Annotated[int | float, AfterValidator(_rank)] | None = None  # directions, or a share of the width
    feature_samples: Positive = 256

    @property
    def new_lora_each_task(self) -> bool:
        """Unless it is shared."""
        return self.lora == "per_task"


class Pegp(Projecting):
    """Updates orthogonal to the features of old tasks (methods.md section 2)."""

    name: Literal["pegp"]  # mode literal: gradients alone, one LoRA for all tasks
    papers: ClassVar[dict[str, object]] = {"project": "gradient", "lora": "shared"}
    energy_max: Energy | None = None  # the energy rises towards it, task by task; null: it is constant
    merge_beta: Annotated[float, Field(ge=0, lt=1)] | None = None
    prefix_values: Literal["free", "project", "freeze"] = "project"
    feature_drift: bool = False  # after each task, run the old tasks' samples again: where are their features now?

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.energy_max is not None and self.energy_max < self.energy:
            raise ValueError(
                f"energy_max {self.energy_max} is below energy {self.energy}; the energy rises towards it: choose "
                "a greater one, or null"
            )
        return self


class Gorp(Projecting):
    """Low-rank and full-rank updates orthogonal to the gradients of old tasks (methods.md section 3)."""

    name: Literal["gorp"]  # mode literal: the paper's own core, and gradients alone
    papers: ClassVar[dict[str, object]] = {"project": "gradient", "project_b": False, "refresh_moments": "keep"}
    parts: Literal["B", "B+L", "B+S", "B+L+S"] = "B+L+S"  # L: full-rank cores; S: spaces grow over all tasks
    gradient_space: Literal["first_moment", "mean_gradient", "hidden_features"] = "first_moment"
    lora: Literal["per_task", "shared"] = "shared"
    project_b: bool = True
    full_rank_modules: list[str] | None = None  # ends of module names; null: the family's own; []: none
    full_rank_lr: Rate = 1e-5
    core_rank: Positive = 8
    core_scale: Rate = 1.0
    refresh_every: Positive = 10
    refresh_moments: Literal["rotate", "keep", "reset"] = "rotate"
    svd: Literal["randomized", "exact"] = "randomized"

    @property
    def trains_cores(self) -> bool:
        """Whether the full-rank modules learn."""
        return "L" in self.parts

    @property
    def accumulates(self) -> bool:
        """Whether spaces hold all tasks, not the last one alone."""
        return "S" in self.parts

    @model_validator(mode="after")
    def _literal_moments(self) -> Self:
        if self.mode == "literal" and self.gradient_space == "hidden_features":
            raise ValueError(
                "gradient_space: hidden_features has no literal form, whose core is projected against a space of its "
                "own moments; set mode: corrected, or another gradient_space"
            )
        if "L" in self.parts and self.full_rank_modules == []:
            raise ValueError(f"full_rank_modules: none, but parts {self.parts} trains them; name some, or leave L out")
        return self


class LbCl(Constrained):
    """Triplets injected from old tasks, trained outside their singular vectors (methods.md section 4)."""

    name: Literal["lbcl"]  # mode literal: the sum of pairwise projections on gradients, plain averages
    papers: ClassVar[dict[str, object]] = {"project": "gradient", "projection": "sum", "align": "none"}
    init: Literal["with_sigma", "without_sigma", "random", "copy"] = "with_sigma"
    projection: Literal["joint", "sum"] = "joint"  # sum: the paper's, on gradients alone
    align: Literal["signs", "hungarian", "none"] = "signs"
    sensitivity: Literal["batch", "per_sample"] = "batch"
    seed_samples: Positive = 8  # of the new task
    layers: Annotated[str, BeforeValidator(_layers)] = "all"  # into which of them old triplets are injected
    gamma: Weight = 0.1  # of the regulariser that keeps U and V near orthonormal
    sigma_lr: Rate | None = None  # null: training.learning_rate

    @property
    def new_lora_each_task(self) -> bool:
        """Always."""
        return True

    @model_validator(mode="after")
    def _projects_gradients(self) -> Self:
        if self.projection == "sum" and self.project == "exact":
            raise ValueError(
                "projection: sum is taken off gradients and no projection of a tensor; set project: gradient, or "
                "projection: joint"
            )
        return self


MethodSettings = Annotated[SeqLora | IncLora | PerTask | Mtl | OLora | Pegp | Gorp | LbCl, Field(discriminator="name")]


class LoraAdapter(Group):
    """A low-rank branch beside linear layers."""

    kind: Literal["lora"] = "lora"
    rank: Positive = 8
    alpha: Rate = 32
    dropout: Share = 0.1
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all_linear"] | None = None


class TripletAdapter(Group):
    """A branch `scale U diag(sigma) V` beside linear layers."""

    kind: Literal["triplet"]
    rank: Positive = 8
    scale: Rate = 4.0  # the same for every rank; 1 is the paper's
    dropout: Share = 0.1
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all_linear"] | None = None


class BottleneckAdapter(Group):
    """Two small layers after each feed-forward block."""

    kind: Literal["bottleneck"]
    width: Positive = 64


class PromptAdapter(Group):
    """Trained embeddings before the prompt."""

    kind: Literal["prompt"]
    length: Positive = 20


class PrefixAdapter(Group):
    """Trained keys and values before those of each attention."""

    kind: Literal["prefix"]
    length: Positive = 10


def _own_kind(raw: object) -> object:
    """`kind` missing or null: LoRA; `recipe.with_own_adapter` has seen to methods that train another."""
    return {**raw, "kind": "lora"} if isinstance(raw, dict) and raw.get("kind") is None else raw


Adapter = Annotated[
    Annotated[
        LoraAdapter | TripletAdapter | BottleneckAdapter | PromptAdapter | PrefixAdapter, Field(discriminator="kind")
    ],
    BeforeValidator(_own_kind),
]


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
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"  # 8 bits a moment, through bitsandbytes
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
    unseen: list[str] = []  # tasks outside the order, scored after each of its tasks and in no average
    retention: list[str] = []  # texts (.txt, .jsonl) or tasks of lm-evaluation-harness (names, .yaml), in no average
    references: list[str] = []  # folders of finished runs of methods pertask and mtl


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

    dir: Text | None = None  # null: runs/<recipe>-<changed overrides>-s<seed>
