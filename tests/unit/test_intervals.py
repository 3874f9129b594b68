"""eval.intervals: Wilson's interval against its formula and its known values."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.intervals import wilson


@given(st.integers(1, 8000), st.data())
def test_wilson_is_its_formula(rows: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, rows))
    z, p = 1.959963984540054, correct / rows
    centre = (p + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(p * (1 - p) / rows + z * z / (4 * rows * rows))
    low, high = wilson(correct, rows)
    assert low == pytest.approx(100 * (centre - half), abs=1e-6)
    assert high == pytest.approx(100 * (centre + half), abs=1e-6)
    assert 0 <= low <= 100 * p + 1e-9
    assert 100 * p - 1e-9 <= high <= 100


def test_all_right_and_all_wrong_keep_a_width() -> None:
    assert wilson(0, 10) == pytest.approx((0, 27.7533), abs=1e-3)
    assert wilson(10, 10) == pytest.approx((72.2467, 100), abs=1e-3)
