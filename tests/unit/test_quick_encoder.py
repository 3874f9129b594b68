"""T5's encoder in its quick form: what transformers' encoder says, and only of encoders that are nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from transformers import T5Config, T5ForConditionalGeneration

from eval import quick_encoder as quick
from eval.quick_encoder import QuickEncoder, quick_encoder
from pipeline.adapters.base import Trained
from pipeline.adapters.prompt import PromptKind
from pipeline.frozen_linear import FrozenLinear
from pipeline.models import prepare_for_scoring

SHAPE = {"vocab_size": 50, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 5, "dropout_rate": 0.5}
X86 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
needs_x86 = pytest.mark.skipif(not X86, reason="the quick encoder is for x86 processors, where torch has oneDNN")


def _model(seed: int = 0, **config: Any) -> Any:
    """A random T5, its norms' weights too, with a bias as large as a trained one's."""
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**SHAPE, **config)).eval().requires_grad_(False)
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(20)
    for name, weight in model.encoder.named_parameters():
        if "norm" in name:
            weight.copy_(torch.rand_like(weight) + 0.5)
    return model


def _inputs(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    ids = torch.randint(3, 50, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(len(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids, None if bool(mask.all()) else mask


MODEL = _model()
EPS = torch.finfo(torch.float32).eps


@needs_x86
@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.booleans(), st.sampled_from([8, 16]))
def test_it_says_what_the_encoder_says(lengths: list[int], alike: bool, vector: int) -> None:
    """Both against float64: the quick form rounds no worse than four times what transformers' encoder does."""
    ids, mask = _inputs([lengths[0]] * len(lengths) if alike else lengths)
    with pytest.MonkeyPatch.context() as patched, torch.inference_mode():
        patched.setattr(quick, "_vector", lambda: vector)
        exact = copy.deepcopy(MODEL.encoder).double()(input_ids=ids, attention_mask=mask).last_hidden_state
        theirs = MODEL.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        ours = QuickEncoder(MODEL.encoder)(ids, mask)
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    errors = [(found.double() - exact)[seen].abs().max() for found in (ours, theirs)]
    assert errors[0] <= 4 * max(errors[1], EPS)


@needs_x86
def test_shorter_prompts_after_longer_ones_have_the_bias_of_their_own_length() -> None:
    encoder = QuickEncoder(MODEL.encoder)
    with torch.inference_mode():
        for length in (20, 33, 7):
            ids, _ = _inputs([length, length])
            expected = MODEL.encoder(input_ids=ids).last_hidden_state
            assert_close(encoder(ids, None), expected, rtol=1e-4, atol=1e-5)


@needs_x86
def test_a_model_prepared_for_scoring_has_it_and_is_not_changed_by_it() -> None:
    model = _model(1)
    prepare_for_scoring(model)
    assert any(type(part) is FrozenLinear for part in model.encoder.modules())
    before = copy.deepcopy(model.state_dict())
    ids, mask = _inputs([9, 4])
    with torch.inference_mode():
        found = quick_encoder(model.encoder)
        assert found is not None
        found(ids, mask)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def _hook(encoder: Any) -> None:
    encoder.block[1].layer[0].SelfAttention.q.register_forward_hook(lambda *_: None)


def _pre_hook(encoder: Any) -> None:
    encoder.register_forward_pre_hook(lambda *_: None)


def _wrapped(encoder: Any) -> None:
    encoder.block[0].layer[1].DenseReluDense.wo = nn.Sequential(encoder.block[0].layer[1].DenseReluDense.wo)


def _rebound(encoder: Any) -> None:
    encoder.block[0].forward = encoder.block[0].forward


def _prompted(encoder: Any) -> None:
    model = _model()
    model.encoder = encoder
    PromptKind(2).attach(model, {"prompt": Trained(torch.zeros(2, SHAPE["d_model"]))})


class Other(nn.Linear):
    """A linear layer that is more than one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _other_class(encoder: Any) -> None:
    encoder.block[0].layer[0].SelfAttention.o.__class__ = Other


def _scattered(encoder: Any) -> None:
    encoder.block[0].layer[0].SelfAttention.v.weight.ds_id = 3


def _quantized(encoder: Any) -> None:
    encoder.block[1].layer[1].DenseReluDense.wi.weight.data = torch.zeros(40, 24, dtype=torch.int8)


def _biased(encoder: Any) -> None:
    encoder.block[0].layer[0].SelfAttention.k.bias = nn.Parameter(torch.ones(40), requires_grad=False)


CHANGES = (_biased, _hook, _pre_hook, _wrapped, _rebound, _prompted, _other_class, _scattered, _quantized)


@needs_x86
@pytest.mark.parametrize("change", CHANGES)
def test_an_encoder_with_anything_added_keeps_its_own_form(change: Any) -> None:
    encoder = copy.deepcopy(MODEL.encoder)
    assert quick_encoder(encoder) is not None
    change(encoder)
    assert quick_encoder(encoder) is None


@needs_x86
@pytest.mark.parametrize("activation", ["gated-gelu", "gelu_new", "gated-silu"])
def test_so_do_encoders_of_another_activation(activation: str) -> None:
    assert quick_encoder(_model(feed_forward_proj=activation).encoder) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_and_of_other_types(dtype: torch.dtype) -> None:
    assert quick_encoder(copy.deepcopy(MODEL.encoder).to(dtype)) is None


def test_and_all_on_other_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert quick_encoder(MODEL.encoder) is None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert quick_encoder(MODEL.encoder) is None


@pytest.mark.parametrize(
    ("keys", "vector", "spare"),
    [(9, 16, 7), (8, 16, 0), (24, 16, 0), (25, 16, 7), (31, 16, 1), (32, 16, 0), (47, 16, 1), (13, 8, 3), (12, 8, 0)],
)
def test_spare_keys_are_added_where_many_weights_would_be_left_over(
    keys: int, vector: int, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick, "_vector", lambda: vector)
    assert quick._spare_keys(keys) == spare
