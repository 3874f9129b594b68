"""T5's encoder over a batch of prompts: on a CPU some rows at a time, so that what a layer writes the next finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.quick_encoder import quick_encoder

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


Encoder = Callable[[Tensor, Tensor | None], Tensor]  # tokens (b, s), mask (b, s) -> (b, v + s, d)


def own_encoder(model: Any) -> Encoder:
    """The T5's forward with all that is attached to it; v are virtual tokens of its own, which come first."""

    def read(input_ids: Tensor, mask: Tensor | None) -> Tensor:
        encoded: Tensor = model.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return encoded

    return read


def encoder_of(model: Any) -> Encoder:
    """The quickest way in which a T5 reads tokens here."""
    return quick_encoder(model.encoder) or own_encoder(model)


def encode(encoder: Encoder, prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> Tensor:
    """What a T5's encoder says to b prompts, the longest of s tokens: `(b, v + s, d)`.

    Rows are read in their order, so that those of like length should stand together. What stands after a prompt's
    end is any number and, where its rows were read apart from the longest's, zero.
    """
    longest = max(map(len, prompts))
    parts: list[Tensor] = []
    for some in _parts(prompts, device):
        input_ids, lengths = padded(some, pad_id, device)
        encoded = encoder(input_ids, read_mask(lengths, input_ids.shape[1]))
        missing = longest - input_ids.shape[1]
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
