"""Generation with early stopping against transformers' own `generate`, on random and on the mini models."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import FAMILIES, check_shared_prefix, examples_of, full_texts, random_model, random_texts, run
from small_tokenizers import tokenizer_of
from transformers import LlamaForCausalLM, LlamaTokenizer, T5ForConditionalGeneration, T5Tokenizer

from eval.decode import Prediction, plan_batches
from eval.generation import TextFollower, generate_greedily
from eval.prompt_state import common_prefix
from eval.scoring import exact_match, normalise
from pipeline.frozen_linear import FEWEST_ROWS, FrozenLinear
from pipeline.models import prepare_for_scoring


def check_matches(predictions: list[Prediction], texts: list[str], labels: list[str]) -> None:
    """Every row matches the labels that its whole text matches, and is cut only where it matches none."""
    for prediction, text in zip(predictions, texts, strict=True):
        matched = [exact_match(text, label) for label in labels]
        assert [exact_match(prediction.text, label) for label in labels] == matched, (prediction, text)
        assert not (prediction.stopped and any(matched))
        assert text.startswith(prediction.text) if prediction.stopped else prediction.text == text


@st.composite
def labels_near(draw: st.DrawFn, texts: list[str]) -> list[str]:
    """Labels that the texts match, begin with, go beyond, or miss by a tail."""
    labels = []
    for text in draw(st.lists(st.sampled_from(texts), min_size=1, max_size=4)):
        text = text.replace("\ufffd", "")  # in an output it is no character, and no label holds it
        cut = text[: draw(st.integers(0, len(text)))] if draw(st.booleans()) else text
        labels.append(cut + draw(st.sampled_from(["", "!?", "...", " or technology", "s", " "])))
    return labels


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_random_model_matches_as_generate_does(family: str, data: st.DataObject) -> None:
    texts = random_texts(family)
    labels = data.draw(labels_near(texts))
    predictions = run(random_model(family), tokenizer_of(family), family, labels)
    check_matches(predictions, texts, labels)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_cut_while_a_label_is_in_reach_and_hopeless_rows_end_at_once(family: str) -> None:
    model, tokenizer, texts = random_model(family), tokenizer_of(family), random_texts(family)
    reachable = [text for text in texts if normalise(text) and "\ufffd" not in text]
    assert len(set(reachable)) > 3, "the random model says too little to test with"
    for prediction, text in zip(run(model, tokenizer, family, reachable), texts, strict=True):
        assert text not in reachable or prediction.text == text
    hopeless = run(model, tokenizer, family, ["\u4e16\u754c"])
    assert any(p.stopped for p in hopeless)
    assert all(not p.stopped or normalise(p.text) for p in hopeless)
    whole = run(model, tokenizer, family, texts)
    assert sum(p.tokens for p in hopeless) < sum(p.tokens for p in whole) / 2


@pytest.mark.parametrize("label_scoring", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_prepared_for_scoring_says_the_same(family: str, *, label_scoring: bool) -> None:
    """Its products are oneDNN's where many rows meet, T5's masks are made once, its encoder's output is read directly.

    But where options are scored, which bring a mask of their own and ask too much for that. Both round in float32: what
    is scored by either is as far from float64's.
    """
    model, tokenizer = copy.deepcopy(random_model(family)), tokenizer_of(family)
    for name, weight in model.named_parameters():
        if name.endswith(".q.weight"):  # T5's attention, unscaled, makes a hundred times as much of rounding otherwise
            weight.data.mul_(0.1)
    labels, many = [*random_texts(family), "Moss", "Moss or fern"], examples_of(tokenizer, family) * 6
    prepared = copy.deepcopy(model).requires_grad_(False)
    prepare_for_scoring(prepared)
    assert any(isinstance(layer, FrozenLinear) for layer in prepared.modules())
    assert len(many) > FEWEST_ROWS, "so that a step of generation is oneDNN's too"
    plain, fast, exact = (
        run(m, tokenizer, family, labels, examples=many, batch_size=64, label_scoring=label_scoring)
        for m in (model, prepared, copy.deepcopy(model).double())
    )
    for one, other in zip(plain, fast, strict=True):
        assert (other.text, other.stopped, other.tokens) == (one.text, one.stopped, one.tokens)
    if label_scoring:
        errors = [max(_errors(found, exact)) for found in (plain, fast)]
        assert errors[1] <= 4 * errors[0] < 1e-3


def _errors(found: list[Prediction], exact: list[Prediction]) -> list[float]:
    """How far the scores of a row's options are from the exact ones, at most."""
    return [
        max(abs(a - b) for a, b in zip(one.option_scores or (), other.option_scores or (), strict=True))
        for one, other in zip(found, exact, strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_depend_neither_on_batches_nor_on_the_order_of_rows(family: str) -> None:
    model, tokenizer = random_model(family), tokenizer_of(family)
    labels = [*random_texts(family), "Moss", "Moss or fern"]
    examples = examples_of(tokenizer, family)
    want = run(model, tokenizer, family, labels, batch_size=1, label_scoring=True)
    assert [p.row_id for p in want] == [example.row_id for example in examples]
    for batch_size in (3, 16):
        shuffled = random.Random(batch_size).sample(examples, len(examples))
        got = run(model, tokenizer, family, labels, examples=shuffled, batch_size=batch_size, label_scoring=True)
        assert [p.row_id for p in got] == [example.row_id for example in shuffled]
        for mine, its in zip(sorted(got, key=lambda p: p.row_id), want, strict=True):
            assert (mine.text, mine.stopped, mine.tokens) == (its.text, its.stopped, its.tokens)
            assert mine.option == its.option
            assert mine.option_scores == pytest.approx(its.option_scores, abs=1e-4)


def test_what_prompts_share_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check_shared_prefix(random_model("llama2"), monkeypatch, precision=1e-4)


prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), min_size=1, max_size=6)


