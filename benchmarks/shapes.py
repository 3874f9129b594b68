"""Shapes of backbones that this project has not run, and the GPU and the task that formulas are for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

GB = 1e9


@dataclass(frozen=True)
class Machine:
    """One GPU: an H200's data sheet; the share of its peak that training reaches is assumed, not measured."""

    flops: float = 989e12  # bf16, dense
    bytes_per_s: float = 4.8e12
    share: float = 0.40
    flops_64: float = 1e12  # of decompositions in float64: assumed, far below the data sheet


@dataclass(frozen=True)
class Work:
    """A task of the four-task benchmark: its rows on average, and tokens of a row of 512 at most."""

    train_rows: int = 8250
    test_rows: int = 7600
    tokens: int = 200  # prompts are far from 512 on average
    scored_together: int = 16  # evaluation.batch_size of the shipped LLaMA recipes
    written: int = 4  # label tokens until a row's end or its text is dead


@cache
def llama(hidden: int, inner: int, layers: int, heads: int, groups: int) -> nn.Module:
    """LLaMA-2 of these shapes, without weights."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@cache
def t5(width: int, layers: int, heads: int) -> nn.Module:
    """T5 of version 1.0, without weights."""
    config = T5Config(
        d_model=width, d_kv=64, d_ff=4 * width, num_layers=layers, num_decoder_layers=layers, num_heads=heads
    )
    with torch.device("meta"):
        return T5ForConditionalGeneration(config)


SHAPES = {
    "LLaMA-2-7B": (4096, 11008, 32, 32, 32),
    "LLaMA-2-13B": (5120, 13824, 40, 40, 40),
    "LLaMA-2-70B": (8192, 28672, 80, 64, 8),
}
T5_SHAPES = {"T5-base": (768, 12, 12), "T5-large": (1024, 24, 16)}


def widths(model: Any, names: Sequence[str]) -> list[tuple[int, int]]:
    """d_in and d_out of linear layers."""
    layers: list[Any] = [model.get_submodule(name) for name in names]
    return [(layer.in_features, layer.out_features) for layer in layers]


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table. Every row has a cell for each head."""
    assert all(len(row) == len(heads) for row in rows), [len(row) for row in rows]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
