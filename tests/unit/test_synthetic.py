"""The templated tasks, the text for pretraining, and the cache they are kept in."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import cache, synthetic
from data_prep.errors import UserError
from data_prep.prompts import build_prompt
from data_prep.tasks import load_tasks
from pipeline.recipe import Data

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "CHECKOUT", tmp_path)
    return tmp_path


def split_rows(question: synthetic.Question) -> dict[str, list[dict[str, str]]]:
    folder = f"CL_Benchmark/{question.family}/{question.name}"
    return {split: json.loads(synthetic.folder_files()[f"{folder}/{split}.json"]) for split in synthetic.ROWS}


def digest_of_everything() -> str:
    texts = list(itertools.islice(synthetic.pretraining_texts(3), 300))
    return hashlib.sha256(repr((sorted(synthetic.folder_files().items()), texts)).encode()).hexdigest()


@pytest.mark.parametrize("question", synthetic.TASKS, ids=lambda question: question.name)
def test_rows_are_distinct_over_splits_and_labels_are_balanced(question: synthetic.Question) -> None:
    rows = split_rows(question)
    sentences = [row["sentence"] for split in rows.values() for row in split]
    assert len(set(sentences)) == len(sentences) == sum(synthetic.ROWS.values())
    for split, count in synthetic.ROWS.items():
        counts = Counter(row["label"] for row in rows[split])
        assert counts == {label: count // len(question.labels) for label in question.labels}
        # shuffled: labels in a fixed turn would give every batch the same mixture
        assert [row["label"] for row in rows[split]] != [
            question.labels[k % len(question.labels)] for k in range(count)
        ]


def test_four_families_and_no_label_in_two_tasks() -> None:
    assert len({question.family for question in synthetic.TASKS}) == 4
    labels = [label.lower() for question in synthetic.TASKS for label in question.labels]
    assert len(set(labels)) == len(labels)


def test_another_process_draws_the_same_text() -> None:
    code = "import test_synthetic; print(test_synthetic.digest_of_everything())"
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    for hash_seed in ("1", "2"):  # the order of sets, were there any, would differ
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip().splitlines()[-1] == digest_of_everything()


def test_folder_is_read_as_a_benchmark_and_gives_the_same_prompts(checkout: Path) -> None:
    folder = synthetic.ensure_folder()
    assert folder.parent == checkout / ".cache"
    loaded = load_tasks(Data(path=str(folder)), [question.name for question in synthetic.TASKS], split="test", seed=1)
    for question, data in zip(synthetic.TASKS, loaded, strict=True):
        assert len(data.train) == synthetic.ROWS["train"]
        assert len(data.evaluation) == synthetic.ROWS["test"]
        for row in data.train[:3]:
            prompt = build_prompt(data.task, row.sentence, add_task_name=True, add_dataset_name=True)
            assert prompt.text == question.prompt(row.sentence)


def test_folder_is_written_once(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = synthetic.ensure_folder()
    (first / "mark").touch()
    assert (synthetic.ensure_folder() / "mark").exists()
    changed = {**synthetic.folder_files(), "more": "text"}
    monkeypatch.setattr(synthetic, "folder_files", lambda: changed)
    second = synthetic.ensure_folder()
    assert second != first
    assert (second / "more").read_text() == "text"


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_pretraining_never_shows_a_row_or_answers_with_a_label_of_the_tasks(seed: int) -> None:
    texts = list(itertools.islice(synthetic.pretraining_texts(seed), 300))
    assert texts == list(itertools.islice(synthetic.pretraining_texts(seed), 300))
    labels = {label.lower() for question in synthetic.TASKS for label in question.labels}
    assert not labels & {text.answer.lower() for text in texts if text.answer is not None}
    rows = {row["sentence"] for task in synthetic.TASKS for split in split_rows(task).values() for row in split}
    lines = {line for text in texts for line in text.text.split("\n")}
    assert not {row.removesuffix("\n") for row in rows} & lines
    assert {text.answer is None for text in texts} == {True, False}


def test_pretraining_differs_by_seed() -> None:
    first, second = (list(itertools.islice(synthetic.pretraining_texts(seed), 50)) for seed in (1, 2))
    assert first != second


def test_what_is_there_is_not_made_again(checkout: Path) -> None:
    made: list[Path] = []
    assert cache.publish("thing", made.append) == cache.publish("thing", made.append)
    assert len(made) == 1


def test_of_two_makers_at_once_one_wins_and_nothing_is_left_over(checkout: Path) -> None:
    both_write = threading.Barrier(2)
    found: list[Path] = []

    def make(who: str) -> None:
        def write(folder: Path) -> None:
            (folder / "who").write_text(who)
            both_write.wait(timeout=20)

        found.append(cache.publish("thing", write))

    makers = [threading.Thread(target=make, args=(who,)) for who in ("a", "b")]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(timeout=30)
    assert found == [checkout / ".cache/thing"] * 2
    assert (found[0] / "who").read_text() in {"a", "b"}
    assert [path.name for path in (checkout / ".cache").iterdir()] == ["thing"]


@pytest.mark.parametrize(("fault", "raised"), [(OSError("no space left"), UserError), (KeyError("ours"), KeyError)])
def test_a_failed_making_leaves_nothing(checkout: Path, fault: Exception, raised: type[Exception]) -> None:
    def write(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise fault

    with pytest.raises(raised, match=r"no space left|ours"):
        cache.publish("thing", write)
    assert list((checkout / ".cache").iterdir()) == []


def test_cache_falls_back_to_a_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(cache, "CHECKOUT", tmp_path / "file")  # no folder can be made below a file
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    folder = cache.cache_root()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700

    monkeypatch.setattr(cache.os, "getuid", lambda: 4321)
    stranger = tmp_path / "continual-learning-cache-4321"
    stranger.mkdir()  # laid there by the user that really runs, who is not 4321
    with pytest.raises(UserError, match=r"neither .* can be written"):
        cache.cache_root()
