"""Prompt and prefix against PEFT's: the same tensors give the same logits and gradients; and without PEFT, by slots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from module_adapter_cases import (
    FAMILIES,
    LENGTH,
    attached,
    attentions_of,
    backbone,
    inputs_of,
    kind_of,
    random_tensors,
    relative_difference,
    score,
)
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

TASK = {"t5": "SEQ_2_SEQ_LM", "llama2": "CAUSAL_LM"}
# PEFT 0.21 asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
families = pytest.mark.parametrize("family", FAMILIES)


def peft_model(name: str, family: str, model: Any) -> Any:
    """PEFT's adapter of our shape, over `model`."""
    common = {"task_type": TASK[family], "num_virtual_tokens": LENGTH[name], "num_transformer_submodules": 1}
    if name == "prompt":
        return get_peft_model(model, PromptTuningConfig(**common)).eval()
    # For encoder-decoders PEFT has two submodules and doubles the layers' pairs, of which it deals every layer two, for
    # itself and for its cross-attention, and throws the latter away: twice as many layers leave each its own.
    heads, width = (3, 5) if family == "t5" else (2, 6)
    shape = {"token_dim": heads * width, "num_attention_heads": heads, "num_layers": 4 if family == "t5" else 2}
    submodules = {"num_transformer_submodules": 2 if family == "t5" else 1}
    return get_peft_model(model, PrefixTuningConfig(**{**common, **shape, **submodules})).eval()


def peft_embedding(name: str, family: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Our tensors as PEFT's one, [length, d] or [length, pairs * 2 * heads * c]."""
    if name == "prompt":
        return tensors["prompt"]
    slots = []
    for attention in attentions_of(family):
        pair = [tensors[f"{attention}.key"], tensors[f"{attention}.value"]]
        unused = [torch.zeros_like(part) for part in pair] if family == "t5" else []
        slots += [*pair, *unused]
    return torch.stack(slots).permute(2, 0, 1, 3).flatten(1)


@families
@pytest.mark.parametrize("name", ["prompt", "prefix"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_and_gradients_are_those_of_peft(family: str, name: str, attention: str) -> None:
    model, inputs, kind = backbone(family), inputs_of(family), kind_of(name, family)
    model.set_attn_implementation(attention)
    tensors, bare = random_tensors(kind, model), model(**inputs).logits
    logits = {}
    with attached(kind, model, tensors) as adapter:
        for use_cache in (True, False):
            logits[use_cache] = model(**inputs, use_cache=use_cache).logits
            for parameter in adapter.parameters.values():
                parameter.grad = None
            score(logits[use_cache], inputs).backward()

    theirs = peft_model(name, family, model)
    embedding = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        embedding.copy_(peft_embedding(name, family, tensors))
    want = theirs(**inputs).logits
    if (name, family) == ("prompt", "llama2"):
        want = want[:, LENGTH[name] :]  # PEFT keeps the prompt's own positions
    score(want, inputs).backward()

    assert relative_difference(want, bare) > 0.1, "the adapter must matter"
    for got in logits.values():
        assert relative_difference(got, want) < 1e-6
    gradients = {key: parameter.grad for key, parameter in adapter.parameters.items()}
    assert relative_difference(peft_embedding(name, family, gradients), embedding.grad) < 1e-5


@families
def test_a_prefix_can_be_read_as_hidden_tokens_keys_and_values(family: str) -> None:
    """A prefix made of a text's own keys and values acts as that text, read before."""
    model, inputs, kind = backbone(family), inputs_of(family, rows=1), kind_of("prefix", family)
    read = "decoder_input_ids" if family == "t5" else "input_ids"
    tokens, length = inputs[read], LENGTH["prefix"]
    others = {key: value for key, value in inputs.items() if key not in (read, "attention_mask")}
    with torch.no_grad():
        whole = model(**others, **{read: tokens}, use_cache=True)
        cache = whole.past_key_values.self_attention_cache if family == "t5" else whole.past_key_values
        tensors = {}
        for layer, attention in enumerate(attentions_of(family)):
            tensors[f"{attention}.key"] = cache.layers[layer].keys[0, :, :length].clone()
            tensors[f"{attention}.value"] = cache.layers[layer].values[0, :, :length].clone()
        with attached(kind, model, tensors):
            rest = model(**others, **{read: tokens[:, length:]}).logits
    assert relative_difference(rest, whole.logits[:, length:]) < 1e-5


@families
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_callers_own_empty_cache_is_filled_and_goes_on(family: str, name: str) -> None:
    model, kind = backbone(family), kind_of(name, family)
    inputs = inputs_of(family, rows=1)
    read = "decoder_input_ids" if family == "t5" else "input_ids"
    tokens = inputs.pop(read)
    inputs.pop("attention_mask")
    cache: Any = DynamicCache(config=model.config)
    if family == "t5":
        cache = EncoderDecoderCache(cache, DynamicCache(config=model.config))
    with attached(kind, model, random_tensors(kind, model)), torch.no_grad():
        want = model(**inputs, **{read: tokens}).logits
        steps = []
        for token in tokens.split(1, dim=1):
            output = model(**inputs, **{read: token}, past_key_values=cache, use_cache=True)
            assert output.past_key_values is cache
            steps.append(output.logits)
    assert relative_difference(torch.cat(steps, dim=1), want) < 1e-5
