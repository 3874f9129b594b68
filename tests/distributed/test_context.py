"""What a method reads and writes through `ctx`, per ZeRO stage and offload, on 1 and on 2 ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from comparing import change, flat, full, names, plain, relative
from plain_reference import Float64, branch, load_plain, pad
from rank_cases import L2, TRAINING, WRITE_AFTER, Case
from torch import Tensor

PLACES = [
    (0, "none"),
    (1, "none"),
    (2, "none"),
    (3, "none"),
    (1, "optimizer"),
    (2, "optimizer"),
    (3, "optimizer"),
    (3, "parameters"),
]


def matrix(run: str) -> list[Case]:
    return [Case(run, family, zero, offload) for family in ("t5", "llama2") for zero, offload in PLACES]


ACCESS_FAST = [
    Case("access", "t5", 0),
    Case("access", "llama2", 1),
    Case("access", "t5", 2),
    Case("access", "llama2", 3),
]


def worst_step(seen: Sequence[Mapping[str, Tensor]], wanted: Sequence[Mapping[str, Tensor]]) -> float:
    assert len(seen) == len(wanted) == 6
    return max(relative(flat(a, list(b)), flat(b, list(b))) for a, b in zip(seen, wanted, strict=True))


@pytest.mark.parametrize("case", full(matrix("access"), but=ACCESS_FAST), ids=str)
def test_reads_and_writes_equal_plain_pytorch(runs, case: Case) -> None:
    for result in (runs.one(case), *runs.two(case)):
        written = result["written"]
        reference = plain(
            runs, case, result, writes={WRITE_AFTER: {name: part["value"] for name, part in written.items()}}
        )
        order = names(result)
        odd = [name for name in order if written[name]["value"].numel() % 2]
        assert odd, "some tensor must not divide by the number of ranks"

        figures = {
            "gradient": worst_step(result["gradients"], reference.gradients),
            "moment": worst_step(result["moments"], reference.moments),
            "master": worst_step(result["masters"], reference.masters),
        }
        for figure, value in figures.items():
            runs.note(case, figure, value)
            assert value <= 1e-5, figure
        for name in order:
            assert torch.equal(written[name]["master"], written[name]["value"])
            assert torch.equal(written[name]["forward"], written[name]["value"])
        assert relative(change(result), change(result, reference)) <= 1e-5
    # The forward after the write used the written values: its loss is the reference's.
    assert runs.one(case)["loss"] == pytest.approx(reference.losses, rel=1e-5)
    assert runs.two(case)[0]["loss"] == pytest.approx(reference.losses, rel=1e-5)


BF16 = [Case("access", family, zero, precision="bf16") for family in ("t5", "llama2") for zero in (2, 3)]


@pytest.mark.parametrize("case", full(BF16, but=BF16[:1]), ids=str)
def test_writes_in_bf16_set_a_float32_master_and_a_rounded_copy(runs, case: Case) -> None:
    for result in (runs.one(case), *runs.two(case)):
        for part in result["written"].values():
            assert torch.equal(part["master"], part["value"])
            assert part["forward"].dtype == torch.bfloat16
            assert torch.equal(part["forward"], part["value"].bfloat16())
        trained = flat(result["trained"], names(result))
        assert not torch.equal(trained, trained.bfloat16().double()), "masters hold more than bf16"


PENALTY_FAST = [Case("penalty", "llama2", 2)]


def pull_to_zero(parameters: Mapping[str, Tensor]) -> Tensor:
    return L2 * torch.stack([v.square().sum() for name, v in parameters.items() if name.endswith(".A")]).sum()


@pytest.mark.parametrize("case", full(matrix("penalty"), but=PENALTY_FAST), ids=str)
def test_a_penalty_counts_once_a_step(runs, case: Case) -> None:
    one, two = runs.one(case), runs.two(case)[0]

    reference = plain(runs, case, one, penalty=pull_to_zero)
    without = plain(runs, case, one)
    assert relative(change(one, without), change(one, reference)) > 0.1, "the penalty must matter"
    for world, result in ((1, one), (2, two)):
        difference = relative(change(result), change(result, reference))
        assert runs.note(case, f"{world} vs plain", difference) <= 1e-5
        # What is logged is the loss over label tokens, without the penalty.
        assert result["loss"] == pytest.approx(reference.losses, rel=1e-5)


ROWS_FAST = [Case("run_rows", "t5", 1), Case("run_rows", "llama2", 3)]
ROWS_ALL = [Case("run_rows", family, zero) for family in ("t5", "llama2") for zero in (0, 1, 2, 3)]


@pytest.mark.parametrize("case", full(ROWS_ALL, but=ROWS_FAST), ids=str)
def test_run_rows_shows_hooks_every_row_once(runs, case: Case) -> None:
    one, (first, second) = runs.one(case), runs.two(case)
    reference = hooked(runs, case, one)

    for result in (one, first, second):
        assert result["loss_before"] == pytest.approx(reference["loss"], rel=1e-5)
        assert result["loss_started"] == pytest.approx(reference["loss"], rel=1e-5)
        assert result["training_again"]
        assert not result["embeddings_differentiable"], "training needs no backward below the first adapter"
        for what in ("inputs", "gradients"):
            for name, moment in result[f"{what}_before"].items():
                assert relative(moment, reference[what][name]) <= 1e-5, (what, name)
        for name, moment in result["inputs_started"].items():
            assert relative(moment, reference["inputs"][name]) <= 1e-5, name
    # Rows run beforehand leave no trace in training.
    assert relative(change(one), change(one, plain(runs, case, one))) <= 1e-5
    assert relative(change(first), change(one)) <= 1e-5


def hooked(runs: Any, case: Case, result: Mapping[str, Any]) -> dict[str, Any]:
    """Loss and second moments from plain PyTorch, in the micro-batches' padding (hooks see it)."""
    model = load_plain(runs.backbones / case.backbone, case.family)
    model.enable_input_require_grads()
    layers = [name.removesuffix(".A") for name in names(result) if name.endswith(".A")]
    sums: dict[str, Any] = {"inputs": {}, "gradients": {}, "loss": 0.0}

    def hook(name: str) -> Any:
        def keep(layer: Any, inputs: Any, output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)
            sums["inputs"][name] = sums["inputs"].get(name, 0) + x.T @ x
            output.register_hook(lambda g: add(name, g.flatten(0, -2)))

        return keep

    def add(name: str, gradient: Tensor) -> None:
        sums["gradients"][name] = sums["gradients"].get(name, 0) + gradient.T @ gradient

    for name in layers:
        branch(model, name).base.register_forward_hook(hook(name))
    examples = [case.examples[row] for row in result["rows"]]
    tokens = sum(len(example.label_ids) for example in examples)
    size = TRAINING.micro_batch_size
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        share = sum(len(example.label_ids) for example in part) / tokens
        with Float64():
            loss = model(**pad(part, case.family)).loss * share
            loss.backward()
        sums["loss"] += loss.item()
    return sums
