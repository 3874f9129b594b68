"""T5's encoder over prompts some at a time: what it says to each alone, read in runs that fit."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import random_model
from torch.testing import assert_close

from eval import encoding
from eval.encoding import encode, encoder_of
from pipeline.adapters.base import Trained
from pipeline.adapters.prompt import PromptKind

lengths = st.lists(st.integers(1, 12), min_size=1, max_size=7)
CPU = torch.device("cpu")


@cache
def model(virtual: int) -> Any:
    """The random T5 in float64, so that rounding hides nothing, with so many virtual tokens before its prompts."""
    t5 = copy.deepcopy(random_model("t5")).double().eval()
    if virtual:
        prompt = torch.randn(virtual, t5.config.d_model, generator=torch.Generator().manual_seed(3))
        PromptKind(virtual).attach(t5, {"prompt": Trained(prompt)})
    return t5


def prompts_of(lengths: list[int]) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, 200, (length,), generator=drawn).tolist() for length in lengths]


@settings(deadline=None)
@given(lengths, st.integers(1, 60), st.sampled_from([0, 3]))
def test_each_prompt_is_read_as_if_alone(lengths: list[int], at_once: int, virtual: int) -> None:
    prompts, t5 = prompts_of(lengths), model(virtual)
    with pytest.MonkeyPatch.context() as patched, torch.inference_mode():
        patched.setattr(encoding, "TOKENS_AT_ONCE", at_once)
        found = encode(encoder_of(t5), prompts, 0, CPU)
        assert found.shape == (len(prompts), virtual + max(lengths), t5.config.d_model)
        for row, prompt in zip(found, prompts, strict=True):
            alone = t5.encoder(input_ids=torch.tensor([prompt])).last_hidden_state[0]
            assert_close(row[: virtual + len(prompt)], alone, rtol=1e-9, atol=1e-9)


@given(lengths, st.integers(1, 60))
def test_runs_keep_the_order_and_are_as_long_as_may_be(lengths: list[int], at_once: int) -> None:
    prompts = prompts_of(lengths)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(encoding, "TOKENS_AT_ONCE", at_once)
        parts = list(encoding._parts(prompts, CPU))
        elsewhere = list(encoding._parts(prompts, torch.device("meta")))
    assert [prompt for part in parts for prompt in part] == prompts
    assert elsewhere == [prompts], "a device with a memory of its own reads a batch at once"
    for part, after in zip(parts, [*parts[1:], []], strict=True):
        assert len(part) == 1 or len(part) * max(map(len, part)) <= at_once
        longer = [*part, *after[:1]]
        assert not after or len(longer) * max(map(len, longer)) > at_once
