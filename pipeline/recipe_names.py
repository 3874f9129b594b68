"""The names of tasks in a recipe: unknown ones are told with the recipe's other faults, before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep import synthetic
from data_prep.errors import UserError
from data_prep.folder import open_folder
from data_prep.orders import ORDERS, near_name
from pipeline.recipe_groups import SYNTHETIC

_BENCHMARK = frozenset(task for tasks in ORDERS.values() for task in tasks)


def name_faults(raw: Mapping[str, Any]) -> list[str]:
    """Faults of task names, and of a data.path that is missing, in raw keys whose paths are resolved.

    Looks at whatever has the right form; the rest is a fault of its own. A benchmark task that the folder does
    not hold, or a folder that is wrong, is otherwise left to loading.
    """
    data = _group(raw, "data")
    own = {str(name) for name in _group(data, "tasks")}
    path = data.get("path")
    stream = _stream(_group(raw, "order"))
    known = own | ({task.name for task in synthetic.TASKS} if path == SYNTHETIC else _BENCHMARK)
    places = _places(raw)
    faults = _unseen_faults(raw, stream or [])
    sure = path == SYNTHETIC  # whether `known` is all there is
    # A path with a fault of its own is not absolute.
    if isinstance(path, str) and Path(path).is_absolute() and any(name not in known for _, name in places):
        try:
            known |= set(open_folder(Path(path)).tasks)
            sure = True
        except UserError as error:
            faults.append(str(error))
    unknown = [(place, name) for place, name in places if name not in known]
    if path is None and "data" in raw:
        slips = {name for _, name in unknown if near_name(name, known)}
        needing = [name for name in stream if name not in own | slips] if stream else []
        if needing or not own:
            faults.append(_missing_path(needing))
    for place, name in unknown:
        near = near_name(name, known)
        # Without its folder, a name that is near no other may well be a task there.
        if near or sure:
            faults.append(f'{place}: no task "{name}"{near or _legal(known)}')
    return faults + [
        f'training.per_task.{name}: no task "{name}"; the order has {", ".join(stream)}{near_name(name, known)}'
        for name in _group(_group(raw, "training"), "per_task")
        if stream is not None and name not in known and name not in stream
    ]


def _stream(order: Mapping[str, Any]) -> list[str] | None:
    """The order's tasks, None where the order is at fault itself."""
    tasks, name = order.get("tasks"), order.get("name")
    if isinstance(tasks, list) and name is None:
        return [task for task in tasks if isinstance(task, str)]
    return list(ORDERS[name]) if tasks is None and isinstance(name, str) and name in ORDERS else None


def _places(raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(field path, name) of the tasks that the order and `evaluation.unseen` list."""
    lists = {
        "order.tasks": _group(raw, "order").get("tasks"),
        "evaluation.unseen": _group(raw, "evaluation").get("unseen"),
    }
    return [
        (f"{field}[{i}]", name)
        for field, listed in lists.items()
        for i, name in enumerate(listed if isinstance(listed, list) else [])
        if isinstance(name, str)
    ]


def _unseen_faults(raw: Mapping[str, Any], stream: list[str]) -> list[str]:
    unseen = [name for field, name in _places(raw) if field.startswith("evaluation.unseen")]
    trained = [name for name in dict.fromkeys(unseen) if name in stream]
    twice = [name for name in dict.fromkeys(unseen) if unseen.count(name) > 1]
    return [
        *(f"evaluation.unseen: {name} is in the order, so it is seen; name others" for name in trained),
        *(f"evaluation.unseen: {name} stands there twice; once is enough" for name in twice),
    ]


def _missing_path(needing: list[str]) -> str:
    why = f" ({', '.join(needing)} {'is' if len(needing) == 1 else 'are'} not under data.tasks)" if needing else ""
    return f"data.path: missing{why}; name the benchmark's folder; only tasks under data.tasks need none"


def _legal(known: set[str]) -> str:
    return f"; there are {', '.join(sorted(known))}; a task of your own stands under data.tasks"


def _group(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    group = raw.get(key)
    return group if isinstance(group, Mapping) else {}
