"""A user's own tasks: JSON, JSON lines and CSV with keys of their own, checked like the benchmark's rows."""

import csv
import gzip
import json
from pathlib import Path

import pytest
from data_folders import Custom, Settings, write_json, write_task

from data_prep.errors import UserError
from data_prep.tasks import load_tasks

ROWS = [
    ('The kettle, and a "lid".\nTwo lines.', "True"),
    ("NA", "None"),
    ("null é", "1"),
    ("2020-01-01", "True"),
]
LABELS = ["True", "None", "1"]


def write(folder, kind, rows, keys=("text", "answer")):
    """The rows as a file of that kind."""
    path = folder / f"{len(list(folder.iterdir()))}.{kind}"
    records = [dict(zip(keys, row, strict=True)) | {"other": k} for k, row in enumerate(rows)]
    if kind == "json":
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*keys, "other"])
            writer.writeheader()
            writer.writerows(records)
    return str(path)


def custom(train, test, labels=LABELS, **others):
    return Custom(labels, train, test, text_key="text", label_key="answer", **others)


def load(task, split="test", **settings):
    data = Settings("nowhere", tasks={"mine": task}, **settings)
    return load_tasks(data, ["mine"], split=split, seed=1)[0]


def refused(task, **settings):
    with pytest.raises(UserError) as caught:
        load(task, **settings)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    data = load(custom(write(tmp_path, kind, ROWS), write(tmp_path, "json", [("a test", "1")])))
    assert [(row.id, row.sentence, row.label) for row in data.train] == [
        (k, text, label) for k, (text, label) in enumerate(ROWS)
    ]
    assert (data.task.name, data.task.family, data.task.labels) == ("mine", "Custom", tuple(LABELS))


def test_packed_file_is_read(tmp_path):
    plain = write(tmp_path, "csv", ROWS)
    packed = tmp_path / "rows.csv.gz"
    packed.write_bytes(gzip.compress(Path(plain).read_bytes()))
    data = load(custom(str(packed), write(tmp_path, "json", [("a test", "1")])))
    assert [row.sentence for row in data.train] == [text for text, _ in ROWS]


def test_instruction_is_optional_and_gets_its_newline(tmp_path):
    files = write(tmp_path, "json", ROWS), write(tmp_path, "json", [("a test", "1")])
    task = load(custom(*files, instruction="Which is it?")).task
    assert (task.instruction, task.show_options) == ("Which is it?\n", True)
    assert load(custom(*files, instruction="Which is it?\n")).task.instruction == "Which is it?\n"
    task = load(custom(*files)).task
    assert (task.instruction, task.show_options) == ("", True)
    assert load(custom(*files, family="SC")).task.instruction.startswith("What is the sentiment")


def test_bad_lines_are_named_together_and_can_be_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        b'{"text": "one", "answer": "1"}',
        b'{"text": "two", "answer": ',
        b'{"text": "thr\xffee", "answer": "1"}',
        b"[1]",
        b'{"text": "five", "answer": 1}',
        b'{"text": "six"}',
        b'{"text": "seven", "answer": "one"}',
        b'{"text": "a test", "answer": "1"}',
        b'{"text": "nine", "answer": "1"}',
    ]
    path.write_bytes(b"\n".join(lines))
    task = custom(str(path), write(tmp_path, "csv", [("a test", "1")]))
    message = refused(task)
    assert f"{path}: 7 bad rows of 9" in message
    for number, words in (
        (1, "not JSON"), (2, "not UTF-8"), (3, "not a JSON object"), (4, '"answer" is 1, not a string'),
        (5, 'no "answer"'), (6, 'label "one" is outside the set'), (7, "same sentence as row 0 of 1.csv"),
    ):  # fmt: skip
        line = next(line for line in message.splitlines() if line.startswith(f"  row {number}: "))
        assert words in line
    data = load(task, bad_rows="drop")
    assert [(row.id, row.sentence) for row in data.train] == [(0, "one"), (8, "nine")]
    assert sum(data.dropped["train"].values()) == 7


