"""Both scores of a model on a task's rows: free greedy generation, and the label options ranked.

Each batch of prompts is read once and serves both.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from data_prep.batches import Example
from eval.encoding import encoder_of
from eval.generation import TextFollower, end_ids, generate_greedily
from eval.label_scoring import score_options
from eval.prompt_state import LlamaState, PromptState, SharedPrefix, T5State, common_prefix

FEWEST_SHARED = 8  # tokens: fewer are not worth a forward of their own


@dataclass(frozen=True)
class Prediction:
    """What a model said to one row.

    `text` is the generated text (or its hopeless beginning, where `stopped`), `tokens` the number of
    generated tokens, EOS included. `option` is the position of the best option, `option_scores` the summed
    log-probability of each; both are None without label scoring.
    """

    row_id: int
    text: str
    stopped: bool
    tokens: int
    option: int | None
    option_scores: tuple[float, ...] | None


def predict(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    family: Literal["t5", "llama2"],
    labels: Sequence[str],
    label_ids: Sequence[tuple[int, ...]],
    max_new_tokens: int = 50,
    batch_size: int,
    label_scoring: bool,
    on_batch: Callable[[], None] | None = None,
) -> list[Prediction]:
    """The predictions of `model` for `examples`, in their order.

    Generation is greedy over the whole vocabulary. A row ends at EOS, at `max_new_tokens`, or (`stopped`)
    where its text can no longer become one of `labels`: exact match with a label is the same as without that
    stop. Label scoring takes the option whose tokens and EOS (`label_ids`) have the highest summed
    log-probability, the first of equals. Batches hold up to `batch_size` of the longest rows, and more of
    shorter ones for the same memory; `on_batch` is called after each. The model is left in the mode in which
    it came.
    """
    assert batch_size > 0, batch_size
    assert max_new_tokens > 0, max_new_tokens
    follower, ends = TextFollower(tokenizer, labels), end_ids(model, tokenizer)
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.unk_token_id) if i is not None), 0)
    found: dict[int, Prediction] = {}
    with torch.inference_mode(), evaluating(model):
        read = _reader(model, [example.input_ids for example in examples], family)
        for batch in plan_batches([len(e.input_ids) for e in examples], batch_size, max_new_tokens):
            state: PromptState = read(model, [examples[i].input_ids for i in batch], pad_id)
            # Scoring leaves the state as it was; generation uses it up.
            scored = score_options(state, label_ids).tolist() if label_scoring else [None] * len(batch)
            rows = generate_greedily(state, follower, ends=ends, max_new_tokens=max_new_tokens)
            for position, row, scores in zip(batch, rows, scored, strict=True):
                found[position] = Prediction(
                    row_id=examples[position].row_id,
                    text=follower.text(row.ids),
                    stopped=row.stopped,
                    tokens=len(row.ids),
                    option=None if scores is None else scores.index(max(scores)),
                    option_scores=None if scores is None else tuple(scores),
                )
            if on_batch is not None:
                on_batch()
    return [found[position] for position in range(len(examples))]


def _reader(
    model: Any, prompts: Sequence[Sequence[int]], family: str
) -> Callable[[Any, Sequence[Sequence[int]], int], PromptState]:
    """How a batch of the prompts is read: by a decoder-only model, from where they begin to differ."""
    if family == "t5":
        return partial(T5State, encoder=encoder_of(model))
    ids = common_prefix(prompts) if len(prompts) > 1 else ()
    return partial(LlamaState, shared=SharedPrefix(model, ids)) if len(ids) >= FEWEST_SHARED else LlamaState


def plan_batches(lengths: Sequence[int], batch_size: int, max_new_tokens: int) -> list[list[int]]:
    """Row positions in batches of like length, the longest first (so that memory is tried at once).

    A batch's padded tokens, new ones included, are at most those of `batch_size` of the longest rows.
    """
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    budget = batch_size * (max(lengths, default=0) + max_new_tokens)
    batches: list[list[int]] = []
    while order:
        rows = budget // (lengths[order[0]] + max_new_tokens)
        batches.append(order[:rows])
        order = order[rows:]
    return batches


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode again after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
