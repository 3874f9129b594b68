"""Which layers of a backbone change, by their names, and how what is learnt of them is put into their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from pipeline.adapters.frozen import past_branch
from pipeline.adapters.lora import Factors, summed_update
from pipeline.checkpoints import Checkpoint

HEAD = "lm_head"  # the output projection, never an adapter's target nor packed


class _Names(NamedTuple):
    """How a family names its layers."""

    default_targets: tuple[str, ...]  # q and v of every attention, as the O-LoRA line of work has them
    feed_forward: str  # the last part of a feed-forward block's name
    full_rank: tuple[str, ...]  # GORP's full-rank modules


_CROSS_ATTENTION = tuple(f"EncDecAttention.{part}" for part in "qkvo")
_NAMES: Mapping[str, _Names] = {
    "t5": _Names(("q", "v"), "DenseReluDense", _CROSS_ATTENTION),
    "llama2": _Names(("q_proj", "v_proj"), "mlp", ("gate_proj",)),
}


def target_modules(model: nn.Module, family: str, chosen: Sequence[str] | str | None) -> list[str]:
    """Full names of the linear layers that carry an adapter, in the model's order.

    `chosen`: null for the family's default (q and v), "all_linear", or last parts of module names.
    The output head is never a target: it is tied to, or as wide as, the vocabulary.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != HEAD]
    if chosen == "all_linear":
        return linear
    wanted = _NAMES[family].default_targets if chosen is None else tuple(chosen)
    legal = sorted({name.rpartition(".")[2] for name in linear})
    for word in wanted:
        if word not in legal:
            raise UserError(
                f"adapter.target_modules: {word!r} names no linear layer of this model; legal are "
                f"{', '.join(legal)}, or all_linear"
            )
    return [name for name in linear if name.rpartition(".")[2] in wanted]


def feed_forward_blocks(model: nn.Module, family: str) -> list[str]:
    """Full names of the feed-forward blocks, in the model's order."""
    last = _NAMES[family].feed_forward
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] == last]


@torch.no_grad()
def merge(
    model: nn.Module,
    folder: Path,
    targets: Iterable[str],
    updates: Mapping[str, Sequence[Factors]],
    matrices: Mapping[str, Tensor] | None = None,
) -> None:
    """Set every target's weight to `W_0 + sum of its updates`, in place; `matrices` stand in the place of `W_0`.

    `W_0` is read again from the checkpoint and the sum is taken in float32 on the CPU, then rounded once to the
    model's dtype: a stream of any length leaves no accumulated rounding (methods.md section 1). A quantized weight
    cannot take it: its updates stand beside it, as one frozen branch.
    """
    original = Checkpoint(folder)
    for name in targets:
        if is_packed(layer := model.get_submodule(name)):
            assert name not in (matrices or {}), "a recipe with cores beside a quantized backbone is refused"
            past_branch(model, name, _embeddings(model)).hold(updates.get(name, ()))
            continue
        weight = layer.weight
        assert isinstance(weight, Tensor)
        changed = (matrices or {}).get(name)
        total = original.read(f"{name}.weight").float() if changed is None else changed
        if updates.get(name):
            total = total + summed_update(updates[name])
        weight.copy_(total)


def full_rank_modules(model: nn.Module, family: str, chosen: Sequence[str] | None) -> list[str]:
    """Full names of the linear layers whose whole weight is to change, in the model's order.

    `chosen`: null for the family's own (T5: the projections of cross-attention; LLaMA: the MLP's gate), or the ends
    of module names, such as "wo" or "EncDecAttention.q". `UserError` for a name that no layer has, for a tied weight.
    """
    wanted = _NAMES[family].full_rank if chosen is None else tuple(chosen)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = []
    for word in wanted:
        of_word = [name for name in linear if name == word or name.endswith(f".{word}")]
        if not of_word:
            legal = sorted({name.rpartition(".")[2] for name in linear if name != HEAD})
            raise UserError(
                f"method.full_rank_modules: {word!r} ends no linear layer's name in this model; legal are ends of "
                f"names such as {', '.join(legal)}, or [] for none"
            )
        found += of_word
    users = [id(weight) for module in model.modules() for weight in module.parameters(recurse=False)]
    for name in found:
        if name == HEAD or users.count(id(linear[name].weight)) > 1:
            raise UserError(
                f"method.full_rank_modules: {name} is the output head or shares its weight with another module, which "
                "would change with it; choose other layers"
            )
        if is_packed(linear[name]):
            raise UserError(
                f"method.full_rank_modules: {name} is quantized, and what the cores learn is merged into the weight "
                "itself; use an unquantized backbone, or [] for none"
            )
    return [name for name in linear if name in found]


def _embeddings(model: Any) -> Tensor:
    """A tensor of the device and dtype that a quantized model computes in."""
    weight: Tensor = model.get_input_embeddings().weight
    return weight


def is_packed(layer: nn.Module) -> bool:
    """Whether a linear layer's weight is quantized, so that nothing can be added to it."""
    weight: Any = layer.weight
    return not weight.is_floating_point()
