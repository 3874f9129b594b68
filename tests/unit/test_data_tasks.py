"""Loading tasks from a CL_Benchmark folder: forms, splits, bad rows, fingerprints."""

import json
import time

import pytest
from data_folders import LABELS, Settings, some_rows, write_json, write_task

from data_prep.errors import UserError
from data_prep.orders import ORDERS
from data_prep.sources import describe_task, find_sources
from data_prep.tasks import load_tasks

PUBLISHED_SIZES = {
    "MNLI": (3000, 7600), "CB": (250, 56), "WiC": (2000, 638), "COPA": (400, 100), "QQP": (2000, 7600),
    "BoolQA": (2000, 3270), "RTE": (2000, 277), "amazon": (5000, 7600), "SST-2": (2000, 872),
    "agnews": (4000, 7600), "MultiRC": (2000, 4848),
}  # fmt: skip


def load(root, *names, split="test", seed=1, **settings):
    return load_tasks(Settings(str(root), **settings), names or ("kettles",), split=split, seed=seed)


def load_one(root, **arguments):
    return load(root, **arguments)[0]


def refused(root, *names, **arguments):
    with pytest.raises(UserError) as caught:
        load(root, *names, **arguments)
    return str(caught.value)


def test_folder_is_found_from_above_and_from_itself(tmp_path):
    write_task(tmp_path, packed=True)
    above, itself = load_one(tmp_path), load_one(tmp_path / "CL_Benchmark")
    assert above == itself
    assert (above.task.name, above.task.family, above.task.labels) == ("kettles", "SC", LABELS)
    assert [row.id for row in above.train] == list(range(20))
    assert above.evaluation[1].sentence == "Text: the test kettle number 1 \n"
    assert above.evaluation[1].label == "Bad"
    assert (above.dropped, above.unmatchable) == ({}, 0)


def test_tasks_come_in_the_order_asked_for(tmp_path):
    write_task(tmp_path, "kettles")
    write_task(tmp_path, "teapots", "TC")
    assert [data.task.name for data in load(tmp_path, "teapots", "kettles")] == ["teapots", "kettles"]


def test_instructions_are_the_folders_own_else_the_bundled(tmp_path):
    own = {"SC": [{"instruction_type": "zero-shot", "instruction": "Is the kettle good?"}]}
    write_json(tmp_path / "configs" / "instruction_config.json", own)
    write_task(tmp_path, "kettles", "SC")
    write_task(tmp_path, "teapots", "TC")
    write_task(tmp_path, "spoons", "COPA")
    kettles, teapots, spoons = (data.task for data in load(tmp_path, "kettles", "teapots", "spoons"))
    assert (kettles.instruction, kettles.show_options) == ("Is the kettle good?\n", True)
    assert teapots.instruction.startswith("What is the topic of")
    assert teapots.instruction.endswith("Choose one from the option.\n")
    assert (spoons.instruction, spoons.show_options) == ("", False)


def test_bundled_instructions_are_the_published_ones(benchmark_dir, mini_dir):
    for folder in (benchmark_dir, mini_dir):
        path = folder / "configs" / "instruction_config.json"
        published = json.loads(path.read_text(encoding="utf-8"))
        for name in ORDERS["order4"]:
            (source,) = find_sources(Settings(str(folder / "CL_Benchmark")), [name])
            bare = type(source)(source.folder, source.folder / "none.json")
            task = describe_task(name, bare)
            assert task.instruction == ("" if name == "COPA" else published[task.family][0]["instruction"])


def test_family_without_an_instruction_is_refused(tmp_path):
    write_task(tmp_path, family="KITCHEN")
    assert 'no instruction for the family "KITCHEN"' in refused(tmp_path)


@pytest.mark.parametrize("config", [[], {"SC": []}, {"SC": "text"}, {"SC": [{"instruction": " "}]}])
def test_instruction_config_of_another_form_is_refused(tmp_path, config):
    write_json(tmp_path / "configs" / "instruction_config.json", config)
    write_task(tmp_path)
    assert "instruction_config.json: " in refused(tmp_path)


