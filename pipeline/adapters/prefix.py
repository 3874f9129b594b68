"""Prefix tuning: trained keys and values before those of the tokens, in every causal self-attention.

That is each attention of LLaMA, and each self-attention of T5's decoder (Li and Liang 2021, without their
reparametrisation; positions as PEFT's `PREFIX_TUNING` has them: the tokens' first is `length`).
Legend: b rows, s token positions, v positions of the prefix, heads key and value heads, c width of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.adapters.base import See, TensorProjector, Trained, install, value_of
from pipeline.adapters.forwards import is_empty, rebind, with_ones

# (the module that makes its own caches, an empty cache or None, each layer's key and value [b, heads, v, c]):
# the cache that holds them, or a new one.
FillCache = Callable[[nn.Module, Any, Sequence[tuple[Tensor, Tensor]]], Any]
# (LLaMA's `model`, told (an attention, its queries [b, query heads, s, c] after the rotary embedding)): a context,
# in which it is told of every forward.
QueriesSeen = Callable[[nn.Module, Callable[[nn.Module, Tensor], None]], AbstractContextManager[None]]


class Prefix(nn.Module):
    """One attention's trained prefix."""

    key_projector: TensorProjector | None
    value_projector: TensorProjector | None

    def __init__(self, key: Trained, value: Trained, like: Tensor) -> None:
        super().__init__()
        self.key = install(self, "key", key, like)  # of [heads, v, c]
        self.value = install(self, "value", value, like)  # of [heads, v, c]

    def forward(self, rows: int) -> tuple[Tensor, Tensor]:  # each [rows, heads, v, c]
        """Key and value for every row."""
        # Copies: the parameter itself may be gone from memory when the cache is read (ZeRO 3).
        key = value_of(self.key, self.key_projector).repeat(rows, 1, 1, 1)
        return key, value_of(self.value, self.value_projector).repeat(rows, 1, 1, 1)


class AttachedPrefix:
    """A prefix in its places: the module `prefix` of each attention."""

    def __init__(
        self, stack: Any, attentions: Mapping[str, Any], undo: Callable[[], None], queries_seen: QueriesSeen
    ) -> None:
        self._stack = stack
        self._attentions = attentions
        self._undo = undo
        self._queries_seen = queries_seen
        self.parameters: Mapping[str, nn.Parameter] = {
            f"{name}.{part}": getattr(attention.prefix, part)
            for name, attention in attentions.items()
            for part in ("key", "value")
        }

    def observe(self, see: See) -> AbstractContextManager[None]:
        """Inside, every forward tells `see` each attention's queries as they meet the keys, [b, s, heads, c].

        Where g query heads share a key head, `see` is told g times: first each group's first, and so on.
        """
        if self._stack.config.is_encoder_decoder:
            return _linear_queries_seen(see, self._attentions)
        names = {attention: name for name, attention in self._attentions.items()}

        def told(attention: nn.Module, queries: Tensor) -> None:
            heads, _ = _key_shape(attention)
            grouped = queries.unflatten(1, (heads, -1))  # [b, heads, g, s, c]: a group's heads stand side by side
            for member in grouped.unbind(dim=2):
                see(names[attention], member.transpose(1, 2))

        return self._queries_seen(self._stack, told)

    def detach(self) -> None:
        """The attentions see their tokens alone again."""
        self._undo()
        for attention in self._attentions.values():
            del attention.prefix


