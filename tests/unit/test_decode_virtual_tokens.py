"""Generation and label scoring with a soft prompt or a prefix attached, against plain forwards without any cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from random_models import FAMILIES, check_shared_prefix, examples_of, option_ids, random_model, random_texts, run
from small_tokenizers import tokenizer_of

from data_prep.batches import Example
from eval import label_scoring
from eval.generation import end_ids
from pipeline.adapters.base import AdapterKind, Trained
from pipeline.adapters.prompt import PromptKind
from pipeline.attention import prefix_kind

LABELS = ["Moss", "Moss or fern", "Moss or oak", "oats", "The old oak by the northern wall", "wall"]
NEW_TOKENS = 12


KINDS = (PromptKind(5), prefix_kind(4))
DECODER_ONLY = [("llama2", kind) for kind in KINDS]


@pytest.fixture(
    params=[(family, kind) for family in FAMILIES for kind in KINDS],
    ids=lambda case: f"{case[0]}-{case[1].name}",
)
def case(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """A family, and its random model with a large random adapter of virtual tokens."""
    family: str = request.param[0]
    kind: AdapterKind = request.param[1]
    random_texts(family)  # made once for all tests, so never with an adapter
    model = random_model(family).double()  # large prompts magnify float32's rounding
    generator = torch.Generator().manual_seed(4)
    # As large as the model's own embeddings, keys and values, so that it changes what is said.
    size = {"t5": 3.0, "llama2": 0.5}[family] if kind.name == "prompt" else 2.0
    starts = kind.starts(model, generator)
    tensors = {name: torch.randn(start.shape, generator=generator) * size for name, start in starts.items()}
    adapter = kind.attach(model, {name: Trained(tensor) for name, tensor in tensors.items()})
    yield family, model
    adapter.detach()
    model.float()


def next_logits(model: Any, family: str, prompt: tuple[int, ...], said: list[int]) -> torch.Tensor:
    """After everything read from its beginning: one row, no padding, no mask, no cache."""
    if family == "t5":
        start = [model.config.decoder_start_token_id, *said]
        output = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([start]), use_cache=False)
    else:
        output = model(input_ids=torch.tensor([[*prompt, *said]]), use_cache=False)
    return output.logits[0, -1].float()


def naive_tokens(model: Any, family: str, example: Example, ends: frozenset[int]) -> list[int]:
    said: list[int] = []
    while len(said) < NEW_TOKENS and not (said and said[-1] in ends):
        said.append(int(next_logits(model, family, example.input_ids, said).argmax()))
    return said


def naive_score(model: Any, family: str, example: Example, option: tuple[int, ...]) -> float:
    total = 0.0
    for at, token in enumerate(option):
        logits = next_logits(model, family, example.input_ids, list(option[:at]))
        total += float(torch.log_softmax(logits, dim=-1)[token])
    return total


@pytest.mark.parametrize("case", DECODER_ONLY, ids=lambda case: case[1].name, indirect=True)
def test_what_prompts_share_is_read_once_after_the_virtual_tokens(
    case: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_shared_prefix(case[1], monkeypatch, precision=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_generation_says_what_plain_forwards_say(case: tuple[str, Any], batch_size: int) -> None:
    family, model = case
    tokenizer = tokenizer_of(family)
    examples = examples_of(tokenizer, family)
    tokens = [naive_tokens(model, family, example, end_ids(model, tokenizer)) for example in examples]
    texts = [tokenizer.decode(said, skip_special_tokens=True) for said in tokens]
    assert texts != random_texts(family), "the adapter must matter"
    assert len({len(said) for said in tokens}) > 2, "rows must leave the batch one by one"

    # Every text is a label, so that no row is cut short as hopeless.
    labels = [text for text in texts if "\ufffd" not in text]
    changes = {"batch_size": batch_size, "max_new_tokens": NEW_TOKENS, "label_scoring": True}
    predictions = run(model, tokenizer, family, labels, label_ids=option_ids(tokenizer, LABELS), **changes)
    for prediction, text, said in zip(predictions, texts, tokens, strict=True):
        if prediction.stopped:
            assert text not in labels
        else:
            assert (prediction.text, prediction.tokens) == (text, len(said))
    assert sum(not prediction.stopped for prediction in predictions) > 3


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("nodes_per_forward", [None, 7])
def test_label_scores_are_those_of_plain_forwards(
    case: tuple[str, Any], attention: str, nodes_per_forward: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, model = case
    tokenizer = tokenizer_of(family)
    options = [*option_ids(tokenizer, LABELS), (tokenizer.eos_token_id,)]
    if nodes_per_forward is not None:
        monkeypatch.setattr(label_scoring, "LOGITS_PER_FORWARD", nodes_per_forward * 3 * model.config.vocab_size)
    model.set_attn_implementation(attention)
    try:
        predictions = run(model, tokenizer, family, LABELS, label_ids=options, label_scoring=True)
    finally:
        model.set_attn_implementation("sdpa")
    for example, prediction in zip(examples_of(tokenizer, family), predictions, strict=True):
        want = [naive_score(model, family, example, option) for option in options]
        assert prediction.option_scores == pytest.approx(want, abs=1e-4)
        assert prediction.option == max(range(len(want)), key=want.__getitem__)
