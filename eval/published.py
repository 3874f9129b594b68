"""The published figures for the backbone and order of a run, from `published.yaml`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from data_prep.orders import ORDERS

PUBLISHED_ORDERS = ("order1", "order2", "order3", "order4", "order5", "order6")


@dataclass(frozen=True)
class Figure:
    """One printed row: average accuracy on this order and over its group of three, BWT; None: not given."""

    method: str
    on_order: float | None
    group_average: float | None
    backward_transfer: float | None
    source: str
    note: str


def backbone_name(model: str | Mapping[str, Any]) -> str:
    """A backbone as tables name it, from a run's `model`: the last part of its path, "(nf4)" where it is quantized."""
    known = {"path": model} if isinstance(model, str) else model
    bits = known.get("quantization")
    return Path(known["path"]).name + (f" ({bits})" if bits else "")


def figures_for(backbone: str, order: Sequence[str]) -> list[Figure]:
    """Every published figure for this backbone and order; none for another backbone or order.

    The backbone is known by its name (`backbone_name`), so a renamed folder or a quantized one gets no figures.
    """
    facts = _facts()
    table = facts["backbones"].get(backbone.lower())
    name = order_name(order)
    if table is None or name not in PUBLISHED_ORDERS:
        return []
    number = PUBLISHED_ORDERS.index(name) + 1
    averages = [_from_averages(entry, number) for entry in facts[table]]
    logs = [_from_logs(entry) for entry in facts.get(f"{table}_own_logs", []) if entry["order"] == number]
    return [figure for figure in averages + logs if (figure.on_order, figure.group_average) != (None, None)]


def order_name(order: Sequence[str]) -> str | None:
    """The name of an order that ships with the benchmark, None for a custom one."""
    return next((name for name, tasks in ORDERS.items() if tuple(order) == tuple(tasks)), None)


def other_row_counts(rows: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> list[str]:
    """The tasks with other row counts than published, "<task> (<train>/<evaluation> rows, published ...)"."""
    differing = []
    for task in order:
        got = [rows[task]["train"], rows[task]["evaluation"]]
        published = _facts()["rows"].get(task)
        if published and got != published:
            differing.append(f"{task} ({got[0]}/{got[1]} rows, published {published[0]}/{published[1]})")
    return differing


def source_legend() -> list[str]:
    """What each source's short name stands for."""
    return [f"{name}: {meaning}" for name, meaning in _facts()["sources"].items()]


@cache
def _facts() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
    return content


def _from_averages(entry: Mapping[str, Any], number: int) -> Figure:
    per_order = entry.get("per_order") or []
    return Figure(
        method=entry["method"],
        on_order=per_order[number - 1] if number <= len(per_order) else None,
        group_average=entry["average"][0 if number <= 3 else 1],
        backward_transfer=entry.get("backward_transfer") if number <= 3 else None,
        source=entry["source"],
        note=entry.get("note", ""),
    )


def _from_logs(entry: Mapping[str, Any]) -> Figure:
    return Figure(
        method=entry["method"],
        on_order=entry["average_accuracy"],
        group_average=None,
        backward_transfer=entry["backward_transfer"],
        source="O-LoRA's logs",
        note="",
    )
