"""Quantized backbones and the 8-bit optimizer under DeepSpeed: ranks and stages do not matter, nothing leaks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from comparing import flat, full, relative
from rank_cases import Case

FAMILIES = ("t5", "llama2")


def cases(places: Iterable[int], **changes: Any) -> list[Case]:
    return [Case("two_tasks", family, zero, method="pegp", **changes) for family in FAMILIES for zero in places]


NF4 = cases((0, 1, 2, 3), bits="nf4")
OFFLOADED = cases((3,), bits="nf4", offload="parameters")
BF16 = cases((2, 3), bits="nf4", precision="bf16")
INT8 = cases((0, 2), bits="int8")
# Tensors below 4,096 numbers, as all are here, keep moments of 32 bits: then it must be AdamW.
SMALL = [*cases((0, 1, 2, 3), optimizer="adamw_8bit"), *cases((2,), optimizer="adamw_8bit", offload="optimizer")]
# As recipes/llama2_nf4_order1.yaml has it.
SHIPPED = Case(
    "two_tasks", "llama2", 2, "none", "bf16", method="pegp", bits="nf4", optimizer="adamw_8bit", checkpointing=True
)
BF16 = [*BF16, SHIPPED]
LARGE = [
    *cases((1, 2, 3), optimizer="adamw_8bit", adapter="wide"),
    *cases((2,), optimizer="adamw_8bit", adapter="wide", offload="optimizer"),
]
FAST = [SHIPPED, NF4[2]]


def apart(one: Mapping[str, Any], other: Mapping[str, Any], task: str) -> float:
    return relative(flat(one[task], list(other[task])), flat(other[task], list(other[task])))


@pytest.mark.parametrize("case", full([*NF4, *OFFLOADED, *INT8], but=FAST), ids=str)
def test_ranks_do_not_matter_to_a_quantized_backbone(runs, case: Case) -> None:
    """methods.md 8.7, of both tasks."""
    one, (first, second) = runs.one(case), runs.two(case)
    assert all(torch.equal(first["trained_2"][name], value) for name, value in second["trained_2"].items())
    assert runs.note(case, "1 vs 2 ranks, task 1", apart(first, one, "trained_1")) <= 1e-5
    assert runs.note(case, "1 vs 2 ranks, task 2", apart(first, one, "trained_2")) <= 1e-4
    for result in (one, first):
        assert runs.note(case, "leak", max(result["leaks"].values())) <= 1e-5
        assert runs.note(case, "engine vs stored", abs(result["live_2"] / result["stored_2"] - 1)) <= 1e-5


@pytest.mark.parametrize("case", full(BF16, but=FAST), ids=str)
def test_nothing_leaks_beside_a_quantized_backbone_in_bf16(runs, case: Case) -> None:
    for result in (runs.one(case), *runs.two(case)):
        assert runs.note(case, "leak", max(result["leaks"].values())) <= 1e-5


PAIRS = [(small, replace(small, optimizer="adamw")) for small in SMALL]


@pytest.mark.parametrize(
    ("small", "plain"),
    [pair if pair[0] in FAST else pytest.param(*pair, marks=pytest.mark.full) for pair in PAIRS],
    ids=str,
)
def test_the_8_bit_optimizer_is_adamw_on_small_tensors(runs, small: Case, plain: Case) -> None:
    for ours, theirs in ((runs.one(small), runs.one(plain)), (runs.two(small)[0], runs.two(plain)[0])):
        assert runs.note(small, "task 1, against AdamW", apart(ours, theirs, "trained_1")) <= 1e-5
        assert runs.note(small, "task 2, against AdamW", apart(ours, theirs, "trained_2")) <= 1e-4


LARGER = [(large, replace(large, optimizer="adamw", offload="none")) for large in LARGE]


@pytest.mark.parametrize(
    ("large", "plain"),
    [pair if pair[0] in FAST else pytest.param(*pair, marks=pytest.mark.full) for pair in LARGER],
    ids=str,
)
def test_moments_of_8_bits_train_nearly_as_adamw(runs, large: Case, plain: Case) -> None:
    """Where tensors are large enough for 8 bits: close, and not equal, which would be the 32-bit kind."""
    for ours, theirs in ((runs.one(large), runs.one(plain)), (runs.two(large)[0], runs.two(plain)[0])):
        assert 1e-5 < runs.note(large, "task 1, against AdamW", apart(ours, theirs, "trained_1")) <= 0.1
        assert ours["loss_1"] == pytest.approx(theirs["loss_1"], rel=0.05)
