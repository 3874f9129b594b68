"""Plain PyTorch in float64 on whole global batches: what the trainer under DeepSpeed must equal.

Shares with the code under test the plan of steps (rows only), torch's AdamW and transformers' models; padding,
loss (transformers' own `labels=`), LoRA, clipping and schedule are written out here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, T5ForConditionalGeneration

from data_prep.batches import Example
from pipeline.recipe import Training

MODELS = {"t5": T5ForConditionalGeneration, "llama2": LlamaForCausalLM}


class Float64(TorchDispatchMode):
    """Inside, a conversion to float32 gives float64: transformers takes norms, softmax and losses in float32."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)


class Branch(nn.Module):
    """A layer with low-rank branches beside it, each `scale * B A x`, written out."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        self.scales: list[float] = []

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def add(self, A: Tensor, B: Tensor, scale: float) -> tuple[nn.Parameter, nn.Parameter]:
        dtype = self.base.weight.dtype
        self.A.append(nn.Parameter(A.detach().to(dtype, copy=True)))
        self.B.append(nn.Parameter(B.detach().to(dtype, copy=True)))
        self.scales.append(scale)
        return self.A[-1], self.B[-1]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for A, B, scale in zip(self.A, self.B, self.scales, strict=True):
            y = y + scale * ((x @ A.T) @ B.T)
        return y


def load_plain(folder: Path, family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The backbone of `folder` as transformers loads it, frozen, without dropout."""
    return MODELS[family].from_pretrained(folder, dtype=dtype).requires_grad_(False).eval()


def branch(model: nn.Module, name: str) -> Branch:
    """The branches beside layer `name`, put there on first use."""
    layer = model.get_submodule(name)
    if not isinstance(layer, Branch):
        layer = Branch(layer)
        model.set_submodule(name, layer)
    return layer


def pad(examples: Sequence[Example], family: str) -> dict[str, Tensor]:
    """One batch, padded on the right, as transformers' `labels=` wants it."""
    if family == "t5":
        inputs = [list(example.input_ids) for example in examples]
        labels = [list(example.label_ids) for example in examples]
    else:
        inputs = [[*example.input_ids, *example.label_ids] for example in examples]
        labels = [[-100] * len(example.input_ids) + list(example.label_ids) for example in examples]
    wide, tall = max(map(len, inputs)), max(map(len, labels))
    return {
        "input_ids": torch.tensor([ids + [0] * (wide - len(ids)) for ids in inputs]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (wide - len(ids)) for ids in inputs]),
        "labels": torch.tensor([ids + [-100] * (tall - len(ids)) for ids in labels]),
    }


def rate_of(training: Training, step: int, steps: int) -> float:
    """Linear warm-up to `learning_rate`, then half a cosine to zero or constant."""
    warm = training.warmup_steps
    if step < warm:
        return training.learning_rate * (step + 1) / warm
    if training.schedule == "constant":
        return training.learning_rate
    return training.learning_rate * math.cos(math.pi * (step - warm) / (2 * (steps - warm))) ** 2


@dataclass
class Trained:
    """What the reference saw, by parameter name (`<layer>.A`, `<layer>.B`) and step."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    moments: list[dict[str, Tensor]] = field(default_factory=list)
    masters: list[dict[str, Tensor]] = field(default_factory=list)


def train_plain(
    folder: Path,
    family: str,
    *,
    start: Mapping[str, Tensor],
    scale: float,
    steps: Sequence[Sequence[Sequence[int]]],
    examples: Sequence[Example],
    training: Training,
    penalty: Callable[[Mapping[str, nn.Parameter]], Tensor] | None = None,
    writes: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> Trained:
    """Train the LoRA that starts at `start`; `writes[n]` replaces tensors after step n (from 1)."""
    model = load_plain(folder, family)
    parameters: dict[str, nn.Parameter] = {}
    for name in (name.removesuffix(".A") for name in start if name.endswith(".A")):
        A, B = branch(model, name).add(start[f"{name}.A"], start[f"{name}.B"], scale)
        parameters |= {f"{name}.A": A, f"{name}.B": B}
    optimizer = torch.optim.AdamW(parameters.values(), eps=training.adam_eps, weight_decay=training.weight_decay)
    seen = Trained()
    for number, micro_batches in enumerate(steps):
        rows = [examples[row] for micro_batch in micro_batches for row in micro_batch if row >= 0]
        optimizer.zero_grad()
        with Float64():
            loss = model(**pad(rows, family)).loss
            seen.losses.append(loss.item())
            (loss if penalty is None else loss + penalty(parameters)).backward()
        seen.gradients.append({name: value.grad.clone() for name, value in parameters.items()})
        norm = nn.utils.clip_grad_norm_(parameters.values(), training.gradient_clipping or math.inf)
        seen.norms.append(norm.item())
        optimizer.param_groups[0]["lr"] = rate_of(training, number, len(steps))
        optimizer.step()
        with torch.no_grad():
            for name, value in ((writes or {}).get(number + 1) or {}).items():
                parameters[name].copy_(value)
        seen.moments.append({n: optimizer.state[p]["exp_avg"].clone() for n, p in parameters.items()})
        seen.masters.append({n: p.detach().clone() for n, p in parameters.items()})
    seen.tensors = seen.masters[-1]
    return seen
