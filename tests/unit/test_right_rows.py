"""Rows that are right, kept as bits: nothing is lost, whatever their number."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eval.right_rows import pack, unpack

rows = st.dictionaries(st.text(max_size=3), st.lists(st.integers(0, 1), max_size=40), max_size=3)


@given(rows)
def test_packed_rows_come_back(found: dict[str, list[int]]) -> None:
    hits = {task: np.array(right, dtype=np.int8) for task, right in found.items()}
    back = unpack(pack(hits), {task: len(right) for task, right in found.items()})
    assert back is not None
    assert {task: right.tolist() for task, right in back.items()} == found
    assert all(right.dtype == np.int8 for right in back.values()), "differences of unsigned bits would wrap"


def test_the_first_row_is_the_highest_bit_and_nothing_stays_nothing() -> None:
    assert pack({"soil": np.array([1, 0, 0, 0, 0, 0, 0, 1, 1], dtype=np.int8)}) == {"soil": "8180"}
    assert pack(None) is None
    assert unpack(None, {}) is None
