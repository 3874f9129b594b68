"""A batch of prompts that a model has read once, ready for generation and for scoring options.

Shapes: b rows, s prompt positions, q packed positions, V vocabulary.

A model may put v virtual tokens of its own before what it reads (a soft prompt, or a prefix in its attention). The
states find them in the cache, where all positions count from the first of them.
"""

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from eval.encoding import Encoder, encode, own_encoder, padded, read_mask


class PromptState(Protocol):
    """A batch of prompts that a model has read: its caches, and the logits of the next token."""

    logits: Tensor  # (b, V)

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to every row, `tokens (b,)`; the logits after it, `(b, V)`."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch alone."""
        ...

    def packed_logits(self, tokens: Tensor, depths: Tensor, visible: Tensor) -> Tensor:
        """Logits `(b, q, V)` after many short continuations of every prompt at once; changes nothing.

        `tokens (q,)` stand at `depths (q,)` after the prompt (0: the first), and each attends to the prompt
        and to the packed positions that `visible (q, q)` marks.
        """
        ...


def _hidden(visible: Tensor, past: int) -> Tensor:
    """True where a packed position must not look, `(1, 1, q, past + q)`: among its fellows, never before."""
    return torch.cat([visible.new_zeros(len(visible), past), ~visible], dim=1)[None, None]


class T5State:
    """Prompts read by a T5: the encoder has run once, and each step reads its output, or keys and values made of it."""

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], pad_id: int, *, encoder: Encoder | None = None
    ) -> None:
        """`encoder`: what reads the prompts; the model's own way by default."""
        device = model.get_input_embeddings().weight.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.model = model
        self.mask = read_mask(lengths, int(lengths.max()))
        self.encoded = encode(encoder or own_encoder(model), prompts, pad_id, device)
        # Not left to the model, which copies its configuration for each.
        self.cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
        start = lengths.new_full((len(prompts),), model.config.decoder_start_token_id)
        self.logits: Tensor = self.step(start)

    def _decode(self, tokens: Tensor, decoder_mask: Tensor | None = None) -> Tensor:
        output = self.model(
            encoder_outputs=(self.encoded,),
            attention_mask=self.mask,
            decoder_input_ids=tokens,
            decoder_attention_mask=decoder_mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """See `PromptState`."""
        return self._decode(tokens[:, None])[:, -1]

    def keep(self, rows: Tensor) -> None:
        """See `PromptState`."""
        self.cache.batch_select_indices(rows)
        self.mask = None if self.mask is None else self.mask[rows]
        self.encoded = self.encoded[rows]

    def packed_logits(self, tokens: Tensor, depths: Tensor, visible: Tensor) -> Tensor:
        """See `PromptState`. The decoder's first positions are in the cache already: v virtual ones, the start token.

        T5 makes its position bias from places in the sequence, which are wrong for packed tokens. The mask is
        added to that bias, so it carries the right one minus the wrong one.
        """
        past = self.cache.get_seq_length()  # v + 1
        positions = torch.cat([torch.arange(past, device=depths.device), depths + past])  # (past + q,)
        attention = self.model.decoder.block[0].layer[0].SelfAttention
        by_place = attention.compute_bias(len(positions), len(positions))  # (1, heads, past + q, past + q)
        by_position = by_place[:, :, positions][:, :, :, positions]
        mask = (by_position - by_place)[:, :, past:]
        mask = mask.masked_fill(_hidden(visible, past), torch.finfo(mask.dtype).min)
        logits = self._decode(tokens.expand(len(self.encoded), -1), mask)
        self.cache.crop(-len(tokens))
        return logits


class SharedPrefix:
    """The tokens that all prompts of a task begin with, read once by a decoder-only model."""

    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        self.ids = ids
        device = model.get_input_embeddings().weight.device
        self._cache = model.model(input_ids=torch.tensor([list(ids)], device=device), use_cache=True).past_key_values

    def cache(self, rows: int) -> Any:
        """A cache of its own for so many rows."""
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(rows)
        return cache


def common_prefix(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens that all prompts begin with, but for the last of the shortest: of each, something is left to read."""
    shortest = min(len(prompt) for prompt in prompts)
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # what these share, all between them share
    same = next((at for at in range(shortest) if first[at] != last[at]), shortest)
    return first[: min(same, shortest - 1)]


class LlamaState:
    """Prompts read by a decoder-only model, padded on the right; what they share may have been read before.

    So the prompt needs no mask (no token sees the padding after it); later tokens mask the padding and take
    their true positions. `lengths` and `mask` count virtual tokens once the prompt is read.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], pad_id: int, shared: SharedPrefix | None = None
    ) -> None:
        """`shared`: what each of the prompts begins with."""
        weight = model.get_input_embeddings().weight
        known = 0 if shared is None else len(shared.ids)
        input_ids, self.lengths = padded([prompt[known:] for prompt in prompts], pad_id, weight.device)
        self.model = model
        self.mask = read_mask(self.lengths, input_ids.shape[1])
        cache = None if shared is None else shared.cache(len(prompts))
        read = model.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        self.cache = read.past_key_values
        last = read.last_hidden_state[torch.arange(len(prompts), device=weight.device), self.lengths - 1]
        self.logits: Tensor = model.lm_head(last)
        before = self.cache.get_seq_length() - input_ids.shape[1]  # what is shared, and virtual tokens
        self.lengths = self.lengths + before
        if self.mask is not None:
            self.mask = torch.nn.functional.pad(self.mask, (before, 0), value=1)

    def _decode(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        output = self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """See `PromptState`."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        logits = self._decode(tokens[:, None], self.lengths[:, None], self.mask)[:, -1]
        self.lengths = self.lengths + 1
        return logits

    def keep(self, rows: Tensor) -> None:
        """See `PromptState`."""
        self.cache.batch_select_indices(rows)
        self.mask = None if self.mask is None else self.mask[rows]
        self.lengths = self.lengths[rows]

    def packed_logits(self, tokens: Tensor, depths: Tensor, visible: Tensor) -> Tensor:
        """See `PromptState`."""
        rows = len(self.lengths)
        hidden = _hidden(visible, past=self.cache.get_seq_length()).expand(rows, -1, -1, -1)
        if self.mask is not None:
            padding = torch.nn.functional.pad(self.mask == 0, (0, len(tokens)))
            hidden = hidden | padding[:, None, None]
        # Additive and in the model's own type, which every attention implementation takes.
        mask = torch.zeros_like(hidden, dtype=self.logits.dtype)
        mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
        logits = self._decode(tokens.expand(rows, -1), self.lengths[:, None] + depths, mask)
        self.cache.crop(-len(tokens))
        return logits
