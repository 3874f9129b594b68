"""A recipe's adapter for its backbone: which of the kinds in `adapters/`, and where in the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from data_prep.errors import UserError
from pipeline.adapters.base import AdapterKind
from pipeline.adapters.bottleneck import BottleneckKind
from pipeline.adapters.core import CoreLoraKind
from pipeline.adapters.lora import LoraKind
from pipeline.adapters.prefix import PrefixKind
from pipeline.adapters.prompt import PromptKind
from pipeline.adapters.triplet import TripletKind
from pipeline.attention import prefix_kind
from pipeline.layers import feed_forward_blocks, full_rank_modules, target_modules
from pipeline.recipe import Adapter, Gorp, LbCl, LoraAdapter, MethodSettings

_DECODER_BLOCK = re.compile(r"^(?:decoder\.block|model\.layers)\.(\d+)\.")


def adapter_kind(settings: Adapter, model: nn.Module, family: str, method: MethodSettings | None = None) -> AdapterKind:
    """The adapter that `settings` and `method` describe, for a backbone of `family`; `model` may be a skeleton.

    Raises `UserError` where the backbone has no such layers.
    """
    if isinstance(method, Gorp):
        assert isinstance(settings, LoraAdapter)
        return _with_cores(settings, method, model, family)
    match settings.kind:
        case "lora":
            targets = target_modules(model, family, settings.target_modules)
            return LoraKind(targets, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout)
        case "triplet":
            targets = target_modules(model, family, settings.target_modules)
            assert isinstance(method, LbCl)
            reached = layers_reached(targets, method.layers)
            return TripletKind(targets, reached, rank=settings.rank, scale=settings.scale, dropout=settings.dropout)
        case "bottleneck":
            return BottleneckKind(feed_forward_blocks(model, family), width=settings.width)
        case "prompt":
            return PromptKind(length=settings.length)
        case "prefix":
            return prefix_kind(settings.length)


def layers_reached(layers: Sequence[str], which: str) -> list[str]:
    """The layers that LB-CL's old triplets are injected into: "all", or "top_<k>", those of the last k decoder blocks.

    `UserError` where the model has fewer of them.
    """
    if which == "all":
        return list(layers)
    count = int(which.removeprefix("top_"))
    places = {name: int(found[1]) for name in layers if (found := _DECODER_BLOCK.match(name))}
    blocks = sorted(set(places.values()))
    if count > len(blocks):
        raise UserError(
            f"method.layers: {which}, but the decoder blocks with adapters number {len(blocks)}; legal are top_1 to "
            f"top_{len(blocks)}, and all"
        )
    return [name for name, block in places.items() if block in blocks[-count:]]


def _with_cores(settings: LoraAdapter, method: Gorp, model: nn.Module, family: str) -> CoreLoraKind:
    """LoRA everywhere but on the full-rank modules, which never carry one, whether they learn or not."""
    cores = full_rank_modules(model, family, method.full_rank_modules)
    targets = [name for name in target_modules(model, family, settings.target_modules) if name not in cores]
    if not targets:
        raise UserError(
            "adapter.target_modules: every one of them is a full-rank module, and none is left for LoRA; choose "
            "others, or fewer method.full_rank_modules"
        )
    for name in cores:
        layer: Any = model.get_submodule(name)
        if method.core_rank > (most := min(layer.in_features, layer.out_features)):
            raise UserError(f"method.core_rank: {method.core_rank}, but {name} has {most} directions; choose fewer")
    return CoreLoraKind(
        targets,
        cores,
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        core_rank=method.core_rank,
        core_scale=method.core_scale,
    )


def space_widths(kind: AdapterKind, model: nn.Module) -> dict[str, int]:
    """The dimension of the space that each kind of tensor's rows live in, by a word for it."""
    config: Any = model.config
    if isinstance(kind, LoraKind):
        layers: list[Any] = [model.get_submodule(name) for name in kind.targets]
        narrowest = {"the narrowest layer's input": min(layer.in_features for layer in layers)}
        if isinstance(kind, CoreLoraKind):
            layers += [model.get_submodule(name) for name in kind.cores]
            narrowest["the narrowest layer's output"] = min(layer.out_features for layer in layers)
        return narrowest
    if isinstance(kind, BottleneckKind):
        return {"the model": config.hidden_size, "the bottleneck (adapter.width)": kind.width}
    if isinstance(kind, PromptKind):
        return {"an embedding": config.hidden_size}
    return {"an attention head": _head_width(config)}


def check_max_rank(method: MethodSettings, kind: AdapterKind, model: nn.Module) -> None:
    """Raises `UserError` where `method.max_rank` asks for more directions than a protected space has."""
    most = getattr(method, "max_rank", None)
    if isinstance(most, int):
        place, width = min(space_widths(kind, model).items(), key=lambda item: item[1])
        if most > width:
            raise UserError(
                f"method.max_rank: {most} directions, but {place} has {width}; legal are 1 to {width}, a share of the "
                "width such as 0.5, or null"
            )


def trainable_parameters(kind: AdapterKind, model: nn.Module) -> int:
    """Numbers in one new adapter of this kind."""
    config: Any = model.config
    if isinstance(kind, LoraKind):
        layers: list[Any] = [model.get_submodule(name) for name in kind.targets]
        more = len(kind.cores) * kind.core_rank**2 if isinstance(kind, CoreLoraKind) else 0
        more += len(layers) * kind.rank if isinstance(kind, TripletKind) else 0
        return more + sum(kind.rank * int(layer.in_features + layer.out_features) for layer in layers)
    if isinstance(kind, BottleneckKind):
        return len(kind.blocks) * 2 * kind.width * int(config.hidden_size)
    if isinstance(kind, PromptKind):
        return kind.length * int(config.hidden_size)
    assert isinstance(kind, PrefixKind)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    layers_with_prefix = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    return 2 * int(layers_with_prefix * heads * _head_width(config)) * kind.length


def _head_width(config: Any) -> int:
    return int(getattr(config, "d_kv", None) or config.head_dim)
