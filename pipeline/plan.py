"""`--plan`: what a run would do and need, without training anything."""

from __future__ import annotations

from eval.accuracy import cells_for
from pipeline.adapter_kinds import trainable_parameters
from pipeline.deepspeed_config import micro_batches_per_rank
from pipeline.memory_estimate import (
    beginning_bytes,
    ending_bytes,
    full_rank_bytes_on_host,
    longest_row,
    longest_scored,
    memory_per_rank,
    scoring_bytes,
)
from pipeline.models import skeleton
from pipeline.recipe import Recipe
from pipeline.workload import Alone, Workload, load_workload

GIB = 2**30


def format_plan(recipe: Recipe, *, world: int) -> str:
    """The resolved recipe, tasks with rows, truncated rows and steps, trainable parameters, memory per rank."""
    micro_batches_per_rank(recipe.training, world)
    workload = load_workload(recipe, Alone())
    model = skeleton(workload.model_folder, recipe.model.family)
    frozen = sum(parameter.numel() for parameter in model.parameters())
    scoring = sum(scoring_bytes(recipe, model, longest_scored(workload)).values())
    trained = trainable_parameters(workload.kind, model)
    longest = longest_row(workload)
    parts = memory_per_rank(recipe, workload.kind, model, longest, world=world)
    begins, ends = beginning_bytes(recipe, model, longest), ending_bytes(recipe, workload.kind, model, longest)
    on_host = full_rank_bytes_on_host(workload.kind, model)
    lines = [recipe.to_yaml().rstrip(), "", f"folder: {recipe.run_dir}", f"recipe: {recipe.sha256}", ""]
    lines += _task_table(workload)
    lines += [
        "",
        f"backbone: {frozen:,} frozen parameters; {workload.kind.name}, "
        f"{trained:,} trainable parameters per task at most ({100 * trained / frozen:.2f} %)",
        f"memory per rank, estimated, with {world} rank(s), zero {recipe.engine.zero}, {recipe.engine.precision}:",
        *(f"  {name:<42}{size / GIB:8.2f} GiB" for name, size in parts.items()),
        f"  {'together, while training':<42}{sum(parts.values()) / GIB:8.2f} GiB",
        f"  {'while scoring':<42}{scoring / GIB:8.2f} GiB",
        f"  {'when a task begins, at most':<42}{begins / GIB:8.2f} GiB",
        f"  {'when a task ends, at most':<42}{ends / GIB:8.2f} GiB",
    ]
    if on_host:
        lines.append(f"  {'full-rank weights, on the host':<42}{on_host / GIB:8.2f} GiB")
    return "\n".join(lines)


def _task_table(workload: Workload) -> list[str]:
    header = f"{'task':<16}{'train rows':>11}{'cut':>7}{'scored rows':>13}{'cut':>7}{'steps':>8}  labels"
    lines = [header]
    joint = workload.recipe.method.joint
    for task in [*workload.tasks, *workload.unseen]:
        facts = task.facts()
        lines.append(
            f"{task.name:<16}{facts['train_rows']:>11}{facts['truncated_train']:>7}"
            f"{facts['evaluation_rows']:>13}{facts['truncated_evaluation']:>7}"
            f"{len(workload.steps(task)) if task.index and not joint else '-':>8}  {len(facts['labels'])}"
        )
    planned = cells_for(workload.recipe.evaluation.cells, len(workload.tasks))
    if joint:
        planned = planned[-1:]
        lines.append(f"trained together in {len(workload.steps(workload.trained_tasks[0]))} steps")
    cells = sum(len(row) + len(workload.unseen) for row in planned)
    lines.append(
        f"cut: rows whose passage is shortened to {workload.recipe.data.max_source_tokens} tokens; "
        f"{cells} cells to score and {len(workload.tasks) + len(workload.unseen)} of the untrained model"
    )
    return lines