def test_all_unknown_tasks_are_named_in_one_message(tmp_path):
    write_task(tmp_path, "kettles")
    write_task(tmp_path, "teapots")
    message = refused(tmp_path, "ketles", "kettles", "clouds")
    there = f"{tmp_path}/CL_Benchmark; there are: kettles, teapots; a task of your own stands under data.tasks"
    assert message.splitlines() == [
        f'no task "ketles" in {there}; did you mean "kettles"?',
        f'no task "clouds" in {there}',
    ]


@pytest.mark.parametrize(("path", "words"), [("nowhere", "does not exist"), ("file", "is a file"), (".", "no task")])
def test_path_without_a_benchmark_is_refused(tmp_path, path, words):
    (tmp_path / "file").write_text("")
    message = refused(tmp_path / path)
    assert message.startswith("data.path: ")
    assert words in message


def test_name_in_two_families_is_refused(tmp_path):
    write_task(tmp_path, "kettles", "SC")
    write_task(tmp_path, "kettles", "TC")
    assert "more than one family" in refused(tmp_path)


@pytest.mark.parametrize("name", ["un tidy", "-dash", "Küche", "a" * 65, "untrained"])
def test_folder_whose_name_cannot_name_files_is_refused_on_use(tmp_path, name):
    write_task(tmp_path, "kettles")
    folder = write_task(tmp_path, name)
    assert load_one(tmp_path).task.name == "kettles"
    message = refused(tmp_path, name)
    assert message.startswith(f"{folder}: ")
    assert ("is reserved" if name == "untrained" else "cannot name a task") in message


@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_split_is_told_with_what_to_do(tmp_path, split):
    folder = write_task(tmp_path, **{split: None})
    message = refused(tmp_path)
    assert f"{folder}: no {split}.json or {split}.json.gz" in message
    assert "python -m data_prep hub" in message


def test_labels_must_be_there_and_be_labels(tmp_path):
    folder = write_task(tmp_path)
    for content, words in (
        ('["Good"]', "at least two"),
        ('{"Good": 1}', "no list of labels"),
        ('["Good", 1]', "no list of labels"),
        ('["Good", ""]', "no list of labels"),
        ('["Good", "Bad", "good"]', "'Good', 'good' read 'good'"),
        ('["A+", "A-", "B"]', "exact match ignores case and punctuation, so 'A+', 'A-' read 'a'; rename them in words"),
        ('["Good", "?!"]', "so '?!' reads ''; rename it in words"),
        ("[", "not JSON"),
    ):
        (folder / "labels.json").write_text(content)
        assert words in refused(tmp_path)
    (folder / "labels.json").unlink()
    assert f"{folder}/labels.json: missing" in refused(tmp_path)


def test_bad_rows_of_all_files_are_told_at_once(tmp_path):
    train, test = some_rows("train", 4), some_rows("test", 4)
    train[1]["label"] = "Goood"
    train[3] = {"label": "Good"}
    test[0]["sentence"] = " "
    folder = write_task(tmp_path, train=train, test=test)
    message = refused(tmp_path)
    assert f"{folder}/train.json: 2 bad rows of 4" in message
    assert 'row 1: label "Goood" is outside the set; did you mean "Good"?' in message
    assert 'row 3: no "sentence"' in message
    assert f"{folder}/test.json: 1 bad row of 4" in message
    assert message.endswith("set data.bad_rows=drop: bad rows are then left out and counted")


