"""The folder made from public data sets: conversions on small local files of the hub's columns."""

import json
import os
import re
from collections import Counter

import pytest
from data_folders import Settings
from datasets import Dataset

from data_prep.errors import UserError
from data_prep.hub import choose_test_rows, choose_train_rows, make_folder
from data_prep.hub_sources import HUB_SOURCES
from data_prep.orders import ORDERS
from data_prep.rows import parse_array, read_content
from data_prep.tasks import load_tasks

# One row of each data set's columns, in our own words, and what it becomes.
CONVERSIONS = {
    "dbpedia": (
        {"label": 3, "title": "Ida Brook", "content": " Ida Brook rows."},
        ("Athlete", "Title: Ida Brook\nText:  Ida Brook rows.\n"),
    ),
    "amazon": (
        {"label": 0, "title": "Leaks", "content": "It leaks."},
        ("very negative", "Title: Leaks\nText: It leaks.\n"),
    ),
    "yahoo": (
        {"topic": 5, "question_title": "Who won?", "question_content": "The race.", "best_answer": "Ida."},
        ("Sports", "Title: Who won?\nQuestion: The race.\nAnswer: Ida.\n"),
    ),
    "agnews": ({"label": 3, "text": "New kettle out"}, ("Science or Technology", "Text: New kettle out\n")),
    "yelp": ({"label": 4, "text": "Fine tea.\\nAgain!"}, ("very positive", "Text: Fine tea.\\nAgain!\n")),
    "IMDB": ({"label": 1, "text": "A fine film."}, ("Good", "A fine film.")),
    "SST-2": ({"label": 0, "sentence": "dull as tin "}, ("Bad", "Text: dull as tin ")),
    "MNLI": (
        {"label": 1, "premise": "Tea is hot.", "hypothesis": "Tea is green."},
        ("neutral", "sentence 1: Tea is hot.\nsentence 2: Tea is green."),
    ),
    "CB": (
        {"label": 1, "premise": "Tea is hot.", "hypothesis": "tea is cold"},
        ("contradiction", "sentence 1: Tea is hot.\nsentence 2: tea is cold"),
    ),
    "RTE": (
        {"label": 1, "sentence1": "Tea is hot.", "sentence2": "Tea is cold."},
        ("contradiction", "sentence 1: Tea is hot.\nsentence 2: Tea is cold."),
    ),
    "QQP": (
        {"label": 0, "question1": "Why tea?", "question2": "Why ink?"},
        ("False", "first sentence: Why tea?\nsecond sentence: Why ink?"),
    ),
    "BoolQA": (
        {"label": 1, "question": "is tea hot", "passage": "Tea -- Tea is hot."},
        ("True", "question: is tea hot\npassage: Tea -- Tea is hot."),
    ),
    "MultiRC": (
        {"label": 0, "paragraph": "Tea is hot.", "question": "Is it?", "answer": "No"},
        ("False", "paragraph: Tea is hot. \nquestion: Is it?\ncandidate answer: No"),
    ),
    "WiC": (
        {"label": 1, "word": "pot", "sentence1": "A pot of tea.", "sentence2": "They pot it."},
        ("True", "word: pot\nA pot of tea.\nThey pot it."),
    ),
    "COPA": (
        {
            "label": 1,
            "question": "effect",
            "premise": "It fell.",
            "choice1": "It rang.",
            "choice2": "It broke.",
        },
        (
            "B",
            'Which sentence is the effect of "It fell."? Choose one between A and B.\nA: It rang.\nB: It broke.',
        ),
    ),
}
# What the published rows of each task look like.
PUBLISHED_FORMS = {
    "dbpedia": r"Title: .*\nText: .*\n", "amazon": r"Title: .*\nText: .*\n", "yelp": r"Text: .*\n",
    "SST-2": r"Text: .* ", "MNLI": r"sentence 1: [^\n]*\nsentence 2: [^\n]*",
    "CB": r"sentence 1: [^\n]*\nsentence 2: [^\n]*", "RTE": r"sentence 1: [^\n]*\nsentence 2: [^\n]*",
    "QQP": r"first sentence: [^\n]*\nsecond sentence: [^\n]*", "BoolQA": r"question: [^\n]*\npassage: [^\n]*",
    "MultiRC": r"paragraph: [^\n]*[^\n ] \nquestion: [^\n]*\ncandidate answer: [^\n]*",
    "WiC": r"word: [^\n]*\n[^\n]*\n[^\n]*",
    "COPA": r'Which sentence is the (cause|effect) of "[^\n]*"\? Choose one between A and B\.'
    r"\nA: [^\n]*\nB: [^\n]*",
}  # fmt: skip


