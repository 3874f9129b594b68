"""The page of what streams cost."""

from benchmarks.scaling import PAGE, filled


def test_its_tables_are_those_of_the_estimator() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page, "out of date: run python benchmarks/scaling.py"