@given(prompts)
def test_the_common_prefix_is_the_longest_that_leaves_each_prompt_a_token(found: list[tuple[int, ...]]) -> None:
    prefix = common_prefix(found)
    assert all(prompt[: len(prefix)] == prefix and len(prompt) > len(prefix) for prompt in found)
    longer = len(prefix) + 1
    assert len({prompt[:longer] for prompt in found}) > 1 or min(map(len, found)) == longer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_token_limit_ends_a_row_without_calling_it_stopped(family: str) -> None:
    model, tokenizer = random_model(family), tokenizer_of(family)
    for prediction in run(model, tokenizer, family, ["\u4e16\u754c"], max_new_tokens=1):
        assert (prediction.tokens, prediction.stopped) == (1, False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mini_model_matches_as_generate_does(family: str, model_dir: Path) -> None:
    if family == "t5":
        folder = model_dir / "mini-t5"
        model: Any = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        tokenizer: Any = T5Tokenizer.from_pretrained(folder)
    else:
        folder = model_dir / "mini-llama"
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = LlamaTokenizer.from_pretrained(folder)
    texts = full_texts(model, tokenizer, family)
    prepared = copy.deepcopy(model).requires_grad_(False)
    prepare_for_scoring(prepared)
    for labels in (
        ["science", "science or technology"],
        [texts[0], f"{texts[0]} or technology", f"{texts[1]}...", texts[2][:-1]],
        [f"{text}!" for text in texts],
        [text[: len(text) // 2] for text in texts],
    ):
        for scored in (model, prepared):
            check_matches(run(scored, tokenizer, family, labels), texts, labels)


class Script:
    """A `PromptState` that says the given token sequences, whatever is asked."""

    def __init__(self, sequences: list[list[int]], vocabulary: int) -> None:
        self.sequences, self.vocabulary, self.at = sequences, vocabulary, 0
        self.logits = self._next()

    def _next(self) -> torch.Tensor:
        tokens = torch.tensor([sequence[self.at] for sequence in self.sequences])
        self.at += 1
        return torch.nn.functional.one_hot(tokens, self.vocabulary).float()

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        assert tokens.tolist() == [sequence[self.at - 1] for sequence in self.sequences]
        return self._next()

    def keep(self, rows: torch.Tensor) -> None:
        self.sequences = [self.sequences[row] for row in rows.tolist()]

    def packed_logits(self, *nodes: torch.Tensor) -> torch.Tensor:
        raise AssertionError("generation never asks for it")


LABELS = ["science", "Science or technology", "caf\u00e9 oats", "Office; Holder", "naïve"]
WORDS = ["science", " or", " technology", ".", "...", " ", "caf\u00e9", " oats", "Office", "Holder", "\u4e16"]
SPEECH = st.tuples(st.lists(st.sampled_from(WORDS), max_size=5), st.integers(0, 3))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=150, deadline=None)
@given(spoken=st.lists(SPEECH, min_size=1))
def test_any_token_sequence_matches_as_its_whole_text_does(family: str, spoken: list[tuple[list[str], int]]) -> None:
    tokenizer = tokenizer_of(family)
    follower, end = TextFollower(tokenizer, LABELS), tokenizer.eos_token_id
    sequences = []
    for words, lost in spoken:  # losing tokens inside leaves unfinished characters (bytes), unknown words
        ids = tokenizer("".join(words), add_special_tokens=False)["input_ids"]
        ids = [token for place, token in enumerate(ids) if not lost or place % (lost + 1) != lost]
        sequences.append([*ids, end] + [0] * 60)
    rows = generate_greedily(Script(sequences, len(tokenizer)), follower, ends=frozenset({end}), max_new_tokens=50)
    for row, sequence in zip(rows, sequences, strict=True):
        whole = sequence[: min(sequence.index(end) + 1, 50)]
        assert row.ids == (whole[: len(row.ids)] if row.stopped else whole)
        text = tokenizer.decode(whole, skip_special_tokens=True)
        for label in LABELS:
            assert exact_match(follower.text(row.ids), label) == exact_match(text, label)


def test_a_character_in_unfinished_bytes_is_waited_for() -> None:
    tokenizer = tokenizer_of("llama2")
    follower = TextFollower(tokenizer, ["caf\u4e16"])
    start = tokenizer("caf", add_special_tokens=False)["input_ids"]
    ids = [*start, *(tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "\u4e16".encode())]
    assert all(follower.can_continue(ids[:length]) for length in range(len(ids) + 1))
    assert exact_match(follower.text(ids), "caf\u4e16")
    assert not follower.can_continue([*ids[:-1], *start])


@given(st.lists(st.integers(1, 600)), st.integers(1, 20), st.integers(1, 50))
def test_batches_hold_every_row_once_within_the_memory_of_the_longest(
    lengths: list[int], batch_size: int, new: int
) -> None:
    batches = plan_batches(lengths, batch_size, new)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    flat = [lengths[row] for batch in batches for row in batch]
    assert flat == sorted(lengths, reverse=True)
    for batch in batches:
        padded = len(batch) * (max(lengths[row] for row in batch) + new)
        assert padded <= batch_size * (max(lengths) + new)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_evaluated_without_dropout_and_left_as_it_was(family: str) -> None:
    model, tokenizer = random_model(family), tokenizer_of(family)
    still = run(model, tokenizer, family, ["Moss"], label_scoring=True)
    model.train()
    model.lm_head.eval()
    calls: list[None] = []
    try:
        trained = run(
            model,
            tokenizer,
            family,
            ["Moss"],
            label_scoring=True,
            batch_size=100,
            on_batch=lambda: calls.append(None),
        )
        assert model.training
        assert not model.lm_head.training
    finally:
        model.eval()
    assert [p.text for p in trained] == [p.text for p in still]
    assert [p.option_scores for p in trained] == [pytest.approx(p.option_scores, abs=1e-4) for p in still]
    assert len(calls) == 1
