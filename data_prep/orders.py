"""The published task orders, and the suggestion of near names that the messages about unknown names share."""

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from data_prep.errors import UserError

# Orders 1-3: O-LoRA's "standard" benchmark as its code runs it (four tasks). Orders 4-6: the 15-task streams.
_PUBLISHED = {
    "order1": "dbpedia amazon yahoo agnews",
    "order2": "dbpedia amazon agnews yahoo",
    "order3": "yahoo amazon agnews dbpedia",
    "order4": "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
    "order5": "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
    "order6": "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
}


def _with_yelp(tasks: tuple[str, ...]) -> tuple[str, ...]:
    """The true five-task stream of a four-task order: yelp directly after amazon, the other review task."""
    after = tasks.index("amazon") + 1
    return (*tasks[:after], "yelp", *tasks[after:])


_orders = {name: tuple(tasks.split()) for name, tasks in _PUBLISHED.items()}
ORDERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    _orders | {f"{name}_5task": _with_yelp(_orders[name]) for name in ("order1", "order2", "order3")}
)
"""Order name -> task names, first task first."""


def near_name(name: str, known: Iterable[str]) -> str:
    """`; did you mean "..."?` for the nearest known name, whatever its case, or an empty string."""
    folded = {candidate.casefold(): candidate for candidate in known}
    nearest = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    return f'; did you mean "{folded[nearest[0]]}"?' if nearest else ""


def order_tasks(name: str) -> tuple[str, ...]:
    """The tasks of a published order. Raises UserError for an unknown name."""
    if name not in ORDERS:
        raise UserError(
            f'order.name: no order "{name}"; known orders: {", ".join(ORDERS)}; an order of your own is a list under '
            f"order.tasks{near_name(name, ORDERS)}"
        )
    return ORDERS[name]
