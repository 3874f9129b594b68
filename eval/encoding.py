"""T5's encoder over a batch of prompts: on a CPU some rows at a time, so that what a layer writes the next finds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOKENS_AT_ONCE = 1536  # on a CPU: more do not stay in its cache, fewer cost more in calls


def padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts padded on the right, `(b, s)`, and their lengths, `(b,)`."""
    longest = max(len(prompt) for prompt in prompts)
    rows = [[*prompt, *[pad_id] * (longest - len(prompt))] for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    # By numpy, which takes a fifth of torch's time over a list of lists.
    return torch.from_numpy(np.array(rows)).to(device), torch.tensor(lengths, device=device)


def read_mask(lengths: Tensor, longest: int) -> Tensor | None:
    """1 on prompt tokens and 0 on padding, `(b, s)`; None without padding, so that no mask is applied."""
    mask = (torch.arange(longest, device=lengths.device) < lengths[:, None]).long()
    return None if bool(mask.all()) else mask


def encode(encoder: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """What T5's encoder says to b prompts, the longest of s tokens: `(b, v + s, d)`, v virtual tokens first.

    Rows are read in their order, so that those of like length should stand together. What stands after a prompt's
    end is any number and, where its rows were read apart from the longest's, zero.
    """
    device = encoder.get_input_embeddings().weight.device
    longest = max(map(len, prompts))
    parts: list[Tensor] = []
    with _one_bias(encoder, longest):
        for some in _parts(prompts, device):
            input_ids, lengths = padded(some, pad_id, device)
            read = encoder(input_ids=input_ids, attention_mask=read_mask(lengths, input_ids.shape[1]))
            missing = longest - input_ids.shape[1]
            encoded = read.last_hidden_state
            parts.append(torch.nn.functional.pad(encoded, (0, 0, 0, missing)) if missing else encoded)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _parts(prompts: Sequence[Sequence[int]], device: torch.device) -> Iterator[Sequence[Sequence[int]]]:
    """The prompts in runs of up to `TOKENS_AT_ONCE` padded tokens; elsewhere than on a CPU, all of them."""
    begin = 0
    for end in range(1, len(prompts) + 1):
        tokens = max(map(len, prompts[begin : end + 1])) * (end + 1 - begin)  # with the next row
        if end == len(prompts) or (device.type == "cpu" and tokens > TOKENS_AT_ONCE):
            yield prompts[begin:end]
            begin = end


@contextmanager
def _one_bias(encoder: Any, longest: int) -> Iterator[None]:
    """Inside, the encoder's position bias is made once for `longest` tokens: that of fewer is its upper left corner."""
    attention = encoder.block[0].layer[0].SelfAttention
    compute = attention.compute_bias
    whole: Tensor = compute(longest, longest).contiguous()  # (1, heads, s, s)

    def corner(queries: int, keys: int, **others: Any) -> Tensor:
        if max(queries, keys) > longest or others.get("past_seen_tokens"):  # virtual tokens stand before the prompt
            other: Tensor = compute(queries, keys, **others)
            return other
        return whole[:, :, :queries, :keys]

    attention.compute_bias = corner
    try:
        yield
    finally:
        del attention.compute_bias
