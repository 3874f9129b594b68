"""The page of what streams cost."""

from pathlib import Path

import pytest

from benchmarks.scaling import PAGE, SCORED, filled, recipes, with_needs
from benchmarks.scaling_methods import methods_table
from benchmarks.shapes import SHAPES, T5_SHAPES, Machine, Work, llama, t5
from pipeline.adapter_kinds import adapter_kind
from pipeline.memory_estimate import (
    LongestRow,
    ending_bytes,
    feature_bytes,
    frozen_bytes,
    memory_per_rank,
    scoring_bytes,
)
from pipeline.recipe import Recipe


def test_its_tables_are_those_of_the_estimator() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page, "out of date: run python benchmarks/scaling.py"


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.stem)
def test_a_recipe_says_which_gpu_it_needs(path: Path) -> None:
    assert with_needs(path) == path.read_text(encoding="utf-8"), "out of date: run python benchmarks/scaling.py"


def test_its_cells_are_what_a_hand_computes() -> None:
    """LLaMA-2-7B, q and v: 64 layers of 4096 x 4096."""
    page = PAGE.read_text(encoding="utf-8")
    lora = 64 * 8 * (4096 + 4096) * 4  # bytes of one task
    bases = 64 * 2 * 4096 * 8 * 4
    parameters = 6_738_415_616
    training = 6 * parameters * 8250 * 200 / (8 * 989e12 * 0.4)
    assert f"| LLaMA-2-7B | LoRA or triplets, all stages on disk | {lora / 1e9:.2f} |" in page
    assert f"| {4 * bases / 1e9:.2f} | {15 * bases / 1e9:.2f} | {100 * bases / 1e9:.2f} | r directions a task |" in page
    on_disk = [sum(range(1, count + 1)) * bases / 1e9 for count in (1, 4, 15, 100)]
    cells = " | ".join(f"{size:.1f}" for size in on_disk)
    assert f"| LLaMA-2-7B | GORP's and LB-CL's bases, all stages on disk, at most | {cells} |" in page
    assert f"| LLaMA-2-7B | 8 | {training:.0f} | {lora / 1e6:.0f} |" in page


def test_what_methods_add_is_what_a_hand_computes() -> None:
    """LLaMA-2-7B on 8 GPUs at task 15: 112 old triplets in each of 64 layers of 4096 x 4096; 32 distinct inputs."""
    rows = [line.split(" | ") for line in methods_table(Machine(), Work(), LongestRow(522, 10)).splitlines()[2:]]
    found = {row[1]: (float(row[4]), row[5], row[6].removesuffix(" |")) for row in rows if "LLaMA-2-7B" in row[0]}
    speed, tokens, parameters = 8 * 989e12 * 0.4, 200, 6_738_415_616
    sums = 8 * tokens * 64 * 4 * 112 * 8192
    looks = (6 * 8 + 2 * (64 + 64 + 8)) * parameters * tokens
    assert found["lbcl"][1] == f"{(sums + looks) / speed:.2f}"
    assert found["gorp"][1] == f"{6 * 64 * parameters * tokens / speed:.2f}"
    assert found["pegp"][2] == f"{2 * 256 * parameters * tokens / speed + 32 * 12 * 4096**3 / 1e12:.1f}"
    assert found["pegp"][0] - found["inclora"][0] == pytest.approx(64 * 4096 * 2048 * 2 / 1e9, abs=0.1)
    assert found["lbcl"][0] - found["inclora"][0] == pytest.approx(64 * 2 * 4096 * 112 * 2 / 1e9, abs=0.1)


