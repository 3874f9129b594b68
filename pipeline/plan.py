"""`--plan`: what a run would do and need, without training anything."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from eval.accuracy import cells_for
from pipeline.adapter_kinds import trainable_parameters
from pipeline.adapters.base import AdapterKind
from pipeline.deepspeed_config import micro_batches_per_rank
from pipeline.models import packed_layers, skeleton
from pipeline.recipe import Recipe
from pipeline.workload import Alone, Workload, load_workload

GIB = 2**30
_BUFFERS = {0: 0, 1: 1, 2: 2, 3: 1}  # as large as all gradients, by ZeRO stage; two where communication overlaps


def format_plan(recipe: Recipe, *, world: int) -> str:
    """The resolved recipe, tasks with rows, truncated rows and steps, trainable parameters, memory per rank."""
    micro_batches_per_rank(recipe.training, world)
    workload = load_workload(recipe, Alone())
    model = skeleton(workload.model_folder, recipe.model.family)
    frozen = sum(parameter.numel() for parameter in model.parameters())
    held = frozen_bytes(recipe, model)
    trained = trainable_parameters(workload.kind, model)
    parts = memory_per_rank(recipe, model, longest_row(workload), frozen=held, trained=trained, world=world)
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
        f"  {'while scoring, whatever the stage':<42}{held / GIB:8.2f} GiB and the cache",
    ]
    if on_host:
        lines.append(f"  {'full-rank weights, on the host':<42}{on_host / GIB:8.2f} GiB")
    return "\n".join(lines)


class LongestRow(NamedTuple):
    """The most tokens of any training row, all of it and its label."""

    tokens: int
    label_tokens: int


def longest_row(workload: Workload) -> LongestRow:
    """Of all tasks."""
    rows = [example for task in workload.tasks for example in task.train]
    return LongestRow(
        max(len(example.input_ids) + len(example.label_ids) for example in rows),
        max(len(example.label_ids) for example in rows),
    )


def memory_per_rank(
    recipe: Recipe, model: nn.Module, longest: LongestRow, *, frozen: float, trained: int, world: int
) -> dict[str, float]:
    """Estimated bytes on one rank's device while a task trains, by part; `frozen`: bytes of the whole backbone."""
    stage, width = recipe.engine.zero, 2 if recipe.engine.precision == "bf16" else 4
    # The 8-bit kind keeps two bytes instead of eight, and two float32 constants for each block of 256.
    moments = 8 if recipe.training.optimizer == "adamw" else 2 + 2 * 4 / 256
    # AdamW keeps two float32 moments; every ZeRO stage and bf16 a float32 master beside the forward's copy.
    per_parameter = moments + (0 if stage == 0 else 4)
    on_host = recipe.engine.offload != "none"
    return {
        "frozen weights": 0 if recipe.engine.offload == "parameters" else frozen / (world if stage == 3 else 1),
        "adapter and its gradients": trained * (width + 4 / (world if stage >= 2 else 1)),
        "gradients on their way to other ranks": trained * width * _BUFFERS[stage],
        "optimizer": 0 if on_host else trained * per_parameter / (world if stage else 1),
        "activations of the longest micro-batch": _activation_bytes(recipe, longest, model, width),
    }


def full_rank_bytes_on_host(kind: AdapterKind, model: nn.Module) -> int:
    """A core's layer stands twice in each rank's memory, in float32: as the task found it, and as it is learnt."""
    layers: list[Any] = [model.get_submodule(name) for name in getattr(kind, "cores", ())]
    return 2 * 4 * sum(int(layer.weight.numel()) for layer in layers)


def frozen_bytes(recipe: Recipe, model: nn.Module) -> float:
    """Of a whole copy of the backbone, as it trains and, with the updates in it, as each rank scores with it.

    4 bits come with 8 of a constant for each 64 numbers (and little more: Dettmers et al. 2023), 8 bits with a float32
    constant a row.
    """
    width = 2 if recipe.engine.precision == "bf16" else 4
    total = float(width * sum(parameter.numel() for parameter in model.parameters()))
    bits = recipe.model.quantization
    for layer in packed_layers(model) if bits else ():
        packed = (
            (0.5 + 1 / 64) * layer.weight.numel() if bits == "nf4" else layer.weight.numel() + 4 * layer.out_features
        )
        total += packed - width * layer.weight.numel()
    return total


def _activation_bytes(recipe: Recipe, longest: LongestRow, model: nn.Module, width: int) -> float:
    """Korthikanti et al. 2022, section 4: s b h (34 + 5 a s / h) bytes per layer in 16 bits, twice in 32; with
    recomputation the layer inputs and one layer; then logits at label positions, with their gradient.

    T5's decoder reads the label alone, and of the encoder's output the keys and values of each cross-attention.
    """
    config: Any = model.config
    hidden, heads = config.hidden_size, config.num_attention_heads
    rows, tokens, labels = recipe.training.micro_batch_size, longest.tokens, longest.label_tokens

    def layer(positions: int) -> float:
        return float(width * positions * rows * hidden * (34 + 5 * heads * positions / hidden) / 2)

    stacks = [(config.num_hidden_layers, layer(tokens), tokens)]
    if decoder_layers := getattr(config, "num_decoder_layers", 0):
        crossed = rows * (2 * tokens * hidden + 5 / 2 * heads * labels * tokens) * width
        stacks = [(config.num_hidden_layers, layer(tokens), tokens), (decoder_layers, layer(labels) + crossed, labels)]
    if recipe.engine.gradient_checkpointing:
        body = sum(count * rows * positions * hidden * width for count, _, positions in stacks)
        body += max(size for _, size, _ in stacks)
    else:
        body = sum(count * size for count, size, _ in stacks)
    return float(body + 3 * 4 * rows * labels * config.vocab_size)


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