def test_bad_rows_of_an_array_are_named(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"text": "one", "answer": "1"}, "two", {"text": "thr\xff", "answer": "1"}, {"text": "f"}]')
    message = refused(custom(str(path), write(tmp_path, "csv", [("a test", "1")])))
    assert "3 bad rows of 4" in message
    assert "row 1: a str" in message
    assert 'row 2: "text" is not UTF-8 text' in message
    assert 'row 3: no "answer"' in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'[{"text": "one", "answer": "1"}, {"text"', "row 1: not JSON"),
        ("a.csv", b"text,answer\none,1\ntwo \xff,1\n", "row 1: byte"),
        ("a.csv", b"text,answer\none,1\n\ntwo,1,1,1\n", "row 1: 4 fields, not 2 as in the header"),
        ("a.csv", b"text,answer\none, and,1\ntwo, or,1\n", "row 0: 3 fields, not 2 as in the header"),
        ("a.csv", b"text,answer\none\n", "row 0: 1 fields"),
        ("a.csv", b"text,text\none,1\n", "a column name stands twice"),
        ("a.csv", b'text,answer\n"one,1\n', "row 0: 1 fields"),
        ("a.csv", b"", "a.csv: is empty"),
        ("a.jsonl", b" \n", "a.jsonl: is empty"),
        ("a.csv", b"\xef\xbb\xbf", "a.csv: is empty"),
        ("a.csv", b"\xef\xbb\xbf\r\n \r\n", "a.csv: is empty"),
        ("a.json", b"\xef\xbb\xbf\n", "a.json: is empty"),
        ("a.csv", b"text,answer\n", "a.csv: has no rows below its header"),
        ("a.csv", b"\xef\xbb\xbftext,answer\r\n\r\n", "a.csv: has no rows below its header"),
        ("a.json", b"[" * 9999, "row 0: not JSON that can be read"),
        ("a.json", b"[" + b"1" * 5000 + b"]", "row 0: not JSON that can be read"),
        ("a.jsonl", b'{"text": "one", "answer": "1"}\n' + b'{"text":' * 9999, "row 1: not JSON that can be read"),
        ("a.csv", b"sentence,answer\none,1\n", 'row 0: no "text" (it has: answer, sentence)'),
        ("a.txt", b"one", "name the file .json, .jsonl or .csv"),
    ],
)
def test_file_that_cannot_be_read_is_refused(tmp_path, name, content, words, capfd):
    (tmp_path / name).write_bytes(content)
    message = refused(custom(str(tmp_path / name), write(tmp_path, "csv", [("a test", "1")])))
    assert words in message
    assert ("bad row" in message) is ("row " in words), "no row is bad where none can be read"
    assert capfd.readouterr().err == ""


def test_missing_file_and_wrong_labels_are_told_at_their_key(tmp_path):
    path = write(tmp_path, "json", ROWS)
    assert refused(custom(path, str(tmp_path / "no.json"))).startswith("data.tasks.mine.test: no file ")
    for labels in (["a", "A"], ["A+", "A-"], ["up", "..."]):
        message = refused(custom(path, path, labels=labels))
        assert message.startswith("data.tasks.mine.labels: exact match ignores case and punctuation, so ")


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbftext,answer\none,1\n")
    assert load(custom(str(path), write(tmp_path, "json", [("a test", "1")]))).train[0].sentence == "one"


def test_name_that_cannot_name_files_is_refused(tmp_path):
    task = custom(write(tmp_path, "json", ROWS), write(tmp_path, "json", [("a test", "1")]))
    for name in ("../up", "", "a/b", ".hidden", "untrained"):
        with pytest.raises(UserError, match=r"^data\.tasks: .*(cannot name a task|is reserved)"):
            load_tasks(Settings(None, tasks={name: task}), [name], split="test", seed=1)
    assert load_tasks(Settings(None, tasks={"v1.0_a+b": task}), ["v1.0_a+b"], split="test", seed=1)


def test_own_tasks_need_no_folder_and_others_do(tmp_path):
    task = custom(write(tmp_path, "json", ROWS), write(tmp_path, "json", [("a test", "1")]))
    with pytest.raises(UserError, match=r"^data\.path: missing"):
        load_tasks(Settings(None, tasks={"mine": task}), ["mine", "yours"], split="test", seed=1)


def test_dev_of_its_own_is_the_validation_set(tmp_path):
    train, test, dev = (write(tmp_path, "csv", [(f"{word} {k}", "1") for k in range(20)]) for word in "abc")
    assert len(load(custom(train, test, dev=dev), split="validation").train) == 20
    assert load(custom(train, test, dev=dev), split="validation").evaluation[0].sentence == "c 0"
    assert len(load(custom(train, test, dev=test), split="validation").train) == 18


def test_own_task_stands_beside_the_folders_but_not_under_the_same_name(tmp_path):
    write_task(tmp_path)
    own = custom(write(tmp_path, "json", ROWS), write(tmp_path, "json", [("a test", "1")]))
    loaded = load_tasks(Settings(str(tmp_path), tasks={"mine": own}), ["mine", "kettles"], split="test", seed=1)
    assert [data.task.name for data in loaded] == ["mine", "kettles"]
    with pytest.raises(UserError, match=r'no task "min" .*; did you mean "mine"\?$'):
        load_tasks(Settings(str(tmp_path), tasks={"mine": own}), ["mine", "min"], split="test", seed=1)
    write_json(tmp_path / "CL_Benchmark" / "SC" / "mine" / "labels.json", ["a", "b"])
    with pytest.raises(UserError, match="give your task another"):
        load_tasks(Settings(str(tmp_path), tasks={"mine": own}), ["mine", "kettles"], split="test", seed=1)


def test_reading_leaves_the_bars_of_datasets_as_they_were(tmp_path):
    import datasets

    datasets.enable_progress_bars()
    level = datasets.logging.get_verbosity()
    load(custom(write(tmp_path, "json", ROWS), write(tmp_path, "json", [("a test", "1")])))
    assert not datasets.are_progress_bars_disabled()
    assert datasets.logging.get_verbosity() == level
