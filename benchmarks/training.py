"""Training speed: `python benchmarks/training.py [--model MODEL] [--pairs 8]`; see README.md here."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `python benchmarks/training.py` puts this folder first; ours start at the repository.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from benchmarks import gorp_costs
from benchmarks.command_line import writable
from benchmarks.pairs import Report, judged, table, timed, write_json
from benchmarks.streams import MODELS
from data_prep.batches import Example, collate
from data_prep.errors import UserError
from pipeline.checkpoints import Checkpoint
from pipeline.context import Context
from pipeline.engine import Ranks, TaskEngine
from pipeline.label_loss import LabelLoss
from pipeline.loop import plan_task, train_task
from pipeline.methods import METHODS
from pipeline.models import load_backbone, prepare_for_training
from pipeline.recipe import LoraAdapter, Recipe
from pipeline.runlog import RunLog
from pipeline.stopping import StopRequest
from pipeline.weights import Weights
from pipeline.workload import Alone, StreamTask, Workload, load_workload

GOAL = 1 / 1.5  # our time to the baseline's
TASKS = ("agnews", "SST-2")


class Ours:
    """A task as the pipeline trains it, DeepSpeed included: `inclora`'s first, or another method's at its place."""

    def __init__(
        self,
        workload: Workload,
        task: StreamTask,
        ranks: Ranks,
        *,
        start: bool = True,
        method: Any = None,
        index: int = 1,
    ) -> None:
        """Without `start` the backbone alone is there, until `start` is called. `method` is used up."""
        recipe = workload.recipe
        self._recipe, self._ranks, self._task = recipe, ranks, task
        self._training = recipe.training.model_copy(update={"epochs": 1})
        self._steps = plan_task(task.train, self._training, recipe.batching, seed=recipe.seed, task_index=index)
        self.model = Weights(workload, ranks.device).give_away({})
        self._method: Any = method or METHODS["inclora"](recipe.method, workload.kind, task_count=1)
        self._ctx = Context(
            self.model,
            ranks=ranks,
            family=recipe.model.family,
            pad_id=int(workload.tokenizer.pad_token_id or 0),
            targets=workload.targets,
            task_index=index,
            examples=task.train,
            micro_batch_size=self._training.micro_batch_size,
            seed=recipe.seed,
            steps=self._steps,
            checkpoint=Checkpoint(workload.model_folder),
        )
        if start:
            self.start()

    def start(self) -> None:
        """Attach the adapter and start the engine."""
        engine = self._recipe.engine
        prepare_for_training(self.model, gradient_checkpointing=engine.gradient_checkpointing)
        self._method.begin_task(self._ctx)
        module = LabelLoss(self.model, self._recipe.model.family)
        self._ctx.started(TaskEngine(module, engine, self._training, self._ranks, self._method.groups()))
        self._method.engine_started(self._ctx)

    def end(self) -> None:
        """What the method does when the task ends."""
        self._method.end_task(self._ctx)

    def epoch(self, _: int) -> None:
        """All rows once."""
        self._train(self._steps)

    def longest_step(self, rows: Sequence[int]) -> None:
        """One step of these rows."""
        width = self._training.micro_batch_size
        self._train([[list(rows[start : start + width]) for start in range(0, len(rows), width)]])

    def _train(self, steps: Any) -> None:
        train_task(
            self._ctx,
            self._method,
            steps,
            self._training,
            name=self._task.name,
            examples=self._task.train,
            seed=self._recipe.seed,
            log=RunLog(None, console=False),
            stop=StopRequest(),
        )


class Baseline:
    """PEFT's LoRA under transformers' Trainer: rows in random order, padded to a batch's longest or to one length."""

    def __init__(
        self, workload: Workload, task: StreamTask, folder: str, *, pad_to: int | None, start: bool = True
    ) -> None:
        """Without `start` the backbone alone is there, until `start` is called."""
        recipe, training = workload.recipe, workload.recipe.training
        family, adapter = recipe.model.family, recipe.adapter
        assert isinstance(adapter, LoraAdapter)
        base: Any = load_backbone(workload.model_folder, family, dtype=torch.float32)
        config = LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            target_modules=list(workload.targets),
            task_type=TaskType.SEQ_2_SEQ_LM if family == "t5" else TaskType.CAUSAL_LM,
        )
        self._rows = [_row(example, family) for example in task.train]
        settings = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=training.micro_batch_size,
            gradient_accumulation_steps=training.global_batch_size // training.micro_batch_size,
            num_train_epochs=1,
            learning_rate=training.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=training.weight_decay,
            adam_epsilon=training.adam_eps,
            max_grad_norm=training.gradient_clipping,
            seed=recipe.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        collator = DataCollatorForSeq2Seq(
            workload.tokenizer,
            model=base if family == "t5" else None,
            padding="longest" if pad_to is None else "max_length",
            max_length=pad_to,
        )
        self._made = {"args": settings, "data_collator": collator}
        self._trainer: Trainer | None = None
        self._base, self._config = base, config
        if start:
            self.start()

    def start(self) -> None:
        """Attach the adapter, make the Trainer; its optimizer comes with its first training."""
        peft: Any = get_peft_model(self._base, self._config)
        self.model: nn.Module = peft.base_model.model
        self._trainer = Trainer(model=peft, train_dataset=self._rows, **self._made)

    def epoch(self, _: int) -> None:
        """All rows once."""
        self._train(self._rows)

    def longest_step(self, rows: Sequence[int]) -> None:
        """One step of these rows."""
        self._train([self._rows[row] for row in rows])

    def _train(self, rows: Any) -> None:
        assert self._trainer is not None
        self._trainer.train_dataset = rows
        self._trainer.train()


