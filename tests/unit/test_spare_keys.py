"""Keys that nobody sees, added in scoring to fill a processor's vectors: the same attention, and only where meant."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import T5Config, T5ForConditionalGeneration

from pipeline import attention
from pipeline.attention import share_masks


def _encoders() -> tuple[Any, Any]:
    """transformers' encoder and ours, of the same weights; the bias as large as a trained T5's."""
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 3}
    plain = T5ForConditionalGeneration(T5Config(**shape, dropout_rate=0.0, attn_implementation="sdpa")).eval()
    plain.requires_grad_(False)
    plain.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(20)
    shared = copy.deepcopy(plain)
    share_masks(shared)
    return plain.encoder, shared.encoder


PLAIN, SHARED = _encoders()


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many keys each attention was given, on a processor with vectors of sixteen."""
    seen: list[int] = []
    attend = attention.sdpa_attention_forward

    def spy(module: Any, query: Any, key: torch.Tensor, *rest: Any, **others: Any) -> Any:
        seen.append(key.shape[2])
        return attend(module, query, key, *rest, **others)

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    return seen


def _read(encoder: Any, lengths: list[int]) -> list[torch.Tensor]:
    ids = torch.randint(3, 50, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(len(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    found = encoder(input_ids=ids, attention_mask=None if bool(mask.all()) else mask).last_hidden_state
    return [row[:length] for row, length in zip(found, lengths, strict=True)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.booleans())
def test_the_encoder_says_what_it_said(lengths: list[int], alike: bool) -> None:
    lengths = [lengths[0]] * len(lengths) if alike else lengths
    with pytest.MonkeyPatch.context() as patched, torch.inference_mode():
        patched.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        for ours, theirs in zip(_read(SHARED, lengths), _read(PLAIN, lengths), strict=True):
            assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("longest", "given"), [(9, 9), (24, 24), (25, 32), (31, 32), (32, 32), (33, 33), (47, 48)])
@pytest.mark.parametrize("shortest", [5, None])
def test_keys_are_added_where_many_weights_would_be_left_over(
    longest: int, given: int, shortest: int | None, keys: list[int]
) -> None:
    with torch.inference_mode():
        _read(SHARED, [longest, shortest or longest])
    assert keys == [given, given], "of two layers"


def test_none_are_added_in_training_in_other_types_or_on_other_processors(
    keys: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _read(SHARED, [31, 5])
    with torch.inference_mode():
        _read(copy.deepcopy(SHARED).double(), [31, 5])
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        _read(SHARED, [31, 5])
    assert keys == [31] * 6


def test_a_sum_is_made_once_for_a_bias_and_a_mask() -> None:
    bias = torch.randn(1, 2, 3, 3)
    masks = [None, *(torch.rand(2, 1, 1, 3, generator=torch.Generator().manual_seed(seed)) < 0.5 for seed in (1, 2))]
    for mask in masks:
        found = attention._together(mask, bias, 0)
        assert attention._together(mask, bias, 0) is found
        least = bias.new_full((), torch.finfo(bias.dtype).min)
        assert torch.equal(found, bias if mask is None else torch.where(mask, bias, least))
