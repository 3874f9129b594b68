"""What scoring costs: each prompt is read once for both scores, finished rows take part in no step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from random_models import FAMILIES, random_model, random_texts, run
from small_tokenizers import tokenizer_of
from torch import Tensor

ROWS_AT_ONCE = 4


@contextmanager
def watched(model: Any) -> Iterator[dict[str, list[tuple[int, int]]]]:
    """Rows and tokens of every call of the encoder and of the decoder."""
    calls: dict[str, list[tuple[int, int]]] = {"encoder": [], "decoder": []}
    parts = {"decoder": getattr(model, "decoder", getattr(model, "model", None))}
    if hasattr(model, "encoder"):
        parts["encoder"] = model.encoder
    hooks = []
    for name, part in parts.items():

        def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            ids: Tensor = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
            calls[name].append((ids.shape[0], ids.shape[1]))

        hooks.append(part.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_read_once_and_options_take_one_forward(family: str) -> None:
    model, tokenizer, texts = random_model(family), tokenizer_of(family), random_texts(family)
    batches: list[None] = []
    found = {}
    for scoring in (False, True):
        batches.clear()
        with watched(model) as calls:
            found[scoring] = calls
            run(
                model,
                tokenizer,
                family,
                texts,
                batch_size=ROWS_AT_ONCE,
                label_scoring=scoring,
                on_batch=lambda: batches.append(None),
            )
    assert len(batches) > 1
    assert len(found[True]["encoder"]) == (len(batches) if family == "t5" else 0)
    assert found[True]["encoder"] == found[False]["encoder"]
    assert len(found[True]["decoder"]) - len(found[False]["decoder"]) == len(batches), "all options in one forward"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_takes_part_in_a_step_for_each_of_its_later_tokens(family: str) -> None:
    model, tokenizer, texts = random_model(family), tokenizer_of(family), random_texts(family)
    with watched(model) as calls:
        rows = run(model, tokenizer, family, texts[:3], batch_size=100)
    steps = calls["decoder"][1:]  # the first one reads the prompts, and says the first tokens
    assert all(tokens == 1 for _, tokens in steps)
    assert sum(count for count, _ in steps) == sum(row.tokens - 1 for row in rows)
    assert len({row.tokens for row in rows}) > 2, "rows must end at different times"
    assert len(steps) == max(row.tokens for row in rows) - 1
