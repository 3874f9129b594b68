"""Reading the benchmark's arrays and checking rows: every fault is named with its row."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.rows import (
    Row,
    check_records,
    describe_faults,
    duplicate_faults,
    parse_array,
    read_content,
)

LABELS = ("Good", "Bad")
TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)


def record(sentence="A kettle sings.", label="Good", **others):
    return {"label": label, "sentence": sentence, **others}


@given(st.lists(st.fixed_dictionaries({"label": st.sampled_from(LABELS), "sentence": TEXT})))
def test_array_survives_the_round_trip(records):
    parsed, faults = parse_array(json.dumps(records, ensure_ascii=False).encode())
    assert (parsed, faults) == (records, [])
    rows, bad = check_records(parsed, labels=LABELS)
    assert sorted([row.id for row in rows] + [fault.row for fault in bad]) == list(range(len(records)))
    for row in rows:
        assert (row.sentence, row.label) == (records[row.id]["sentence"], records[row.id]["label"])
    assert all(not records[fault.row]["sentence"].strip() for fault in bad)


@given(
    st.lists(st.fixed_dictionaries({"sentence": TEXT, "n": st.lists(st.integers(), max_size=2)}), min_size=1),
    st.sampled_from([",", " , ", ",\n "]),
    st.data(),
)
def test_broken_array_names_the_row_it_breaks_in(records, comma, data):
    pieces = [json.dumps(item) for item in records]
    broken = data.draw(st.integers(0, len(pieces) - 1))
    pieces[broken] = pieces[broken][:-1]  # the closing brace is gone
    parsed, faults = parse_array(("[ " + comma.join(pieces) + "]").encode())
    assert parsed == []
    assert [(fault.row, fault.fatal) for fault in faults] == [(broken, True)]


@pytest.mark.parametrize("content", [b"", b"not json", b'{"label": "Good"}', b'"text"'])
def test_content_without_an_array_is_fatal_without_a_row(content):
    parsed, faults = parse_array(content)
    assert parsed == []
    assert [(fault.row, fault.fatal) for fault in faults] == [(None, True)]


def test_row_that_is_not_utf8_is_named_and_the_others_are_kept():
    content = json.dumps([record("one"), record("two"), record("three")]).encode().replace(b"two", b"tw\xff")
    parsed, faults = parse_array(content)
    assert faults == []
    rows, bad = check_records(parsed, labels=LABELS)
    assert [row.sentence for row in rows] == ["one", "three"]
    assert [(fault.row, fault.reason, fault.fatal) for fault in bad] == [(1, "not UTF-8", False)]


def test_byte_order_mark_is_passed_over():
    parsed, faults = parse_array(b"\xef\xbb\xbf" + json.dumps([record("one é")], ensure_ascii=False).encode())
    assert (parsed, faults) == ([record("one é")], [])


@pytest.mark.parametrize(
    ("bad", "reason", "words"),
    [
        ("a line", "not an object", "a str"),
        ({"label": "Good"}, "missing key", 'no "sentence" (it has: label)'),
        ({"sentence": "A kettle."}, "missing key", 'no "label" (it has: sentence)'),
        (record(sentence=None), "missing key", 'no "sentence"'),
        (record(sentence=["a"]), "not a string", "\"sentence\" is ['a'], not a string"),
        (record(label=1), "not a string", '"label" is 1'),
        (record(sentence=" \n\t"), "empty text", '"sentence" is empty'),
        (record(label="good"), "label outside the set", '; did you mean "Good"?'),
        (record(label="Good "), "label outside the set", 'label "Good "'),
        (record(label="-"), "label outside the set", 'label "-" is outside the set'),
    ],
)
def test_each_kind_of_bad_row_is_named(bad, reason, words):
    rows, faults = check_records([record(), bad, record()], labels=LABELS)
    assert [row.id for row in rows] == [0, 2]
    assert [(fault.row, fault.reason) for fault in faults] == [(1, reason)]
    assert words in faults[0].detail


def test_sentences_are_taken_as_they_are():
    rows, _ = check_records([record("  Text: x \n", "Bad")], labels=LABELS)
    assert rows == [Row(0, "  Text: x \n", "Bad")]


def test_known_unmatchable_label_is_kept():
    rows, faults = check_records([record(label="-"), record(label="x")], labels=LABELS, unmatchable="-")
    assert [row.label for row in rows] == ["-"]
    assert [fault.row for fault in faults] == [1]


def test_duplicates_compare_whole_sentences_and_ignore_labels():
    rows = [Row(0, "a", "Good"), Row(1, "b", "Good"), Row(2, "a", "Bad"), Row(3, "a ", "Good")]
    faults = duplicate_faults(rows, {"test.json": [Row(7, "a", "Bad")], "dev.json": [Row(9, "a", "Bad")]})
    assert [fault.row for fault in faults] == [0, 2]
    assert faults[0].detail == "same sentence as row 7 of test.json"
    assert duplicate_faults([Row(0, "a", "x"), Row(1, "a", "x")], {}) == []


def test_message_lists_ten_faults_counts_the_rest_and_gives_the_labels(tmp_path):
    records = [record(label="worse") for _ in range(12)] + [record(sentence="")] + [record("fine")]
    _, faults = check_records(records, labels=LABELS)
    message = describe_faults(tmp_path / "train.json", faults, len(records), LABELS)
    lines = message.splitlines()
    assert lines[0] == f"{tmp_path}/train.json: 13 bad rows of 14 (rows are counted from 0)"
    assert [line.split(":")[0] for line in lines[1:11]] == [f"  row {k}" for k in range(10)]
    assert lines[11] == "  and 3 more: 2 label outside the set, 1 empty text"
    assert lines[12] == '  legal labels: "Good", "Bad"'


def test_packed_content_is_unpacked_and_a_damaged_pack_refused(tmp_path):
    whole = tmp_path / "a.json.gz"
    whole.write_bytes(gzip.compress(b"[1]"))
    assert read_content(whole) == b"[1]"
    for number, data in enumerate((b"[1]", gzip.compress(b"[1]" * 999)[:-9])):
        damaged = tmp_path / f"{number}.json.gz"
        damaged.write_bytes(data)
        with pytest.raises(UserError, match="not a whole gzip file"):
            read_content(damaged)