def test_the_estimate_is_what_a_hand_computes() -> None:
    """LLaMA-2-7B by the shipped recipe on two ranks."""
    model = llama(*SHAPES["LLaMA-2-7B"])
    recipe = Recipe.load("recipes/llama2_order1.yaml")
    kind = adapter_kind(recipe.adapter, model, "llama2", recipe.method)
    parts = memory_per_rank(recipe, kind, model, LongestRow(522, 10), world=2)
    trained, square = 64 * 8 * 8192, 4096**2
    assert parts["frozen weights"] == frozen_bytes(recipe, model) == 2 * 6_738_415_616
    assert parts["adapter and its gradients"] == trained * (2 + 4 / 2)
    assert parts["gradients on their way to other ranks"] == trained * 4 * 2
    assert parts["optimizer"] == trained * 12 / 2
    assert parts["protected bases, at most"] == 64 * square // 2 * 2
    assert feature_bytes(recipe, kind, model) == 64 * square * 4
    ends = ending_bytes(recipe, kind, model, LongestRow(522, 10))
    assert ends == 2 * 6_738_415_616 + 64 * square * 4 + 5 * 8 * square  # a layer in work takes less
    inputs, block = 32 * 522 * 4 * 4096 * 2, 522 * 4 * 4096 * (34 + 5 * 32 * 522 / 4096)
    logits = 3 * 4 * 4 * 10 * 32000
    assert parts["activations of the longest micro-batch"] == pytest.approx(inputs + block + logits)


def test_recomputation_cannot_drop_what_int8_layers_read() -> None:
    """LLaMA-2-7B: each of 32 blocks has q, k, v, o, gate and up over 4096 numbers and down over 11008."""
    model = llama(*SHAPES["LLaMA-2-7B"])
    activations = {}
    for bits in ("nf4", "int8"):
        recipe = Recipe.load("recipes/llama2_order1.yaml", [f"model.quantization={bits}", "method=inclora"])
        kind = adapter_kind(recipe.adapter, model, "llama2", recipe.method)
        parts = memory_per_rank(recipe, kind, model, LongestRow(522, 10), world=1)
        activations[bits] = parts["activations of the longest micro-batch"]
    kept = 32 * (6 * 4096 + 11008) * 522 * 4 * 2  # tokens, rows, bytes
    assert activations["int8"] - activations["nf4"] == pytest.approx(kept)


def test_scoring_needs_a_cache() -> None:
    """LLaMA-2-7B in bf16: 2 x 32 x 4096 numbers a token; T5-large in fp32: of each decoder layer's cross-attention."""
    recipe = Recipe.load("recipes/llama2_order1.yaml", ["evaluation.batch_size=64"])
    found = scoring_bytes(recipe, llama(*SHAPES["LLaMA-2-7B"]), SCORED)
    assert found["cache of a batch"] == 2 * 32 * 4096 * 64 * (512 + 50) * 2
    work = "a layer in work, or options' logits"
    assert found[work] == (3 * 11008 + 4 * 4096) * 64 * 562 * 2 > 2**26 * (2 + 8)
    recipe = Recipe.load("recipes/llama2_order1.yaml", ["evaluation.batch_size=4"])
    assert scoring_bytes(recipe, llama(*SHAPES["LLaMA-2-7B"]), SCORED)[work] == (3 * 11008 + 4 * 4096) * 4 * 562 * 2
    few = SCORED._replace(prompt_tokens=8)
    assert scoring_bytes(recipe, llama(*SHAPES["LLaMA-2-7B"]), few)[work] == 4 * 60 * 32000 * (2 + 8)
    recipe = Recipe.load("recipes/t5_large_order1.yaml", ["evaluation.batch_size=8"])
    found = scoring_bytes(recipe, t5(*T5_SHAPES["T5-large"]), SCORED)
    assert found["cache of a batch"] == 2 * 24 * 1024 * 8 * 562 * 4
    assert found[work] == (3 * 4096 + 4 * 1024 + 3 * 16 * 512) * 8 * 562 * 4


def test_bases_of_singular_vectors_are_counted() -> None:
    """LB-CL's at the last of four tasks: 24 columns on either side of 64 layers; half the width at most."""
    model = llama(*SHAPES["LLaMA-2-7B"])
    for tasks, columns in ((4, 24), (300, 2048)):
        recipe = Recipe.load("recipes/llama2_order1.yaml", ["method=lbcl"])
        order = recipe.order.model_copy(update={"name": None, "tasks": [f"t{index}" for index in range(tasks)]})
        recipe = recipe.model_copy(update={"order": order})
        kind = adapter_kind(recipe.adapter, model, "llama2", recipe.method)
        parts = memory_per_rank(recipe, kind, model, LongestRow(522, 10), world=1)
        assert parts["protected bases, at most"] == 64 * 2 * 4096 * columns * 2
