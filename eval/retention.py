"""Retention of general ability: what a model still predicts of texts outside the stream.

T5: the tokens of hidden spans, as it was pretrained. LLaMA: every token after those before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.texts import Piece
from eval.decode import evaluating


def negative_log_likelihoods(
    model: Any,
    pieces: Sequence[Piece],
    *,
    family: Literal["t5", "llama2"],
    pad_id: int,
    batch_size: int,
    on_batch: Callable[[], None] | None = None,
) -> list[float]:
    """Of each piece, the sum over its counted tokens of -log p(token), in nats; `on_batch` is called after each batch.

    The model is left in the mode in which it came.
    """
    log_likelihoods = _of_t5 if family == "t5" else _of_llama
    found: list[float] = []
    with torch.inference_mode(), evaluating(model):
        for start in range(0, len(pieces), batch_size):
            batch = pieces[start : start + batch_size]
            found += (float(values.double().sum()) for values in log_likelihoods(model, batch, pad_id))
            if on_batch is not None:
                on_batch()
    return found


def perplexity(nll: float, tokens: int) -> float | None:
    """`exp(nll / tokens)`; None where that is no finite number."""
    try:
        found = math.exp(nll / tokens)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _of_t5(model: Any, batch: Sequence[Piece], pad_id: int) -> Iterator[Tensor]:
    inputs, mask = _padded([piece.input_ids for piece in batch], pad_id, model.device)
    targets, _ = _padded([piece.target_ids for piece in batch], pad_id, model.device)
    first = targets.new_full((len(targets), 1), model.config.decoder_start_token_id)
    logits = model(
        input_ids=inputs,
        attention_mask=mask,
        decoder_input_ids=torch.cat([first, targets[:, :-1]], dim=1),
        use_cache=False,
    ).logits
    for piece, row, wanted in zip(batch, logits, targets, strict=True):
        counted = torch.tensor(piece.counted, device=row.device)
        yield F.cross_entropy(row[counted].float(), wanted[counted], reduction="none")


def _of_llama(model: Any, batch: Sequence[Piece], pad_id: int) -> Iterator[Tensor]:
    inputs, mask = _padded([piece.input_ids for piece in batch], pad_id, model.device)
    hidden = model.model(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state
    for piece, row, wanted in zip(batch, hidden, inputs, strict=True):
        counted = torch.tensor(piece.counted, device=row.device)
        # Row by row: the logits of a whole batch of long pieces take gigabytes.
        yield F.cross_entropy(model.lm_head(row[counted - 1]).float(), wanted[counted], reduction="none")


def _padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [b, longest], padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(longest, device=device) < lengths[:, None]).long()
