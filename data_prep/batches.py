"""From rows to tensors: token ids of prompts and labels, the plan of an epoch's steps, padded batches.

Special tokens are added here, one by one, and never by the tokenizer: whether a LLaMA tokenizer adds BOS
depends on how it was loaded, and a second BOS or a missing one changes every prediction silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from data_prep.errors import UserError
from data_prep.planning import PADDING_ROW, plan_steps
from data_prep.prompts import build_prompt
from data_prep.truncation import Encode, FittedPrompt, cut_passages, cut_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from data_prep.tasks import Row, Task

__all__ = [
    "PADDING_ROW",
    "Example",
    "Family",
    "PromptSettings",
    "collate",
    "count_label_tokens",
    "encode_labels",
    "encode_rows",
    "plan_steps",
]

Family = Literal["t5", "llama2"]

IGNORED = -100  # the label of a position without loss, as torch's cross entropy has it
_CHUNK = 2048  # texts a tokenizer is given at once: enough for its threads, little memory


class PromptSettings(Protocol):
    """What encoding reads of a recipe's `data` group."""

    @property
    def max_source_tokens(self) -> int:
        """The most tokens a prompt may take, BOS or EOS counted in."""

    @property
    def truncation(self) -> Literal["passage", "legacy"]:
        """What gives way in a longer prompt."""

    @property
    def add_task_name(self) -> bool:
        """Whether a line names the task's family."""

    @property
    def add_dataset_name(self) -> bool:
        """Whether a line names the task."""


@dataclass(frozen=True)
class Example:
    """One row as token ids.

    t5: `input_ids` is the prompt + EOS. llama2: it is BOS + the prompt. `label_ids` is the label + EOS.
    """

    row_id: int
    input_ids: tuple[int, ...]
    label_ids: tuple[int, ...]
    truncated: bool


def encode_rows(
    task: Task,
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    family: Family,
    data: PromptSettings,
) -> list[Example]:
    """Encode labels, and prompts cut to `data.max_source_tokens` (BOS or EOS counted in), in the rows' order.

    `data.truncation`: `passage` cuts the passages from their ends and nothing else, `legacy` the end of the
    prompt. UserError where a prompt does not fit even with empty passages.
    """
    rows = list(rows)
    encode = _encoder(tokenizer, family)
    prompts = [
        build_prompt(task, row.sentence, add_task_name=data.add_task_name, add_dataset_name=data.add_dataset_name)
        for row in rows
    ]
    cut = cut_passages if data.truncation == "passage" else cut_tokens
    budget = data.max_source_tokens - 1
    fitted = cut(prompts, encode, budget)
    _refuse_unfitting(task, rows, fitted, budget)
    texts = sorted({row.label for row in rows})
    targets = dict(zip(texts, _encode_targets(texts, tokenizer, encode), strict=True))
    return [
        Example(row.id, _with_special(prompt.ids, tokenizer, family), targets[row.label], prompt.truncated)
        for row, prompt in zip(rows, fitted, strict=True)
    ]


def encode_labels(task: Task, tokenizer: PreTrainedTokenizerBase, *, family: Family) -> list[tuple[int, ...]]:
    """Token ids of every option + EOS, in option order."""
    return _encode_targets(task.labels, tokenizer, _encoder(tokenizer, family))


def count_label_tokens(examples: Iterable[Example | None]) -> int:
    """The positions that bear loss (EOS counted): what a global batch's summed loss is divided by."""
    return sum(len(example.label_ids) for example in examples if example is not None)


def collate(examples: Sequence[Example | None], *, family: Family, pad_id: int) -> dict[str, Tensor]:
    """Pad on the right to `input_ids` and `attention_mask` [b, s] and `labels` ([b, l] or [b, s]), int64.

    t5: `labels` are the decoder's targets. llama2: a sequence is prompt + label, and each label token stands
    in `labels` at its own position (the model shifts). Elsewhere `labels` is -100. None is a padding row: pad
    tokens, no loss, and attention on its first token alone, since a softmax over nothing would give NaN.
    """
    assert examples, "a batch has at least one entry"
    inputs, labels = [], []
    for example in examples:
        if example is None:
            inputs.append([pad_id])
            labels.append([IGNORED])
        elif family == "t5":
            inputs.append([*example.input_ids])
            labels.append([*example.label_ids])
        else:
            inputs.append([*example.input_ids, *example.label_ids])
            labels.append([*[IGNORED] * len(example.input_ids), *example.label_ids])
    return {
        "input_ids": _padded(inputs, pad_id),
        "attention_mask": _padded([[1] * len(ids) for ids in inputs], 0),
        "labels": _padded(labels, IGNORED),
    }


def _padded(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(len(sequence) for sequence in sequences)
    return torch.tensor([[*sequence, *[value] * (width - len(sequence))] for sequence in sequences])


def _encoder(tokenizer: PreTrainedTokenizerBase, family: Family) -> Encode:
    """A function from texts to token ids without special tokens."""
    # A "</s>" in a LLaMA row is text, as it is to sentencepiece. T5's vocabulary holds its special tokens as
    # ordinary pieces, so there the option would not keep them out and would add stray space tokens.
    split = family == "llama2"

    def encode(texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = []
        for start in range(0, len(texts), _CHUNK):
            chunk = list(texts[start : start + _CHUNK])
            # verbose=False: prompts longer than the model's maximum are cut after this, by us.
            ids += tokenizer(chunk, add_special_tokens=False, split_special_tokens=split, verbose=False).input_ids
        return ids

    return encode


def _encode_targets(labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, encode: Encode) -> list[tuple[int, ...]]:
    """Label tokens + EOS.

    Sentencepiece puts one space before any text it is given, so a LLaMA label encoded by itself already is
    the label after a space: joined to the prompt's ids it reads "Answer: World".
    """
    eos = _special(tokenizer, "eos")
    return [(*ids, eos) for ids in encode(list(labels))]


def _with_special(ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase, family: Family) -> tuple[int, ...]:
    return (*ids, _special(tokenizer, "eos")) if family == "t5" else (_special(tokenizer, "bos"), *ids)


def _special(tokenizer: PreTrainedTokenizerBase, name: Literal["bos", "eos"]) -> int:
    token = tokenizer.bos_token_id if name == "bos" else tokenizer.eos_token_id
    if not isinstance(token, int):
        raise UserError(
            f"model.path: the tokenizer {tokenizer.name_or_path!r} has no {name.upper()} token; "
            "T5 needs EOS, LLaMA needs BOS and EOS; use the model's own tokenizer files"
        )
    return token


def _refuse_unfitting(task: Task, rows: Sequence[Row], fitted: Sequence[FittedPrompt], budget: int) -> None:
    """UserError if a prompt is still longer than `budget`, naming the row that needs most."""
    unfitting = [
        (len(prompt.ids), row.id) for row, prompt in zip(rows, fitted, strict=True) if len(prompt.ids) > budget
    ]
    if unfitting:
        needed, row_id = max(unfitting)
        raise UserError(
            f"task {task.name}, row {row_id}: the prompt takes {needed + 1} tokens with nothing left of its "
            f"passage; data.max_source_tokens is {budget + 1}; raise it to at least {needed + 1} "
            f"({len(unfitting)} of {len(rows)} rows do not fit), or use data.truncation=legacy"
        )
