"""What streams cost on paper: `python benchmarks/scaling.py [--check]` writes the tables of docs/scaling.md.

And the line "# Needs:" of the recipes of backbones that this project has not run.

Legend: N parameters; d_in, d_out widths of a layer; r LoRA's rank; T tasks.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `python benchmarks/scaling.py` puts this folder first; ours start at the repository.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.scaling_methods import methods_table
from benchmarks.shapes import GB, SHAPES, T5_SHAPES, Machine, Work, llama, markdown, t5, widths
from pipeline.adapter_kinds import adapter_kind
from pipeline.layers import full_rank_modules, target_modules
from pipeline.memory_estimate import LongestRow, Scored, ending_bytes, feature_bytes, memory_per_rank, scoring_bytes
from pipeline.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scaling.md"
GPUS = (1, 8, 16, 64)
GROWTH = 12  # operations d^3 of an eigendecomposition and a QR of [d, d]
ROW = LongestRow(tokens=522, label_tokens=10)  # 512 of prompt, a label of ten: what the benchmark allows
SCORED = Scored(prompt_tokens=512, option_tokens=60)  # fourteen labels of four tokens are the most of any task
ENERGY_SHARE = {1: 0.54, 14: 0.82}  # of a layer input's directions that PEGP protects at energy 0.99, on mini_llama2


RECIPES = {"llama2_*.yaml": "LLaMA-2-7B", "t5_base_*.yaml": "T5-base", "t5_large_*.yaml": "T5-large"}


def memory_table() -> str:
    """Estimated GB on one GPU while training, as `--plan` counts them."""
    rows = []
    plans: list[tuple[str, Any, str, list[str]]] = [("T5-large", t5(*T5_SHAPES["T5-large"]), "t5_large", [])]
    for name, shape in SHAPES.items():
        model = llama(*shape)
        plans += [
            (name, model, "llama2", []),
            (name, model, "llama2", ["zero=3"]),
            (name, model, "llama2", ["zero=3", "engine.offload=parameters"]),
            (name, model, "llama2", ["model.quantization=nf4", "training.optimizer=adamw_8bit"]),
        ]
    for name, model, recipe_name, changes in plans:
        recipe = Recipe.load(f"recipes/{recipe_name}_order1.yaml", changes)
        kind = adapter_kind(recipe.adapter, model, recipe.model.family, recipe.method)
        scoring, features = sum(scoring_bytes(recipe, model, SCORED).values()), feature_bytes(recipe, kind, model)
        sizes = [sum(memory_per_rank(recipe, kind, model, ROW, world=world).values()) for world in GPUS]
        setting = " ".join(changes) or f"zero={recipe.engine.zero}"
        rows.append(
            [name, setting, *(f"{size / GB:.1f}" for size in sizes), f"{scoring / GB:.1f}", f"{features / GB:.1f}"]
        )
    heads = ["backbone", "setting", *(f"{count} GPU" for count in GPUS), "while scoring", "sums of features"]
    return markdown(heads, rows)


def needs(path: Path) -> str:
    """The line of a recipe that says which GPU it needs."""
    name = next(name for pattern, name in RECIPES.items() if path.match(pattern))
    model = t5(*T5_SHAPES[name]) if name in T5_SHAPES else llama(*SHAPES[name])
    recipe = Recipe.load(str(path))
    kind = adapter_kind(recipe.adapter, model, recipe.model.family, recipe.method)
    step = sum(memory_per_rank(recipe, kind, model, ROW, world=1).values())
    scoring = sum(scoring_bytes(recipe, model, SCORED).values())
    end = ending_bytes(recipe, kind, model, ROW)
    sizes = [math.ceil(size / GB) for size in (step, scoring, end)]
    return (
        f"# Needs: a GPU of about {max(sizes)} GB (estimated for {recipe.method.name.upper()}: "
        f"{sizes[0]} in a step, {sizes[1]} while scoring, {sizes[2]} at most when a task ends)."
    )


def recipes() -> list[Path]:
    """Those of backbones that this project has not run."""
    return sorted(path for pattern in RECIPES for path in (ROOT / "recipes").glob(pattern))


def with_needs(path: Path) -> str:
    """A recipe's text with its line as it is now."""
    text, count = re.subn(r"^# Needs: .*$", needs(path), path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert count == 1, f"{path}: no place for what it needs"
    return text


def growth_table(tasks: Sequence[int] = (1, 4, 15, 100)) -> str:
    """GB that a stream's stages and bases take, q and v adapted at r = 8, and what bounds them."""
    rows, r = [], 8
    for name, shape in SHAPES.items():
        model = llama(*shape)
        layers = widths(model, target_modules(model, "llama2", None))
        inputs = [d_in for d_in, _ in layers[::2]]  # q and v of a layer read one tensor
        gates = widths(model, full_rank_modules(model, "llama2", None))
        lora = 4 * r * sum(d_in + d_out for d_in, d_out in layers)
        full = 4 * sum(d * d for d in inputs)
        narrow = [_narrow_bases(layers, r * T) for T in tasks]
        kept = [sum(_narrow_bases(layers, r * t) for t in range(1, T + 1)) for T in tasks]
        masters = 4 * sum(d_in * d_out for d_in, d_out in gates)
        rows += [
            [
                name,
                "LoRA or triplets, all stages on disk",
                *(f"{lora * T / GB:.2f}" for T in tasks),
                "no bound: one more a task",
            ],
            [
                name,
                "PEGP's bases in memory",
                *(f"{_share(T) * full / GB:.2f}" for T in tasks),
                f"{full / GB:.2f}: every direction protected",
            ],
            [
                name,
                "PEGP's bases, all stages on disk",
                *(f"{sum(_share(t) for t in range(1, T + 1)) * full / GB:.1f}" for T in tasks),
                "no bound: each stage holds its own",
            ],
            [
                name,
                "GORP's and LB-CL's bases in memory, at most",
                *(f"{size / GB:.2f}" for size in narrow),
                "r directions a task",
            ],
            [
                name,
                "GORP's and LB-CL's bases, all stages on disk, at most",
                *(f"{size / GB:.1f}" for size in kept),
                "no bound: each stage holds its own",
            ],
            [
                name,
                "GORP's full-rank weights, all stages on disk",
                *(f"{masters * T / GB:.1f}" for T in tasks),
                f"no bound on disk; {2 * masters / GB:.1f} on each rank's host",
            ],
        ]
    return markdown(["backbone", "what", *(f"{count} tasks" for count in tasks), "bound"], rows)


def _narrow_bases(layers: Sequence[tuple[int, int]], directions: int) -> float:
    """Bytes of a basis on either side of each layer."""
    return 4 * sum(d * min(d, directions) for pair in layers for d in pair)


def _share(tasks: int) -> float:
    """Of directions protected: between the two measured shares by the logarithm of tasks, never above all."""
    low, high = ENERGY_SHARE[1], ENERGY_SHARE[14]
    return min(1.0, low + (high - low) * float(torch.tensor(float(tasks)).log() / torch.tensor(14.0).log()))


def time_table(machine: Machine, work: Work) -> str:
    """Seconds of a task's parts."""
    rows = []
    for name, shape in SHAPES.items():
        model = llama(*shape)
        count = sum(parameter.numel() for parameter in model.parameters())
        tokens = work.train_rows * work.tokens
        # Forward 2 N a token, backward 2 N (frozen weights have no gradient), recomputation 2 N.
        train = 6 * count * tokens
        trained = sum(d_in + d_out for d_in, d_out in widths(model, target_modules(model, "llama2", None))) * 8
        features = 2 * count * 256 * work.tokens
        read = 2 * count * work.test_rows * work.tokens
        # Each token written reads all weights once for a batch of rows.
        written = 2 * count * work.written * work.test_rows / work.scored_together / machine.bytes_per_s
        for gpus in GPUS[1:]:
            speed = gpus * machine.flops * machine.share
            cell = read / speed + written / gpus
            growth = sum(GROWTH * d_in**3 for d_in, _ in widths(model, target_modules(model, "llama2", None))[::2])
            rows.append(
                [
                    name,
                    str(gpus),
                    f"{train / speed:.0f}",
                    f"{4 * trained / 1e6:.0f}",
                    f"{features / speed:.1f}",
                    f"{growth / machine.flops_64:.0f}",
                    f"{cell:.1f}",
                    f"{7 * cell / 60:.1f}",
                    f"{29 * cell / 60:.1f}",
                    f"{199 * cell / 3600:.1f}",
                ]
            )
    heads = [
        "backbone",
        "GPUs",
        "training, s",
        "averaged a step, MB",
        "PEGP's feature pass, s",
        "its growth, s",
        "a cell, s",
    ]
    return markdown([*heads, "4 tasks' cells, min", "15, min", "100, h"], rows)


def tables() -> dict[str, str]:
    """The page's tables by name."""
    return {
        "memory": memory_table(),
        "growth": growth_table(),
        "time": time_table(Machine(), Work()),
        "methods": methods_table(Machine(), Work(), ROW),
    }


def filled(page: str) -> str:
    """The page with its tables as they are now."""
    for name, table in tables().items():
        block = f"<!-- {name} -->\n{table}\n<!-- end -->"
        page, count = re.subn(rf"<!-- {name} -->\n.*?<!-- end -->", lambda _, new=block: new, page, flags=re.DOTALL)
        assert count == 1, f"{PAGE}: no place for the table {name}"
    return page


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python benchmarks/scaling.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a file is out of date")
    options = parser.parse_args()
    new = {PAGE: filled(PAGE.read_text(encoding="utf-8"))} | {path: with_needs(path) for path in recipes()}
    stale = [path for path, text in new.items() if path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'out of date' if options.check else 'written'}")
        if not options.check:
            path.write_text(new[path], encoding="utf-8")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
