"""How transformers scores a task's rows: its `generate`, and `Seq2SeqTrainer.predict`, which the public runs call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

from data_prep.batches import Example
from eval.generation import end_ids

BASELINES = ("generate", "predict")  # predict is an encoder-decoder's
Family = Literal["t5", "llama2"]
Ids = list[list[int]]


def generated(model: Any, tokenizer: Any, family: Family, examples: Sequence[Example], size: int, **told: Any) -> Ids:
    """New ids of every row, in batches of `size` rows in their order, padded to a batch's longest."""
    found: Ids = []
    for start in range(0, len(examples), size):
        prompts = [example.input_ids for example in examples[start : start + size]]
        ids, mask = _padded(prompts, int(tokenizer.pad_token_id or 0), left=family == "llama2")
        with torch.inference_mode():
            written = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, **told)
        found += written[:, ids.shape[1] if family == "llama2" else 1 :].tolist()
    return found


class Predict:
    """`Seq2SeqTrainer.predict` with generation, on rows that carry their labels, so that it takes their loss too."""

    def __init__(self, model: Any, tokenizer: Any, size: int, folder: str, *, new_tokens: int) -> None:
        """`folder` gets nothing; the Trainer asks for one."""
        settings = Seq2SeqTrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=size,
            predict_with_generate=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        # The start token counts. `max_new_tokens` would be obeyed too, with a warning for each batch.
        self._told = {"do_sample": False, "num_beams": 1, "max_length": 1 + new_tokens}
        self._pad = int(tokenizer.pad_token_id or 0)
        self._trainer = Seq2SeqTrainer(
            model=model, args=settings, data_collator=DataCollatorForSeq2Seq(tokenizer, model=model)
        )

    def __call__(self, examples: Sequence[Example]) -> Ids:
        """New ids of every row."""
        rows: Any = [
            {"input_ids": list(e.input_ids), "attention_mask": [1] * len(e.input_ids), "labels": list(e.label_ids)}
            for e in examples
        ]
        written: Any = self._trainer.predict(rows, **self._told).predictions
        return [[token if token >= 0 else self._pad for token in row[1:]] for row in written.tolist()]


def ended(model: Any, tokenizer: Any, rows: Ids) -> Ids:
    """Each row up to its end, that included."""
    ends = end_ids(model, tokenizer)
    return [row[: next((place + 1 for place, token in enumerate(row) if token in ends), len(row))] for row in rows]


def _padded(prompts: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    rows = [[pad] * (width - len(p)) + list(p) if left else list(p) + [pad] * (width - len(p)) for p in prompts]
    masks = [[0] * (width - len(p)) + [1] * len(p) if left else [1] * len(p) + [0] * (width - len(p)) for p in prompts]
    return torch.tensor(rows), torch.tensor(masks)
