"""Texts outside the stream: how they are cut and hidden, and that their perplexity is the model's own."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import FAMILIES, SENTENCES, random_model
from small_tokenizers import tokenizer_of

from data_prep.errors import UserError
from data_prep.texts import SPACING, SPAN, Piece, load_text
from eval import harness
from eval.retention import negative_log_likelihoods, perplexity

LONG = " ".join(SENTENCES * 3)
SENTENCE = st.sampled_from([text for text in SENTENCES if len(text) > 20])
DOCUMENTS = st.lists(SENTENCE, min_size=4, max_size=20).map(" ".join)


def text_of(content: str, family: str, folder: Path, tokens: int = 48) -> Any:
    path = folder / "essay.txt"
    path.write_text(content, encoding="utf-8")
    return load_text(path, tokenizer_of(family), family=family, piece_tokens=tokens)


def sentinels() -> set[int]:
    return {tokenizer_of("t5").convert_tokens_to_ids(f"<extra_id_{index}>") for index in range(100)}


def read_back(piece: Piece) -> list[int]:
    """The text's ids, each hidden span put in the place of its sentinel."""
    marks, spans, key = sentinels(), {}, None
    for token in piece.target_ids[:-1]:
        if token in marks:
            key = token
            spans[key] = []
        else:
            spans[key].append(token)
    return [token for read in piece.input_ids[:-1] for token in (spans[read] if read in marks else [read])]


