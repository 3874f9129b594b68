"""Frozen linear layers by oneDNN: the products and gradients of torch's own, and only where they are meant."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pipeline import frozen_linear
from pipeline.frozen_linear import FEWEST_ROWS, FrozenLinear, speed_up_frozen


@pytest.fixture
def layers() -> tuple[nn.Linear, FrozenLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=False).requires_grad_(False)
    model = nn.Sequential(nn.Linear(24, 40, bias=False).requires_grad_(False))
    model.load_state_dict({"0.weight": plain.weight})
    speed_up_frozen(model)
    assert isinstance(model[0], FrozenLinear)
    return plain, model[0]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that oneDNN was given."""
    seen: list[tuple[int, ...]] = []
    onednn = frozen_linear._onednn

    def spy(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return onednn(x, weight)

    monkeypatch.setattr(frozen_linear, "_onednn", spy)
    return seen


@pytest.mark.parametrize("shape", [(FEWEST_ROWS,), (4, 9), (2, 3, 7)])
def test_outputs_and_gradients_are_those_of_a_plain_layer(
    layers: tuple[nn.Linear, FrozenLinear], products: list[tuple[int, ...]], shape: tuple[int, ...]
) -> None:
    plain, frozen = layers
    x, delta = torch.randn(*shape, 24, requires_grad=True), torch.randn(*shape, 40)
    expected, got = plain(x), frozen(x)
    assert_close(got, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad((y * delta).sum(), x)[0] for y in (expected, got)]
    assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
    assert products == [(*shape, 24), (*shape, 40)]


def test_a_gradient_of_any_layout_is_taken(layers: tuple[nn.Linear, FrozenLinear]) -> None:
    plain, frozen = layers
    x, delta = torch.randn(6, 8, 24).transpose(0, 1).requires_grad_(), torch.randn(1, 6, 40).expand(8, 6, 40)
    gradients = [torch.autograd.grad(layer(x), x, delta)[0] for layer in (plain, frozen)]
    assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def test_a_weight_written_in_place_is_read(layers: tuple[nn.Linear, FrozenLinear]) -> None:
    _, frozen = layers
    x = torch.randn(FEWEST_ROWS, 24)
    before = frozen(x)
    frozen.weight.data.mul_(2)
    assert_close(frozen(x), 2 * before)


@pytest.mark.parametrize("case", ["few rows", "bf16", "float64", "zero rows", "ZeRO 3"])
def test_elsewhere_it_is_torchs_own_to_the_bit(
    layers: tuple[nn.Linear, FrozenLinear], products: list[tuple[int, ...]], case: str
) -> None:
    plain, frozen = layers
    dtype = {"bf16": torch.bfloat16, "float64": torch.float64}.get(case, torch.float32)
    rows = {"few rows": FEWEST_ROWS - 1, "zero rows": 0}.get(case, 2 * FEWEST_ROWS)
    plain, frozen = plain.to(dtype), frozen.to(dtype)
    if case == "ZeRO 3":
        frozen.weight.ds_id = 0  # type: ignore[attr-defined]
    x = torch.randn(rows, 24, dtype=dtype)
    assert torch.equal(frozen(x), plain(x))
    assert not products


def test_trained_layers_and_those_with_a_bias_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    speed_up_frozen(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear, FrozenLinear]
