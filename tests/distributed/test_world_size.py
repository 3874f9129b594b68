"""1 rank with accumulation 4 == 2 ranks with accumulation 2 == plain float64 on whole global batches."""

from __future__ import annotations

import pytest
import torch
from comparing import change, full, names, plain, relative
from rank_cases import ROWS, TRAINING, Case

FAMILIES = ("t5", "llama2")
STAGES = (0, 1, 2, 3)

FAST = [Case("train", "t5", 2, dropout=0.1), Case("train", "llama2", 3, dropout=0.1)]
PLAIN_FAST = [Case("train", "llama2", 0), Case("train", "t5", 1), Case("train", "llama2", 2), Case("train", "t5", 3)]
DROPOUT = [Case("train", family, zero, dropout=0.1) for family in FAMILIES for zero in STAGES]
NO_DROPOUT = [Case("train", family, zero) for family in FAMILIES for zero in STAGES]
OFFLOAD = [
    Case("train", family, zero, offload)
    for family in FAMILIES
    for zero, offload in [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")]
]


@pytest.mark.parametrize("case", full([*DROPOUT, *NO_DROPOUT, *OFFLOAD], but=[*FAST, *PLAIN_FAST]), ids=str)
def test_one_rank_trains_as_two_ranks_do(runs, case: Case) -> None:
    one, (first, second) = runs.one(case), runs.two(case)

    assert len(one["loss"]) == 6
    difference = runs.note(case, "1 vs 2 ranks", relative(change(first), change(one)))
    assert difference <= 1e-5
    assert first["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert first["rows"] == one["rows"] == [8, 8, 5] * 2
    assert sum(one["rows"]) == 2 * ROWS
    assert all(torch.equal(first["trained"][name], second["trained"][name]) for name in names(first))


@pytest.mark.parametrize("case", full([*NO_DROPOUT, *OFFLOAD], but=PLAIN_FAST), ids=str)
def test_training_equals_plain_pytorch_in_float64(runs, case: Case) -> None:
    one, two = runs.one(case), runs.two(case)[0]
    reference = plain(runs, case, one)

    assert any(norm > TRAINING.gradient_clipping for norm in reference.norms), "clipping must be at work"
    for world, result in ((1, one), (2, two)):
        difference = runs.note(case, f"{world} vs plain", relative(change(result), change(result, reference)))
        assert difference <= 1e-5
        assert result["loss"] == pytest.approx(reference.losses, rel=1e-5)
        assert result["gradient_norm"] == pytest.approx(reference.norms, rel=1e-4)
