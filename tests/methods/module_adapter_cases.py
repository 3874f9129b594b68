"""Two-layer backbones for bottleneck, prompt and prefix, the three adapters on them, and a loss to differentiate.

LLaMA's query heads share key heads two by two; T5's position bias is as large as a trained one's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from pipeline.adapters.base import AdapterKind, Attached, Trained
from pipeline.adapters.bottleneck import BottleneckKind
from pipeline.adapters.prompt import PromptKind
from pipeline.attention import prefix_kind

FAMILIES = ("t5", "llama2")
KINDS = ("bottleneck", "prompt", "prefix")
LENGTH = {"prompt": 4, "prefix": 3}
VOCABULARY, WIDTH = 61, 16


def backbone(family: str) -> Any:
    """A frozen random model in evaluation mode; the same one for every call."""
    torch.manual_seed(3)
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1}
    if family == "t5":
        shape = {"d_model": WIDTH, "d_kv": 5, "num_heads": 3, "d_ff": 20, "num_layers": 2}
        model: Any = T5ForConditionalGeneration(
            T5Config(**common, **shape, decoder_start_token_id=0, dropout_rate=0.0, tie_word_embeddings=False)
        )
        model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.mul_(10)
    else:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
        shape = {"hidden_size": WIDTH, "intermediate_size": 20, "num_hidden_layers": 2}
        model = LlamaForCausalLM(LlamaConfig(**common, **heads, **shape, initializer_range=0.2))
        with torch.no_grad():  # zero otherwise, which would hide padding that takes part in a sum
            model.model.embed_tokens.weight[0].normal_(std=0.2)
    return model.requires_grad_(False).eval()


def blocks_of(family: str) -> list[str]:
    if family == "llama2":
        return [f"model.layers.{layer}.mlp" for layer in (0, 1)]
    places = {"encoder": 1, "decoder": 2}
    return [f"{side}.block.{i}.layer.{place}.DenseReluDense" for side, place in places.items() for i in (0, 1)]


def attentions_of(family: str) -> list[str]:
    if family == "llama2":
        return [f"model.layers.{layer}.self_attn" for layer in (0, 1)]
    return [f"decoder.block.{layer}.layer.0.SelfAttention" for layer in (0, 1)]


def kind_of(name: str, family: str) -> AdapterKind:
    if name == "bottleneck":
        return BottleneckKind(blocks_of(family), width=7)
    return PromptKind(LENGTH[name]) if name == "prompt" else prefix_kind(LENGTH[name])


def random_tensors(kind: AdapterKind, model: nn.Module, *, seed: int = 5) -> dict[str, Tensor]:
    """Tensors as large as trained ones may get, of the names and shapes of the kind's starts."""
    generator = torch.Generator().manual_seed(seed)
    starts = kind.starts(model, generator)
    return {name: torch.randn(start.shape, generator=generator) for name, start in starts.items()}


@contextmanager
def attached(kind: AdapterKind, model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[Attached]:
    adapter = kind.attach(model, {name: Trained(tensor) for name, tensor in tensors.items()})
    try:
        yield adapter
    finally:
        adapter.detach()


def inputs_of(family: str, *, rows: int = 3, positions: int = 7) -> dict[str, Tensor]:
    """Random rows of unequal length, padded on the right, as keyword arguments of the backbone."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (rows, positions), generator=generator)
    mask = (torch.arange(positions) < positions - 2 * torch.arange(rows)[:, None]).long()
    inputs = {"input_ids": tokens * mask, "attention_mask": mask}
    if family == "t5":
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, 5), generator=generator)
    return inputs


def score(logits: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """A number that depends on the logits of every token, padding left out."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    if "decoder_input_ids" not in inputs:
        weights = weights * inputs["attention_mask"][..., None]
    return (logits * weights).sum()


def relative_difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().norm() / want.detach().norm())
