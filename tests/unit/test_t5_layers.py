"""T5's layers for scoring: the numbers of transformers' layers, and their bits wherever they are not meant."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense, T5LayerNorm

from pipeline import t5_layers
from pipeline.frozen_linear import FEWEST_ROWS
from pipeline.t5_layers import FusedDense, LeanNorm, speed_up_t5

D, WIDE = 24, 40
MANY = FEWEST_ROWS + 3


def _norms(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """transformers' norm and ours, of the same weights."""
    plain = T5LayerNorm(D).requires_grad_(False)
    plain.weight.copy_(torch.randn(D, generator=torch.Generator().manual_seed(seed)))
    lean = nn.Sequential(copy.deepcopy(plain))
    speed_up_t5(lean)
    assert type(lean[0]) is LeanNorm
    return plain.to(dtype), lean[0].to(dtype)


def _denses(**config: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    plain = T5DenseActDense(T5Config(d_model=D, d_ff=WIDE, dropout_rate=0.5, **config)).eval().requires_grad_(False)
    fused = nn.Sequential(copy.deepcopy(plain))
    speed_up_t5(fused)
    return plain, fused[0]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What oneDNN's products were written through."""
    seen: list[str] = []
    onednn = t5_layers.onednn

    def spy(x: torch.Tensor, weight: torch.Tensor, then: Any) -> torch.Tensor:
        seen.append(then)
        return onednn(x, weight, then)

    monkeypatch.setattr(t5_layers, "onednn", spy)
    return seen


@given(st.integers(0, 10**6), st.sampled_from([1e-12, 1e-3, 1.0, 1e6]), st.sampled_from([(D,), (5, D), (2, 3, D)]))
def test_a_norm_is_that_of_transformers(seed: int, size: float, shape: tuple[int, ...]) -> None:
    """To some units in the last place: each takes a sum of squares, a root and two products."""
    plain, lean = _norms(seed)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    before = x.clone()
    with torch.inference_mode():
        assert_close(lean(x), plain(x), rtol=1e-6, atol=0)
        assert torch.equal(lean(torch.zeros(shape)), torch.zeros(shape))
    assert torch.equal(x, before), "a residual is still to be added to it"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_in_training_and_in_other_types_a_norm_is_transformers_to_the_bit(dtype: torch.dtype) -> None:
    plain, lean = _norms(dtype=dtype)
    x = torch.randn(MANY, D, dtype=dtype)
    assert torch.equal(lean(x), plain(x))
    with torch.inference_mode():
        assert torch.equal(lean(x), plain(x)) or dtype == torch.float32


@pytest.mark.parametrize("shape", [(MANY, D), (5, MANY, D)])
def test_a_feed_forward_layer_is_that_of_transformers(shape: tuple[int, ...], products: list[str]) -> None:
    plain, fused = _denses()
    assert type(fused) is FusedDense
    x = torch.randn(shape)
    with torch.inference_mode():
        assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-6)
    assert products == ["relu"]


def test_few_rows_and_what_trains_or_watches_or_adds_go_through_transformers_layer(products: list[str]) -> None:
    plain, fused = _denses()
    x = torch.randn(MANY, D)
    assert torch.equal(fused(x), plain(x)), "outside of scoring"
    with torch.inference_mode():
        assert torch.equal(fused(x[:2]), plain(x[:2]))
        layer, seen = fused.wi, []
        handle = layer.register_forward_hook(lambda *found: seen.append(found))
        assert torch.equal(fused(x), plain(x))
        handle.remove()
        assert len(seen) == 1
        fused.wi = nn.Sequential(layer)  # as an adapter's or a packed layer: what it does is its own
        assert torch.equal(fused(x), plain(x))
        fused.wi = layer
        torch.manual_seed(2)
        dropped = fused.train()(x)
        torch.manual_seed(2)
        assert torch.equal(dropped, plain.train()(x)), "dropout"
    assert not products


def test_layers_of_another_form_stay() -> None:
    assert type(_denses(feed_forward_proj="gelu_new")[1]) is T5DenseActDense
    shape = {"d_model": D, "d_kv": 8, "d_ff": WIDE, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    model = T5ForConditionalGeneration(T5Config(**shape, feed_forward_proj="gated-gelu"))
    speed_up_t5(model)
    kinds = {type(module) for module in model.modules()}
    assert T5DenseGatedActDense in kinds
    assert LeanNorm in kinds
    assert not kinds & {FusedDense, T5LayerNorm}
