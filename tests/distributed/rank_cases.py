"""What one process group is asked to run: cases, and the rows and settings that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from random_backbones import random_examples

from pipeline.adapters.lora import LoraKind
from pipeline.loop import Step, plan_task
from pipeline.recipe import Batching, Engine, Training

SEED = 7
# Three steps an epoch; the third has 5 rows of 8: two full micro-batches, one half empty, one of padding alone.
ROWS = 21
# eps 1e-4: with 1e-8 Adam turns rounding noise in near-zero gradients into steps of full size (methods.md 8.7).
TRAINING = Training(
    epochs=2,
    learning_rate=1e-2,
    schedule="cosine",
    warmup_steps=2,
    global_batch_size=8,
    micro_batch_size=2,
    adam_eps=1e-4,
    weight_decay=0.1,
    gradient_clipping=1.0,
)
# methods.md 8.4: GORP against its reference over 50 steps a task.
FIFTY_STEPS = TRAINING.model_copy(update={"epochs": 17, "max_steps": 50, "learning_rate": 1e-4})
WRITE_AFTER = 3  # the step after which the case "access" writes tensors
L2 = 0.05  # of the case "penalty"


@dataclass(frozen=True)
class Case:
    """One run of `rank_runs.RUNS[run]`; every rank of a group runs it."""

    run: str
    family: str = "t5"
    zero: int = 0
    offload: str = "none"
    precision: str = "fp32"
    dropout: float = 0.0
    method: str = "inclora"
    checkpointing: bool = False
    adapter: str = "lora"
    project: str = "exact"  # of the methods pegp and gorp
    refresh: str = "rotate"  # of the method gorp
    svd: str = "exact"  # of the method gorp
    mode: str = "corrected"  # of the method gorp; literal sets `project` and `refresh` itself
    bits: Literal["nf4", "int8"] | None = None  # of the backbone, in the run two_tasks
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    one_each: bool = False  # one micro-batch a step for either of two ranks, of `pegp_runs`
    long: bool = False  # tasks of 50 steps, of the methods pegp and gorp

    def __str__(self) -> str:
        parts = [self.run, self.family, f"zero{self.zero}"]
        parts += [] if self.offload == "none" else [f"{self.offload}-offload"]
        parts += [] if self.precision == "fp32" else [self.precision]
        parts += ["dropout"] if self.dropout else []
        parts += [] if self.method == "inclora" else [self.method]
        parts += ["checkpointing"] if self.checkpointing else []
        parts += [] if self.adapter == "lora" else [self.adapter]
        parts += [] if self.project == "exact" else [self.project]
        parts += [] if self.refresh == "rotate" else [self.refresh]
        parts += [] if self.svd == "exact" else [self.svd]
        parts += [] if self.mode == "corrected" else [self.mode]
        parts += [self.bits] if self.bits else []
        parts += [] if self.optimizer == "adamw" else [self.optimizer]
        parts += ["one-each"] if self.one_each else []
        parts += ["50-steps"] if self.long else []
        return "-".join(parts)

    @property
    def backbone(self) -> str:
        """The folder of its backbone: T5 has a dropout of its own."""
        return f"{self.family}-dropout" if self.dropout else self.family

    @property
    def engine(self) -> Engine:
        return Engine(
            zero=self.zero,
            offload=self.offload,
            precision=self.precision,
            gradient_checkpointing=self.checkpointing,
        )

    @property
    def training(self) -> Training:
        changes = {"optimizer": self.optimizer} | ({"micro_batch_size": 4} if self.one_each else {})
        return (FIFTY_STEPS if self.long else TRAINING).model_copy(update=changes)

    def kind(self, targets: list[str]) -> LoraKind:
        return LoraKind(targets, rank=3, alpha=6, dropout=self.dropout)

    @property
    def examples(self):
        return random_examples(ROWS, self.family)

    @property
    def steps(self) -> list[Step]:
        return plan_task(self.examples, TRAINING, Batching(), seed=SEED, task_index=1)
