"""Examples and batches: labels, truncation, padding; with small real tokenizers of both kinds."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import reference_of, tokenizer_of

from data_prep.batches import Example, collate, count_label_tokens, encode_labels, encode_rows
from data_prep.errors import UserError
from data_prep.prompts import build_prompt
from data_prep.tasks import Row, Task

FAMILIES = ("t5", "llama2")
FORMS = {
    "TC": "Title: {}\nText: {}\n",
    "BoolQA": "question: {}\npassage: {}",
    "NLI": "sentence 1: {}\nsentence 2: {}",
    "QQP": "first sentence: {}\nsecond sentence: {}",
    "MultiRC": "paragraph: {}\nquestion: how does moss grow?\ncandidate answer: slowly",
}
# What of each form must survive any cut, besides the lines before it and the cue.
KEPT = {
    "TC": "",
    "BoolQA": "",
    "NLI": "\nsentence 2: ",
    "QQP": "\nsecond sentence: ",
    "MultiRC": "\nquestion: how does moss grow?\ncandidate answer: slowly",
}
WORDS = st.lists(
    st.sampled_from(["oak", " moss", "  the", "\n", "é", "東", " 1804", ".", " harbour", "\U0001f642"]),
    min_size=1,
    max_size=60,
).map("".join)


@dataclass(frozen=True)
class Settings:
    max_source_tokens: int = 512
    truncation: str = "passage"
    add_task_name: bool = True
    add_dataset_name: bool = True


def task_of(kind: str = "TC") -> Task:
    return Task(
        name="plants",
        family=kind,
        labels=("Tree", "Moss", "an old oak"),
        instruction="Which is it? Choose one from the option.\n",
        show_options=True,
        files={},
    )


def encode_one(sentence: str, family: str, kind: str = "TC", **data: object) -> Example:
    (example,) = encode_rows(
        task_of(kind),
        [Row(7, sentence, "Moss")],
        tokenizer_of(family),
        family=family,
        data=Settings(**data),  # type: ignore[arg-type]
    )
    return example


def pieces_of(example: Example, family: str) -> list[int]:
    """The prompt's tokens without its special one."""
    return list(example.input_ids[:-1] if family == "t5" else example.input_ids[1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_examples_keep_order_and_ids_and_end_labels_with_eos(family: str) -> None:
    tokenizer, reference = tokenizer_of(family), reference_of(family)
    rows = [Row(4, "An oak.", "Tree"), Row(0, "Some moss.", "Moss"), Row(9, "A wall.", "-")]
    examples = encode_rows(task_of(), rows, tokenizer, family=family, data=Settings())
    assert [example.row_id for example in examples] == [4, 0, 9]
    for row, example in zip(rows, examples, strict=True):
        prompt = build_prompt(task_of(), row.sentence, add_task_name=True, add_dataset_name=True)
        assert pieces_of(example, family) == reference.encode(prompt.text)
        assert list(example.label_ids) == [*reference.encode(row.label), tokenizer.eos_token_id]
        assert not example.truncated
    special = tokenizer.eos_token_id if family == "t5" else tokenizer.bos_token_id
    assert examples[0].input_ids[-1 if family == "t5" else 0] == special
    assert examples[0].input_ids.count(special) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_options_are_encoded_in_option_order(family: str) -> None:
    reference = reference_of(family)
    assert encode_labels(task_of(), tokenizer_of(family), family=family) == [
        (*reference.encode(label), reference.eos_id()) for label in task_of().labels
    ]


def test_a_llama_label_reads_on_from_its_prompt_after_one_space() -> None:
    example = encode_one("An oak.", "llama2")
    text = tokenizer_of("llama2").decode([*example.input_ids, *example.label_ids], skip_special_tokens=True)
    assert text.endswith("\nAnswer: Moss")


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(sorted(FORMS)), first=WORDS, second=WORDS, room=st.integers(0, 60))
def test_cut_prompts_fit_and_keep_all_but_the_passages_ends(
    family: str, kind: str, first: str, second: str, room: int
) -> None:
    reference = reference_of(family)
    sentence = FORMS[kind].format(first, second)
    prompt = build_prompt(task_of(kind), sentence, add_task_name=True, add_dataset_name=True)
    limit = len(reference.encode(prompt.with_removed(prompt.cuttable))) + 1 + room
    example = encode_one(sentence, family, kind, max_source_tokens=limit)

    assert len(example.input_ids) <= limit
    assert example.truncated == (len(reference.encode(prompt.text)) + 1 > limit)
    candidates = [r for r in range(prompt.cuttable + 1) if encodes(prompt.with_removed(r), example, family)]
    assert candidates, "the ids are those of the prompt with only the passages' ends cut off"
    removed = candidates[0]
    text = prompt.with_removed(removed)
    assert text.startswith(prompt.head)
    assert text.endswith("\nAnswer:")
    assert KEPT[kind] in text
    if example.truncated:
        # One character more would not fit. (T5 drops white space, so several cuts can give the same ids.)
        assert len(reference.encode(prompt.with_removed(removed - 1))) + 1 > limit
    else:
        assert removed == 0


def encodes(text: str, example: Example, family: str) -> bool:
    return reference_of(family).encode(text) == pieces_of(example, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_truncation_finds_about_the_longest_prompt_that_fits(family: str) -> None:
    sentence = FORMS["MultiRC"].format("Moss grows slowly by the northern wall. " * 40)
    example = encode_one(sentence, family, "MultiRC", max_source_tokens=200)
    assert example.truncated
    assert len(example.input_ids) in (199, 200)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_sentence_is_whole_until_the_first_is_gone(family: str) -> None:
    long = "The mill stands on the river and grinds oats. " * 8
    prompt = build_prompt(task_of("NLI"), FORMS["NLI"].format(long, long), add_task_name=True, add_dataset_name=True)
    whole = len(reference_of(family).encode(prompt.text)) + 1
    shorter = encode_one(FORMS["NLI"].format(long, long), family, "NLI", max_source_tokens=whole - 9)
    text = tokenizer_of(family).decode(pieces_of(shorter, family))
    assert text.count("grinds oats") in (14, 15)
    assert text.split("sentence 2:")[1].count("grinds oats.") == 8
    shortest = encode_one(FORMS["NLI"].format(long, long), family, "NLI", max_source_tokens=whole // 2)
    text = tokenizer_of(family).decode(pieces_of(shortest, family))
    assert "sentence 1:" in text
    assert text.split("sentence 1:")[1].split("sentence 2:")[0].strip() == ""
    assert 0 < text.split("sentence 2:")[1].count("grinds oats.") < 8


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_cannot_fit_is_refused_with_the_limit_it_needs(family: str) -> None:
    with pytest.raises(UserError, match=r"task plants, row 7: .* data\.max_source_tokens is 12; raise it") as caught:
        encode_one("An oak.", family, max_source_tokens=12)
    needed = int(str(caught.value).split("at least ")[1].split(" ")[0])
    assert len(encode_one("An oak.", family, max_source_tokens=needed).input_ids) <= needed
    with pytest.raises(UserError):
        encode_one("An oak.", family, max_source_tokens=needed - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_legacy_truncation_cuts_the_end_of_the_prompt(family: str) -> None:
    whole = encode_one("An oak by the wall.", family)
    cut = encode_one("An oak by the wall.", family, max_source_tokens=30, truncation="legacy")
    assert len(whole.input_ids) > 30
    assert cut.truncated
    assert len(cut.input_ids) == 30
    assert pieces_of(cut, family) == pieces_of(whole, family)[:29]
    assert cut.label_ids == whole.label_ids
    kept = encode_one("An oak by the wall.", family, truncation="legacy")
    assert kept == whole


def test_a_tokenizer_without_bos_cannot_serve_llama() -> None:
    with pytest.raises(UserError, match="has no BOS token"):
        encode_rows(task_of(), [Row(0, "An oak.", "Tree")], tokenizer_of("t5"), family="llama2", data=Settings())


LONG = Example(0, (5, 6, 7, 8), (9, 1), truncated=False)
SHORT = Example(1, (3, 4), (9, 9, 1), truncated=False)


def test_t5_batch() -> None:
    batch = collate([LONG, None, SHORT], family="t5", pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [0, 0, 0, 0], [3, 4, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[9, 1, -100], [-100, -100, -100], [9, 9, 1]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_llama_batch_has_labels_at_their_own_positions() -> None:
    batch = collate([LONG, None, SHORT], family="llama2", pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1], [2] * 6, [3, 4, 9, 9, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, -100, 9, 1],
        [-100] * 6,
        [-100, -100, 9, 9, 1, -100],
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_padding_rows_is_as_small_as_can_be(family: str) -> None:
    batch = collate([None, None], family=family, pad_id=0)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[0], [0]],
        "attention_mask": [[1], [1]],
        "labels": [[-100], [-100]],
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_label_tokens_counted_are_those_that_bear_loss(family: str) -> None:
    examples = [LONG, None, SHORT, None]
    assert count_label_tokens(examples) == 5
    assert int((collate(examples, family=family, pad_id=0)["labels"] != -100).sum()) == 5
