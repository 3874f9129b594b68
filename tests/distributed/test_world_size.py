"""1 rank with accumulation 4 == 2 ranks with accumulation 2 == plain float64 on whole global batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comparing import change, flat, full, names, plain, relative
from rank_cases import ROWS, TRAINING, Case

FAMILIES = ("t5", "llama2")
STAGES = (0, 1, 2, 3)

FAST = [Case("train", "t5", 2, dropout=0.1), Case("train", "llama2", 3, dropout=0.1)]
PLAIN_FAST = [Case("train", "llama2", 0), Case("train", "t5", 3)]
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


CHECKPOINTING = [replace(case, checkpointing=True) for case in DROPOUT]


@pytest.mark.parametrize(
    ("case", "without"),
    [
        pytest.param(*pair, marks=[] if pair[1] == FAST[0] else pytest.mark.full, id=str(pair[0]))
        for pair in zip(CHECKPOINTING, DROPOUT, strict=True)
    ],
)
def test_recomputed_activations_change_nothing(runs, case: Case, without: Case) -> None:
    for result, expected in ((runs.one(case), runs.one(without)), (runs.two(case)[1], runs.two(without)[1])):
        difference = relative(change(result), change(expected))
        assert runs.note(case, "on vs off", difference) <= 1e-6


BF16 = [Case("train", family, zero, precision="bf16") for family in FAMILIES for zero in (2, 3)]


@pytest.mark.parametrize("case", full(BF16, but=BF16[:1]), ids=str)
def test_bf16_trains_alike_on_one_and_two_ranks_and_near_float64(runs, case: Case) -> None:
    one, two = runs.one(case), runs.two(case)[0]
    reference = plain(runs, case, one)

    trained = flat(one["trained"], names(one))
    assert not torch.equal(trained, trained.bfloat16().double()), "masters hold more than bf16"
    difference = runs.note(case, "1 vs 2 ranks", relative(change(two), change(one)))
    assert difference <= 1e-5
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    # bf16 keeps 8 bits: a rounding of 2^-9 in each of some tens of products on the way to a loss.
    runs.note(case, "vs float64", relative(change(one), change(one, reference)))
    assert one["loss"] == pytest.approx(reference.losses, rel=0.02)


SEQLORA = [(replace(case, method="seqlora"), case) for case in NO_DROPOUT]


@pytest.mark.parametrize(
    ("case", "inclora"),
    [
        pytest.param(*pair, marks=[] if pair[1] == PLAIN_FAST[0] else pytest.mark.full, id=str(pair[0]))
        for pair in SEQLORA
    ],
)
def test_the_first_task_of_seqlora_is_that_of_inclora_bit_for_bit(runs, case: Case, inclora: Case) -> None:
    one, other = runs.one(case), runs.one(inclora)
    assert one["loss"] == other["loss"]
    assert all(torch.equal(one["trained"][name], other["trained"][name]) for name in names(one))


FLOAT64 = [Case("float64", family) for family in FAMILIES]


@pytest.mark.parametrize("case", FLOAT64, ids=str)
def test_accumulated_micro_batches_equal_one_batch_in_float64(runs, case: Case) -> None:
    """Outside DeepSpeed. What is left are roundings of 1e-16, grown by Adam's division by eps = 1e-4 and more."""
    one = runs.one(case)
    difference = relative(change(one), change(one, plain(runs, case, one)))
    assert runs.note(case, "accumulated vs one batch", difference) <= 1e-8
