"""O-LoRA's penalty: the naive double loop, its gradient, once per step, what it does to the overlap."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from one_rank import context, learn, new_method, tensors_of
from random_backbones import save_backbone
from torch import Tensor

from pipeline.methods.olora import sum_of_overlaps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbones") / "t5", "t5")


def naive(pasts: list[dict[str, Tensor]], new: dict[str, Tensor]) -> Tensor:
    """One entry after the other."""
    total = torch.zeros((), dtype=torch.float64)
    for past in pasts:
        for name, A in new.items():
            if name.endswith(".A"):
                for old_row in past[name].double():
                    for new_row in A.double():
                        total = total + (old_row * new_row).sum().abs()
    return total


def test_hand_computed_overlap_and_gradient() -> None:
    old = [(["q.A"], torch.tensor([[[1.0, 2.0], [0.0, -1.0]]]))]
    A = torch.tensor([[3.0, -1.0]], requires_grad=True)
    overlap = sum_of_overlaps(old, {"q.A": A})
    # A_old A_new^T = (3 - 2, 1) = (1, 1); the gradient is sign^T A_old = (1, 2) + (0, -1).
    assert overlap.item() == 2.0
    overlap.backward()
    assert A.grad.tolist() == [[1.0, 1.0]]


def test_the_penalty_and_its_gradient_equal_the_naive_double_loop(folder: Path) -> None:
    method = new_method(folder, "t5", "olora", lambda_1=0.5, lambda_2=0.25)
    pasts = [learn(folder, "t5", method, task) for task in (1, 2)]
    ctx = context(folder, "t5", method, 3)
    method.begin_task(ctx)
    new = tensors_of(method)
    for name, parameter in new.items():  # the gradient of a norm at zero is a matter of taste
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    penalty = method.penalty(ctx)
    penalty.backward()
    twins = {name: parameter.detach().double().requires_grad_() for name, parameter in new.items()}
    expected = 0.5 * naive(pasts, twins) + 0.25 * sum(twin.norm() for twin in twins.values())
    expected.backward()
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in new.items():
        difference = (parameter.grad.double() - twins[name].grad).norm() / twins[name].grad.norm()
        assert difference <= 1e-6, name
    entries = sum(2 * 3 * 3 for name in new if name.endswith(".A"))
    (record,) = method.records()
    assert record["sum"] == pytest.approx(naive(pasts, twins).item(), rel=1e-6)
    assert record["per_entry"] == pytest.approx(record["sum"] / entries)


def test_without_weights_or_a_past_it_is_inclora_bit_for_bit(folder: Path) -> None:
    plain, off, on = (
        new_method(folder, "t5", "inclora"),
        new_method(folder, "t5", "olora", lambda_1=0.0),
        new_method(folder, "t5", "olora"),
    )
    first = [learn(folder, "t5", method, 1) for method in (plain, off, on)]
    assert all(torch.equal(first[0][name], other[name]) for other in first[1:] for name in first[0])
    second = [learn(folder, "t5", method, 2) for method in (plain, off, on)]
    assert all(torch.equal(second[0][name], second[1][name]) for name in second[0])
    overlaps = [float(naive([first[0]], tensors)) for tensors in (second[0], second[2])]
    assert overlaps[1] < 0.7 * overlaps[0], "the penalty pushes new rows away from old ones"