def hub_rows(task, split, count):
    """Rows of the task's hub columns, every text different, all classes in turn."""
    source, (example, _) = HUB_SOURCES[task], CONVERSIONS[task]
    return [
        {name: f"{value} {split} {k}" for name, value in example.items() if isinstance(value, str)}
        | {source.label_column: k % len(source.classes)}
        for k in range(count)
    ]


def write_hub_files(root, task, train, test, kind="parquet"):
    (root / task).mkdir(parents=True)
    for split, rows in (("train", train), ("test", test)):
        data = Dataset.from_list(rows)
        path = str(root / task / f"{split}.{kind}")
        {"parquet": data.to_parquet, "jsonl": data.to_json, "csv": data.to_csv}[kind](path)


def test_there_is_a_source_for_each_of_the_fifteen_tasks():
    assert set(HUB_SOURCES) == set(CONVERSIONS) == set(ORDERS["order4"])
    for source in HUB_SOURCES.values():
        assert re.fullmatch("[0-9a-f]{40}", source.revision)
        assert sorted(source.classes) == sorted(source.labels)


@pytest.mark.parametrize("task", CONVERSIONS)
def test_conversion_gives_the_published_form(task):
    row, (label, sentence) = CONVERSIONS[task]
    assert HUB_SOURCES[task].convert(row | {"idx": 1}) == {"label": label, "sentence": sentence}
    if task in PUBLISHED_FORMS:
        assert re.fullmatch(PUBLISHED_FORMS[task], sentence)


def test_published_rows_have_the_forms_and_labels_that_conversions_give(benchmark_dir):
    for task, form in PUBLISHED_FORMS.items():
        source = HUB_SOURCES[task]
        folder = benchmark_dir / "CL_Benchmark" / source.family / task
        assert json.loads((folder / "labels.json").read_text()) == list(source.labels)
        for path in folder.glob("t*.json.gz"):
            records, _ = parse_array(read_content(path))
            assert all(re.fullmatch(form, record["sentence"], re.DOTALL) for record in records)


@pytest.mark.parametrize("question", ["", "  ", None])
def test_yahoo_without_a_question_text_calls_the_title_the_question(question):
    row = CONVERSIONS["yahoo"][0] | {"question_content": question, "best_answer": ""}
    converted = HUB_SOURCES["yahoo"].convert(row)
    assert converted is not None
    assert converted["sentence"] == "Question: Who won?\nAnswer: \n"


def test_paragraph_with_its_final_space_gets_no_second_one():
    row = CONVERSIONS["MultiRC"][0] | {"paragraph": "Tea is hot. "}
    assert HUB_SOURCES["MultiRC"].convert(row)["sentence"] == CONVERSIONS["MultiRC"][1][1]