def test_dropped_rows_are_counted_and_ids_stay(tmp_path):
    train, test = some_rows("train", 6), some_rows("test", 4)
    train[1]["label"] = "Goood"
    train[2]["sentence"] = test[3]["sentence"]
    train[4]["sentence"] = ""
    test[0] = {"label": "Good"}
    write_task(tmp_path, train=train, test=test)
    data = load_one(tmp_path, bad_rows="drop")
    assert [row.id for row in data.train] == [0, 3, 5]
    assert [row.id for row in data.evaluation] == [1, 2, 3]
    assert data.dropped == {
        "train": {"label outside the set": 1, "empty text": 1, "duplicate across splits": 1},
        "test": {"missing key": 1},
    }


def test_sentence_in_train_and_test_is_refused_but_twice_in_one_file_is_not(tmp_path):
    train = [*some_rows("train", 3), *some_rows("train", 3)]
    write_task(tmp_path, train=train)
    assert len(load_one(tmp_path).train) == 6
    train[4] = {"label": "Good", "sentence": some_rows("test", 6)[5]["sentence"]}
    write_task(tmp_path, train=train)
    assert "row 4: same sentence as row 5 of test.json" in refused(tmp_path)


@pytest.mark.parametrize("bad_rows", ["refuse", "drop"])
def test_file_that_cannot_be_read_is_refused_with_its_row(tmp_path, bad_rows):
    folder = write_task(tmp_path)
    text = json.dumps(some_rows("train", 5))
    (folder / "train.json").write_text(text[:-3])
    message = refused(tmp_path, bad_rows=bad_rows)
    assert f"{folder}/train.json: 1 bad row " in message
    assert "row 4: not JSON" in message


@pytest.mark.parametrize("rows", [[], [{"label": "Good", "sentence": ""}]])
def test_split_without_a_good_row_is_refused(tmp_path, rows):
    folder = write_task(tmp_path, test=rows)
    assert f"{folder}/test.json: no row" in refused(tmp_path, bad_rows="drop")


def test_dash_is_kept_in_mnli_test_alone(tmp_path):
    labels = ("neutral", "entailment", "contradiction")
    test = [*some_rows("test", 6, labels), {"label": "-", "sentence": "sentence 1: x\nsentence 2: y"}]
    write_task(tmp_path, "MNLI", "NLI", labels=labels, test=test)
    data = load(tmp_path, "MNLI")[0]
    assert (len(data.evaluation), data.unmatchable, data.dropped) == (7, 1, {})
    assert load(tmp_path, "MNLI", max_test_rows=6)[0].unmatchable == 0
    write_task(tmp_path, "MNLI", "NLI", labels=labels, train=[*test[-1:], *some_rows("train", 3, labels)])
    assert "train.json: 1 bad row of 4" in refused(tmp_path, "MNLI")
    write_task(tmp_path, "RTE", "NLI", labels=labels, test=test)
    assert 'row 6: label "-" is outside the set' in refused(tmp_path, "RTE")


@pytest.mark.parametrize("packed", [False, True])
def test_dev_that_is_the_test_file_is_never_read(tmp_path, packed):
    test = some_rows("test", 6)
    folder = write_task(tmp_path, train=some_rows("train", 40), test=test)
    write_json(folder / "dev.json", test, packed=packed)
    assert load_one(tmp_path).train == load_one(tmp_path, bad_rows="drop").train
    data = load_one(tmp_path, split="validation")
    assert (len(data.train), len(data.evaluation), data.dropped) == (36, 4, {})
    assert {row.id for row in data.train} | {row.id for row in data.evaluation} == set(range(40))


def test_dev_apart_from_test_is_the_validation_set(tmp_path):
    write_task(tmp_path, dev=some_rows("dev", 5))
    assert [row.sentence for row in load_one(tmp_path).evaluation] == [r["sentence"] for r in some_rows("test", 6)]
    data = load_one(tmp_path, split="validation")
    assert [row.sentence for row in data.evaluation] == [r["sentence"] for r in some_rows("dev", 5)]
    assert len(data.train) == 20


def test_dev_that_shares_a_row_with_test_is_passed_over(tmp_path):
    write_task(tmp_path, dev=[*some_rows("dev", 5), some_rows("test", 1)[0]])
    data = load_one(tmp_path, split="validation")
    assert len(data.evaluation) == 2
    assert all("train kettle" in row.sentence for row in data.evaluation)


