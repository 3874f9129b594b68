"""T5's cross-attention read directly: the attention of transformers, and only where it may take its place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_models import random_model
from torch import nn
from torch.testing import assert_close
from transformers import DynamicCache, EncoderDecoderCache, T5Config
from transformers.models.t5.modeling_t5 import T5LayerCrossAttention

from pipeline.cross_attention import DirectCrossAttention, read_directly

D, C, HEADS = 24, 8, 5  # the heads together are wider than the model


def _layers(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """transformers' attention and ours, of the same weights."""
    torch.manual_seed(seed)
    config = T5Config(d_model=D, d_kv=C, num_heads=HEADS, is_decoder=True, attn_implementation="sdpa")
    plain = T5LayerCrossAttention(config, layer_idx=0).eval().requires_grad_(False).to(dtype)
    direct = copy.deepcopy(plain)
    read_directly(direct)
    assert type(direct.EncDecAttention) is DirectCrossAttention
    return plain.EncDecAttention, direct.EncDecAttention


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries each direct reading had."""
    seen: list[int] = []
    read = DirectCrossAttention._read

    def spy(self: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(x.shape[1])
        return read(self, x, *rest)

    monkeypatch.setattr(DirectCrossAttention, "_read", spy)
    return seen


def _mask(lengths: list[int], longest: int, queries: int) -> torch.Tensor:
    seen = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return seen[:, None, None].expand(-1, 1, queries, -1)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, C // 2), st.integers(0, 10**6), st.booleans()
)
def test_it_is_the_attention_of_transformers(lengths: list[int], queries: int, seed: int, masked: bool) -> None:
    plain, direct = _layers(seed)
    rows, longest = len(lengths), max(lengths)
    x, encoded = (torch.randn(rows, size, D, dtype=torch.float64) for size in (queries, longest))
    given = {"key_value_states": encoded, "mask": _mask(lengths, longest, queries) if masked else None}
    with torch.inference_mode():
        expected, got = plain(x, **given)[0], direct(x, **given)[0]
        assert direct._reads_directly(x, given)
    assert_close(got, expected, rtol=1e-9, atol=1e-9)


def _asked(layer: Any, queries: int = 1, **given: Any) -> torch.Tensor:
    torch.manual_seed(1)
    encoded, x = (torch.randn(2, size, D, dtype=torch.float64) for size in (6, queries))
    output: torch.Tensor = layer(x, key_value_states=encoded, **given)[0]
    return output


def test_many_queries_go_through_keys_and_values_and_so_do_all_that_come_after(reads: list[int]) -> None:
    plain, direct = _layers()
    with torch.inference_mode():
        caches = [EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(2)]
        for queries, read in ((1, [1]), (C // 2 + 1, [1]), (1, [1])):
            both = [_asked(m, queries, past_key_values=c) for m, c in zip((plain, direct), caches, strict=True)]
            assert_close(both[1], both[0], rtol=1e-9, atol=1e-9)
            assert reads == read


def test_outside_of_scoring_and_beside_what_watches_or_adds_it_is_the_attention_of_transformers(
    reads: list[int],
) -> None:
    _, direct = _layers()
    with torch.no_grad():
        expected = _asked(direct)
    with torch.inference_mode():
        for name in ("k", "v"):
            seen: list[Any] = []
            layer = getattr(direct, name)
            for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
                handle = register(lambda *found, seen=seen: seen.append(found))
                assert torch.equal(_asked(direct), expected)
                handle.remove()
            assert len(seen) == 2
            setattr(direct, name, nn.Sequential(layer))  # as an adapter's or a packed layer: what it does is its own
            assert torch.equal(_asked(direct), expected)
            setattr(direct, name, layer)
        assert torch.equal(_asked(direct, mask=torch.zeros(2, 1, 1, 6, dtype=torch.float64)), expected), "to be added"
        assert not reads
        assert_close(_asked(direct), expected, rtol=1e-9, atol=1e-9)
    assert reads == [1]


def test_only_cross_attention_is_changed() -> None:
    model = copy.deepcopy(random_model("t5"))
    read_directly(model)
    changed = [name for name, module in model.named_modules() if isinstance(module, DirectCrossAttention)]
    assert changed == [f"decoder.block.{layer}.layer.1.EncDecAttention" for layer in range(2)]