@pytest.mark.parametrize("change", [{"label": -1}, {"label": 2}, {"text": " \n"}, {"text": None}])
def test_rows_without_a_class_or_text_are_left_out(change):
    assert HUB_SOURCES["IMDB"].convert({"label": 0, "text": "A film."} | change) is None


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_made_folder_loads(tmp_path, kind):
    for task in ("IMDB", "COPA", "WiC"):
        write_hub_files(tmp_path / "hub", task, hub_rows(task, "train", 30), hub_rows(task, "test", 10), kind)
    out = tmp_path / "deep" / "out"
    counts = make_folder(out, ["IMDB", "COPA", "WiC"], seed=1, local=tmp_path / "hub")
    assert counts == {task: {"train": 30, "test": 10} for task in ("IMDB", "COPA", "WiC")}
    loaded = load_tasks(Settings(str(out)), ["COPA", "WiC", "IMDB"], split="test", seed=1)
    assert [data.task.show_options for data in loaded] == [False, True, True]
    wic = loaded[1]
    assert wic.task.labels == ("True", "False")
    rows = {row["word"]: row for row in hub_rows("WiC", "train", 30)}
    for row in wic.train:
        word = row.sentence.split("\n")[0].removeprefix("word: ")
        assert row.label == ("False", "True")[rows[word]["label"]]
    assert json.loads((out / "SOURCES.json").read_text())["tasks"]["WiC"]["rows"] == counts["WiC"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


def test_same_seed_makes_the_same_bytes(tmp_path):
    write_hub_files(tmp_path / "hub", "IMDB", hub_rows("IMDB", "train", 40), hub_rows("IMDB", "test", 9))
    bytes_of = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_folder(tmp_path / name, ["IMDB"], seed=seed, local=tmp_path / "hub")
        bytes_of[name] = (tmp_path / name / "CL_Benchmark" / "SC" / "IMDB" / "train.json").read_bytes()
    assert bytes_of["a"] == bytes_of["b"] != bytes_of["c"]


def test_train_has_a_thousand_a_class_and_nothing_of_test():
    source = HUB_SOURCES["IMDB"]
    rows = [{"label": int(k >= 1500), "text": f"film {k}"} for k in range(2300)] + [{"label": -1, "text": "x"}]
    train = choose_train_rows(source, Dataset.from_list(rows), 1, exclude={f"film {k}" for k in range(600)})
    assert Counter(row["label"] for row in train) == {"Bad": 900, "Good": 800}
    assert all(int(row["sentence"].split()[1]) >= 600 for row in train)
    assert len({row["sentence"] for row in train}) == len(train)
    labels = [row["label"] for row in train]
    assert labels != sorted(labels)  # mixed: the data set itself is sorted by class
    assert len(choose_train_rows(source, Dataset.from_list(rows), 1)) == 1800


def test_whole_task_keeps_all_its_rows():
    rows = [{"label": 0, "premise": f"p {k}", "hypothesis": "h"} for k in range(1200)]
    assert len(choose_train_rows(HUB_SOURCES["CB"], Dataset.from_list(rows), 1)) == 1200


def test_large_test_split_is_sampled_evenly():
    rows = [{"label": int(k >= 5000), "text": f"film {k}"} for k in range(9000)]
    test = choose_test_rows(HUB_SOURCES["IMDB"], Dataset.from_list(rows), 1)
    assert Counter(row["label"] for row in test) == {"Bad": 3800, "Good": 3800}


def test_amazon_copy_may_name_its_columns_otherwise_and_count_from_one():
    rows = [{"3": k % 5 + 1, "funny": f"title {k}", "It is": f"text {k}"} for k in range(10)]
    train = choose_train_rows(HUB_SOURCES["amazon"], Dataset.from_list(rows), 1)
    assert {(row["label"], row["sentence"]) for row in train} >= {
        ("very negative", "Title: title 0\nText: text 0\n"),
        ("very positive", "Title: title 4\nText: text 4\n"),
    }
    assert len(train) == 10


def refused(tmp_path, tasks=("IMDB",), out="out"):
    with pytest.raises(UserError) as caught:
        make_folder(tmp_path / out, tasks, seed=1, local=tmp_path / "hub")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")) == []
    return str(caught.value)


def test_faults_are_told_and_leave_nothing_behind(tmp_path):
    good = hub_rows("IMDB", "train", 6)
    assert f"no {tmp_path}/hub/IMDB/test.parquet" in refused(tmp_path)
    write_hub_files(tmp_path / "hub", "IMDB", good, hub_rows("IMDB", "test", 2))
    assert '--tasks: no task "imdb"; did you mean "IMDB"? (there are ' in refused(tmp_path, ["imdb"])
    (tmp_path / "there").mkdir()
    assert "exists; name a new folder" in refused(tmp_path, out="there")
    assert "cannot be written" in refused(tmp_path, out="hub/IMDB/train.parquet/out")
    (tmp_path / "hub" / "IMDB" / "train.parquet").write_bytes(b"PAR1 no more")
    assert "train.parquet cannot be read" in refused(tmp_path)
    Dataset.from_list([{"text": "film"}]).to_parquet(str(tmp_path / "hub" / "IMDB" / "train.parquet"))
    assert "the data set has the columns text; needed: label, text" in refused(tmp_path)
    Dataset.from_list([{"label": -1, "text": "film"}]).to_parquet(str(tmp_path / "hub" / "IMDB" / "train.parquet"))
    assert "no usable row in train" in refused(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.environ.get("CL_TEST_NETWORK") != "1", reason="CL_TEST_NETWORK=1 not set: this test downloads")
def test_download_makes_a_folder(tmp_path):
    counts = make_folder(tmp_path / "out", ["COPA", "CB", "RTE"], seed=1, local=None)
    assert counts == {
        "COPA": {"train": 400, "test": 100},
        "CB": {"train": 250, "test": 56},
        "RTE": {"train": 2000, "test": 277},
    }
    assert len(load_tasks(Settings(str(tmp_path / "out")), ["COPA", "CB", "RTE"], split="test", seed=1)) == 3