def test_dev_in_use_is_checked_against_train(tmp_path):
    train = [*some_rows("train", 20), some_rows("dev", 3)[2]]
    write_task(tmp_path, train=train, dev=some_rows("dev", 3))
    assert len(load_one(tmp_path).train) == 21
    assert "row 20: same sentence as row 2 of dev.json" in refused(tmp_path, split="validation")
    data = load_one(tmp_path, split="validation", bad_rows="drop")
    assert (len(data.train), data.dropped) == (20, {"train": {"duplicate across splits": 1}})


def test_validation_needs_no_test_file_and_the_carve_ignores_the_seed(tmp_path):
    write_task(tmp_path, test=None, dev=some_rows("dev", 3))
    one, two = (load_one(tmp_path, split="validation", seed=seed) for seed in (1, 2))
    assert one.evaluation == two.evaluation
    assert len(one.evaluation) == 2


def test_subsets_are_balanced_and_drawn_from_the_seed(tmp_path):
    write_task(tmp_path, train=some_rows("train", 60), test=some_rows("test", 60))
    limits = {"max_train_rows": 10, "max_test_rows": 8}
    one, again, other = (load_one(tmp_path, seed=seed, **limits) for seed in (1, 1, 2))
    assert one == again
    assert one.train != other.train
    assert sorted(row.label for row in one.train) == ["Bad"] * 5 + ["Good"] * 5
    assert len(one.evaluation) == 8


def test_fingerprints_see_what_is_read_and_not_how_it_is_stored(tmp_path):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    write_task(plain)
    write_task(packed, packed=True)
    prints = load_one(plain).fingerprints
    assert prints == load_one(packed).fingerprints
    assert set(prints) == {"train", "evaluation"}
    assert all(len(value) == 64 for value in prints.values())
    test = some_rows("test", 6)
    test[5]["sentence"] += " "
    write_task(plain, test=test)
    changed = load_one(plain).fingerprints
    assert changed["train"] == prints["train"]
    assert changed["evaluation"] != prints["evaluation"]
    write_task(packed, labels=("Bad", "Good"), train=some_rows("train", 20), test=some_rows("test", 6))
    assert load_one(packed).fingerprints["train"] != prints["train"]


def test_synthetic_tasks_load():
    from data_prep.synthetic import ensure_folder

    names = sorted(folder.name for folder in (ensure_folder() / "CL_Benchmark").glob("*/*"))
    loaded = load("synthetic", *names)
    assert len(loaded) >= 4
    assert all(data.train and data.evaluation and data.task.instruction for data in loaded)


def test_unknown_split_is_refused(tmp_path):
    write_task(tmp_path)
    assert 'evaluation.split: "dev"' in refused(tmp_path, split="dev")


def test_real_files_load_without_a_bad_row(benchmark_dir):
    start = time.monotonic()
    loaded = load(benchmark_dir, *PUBLISHED_SIZES)
    assert time.monotonic() - start < 20
    assert {data.task.name: (len(data.train), len(data.evaluation)) for data in loaded} == PUBLISHED_SIZES
    assert {data.task.name: data.unmatchable for data in loaded if data.unmatchable} == {"MNLI": 131}


def test_mini_files_load_and_their_dev_is_the_validation_set(mini_dir):
    tests = load(mini_dir, *ORDERS["order4"])
    validation = load(mini_dir, *ORDERS["order4"], split="validation")
    assert {data.task.family for data in tests} == {
        "NLI", "QQP", "SC", "TC", "BoolQA", "MultiRC", "WiC", "COPA"
    }  # fmt: skip
    for test, dev in zip(tests, validation, strict=True):
        assert test.train == dev.train
        assert not {row.sentence for row in test.evaluation} & {row.sentence for row in dev.evaluation}