@settings(deadline=None, max_examples=40)
@given(content=DOCUMENTS, tokens=st.integers(SPACING, 60))
def test_t5_reads_the_text_with_three_of_each_twenty_tokens_hidden(
    content: str, tokens: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokenizer = tokenizer_of("t5")
    text = text_of(content, "t5", tmp_path_factory.mktemp("text"), tokens)
    whole = tokenizer(content, add_special_tokens=False).input_ids
    windows = [whole[start : start + tokens] for start in range(0, len(whole), tokens)]
    kept = [window for window in windows if len(window) >= SPACING]
    assert [read_back(piece) for piece in text.pieces] == kept
    for piece, window in zip(text.pieces, kept, strict=True):
        hidden = [window[i] for i in range(len(window) // SPACING * SPACING) if i % SPACING >= SPACING - SPAN]
        assert [piece.target_ids[place] for place in piece.counted] == hidden
        assert piece.input_ids[-1] == piece.target_ids[-1] == tokenizer.eos_token_id
    assert text.tokens == sum(len(window) // SPACING * SPAN for window in kept)


def test_llama_reads_every_token_once_after_a_bos(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("llama2")
    text = text_of(LONG, "llama2", tmp_path)
    whole = tokenizer(LONG, add_special_tokens=False).input_ids
    assert [token for piece in text.pieces for token in piece.input_ids[1:]] == whole
    assert all(piece.input_ids == piece.target_ids and len(piece.input_ids) <= 48 for piece in text.pieces)
    assert {piece.input_ids[0] for piece in text.pieces} == {tokenizer.bos_token_id}
    assert text.tokens == len(whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_are_those_of_one_token_after_another(family: str, batch_size: int, tmp_path: Path) -> None:
    model, pieces = random_model(family), text_of(LONG, family, tmp_path).pieces
    found = negative_log_likelihoods(model, pieces, family=family, pad_id=0, batch_size=batch_size)
    assert found == pytest.approx([one_by_one(model, piece, family) for piece in pieces], rel=1e-5)


@torch.no_grad()
def one_by_one(model: Any, piece: Piece, family: str) -> float:
    """A forward for each counted token, without batch, padding, mask or cache."""
    total = 0.0
    for place in piece.counted:
        if family == "t5":
            before = [model.config.decoder_start_token_id, *piece.target_ids[:place]]
            logits = model(
                input_ids=torch.tensor([piece.input_ids]), decoder_input_ids=torch.tensor([before]), use_cache=False
            ).logits
        else:
            logits = model(input_ids=torch.tensor([piece.input_ids[:place]]), use_cache=False).logits
        total -= float(logits[0, -1].double().log_softmax(-1)[piece.target_ids[place]])
    return total


def test_perplexity_of_uniform_guesses_is_their_number() -> None:
    assert perplexity(7 * math.log(50), 7) == pytest.approx(50)
    assert perplexity(1e6, 1) is None


def test_documents_of_a_jsonl_file_are_cut_one_by_one(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("llama2")
    path = tmp_path / "essays.jsonl"
    path.write_text("".join(json.dumps({"text": text, "by": "nobody"}) + "\n" for text in SENTENCES), encoding="utf-8")
    text = load_text(path, tokenizer, family="llama2", piece_tokens=500)
    assert [list(piece.input_ids[1:]) for piece in text.pieces] == [
        tokenizer(sentence, add_special_tokens=False).input_ids for sentence in SENTENCES
    ]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("short.txt", b"Moss", "no document of at least 20 tokens"),
        ("latin.txt", "naïve".encode("latin-1"), "not UTF-8 (byte 2)"),
        ("rows.jsonl", b'{"text": "one"}\n{"words": "two"}\n', 'row 1: no text under "text"'),
        ("rows.jsonl", b'{"text": "one"}\n{"text": \n', "row 1: not JSON"),
        ("rows.jsonl", b"[1, 2]", 'row 0: no text under "text"'),
        ("rows.jsonl", b"", "rows.jsonl: is empty"),
        ("rows.jsonl", b'{"text": "\\ud800"}\n', 'row 0: no text under "text"'),
    ],
)
def test_a_text_that_cannot_be_used_is_told(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_text(path, tokenizer_of("t5"), family="t5", piece_tokens=48)
    assert told in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("family", "tokens", "least"), [("t5", 19, 20), ("llama2", 1, 2)])
def test_pieces_too_short_to_predict_in_are_told(family: str, tokens: int, least: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"data.max_source_tokens, {tokens}; at least {least} are needed"):
        text_of(LONG, family, tmp_path, tokens)


HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HARNESS, reason="lm-evaluation-harness is not installed (pip install lm-eval)")


@pytest.mark.skipif(HARNESS, reason="lm-evaluation-harness is installed")
def test_without_the_harness_its_tasks_are_refused() -> None:
    with pytest.raises(UserError, match=r"evaluation.retention: hellaswag: .*pip install lm-eval"):
        harness.load_task("hellaswag")


@pytest.fixture
def parity(tmp_path: Path) -> Path:
    """A task of the harness with its data beside it."""
    rows = [{"q": f"Is {number} even?", "a": number % 2} for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "parity",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}} ",
        "doc_to_target": "a",
        "doc_to_choice": ["yes", "no"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [{"name": name, "filter": [{"function": "take_first"}]} for name in ("one", "two")],
    }
    path = tmp_path / "parity.yaml"
    path.write_text(json.dumps(task), encoding="utf-8")
    return path


@needs_harness
@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_of_the_harness_is_scored_by_the_model(family: str, parity: Path) -> None:
    task, model, tokenizer = harness.load_task(str(parity)), random_model(family), tokenizer_of(family)
    found = [harness.scores(task, model, tokenizer, family=family, batch_size=size) for size in (4, 20)]
    assert set(found[0]) == {"parity: acc,one", "parity: acc,two"}
    assert found[0] == found[1]
    assert 0 <= found[0]["parity: acc,one"] <= 1


@needs_harness
def test_other_rows_are_another_task(parity: Path) -> None:
    before = harness.load_task(str(parity)).fingerprint
    assert harness.load_task(str(parity)).fingerprint == before
    rows = parity.with_name("rows.jsonl")
    rows.write_text(rows.read_text().replace("Is 3 even", "Is 5 even"))
    assert harness.load_task(str(parity)).fingerprint != before


@needs_harness
def test_a_task_that_cannot_be_scored_is_told(parity: Path) -> None:
    task = harness.load_task(str(parity))
    with pytest.raises(UserError, match="parity: lm-evaluation-harness cannot score it with this model"):
        harness.scores(task, object(), tokenizer_of("t5"), family="t5", batch_size=4)


@needs_harness
def test_tasks_that_the_harness_cannot_load_are_told(parity: Path) -> None:
    with pytest.raises(UserError, match="no_such_task: lm-evaluation-harness cannot load it"):
        harness.load_task("no_such_task")
    parity.write_text(parity.read_text().replace('"{{q}} "', "!function os.system"))
    with pytest.raises(UserError, match="cannot be read as plain YAML"):
        harness.load_task(str(parity))
    parity.write_text('{"dataset_path": "json"}')
    with pytest.raises(UserError, match='needs a key "task"'):
        harness.load_task(str(parity))
