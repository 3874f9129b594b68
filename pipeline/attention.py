"""What reaches into transformers' attention: caches that hold a prefix, LLaMA's queries, T5's masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, DynamicCache, EncoderDecoderCache, T5ForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from pipeline.adapters.prefix import PrefixKind

SHARED = "sdpa_shared_mask"


def prefix_kind(length: int) -> PrefixKind:
    """Prefix tuning with `length` positions."""
    return PrefixKind(length, filled_cache, queries_seen)


def filled_cache(stack: Any, cache: Any, layers: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """A cache whose self-attention holds each layer's key and value, [b, heads, v, c]: `cache` itself, or a new one.

    `stack` is LLaMA's `model` or T5's decoder, whose cross-attention finds nothing cached.
    """
    if cache is None:
        cache = DynamicCache(config=stack.config)
        if stack.config.is_encoder_decoder:
            cache = EncoderDecoderCache(cache, DynamicCache(config=stack.config))
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for layer, (key, value) in enumerate(layers):
        own.update(key, value, layer)
    return cache


@contextmanager
def queries_seen(stack: Any, told: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Inside, `told` gets every attention of LLaMA's `model` and its queries [b, query heads, s, c] of each forward.

    Rotary queries are no module's output, so the model attends through a function of ours, which hands everything
    on to the attention in use: outputs are the same bits.
    """
    used = stack.config._attn_implementation
    name = f"{used}_seen"  # the old name within: transformers looks for "flash" in it
    assert name not in ALL_ATTENTION_FUNCTIONS, "another model is being observed"
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(used, eager_attention_forward)

    def seen(module: nn.Module, query: Tensor, *arguments: Any, **others: Any) -> Any:
        told(module, query)
        return attend(module, query, *arguments, **others)

    ALL_ATTENTION_FUNCTIONS[name] = seen
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[used])
    stack.config._attn_implementation = name
    try:
        yield
    finally:
        stack.config._attn_implementation = used
        del ALL_ATTENTION_FUNCTIONS[name]


def share_masks(model: nn.Module) -> None:
    """Let T5's layers share the sum of position bias and mask, which each would form by itself; same bits.

    Of a model that attends by torch's own function (`sdpa`); others stay as they are.
    """
    if not isinstance(model, T5ForConditionalGeneration) or model.config._attn_implementation != "sdpa":
        return
    if SHARED not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS[SHARED] = _attend_with_shared_mask
        AttentionMaskInterface.register(SHARED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(SHARED)


def _attend_with_shared_mask(
    module: nn.Module,
    query: Tensor,  # [b, heads, s, c]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # [b, 1, s or 1, keys], bool; or what is to be added
    *,
    position_bias: Tensor | None = None,  # [1, heads, s, keys]: one tensor for all layers of a stack
    **others: Any,
) -> Any:
    hides = attention_mask if attention_mask is not None and attention_mask.dtype == torch.bool else None
    shared = hides is not None or (attention_mask is None and not module.is_causal)
    if shared and position_bias is not None and not position_bias.requires_grad:
        spare = _spare_keys(query, key)
        attention_mask, position_bias = _together(hides, position_bias, spare), None
        if spare:
            key, value = (
                nn.functional.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, spare)).transpose(1, 2) for x in (key, value)
            )
    return sdpa_attention_forward(module, query, key, value, attention_mask, position_bias=position_bias, **others)


def _spare_keys(query: Tensor, key: Tensor) -> int:
    """How many keys that nobody sees are worth adding, in scoring on a CPU.

    torch's attention takes the weights that fill no vector of the processor's one by one: of 127 keys fifteen, which
    cost a third of the time of 128. To add keys is to copy them, and worth it where many are left over.
    """
    keys, wide = key.shape[2], 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1
    many = query.shape[2] >= wide and keys % wide > wide / 2
    plain = query.is_cpu and query.dtype == torch.float32 and torch.is_inference_mode_enabled()
    return -keys % wide if many and plain else 0


def _together(mask: Tensor | None, bias: Tensor, spare: int) -> Tensor:
    """Bias where the mask is, elsewhere and of spare keys the least number, as transformers has it.

    Made once for these two tensors, and kept with the bias, so for one forward. The least number plus a bias is the
    least number again in float32 and bfloat16, and a sum over contiguous tensors takes a sixth of the time of choosing
    between them.
    """
    kept: Any = bias
    if not hasattr(kept, "masked") or kept.masked[0] is not mask:
        least, summed = torch.finfo(bias.dtype).min, bias.contiguous()
        if mask is not None:
            summed = summed + torch.where(mask, bias.new_zeros(()), bias.new_full((), least))
        kept.masked = mask, nn.functional.pad(summed, (0, spare), value=least) if spare else summed
    found: Tensor = kept.masked[1]
    return found
