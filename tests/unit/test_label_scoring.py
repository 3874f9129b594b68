"""Label scoring in one packed forward against the plain sum, one option of one row at a time."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_models import FAMILIES, examples_of, option_ids, random_model, random_texts, run
from small_tokenizers import tokenizer_of

from eval import label_scoring
from eval.label_scoring import option_trees

LABELS = ["Moss", "Moss or fern", "Moss or oak", "oats", "The old oak by the northern wall", "wall"]


def exact_model(family: str) -> Any:
    """The random model in float64: its attention magnifies float32's rounding, in which two ways of reading differ."""
    return copy.deepcopy(random_model(family)).double()


def naive_scores(model: Any, family: str, prompt: tuple[int, ...], option: tuple[int, ...]) -> float:
    if family == "t5":
        logits = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([option])).logits[0]
    else:
        logits = model(input_ids=torch.tensor([[*prompt, *option]])).logits[0, len(prompt) - 1 : -1]
    chosen = torch.log_softmax(logits.float(), dim=-1)[range(len(option)), list(option)]
    return float(chosen.sum())


@torch.no_grad()
def check_against_naive(model: Any, family: str, options: list[tuple[int, ...]], **changes: Any) -> None:
    tokenizer = tokenizer_of(family)
    predictions = run(model, tokenizer, family, LABELS, label_ids=options, label_scoring=True, **changes)
    for example, prediction in zip(examples_of(tokenizer, family), predictions, strict=True):
        want = [naive_scores(model, family, example.input_ids, option) for option in options]
        assert prediction.option_scores == pytest.approx(want, abs=1e-4)
        assert prediction.option == max(range(len(want)), key=want.__getitem__)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_are_those_of_one_option_at_a_time(family: str, attention: str) -> None:
    model, tokenizer = exact_model(family), tokenizer_of(family)
    model.set_attn_implementation(attention)
    check_against_naive(model, family, [*option_ids(tokenizer, LABELS), (tokenizer.eos_token_id,)])


@pytest.mark.parametrize("family", FAMILIES)
def test_options_that_exceed_one_forward_are_scored_in_several(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = exact_model(family), tokenizer_of(family)
    monkeypatch.setattr(label_scoring, "LOGITS_PER_FORWARD", 7 * 3 * model.config.vocab_size)
    options = option_ids(tokenizer, LABELS)
    assert len(option_trees(options, max_nodes=7)) > 1
    check_against_naive(model, family, options, batch_size=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_does_not_disturb_generation(family: str) -> None:
    model, tokenizer = random_model(family), tokenizer_of(family)
    labels = [*random_texts(family), "Moss", "Moss or fern"]
    alone = run(model, tokenizer, family, labels)
    beside = run(model, tokenizer, family, labels, label_scoring=True)
    assert all(p.option is None and p.option_scores is None for p in alone)
    assert max(p.tokens for p in alone) > 2
    assert [(p.text, p.stopped, p.tokens) for p in beside] == [(p.text, p.stopped, p.tokens) for p in alone]


@pytest.mark.parametrize("family", FAMILIES)
def test_of_equal_options_the_first_is_taken(family: str) -> None:
    model, tokenizer = random_model(family), tokenizer_of(family)
    options = option_ids(tokenizer, LABELS)
    once = run(model, tokenizer, family, LABELS, label_ids=options, label_scoring=True)
    twice = run(model, tokenizer, family, LABELS, label_ids=[*options, *options], label_scoring=True)
    assert [p.option for p in twice] == [p.option for p in once]


@given(st.lists(st.lists(st.integers(3, 5), max_size=4), min_size=1), st.integers(1, 12))
def test_a_tree_holds_every_option_and_each_shared_beginning_once(bodies: list[list[int]], max_nodes: int) -> None:
    options = [(*body, 1) for body in bodies]
    trees = option_trees(options, max_nodes=max_nodes)
    paths = [(tree, path) for tree in trees for path in tree.options]
    assert [tuple(token for _, token in path) for _, path in paths] == options
    for tree, path in paths:
        visible = tree.visible()
        for step, (node, _) in enumerate(path[1:]):
            ancestors = [place for place, _ in path[1 : step + 2]]
            assert tree.tokens[node] == path[step][1]
            assert tree.depths[node] == step
            assert visible[node].nonzero().flatten().tolist() == sorted(ancestors)
    for tree in trees:
        said = [tuple(token for _, token in path) for path in tree.options]
        assert len(tree.tokens) == len({text[:length] for text in said for length in range(1, len(text))})
        assert len(tree.tokens) <= max_nodes or len(tree.options) == 1
