"""What each method adds to a task on paper: memory in a step, work before it begins and when it ends.

Legend: N parameters; d widths of a layer; r directions a task and layer; R of all old tasks; n tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.shapes import GB, SHAPES, Machine, Work, llama, markdown, widths
from pipeline.adapter_kinds import adapter_kind
from pipeline.layers import target_modules
from pipeline.memory_estimate import LongestRow, memory_per_rank
from pipeline.methods.lbcl import OTHER_ROWS
from pipeline.recipe import Recipe

GPUS, TASK, RANK = 8, 15, 8
GROWTH = 12  # operations d^3 of an eigendecomposition and a QR of [d, d]
# Of the step on the same layers against `inclora`, regularisers and refreshes included (EXPERIMENTS.md): on the small
# backbones, and where it was measured on single layers of LLaMA-2-7B's widths.
STEP = {
    "inclora": ("1", "1"),
    "olora": ("0.98 to 1.05", "-"),
    "pegp": ("1.00 to 1.08", "1.01"),
    "gorp": ("0.92 to 1.02", "0.97 to 1.06"),
    "lbcl": ("0.91 to 0.99", "-"),
}


def methods_table(machine: Machine, work: Work, row: LongestRow) -> str:
    """For LLaMA on 8 GPUs, ZeRO 2, the fifteenth task."""
    lines = []
    for name, shape in SHAPES.items():
        model = llama(*shape)
        layers = widths(model, target_modules(model, "llama2", None))
        for method, ratios in STEP.items():
            recipe = _recipe(method)
            kind = adapter_kind(recipe.adapter, model, "llama2", recipe.method)
            step = sum(memory_per_rank(recipe, kind, model, row, world=GPUS).values())
            before, after = _seconds(method, model, layers, machine, work)
            lines.append([name, method, *ratios, f"{step / GB:.1f}", f"{before:.2f}", f"{after:.1f}"])
    heads = ["backbone", "method", "step / inclora, small backbones", "layers of these widths", "GB in a step"]
    return markdown([*heads, "s before training", "s when a task ends"], lines)


def _recipe(method: str) -> Recipe:
    tasks = ", ".join(["dbpedia", "amazon", "agnews", "yahoo", "yelp", "MNLI", "CB", "COPA", "QQP", "RTE", "IMDB"])
    order = f"order={{tasks: [{tasks}, SST-2, MultiRC, BoolQA, WiC]}}"
    return Recipe.load("recipes/llama2_order1.yaml", [f"method={method}", order])


def _seconds(
    method: str, model: Any, layers: Sequence[tuple[int, int]], machine: Machine, work: Work
) -> tuple[float, float]:
    """Before training and when the task ends, beside what `inclora` does.

    A forward takes 2 N operations a token, a backward with recomputation 4 N more.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    speed = GPUS * machine.flops * machine.share
    if method == "lbcl":
        sums = 8 * work.tokens * sum(4 * RANK * (TASK - 1) * (d_in + d_out) for d_in, d_out in layers)
        passes = 6 * count * 8 + 2 * count * (2 * OTHER_ROWS + 8)  # seed rows with backward; losses noted
        joins = sum(4 * RANK**2 * TASK * (d_in + d_out) for d_in, d_out in layers)  # new columns off the old, QR
        return (sums + passes * work.tokens) / speed, joins / machine.flops_64
    if method == "gorp":  # the first global batch runs backward once; SVDs of r columns
        columns = sum(4 * RANK**2 * TASK * (d_in + d_out) for d_in, d_out in layers)
        return 6 * count * 64 * work.tokens / speed, columns / machine.flops_64
    if method == "pegp":
        growth = sum(GROWTH * d_in**3 for d_in, _ in layers[::2])  # q and v of a layer read one tensor
        return 0.0, 2 * count * 256 * work.tokens / speed + growth / machine.flops_64
    return 0.0, 0.0
