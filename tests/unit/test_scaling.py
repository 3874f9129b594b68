"""The page of what streams cost."""

import pytest

from benchmarks.scaling import PAGE, SHAPES, filled, llama
from pipeline.adapter_kinds import adapter_kind
from pipeline.memory_estimate import LongestRow, feature_bytes, frozen_bytes, memory_per_rank
from pipeline.recipe import Recipe


def test_its_tables_are_those_of_the_estimator() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page, "out of date: run python benchmarks/scaling.py"


def test_its_cells_are_what_a_hand_computes() -> None:
    """LLaMA-2-7B, q and v: 64 layers of 4096 x 4096."""
    page = PAGE.read_text(encoding="utf-8")
    lora = 64 * 8 * (4096 + 4096) * 4  # bytes of one task
    bases = 64 * 2 * 4096 * 8 * 4
    parameters = 6_738_415_616
    training = 6 * parameters * 8250 * 200 / (8 * 989e12 * 0.4)
    assert f"| LLaMA-2-7B | LoRA or triplets, all stages on disk | {lora / 1e9:.2f} |" in page
    assert f"| {4 * bases / 1e9:.2f} | {15 * bases / 1e9:.2f} | {100 * bases / 1e9:.2f} | r directions a task |" in page
    assert f"| LLaMA-2-7B | 8 | {training:.0f} | {lora / 1e6:.0f} |" in page


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