class PrefixKind:
    """A prefix of `length` positions; tensors `<attention>.key`, `<attention>.value` [heads, length, c].

    Callers of the model see nothing of it in masks; a cache that a first read has filled is `length` positions longer
    than the tokens, and is handed back even where none was asked for. `pipeline.attention.prefix_kind` makes one.
    """

    name = "prefix"

    def __init__(self, length: int, fill_cache: FillCache, queries_seen: QueriesSeen) -> None:
        self.length = length
        self._fill_cache = fill_cache
        self._queries_seen = queries_seen

    def starts(self, model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """Keys N(0, 1), as PEFT draws them, and values zero, so that a prefix takes attention but adds nothing yet.

        Small keys are nearly alike, so that positions learn the same thing slowly; PEFT's random values disturb LLaMA.
        Loss of the second epoch on agnews at a learning rate of 1e-2, mini-t5 and mini-llama2, one seed: 3.89 and 3.25
        so; 3.84 and 3.62 with values N(0, 1) too; 4.60 and 3.97 with keys N(0, 0.02^2); 4.16 and 3.30 with the keys
        and values of random tokens. (At 1e-3 no start learns much.)

        Drawn on the CPU in the model's order, so that every rank and device starts from the same numbers.
        """
        tensors: dict[str, Tensor] = {}
        for name, attention in _attentions(model).items():
            heads, width = _key_shape(attention)
            key = torch.empty(heads, self.length, width).normal_(generator=generator)
            tensors |= {f"{name}.key": key, f"{name}.value": torch.zeros(heads, self.length, width)}
        return tensors

    def attach(self, model: Any, trained: Mapping[str, Trained]) -> AttachedPrefix:
        """Put a prefix into every attention; `trained` has tensors for all of them."""
        stack = model.decoder if model.config.is_encoder_decoder else model.model
        like = model.get_input_embeddings().weight  # not the attention's own weights, which may be quantized
        attentions = _attentions(model)
        for name, attention in attentions.items():
            attention.prefix = Prefix(trained[f"{name}.key"], trained[f"{name}.value"], like)
            attention.prefix.training = attention.training
        undo = rebind(stack, _read, list(attentions.values()), self._fill_cache)
        return AttachedPrefix(stack, attentions, undo, self._queries_seen)

    def space_of(self, tensor: str) -> str:
        """Keys are multiplied with the attention's queries; values, with nothing that theory knows, go with them."""
        attention, _, part = tensor.rpartition(".")
        assert part in ("key", "value"), tensor
        return attention


def _attentions(model: Any) -> dict[str, Any]:
    """The attentions that take a prefix, by full name, in the order of their layers."""
    if model.config.is_encoder_decoder:
        names = [f"decoder.block.{layer}.layer.0.SelfAttention" for layer in range(len(model.decoder.block))]
    else:
        names = [f"model.layers.{layer}.self_attn" for layer in range(len(model.model.layers))]
    return {name: model.get_submodule(name) for name in names}


def _key_shape(attention: Any) -> tuple[int, int]:
    """Key and value heads of an attention, and the width of one."""
    if attention.config.is_encoder_decoder:
        return attention.n_heads, attention.key_value_proj_dim
    return attention.config.num_key_value_heads, attention.head_dim


@contextmanager
def _linear_queries_seen(see: See, attentions: Mapping[str, Any]) -> Iterator[None]:
    """T5 has its queries as a linear layer's output gives them."""

    def hook(name: str, width: int, _: nn.Module, __: Any, queries: Tensor) -> None:
        see(name, queries.unflatten(-1, (-1, width)))

    handles = [
        attention.q.register_forward_hook(partial(hook, name, _key_shape(attention)[1]))
        for name, attention in attentions.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read(
    stack: Any,
    forward: Callable[..., Any],
    attentions: Sequence[Any],
    fill_cache: FillCache,
    input_ids: Tensor | None = None,  # [b, s]
    attention_mask: Tensor | None = None,  # [b, s]
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    **others: Any,
) -> Any:
    """LLaMA, or T5's decoder, over a cache that holds the prefix already."""
    if is_empty(past_key_values):
        assert position_ids is None, "positions follow from the cache"
        dropped = stack.training and getattr(stack, "gradient_checkpointing", False)
        assert not dropped, "gradient checkpointing drops every cache, and the prefix with it"
        tokens = others["inputs_embeds"] if input_ids is None else input_ids
        layers = [attention.prefix(len(tokens)) for attention in attentions]
        past_key_values = fill_cache(stack, past_key_values, layers)
        attention_mask = with_ones(attention_mask, layers[0][0].shape[2])
    if position_ids is not None:  # T5 knows no such argument
        others["position_ids"] = position_ids
    return forward(input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **others)