def _row(example: Example, family: str) -> dict[str, list[int]]:
    if family == "t5":
        ids, labels = list(example.input_ids), list(example.label_ids)
    else:
        ids = [*example.input_ids, *example.label_ids]
        labels = [*[-100] * len(example.input_ids), *example.label_ids]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _first_step(side: Ours | Baseline, rows: Sequence[int]) -> None:
    side.start()
    side.longest_step(rows)


@torch.no_grad()
def held_out_loss(model: nn.Module, workload: Workload, task: StreamTask) -> float:
    """Per label token, on the rows that the recipe scores."""
    family, pad = workload.recipe.model.family, int(workload.tokenizer.pad_token_id or 0)
    module = LabelLoss(model, family)
    mode = model.training
    model.eval()
    rows, total = task.evaluation, 0.0
    for start in range(0, len(rows), 16):
        total += float(module(**collate(rows[start : start + 16], family=family, pad_id=pad)))
    model.train(mode)
    return total / sum(len(example.label_ids) for example in rows)


def measure(report: Report, name: str, options: argparse.Namespace, ranks: Ranks, folder: str) -> None:
    """One model: time and memory of each task, against both paddings."""
    overrides = ["method=inclora", f"order={{tasks: [{', '.join(TASKS)}]}}", f"data.max_train_rows={options.rows}"]
    workload = load_workload(Recipe.load(f"recipes/{name}_order1.yaml", overrides), Alone())
    for task in workload.tasks:
        widest = max(len(_row(example, workload.recipe.model.family)["input_ids"]) for example in task.train)
        for padding, pad_to in (("padded to the longest of a batch", None), (f"padded to {widest}", widest)):
            ours, baseline = Ours(workload, task, ranks), Baseline(workload, task, folder, pad_to=pad_to)
            ours.epoch(0)
            baseline.epoch(0)
            losses = [round(held_out_loss(side.model, workload, task), 4) for side in (ours, baseline)]
            title = f"{name}, {task.name}: inclora / PEFT and Trainer, {padding}"
            report.state(f"{title}: loss on unseen rows after an epoch", losses)
            goal = GOAL if pad_to is None else None
            times = timed(ours.epoch, baseline.epoch, pairs=options.pairs, warm_up=0)[None]
            found = judged(title, times, goal=goal)
            report.add(found)
            rates = [round(1000 * len(task.train) / ms, 1) for ms in (found.first_ms, found.second_ms)]
            report.state(f"{title}: rows a second", rates)
            by_length = sorted(range(len(task.train)), key=[len(row.input_ids) for row in task.train].__getitem__)
            rows = by_length[-workload.recipe.training.global_batch_size :]
            ours, baseline = (
                Ours(workload, task, ranks, start=False),
                Baseline(workload, task, folder, pad_to=pad_to, start=False),
            )
            peaks = [gorp_costs.peak_bytes(partial(_first_step, side, rows)) for side in (ours, baseline)]
            report.state(f"{title}: peak bytes above the frozen weights, to a step of the longest rows", peaks)


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python benchmarks/training.py", description=__doc__)
    parser.add_argument("--model", choices=MODELS, help="both by default")
    parser.add_argument("--pairs", type=int, default=8, help="epochs of either side")
    parser.add_argument("--rows", type=int, default=504, help="of each task")
    parser.add_argument("--json", type=writable, metavar="OUT")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of each start and stop
    report, ranks = Report(), Ranks.start()
    print(table([]), flush=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in [options.model] if options.model else MODELS:
                measure(report, name, options, ranks, folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        arguments = {"model": options.model, "pairs": options.pairs, "rows": options.rows}
        write_json(options.json, report.ratios, report.stated, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
