"""What the pages of a run and of a comparison share: templates, and cells of heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from eval.report_charts import shade
from eval.summary import number, significant


@cache
def page_of(name: str) -> Any:
    """The template of a page."""
    pages = Environment(
        loader=PackageLoader("eval"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters["number"] = number
    pages.filters["significant"] = significant
    return pages.get_template(name)


def cells_of(values: Sequence[float | None], intervals: Sequence[Sequence[float] | None]) -> list[dict[str, Any]]:
    """Cells of a heat map: value, interval, shade from 0 to 9."""
    return [
        {"value": value, "interval": interval, "shade": None if value is None else shade(value / 100)}
        for value, interval in zip(values, intervals, strict=True)
    ]
