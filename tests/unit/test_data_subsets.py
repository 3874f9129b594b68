"""Balanced quotas and subsets, and the carved validation rows."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from data_prep.rows import Row
from data_prep.subsets import balanced_quotas, balanced_subset, carve_validation, seeded_random

SIZES = st.lists(st.integers(0, 30), max_size=6)
ROWS = st.lists(st.tuples(st.integers(0, 40), st.sampled_from("abc-")), max_size=60).map(
    lambda drawn: [Row(3 * k, f"sentence {number}", label) for k, (number, label) in enumerate(drawn)]
)


def subset(rows, total, seed=1, task="t"):
    return balanced_subset(rows, "abc", total, seed=seed, task=task, purpose="train")


@given(SIZES, st.integers(0, 200))
def test_quotas_are_as_even_as_the_sizes_allow(sizes, total):
    quotas = balanced_quotas(sizes, total)
    assert sum(quotas) == min(total, sum(sizes))
    assert all(0 <= quota <= size for quota, size in zip(quotas, sizes, strict=True))
    most = max(quotas, default=0)
    assert all(quota >= most - 1 for quota, size in zip(quotas, sizes, strict=True) if quota < size)


@given(SIZES, st.integers(0, 200))
def test_quotas_grow_with_the_total(sizes, total):
    smaller, larger = balanced_quotas(sizes, total), balanced_quotas(sizes, total + 1)
    assert all(a <= b for a, b in zip(smaller, larger, strict=True))


def test_quotas_of_an_uneven_task():
    assert balanced_quotas([100, 2, 100], 11) == [5, 2, 4]


@given(ROWS, st.integers(0, 70), st.integers(0, 9))
def test_subset_is_ordered_balanced_and_nested(rows, total, seed):
    chosen = subset(rows, total, seed)
    assert len(chosen) == min(total, len(rows))
    assert [row.id for row in chosen] == sorted({row.id for row in chosen})
    assert set(chosen) <= set(rows)
    assert set(chosen) <= set(subset(rows, total + 1, seed))
    counts, sizes = Counter(row.label for row in chosen), Counter(row.label for row in rows)
    most = max((counts[label] for label in "abc"), default=0)
    assert all(counts[label] in (most, most - 1, sizes[label]) for label in "abc")
    if any(counts[label] < sizes[label] for label in "abc"):
        assert counts["-"] == 0


def test_subset_depends_on_seed_and_task_alone():
    rows = [Row(k, f"sentence {k}", "abc"[k % 3]) for k in range(90)]
    assert subset(rows, 30) == subset(rows, 30)
    assert subset(rows, 30) != subset(rows, 30, seed=2)
    assert subset(rows, 30) != subset(rows, 30, task="u")


def test_rows_outside_the_labels_come_last():
    rows = [Row(k, f"sentence {k}", "-" if k < 3 else "a") for k in range(6)]
    assert [row.id for row in subset(rows, 3)] == [3, 4, 5]
    assert [row.label for row in subset(rows, 5)] == ["-", "-", "a", "a", "a"]


def test_no_total_keeps_every_row():
    rows = [Row(k, "same", "-") for k in range(3)]
    assert subset(rows, None) == tuple(rows)


@given(ROWS)
def test_carved_rows_share_no_sentence_with_train(rows):
    train, validation = carve_validation(rows, task="t")
    assert sorted([*train, *validation], key=lambda row: row.id) == rows
    assert not {row.sentence for row in train} & {row.sentence for row in validation}


def test_a_tenth_of_each_class_is_carved():
    rows = [Row(k, f"sentence {k}", "a" if k < 100 else "b" if k < 116 else "c") for k in range(117)]
    train, validation = carve_validation(rows, task="t")
    assert Counter(row.label for row in validation) == {"a": 10, "b": 2}
    assert len(train) == 105
    assert carve_validation(rows, task="t") == (train, validation)
    assert carve_validation(rows, task="u") != (train, validation)


def test_generator_is_the_same_in_another_process():
    code = "from data_prep.subsets import seeded_random; print(seeded_random(7, 'a', 'b').getrandbits(64))"
    root = Path(__file__).resolve().parents[2]
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    assert outputs == {str(seeded_random(7, "a", "b").getrandbits(64))}
    assert seeded_random(7, "a", "b").random() != seeded_random(7, "ab").random()
