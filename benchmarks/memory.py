"""`--plan`'s memory against measured peaks: `python benchmarks/memory.py [--model MODEL]`; see README.md here."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `python benchmarks/memory.py` puts this folder first; ours start at the repository.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import copy
import os
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import gorp_costs
from benchmarks.command_line import writable
from benchmarks.pairs import Report, write_json
from benchmarks.streams import MODELS, Streams
from benchmarks.tasks import STREAM
from benchmarks.training import Ours
from data_prep.errors import UserError
from eval.decode import predict
from pipeline.engine import Ranks
from pipeline.memory_estimate import (
    beginning_bytes,
    ending_bytes,
    frozen_bytes,
    longest_of,
    longest_row,
    longest_scored,
    memory_per_rank,
    scoring_bytes,
)
from pipeline.models import skeleton
from pipeline.recipe import Recipe
from pipeline.weights import Weights
from pipeline.workload import Alone, StreamTask, Workload, load_workload

SETTINGS: Sequence[Sequence[str]] = (
    ["zero=0"],
    ["zero=2"],
    ["zero=3"],
    ["zero=2", "engine.precision=bf16"],
    ["zero=2", "engine.gradient_checkpointing=true"],
    ["zero=2", "training.optimizer=adamw_8bit"],
    ["zero=2", "model.quantization=nf4"],
    ["zero=2", "model.quantization=int8"],
    ["zero=2", "model.quantization=nf4", "engine.gradient_checkpointing=true"],
    ["zero=2", "model.quantization=int8", "engine.gradient_checkpointing=true"],
)
METHODS = ("inclora", "olora", "pegp", "gorp", "lbcl")
STEPS = 2  # of each old task, for memories that come from training
MIB = 2**20


def measured(workload: Workload, ranks: Ranks, task: StreamTask, method: Any = None, index: int = 1) -> list[int]:
    """Bytes of the frozen weights; the most that torch's allocator held above them until a step was done, and then
    until the task had ended."""
    ours = Ours(workload, task, ranks, start=False, method=method, index=index)
    constants = [state for weight in ours.model.parameters() for state in _constants(weight)]
    frozen = gorp_costs.resident_bytes([*ours.model.parameters(), *constants])
    by_length = sorted(range(len(task.train)), key=[len(row.input_ids) for row in task.train].__getitem__)
    rows = by_length[-workload.recipe.training.global_batch_size :]

    def step() -> None:
        ours.start()
        ours.longest_step(rows)

    until_step = gorp_costs.peak_bytes(step)
    held = gorp_costs.resident_bytes([*ours.model.parameters(), *constants]) - frozen
    return [frozen, until_step, held + gorp_costs.peak_bytes(ours.end)]


def _constants(weight: Any) -> list[Any]:
    """What unpacks a quantized weight."""
    state = getattr(weight, "quant_state", None)
    return [state.absmax] if state is not None else [weight.SCB] if getattr(weight, "SCB", None) is not None else []


def compare(report: Report, name: str, changes: Sequence[str], ranks: Ranks) -> None:
    """One line: estimated and measured MiB, and their ratio."""
    recipe = Recipe.load(f"recipes/{name}_order1.yaml", ["method=inclora", "order={tasks: [agnews]}", *changes])
    workload = load_workload(recipe, Alone())
    model: Any = skeleton(workload.model_folder, recipe.model.family)
    held = frozen_bytes(recipe, model)
    parts = memory_per_rank(recipe, workload.kind, model, longest_row(workload), world=ranks.world)
    frozen, above, _ = measured(workload, ranks, workload.tasks[0])
    estimated = sum(parts.values())
    report.state(
        f"{name}, {' '.join(changes)}",
        {
            "estimated MiB": round(estimated / MIB, 1),
            "measured MiB": round((frozen + above) / MIB, 1),
            "estimated / measured": round(estimated / (frozen + above), 2),
            "of it frozen weights, estimated and measured": [round(held / MIB, 1), round(frozen / MIB, 1)],
        },
    )


def compare_method(report: Report, name: str, streams: Streams, method: str, ranks: Ranks) -> None:
    """The same of a method's fifteenth task, its begin included; and of that task's end, above the weights."""
    recipe = Recipe.load(f"recipes/{name}_order4.yaml", [f"method={method}"])
    workload = load_workload(recipe, Alone())
    task = next(task for task in workload.tasks if task.name == "agnews")
    longest = longest_of(task.train)
    model: Any = skeleton(workload.model_folder, recipe.model.family)
    parts = memory_per_rank(recipe, workload.kind, model, longest, world=ranks.world)
    estimated = max(sum(parts.values()), beginning_bytes(recipe, model, longest))
    after = copy.deepcopy(streams.after(method, len(STREAM) - 1))
    frozen, above, at_end = measured(workload, ranks, task, after, len(STREAM))
    told = {
        "estimated MiB": round(estimated / MIB, 1),
        "measured MiB": round((frozen + above) / MIB, 1),
        "estimated / measured": round(estimated / (frozen + above), 2),
        "bases: on the device, estimated at most; as kept": [
            round(parts["protected bases, at most"] / MIB, 1),
            round(after.memory.bytes / MIB, 1) if hasattr(after, "memory") else 0.0,
        ],
        "end of the task, estimated at most and measured MiB": [
            round(ending_bytes(recipe, workload.kind, model, longest) / MIB, 1),
            round((frozen + at_end) / MIB, 1),
        ],
    }
    report.state(f"{name}, {method} at task {len(STREAM)}", told)


def compare_scoring(report: Report, name: str, ranks: Ranks) -> None:
    """The same of scoring a batch of the longest prompts of the recipe's task with the most tokens."""
    recipe = Recipe.load(f"recipes/{name}_order1.yaml", ["method=inclora"])
    workload = load_workload(recipe, Alone())
    model = Weights(workload, ranks.device).model({})
    longest = longest_scored(workload)
    task = next(
        task for task in workload.tasks if longest.prompt_tokens in [len(row.input_ids) for row in task.evaluation]
    )
    rows = sorted(task.evaluation, key=lambda row: len(row.input_ids))[-recipe.evaluation.batch_size :]
    labels = {"labels": task.data.task.labels, "label_ids": task.label_ids, "label_scoring": True}

    def score() -> None:
        predict(
            model,
            workload.tokenizer,
            rows,
            family=recipe.model.family,
            batch_size=recipe.evaluation.batch_size,
            max_new_tokens=recipe.evaluation.max_new_tokens,
            **labels,
        )

    held = gorp_costs.resident_bytes(list(model.parameters()))
    estimated, found = sum(scoring_bytes(recipe, model, longest).values()), held + gorp_costs.peak_bytes(score)
    report.state(
        f"{name}, scoring {len(rows)} rows of {task.name}",
        {
            "estimated MiB": round(estimated / MIB, 1),
            "measured MiB": round(found / MIB, 1),
            "estimated / measured": round(estimated / found, 2),
        },
    )


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python benchmarks/memory.py", description=__doc__)
    parser.add_argument("--model", choices=MODELS, help="both by default")
    parser.add_argument("--json", type=writable, metavar="OUT")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of each start and stop
    report, ranks = Report(), Ranks.start()
    try:
        for name in [options.model] if options.model else MODELS:
            for changes in SETTINGS:
                compare(report, name, changes, ranks)
            streams = Streams(name, steps={"gorp": STEPS, "lbcl": STEPS})
            for method in METHODS:
                compare_method(report, name, streams, method, ranks)
            compare_scoring(report, name, ranks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        write_json(options.json, report.ratios, report.stated, {"model": options.model})
    return 0


if __name__ == "__main__":
    sys.exit(main())
