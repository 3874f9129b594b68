"""The tiny backbones: the same bytes every time, the tokenizers of the real families, text that can be learnt."""

import dataclasses
import itertools
from pathlib import Path
from random import Random

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import cache, synthetic
from data_prep.batches import encode_rows
from data_prep.tasks import load_tasks
from pipeline import tiny
from pipeline.models import CLASSES, load_tokenizer
from pipeline.recipe import Data

BOTH = pytest.mark.parametrize("family", ["t5", "llama2"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Backbones of two training steps."""
    made = {}
    for family in tiny.MAKING:
        made[family] = tmp_path_factory.mktemp(family)
        tiny._make(made[family], family, steps=2)
    return made


def vocabulary_of(folders: dict[str, Path], family: tiny.Family) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folders[family] / tiny.MAKING[family].tokenizer_file))


@BOTH
def test_bytes_do_not_depend_on_the_caller(folders: dict[str, Path], family: tiny.Family, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.manual_seed(5)
        expected = torch.random.get_rng_state()
        tiny._make(tmp_path, family, steps=2)
        assert torch.get_num_threads() == 3
        assert torch.equal(torch.random.get_rng_state(), expected)
    finally:
        torch.set_num_threads(threads)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", tiny.MAKING[family].tokenizer_file} <= names
    assert names == {path.name for path in folders[family].iterdir()}
    for name in names:
        assert (tmp_path / name).read_bytes() == (folders[family] / name).read_bytes(), name


@BOTH
def test_rows_are_encoded_with_sentencepiece_ids(folders: dict[str, Path], family: tiny.Family) -> None:
    tokenizer = load_tokenizer(folders[family], family)
    vocabulary = vocabulary_of(folders, family)
    names = [question.name for question in synthetic.TASKS]
    data = Data(path="synthetic", max_source_tokens=96)
    for question, loaded in zip(synthetic.TASKS, load_tasks(data, names, split="test", seed=1), strict=True):
        examples = encode_rows(loaded.task, loaded.evaluation, tokenizer, family=family, data=data)
        for row, example in zip(loaded.evaluation, examples, strict=True):
            ids = vocabulary.encode(question.prompt(row.sentence))
            assert vocabulary.unk_id() not in ids
            begin, end = vocabulary.bos_id(), vocabulary.eos_id()
            assert list(example.input_ids) == ([*ids, end] if family == "t5" else [begin, *ids])
            assert list(example.label_ids) == [*vocabulary.encode(row.label), end]
            assert not example.truncated


@BOTH
def test_every_label_is_said_in_whole_words(folders: dict[str, Path], family: tiny.Family) -> None:
    tokenizer = load_tokenizer(folders[family], family)
    for label in (label for question in synthetic.TASKS for label in question.labels):
        ids = vocabulary_of(folders, family).encode(label)
        assert len(ids) == len(label.split())
        assert tokenizer.decode(ids) == label


@BOTH
def test_no_printable_character_is_unknown(folders: dict[str, Path], family: tiny.Family) -> None:
    vocabulary = vocabulary_of(folders, family)
    text = "".join(chr(code) for code in range(33, 127))  # a user's own task may hold any
    assert vocabulary.decode(vocabulary.encode(text)) == text
    spaced = "two  spaces"  # the families differ here: T5's own vocabulary squeezes them, LLaMA's keeps them
    assert vocabulary.decode(vocabulary.encode(spaced)) == ("two spaces" if family == "t5" else spaced)


@BOTH
def test_folder_loads_and_fits_its_tokenizer(folders: dict[str, Path], family: tiny.Family) -> None:
    model = CLASSES[family].from_pretrained(folders[family])
    tokenizer = load_tokenizer(folders[family], family)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) < 400_000
    if family == "t5":
        sentinel = len(vocabulary_of(folders, family)) + tiny.SENTINELS - 1
        assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == sentinel


@BOTH
def test_training_lowers_the_loss(folders: dict[str, Path], family: tiny.Family) -> None:
    vocabulary = vocabulary_of(folders, family)
    encode = tiny._t5_example if family == "t5" else tiny._llama_example
    examples = [encode(text, vocabulary, Random(1)) for text in itertools.islice(synthetic.pretraining_texts(1), 24)]
    batch = {
        "input_ids": tiny._padded([source for source, _ in examples], 0),
        "attention_mask": tiny._padded([[1] * len(source) for source, _ in examples], 0),
        "labels": tiny._padded([target for _, target in examples], -100),
    }
    losses = []
    for steps in (0, 25):
        with tiny._reproducible(), torch.no_grad():
            model = tiny._new_model(family, len(vocabulary))
            with torch.enable_grad():
                tiny._train(model, family, vocabulary, steps)
            losses.append(float(model(**batch).loss))
    assert losses[1] < 0.8 * losses[0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000))
def test_corrupted_spans_can_be_put_back(folders: dict[str, Path], seed: int) -> None:
    vocabulary = vocabulary_of(folders, "t5")
    text = next(text for text in synthetic.pretraining_texts(seed) if text.answer is None)
    source, target = tiny._t5_example(text, vocabulary, Random(seed))
    assert source[-1] == target[-1] == vocabulary.eos_id()
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token >= len(vocabulary):
            spans[token] = []
        else:
            spans[min(spans)].append(token)
    assert list(spans) == [len(vocabulary) + tiny.SENTINELS - 1 - k for k in range(len(spans))]  # <extra_id_0> first
    restored = [token for place in source[:-1] for token in spans.get(place, [place])]
    assert restored == vocabulary.encode(text.text)


@BOTH
def test_of_a_practice_question_only_the_answer_is_trained(folders: dict[str, Path], family: tiny.Family) -> None:
    vocabulary = vocabulary_of(folders, family)
    encode = tiny._t5_example if family == "t5" else tiny._llama_example
    text = next(text for text in synthetic.pretraining_texts(2) if text.answer is not None)
    source, target = encode(text, vocabulary, Random(0))
    answer = [*vocabulary.encode(text.answer), vocabulary.eos_id()]
    prompt = vocabulary.encode(text.text)
    if family == "t5":
        assert (source, target) == ([*prompt, vocabulary.eos_id()], answer)
    else:
        assert source == [vocabulary.bos_id(), *prompt, *answer]
        assert target == [-100] * (1 + len(prompt)) + answer


def test_backbone_is_made_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CHECKOUT", tmp_path)
    monkeypatch.setitem(tiny.MAKING, "t5", dataclasses.replace(tiny.MAKING["t5"], steps=1))
    folder = tiny.ensure_tiny_backbone("t5")
    assert folder.parent == tmp_path / ".cache"
    (folder / "mark").touch()
    assert tiny.ensure_tiny_backbone("t5") == folder
    assert (folder / "mark").exists()
