"""Which rows stand in which micro-batch of which optimizer step: a function of its arguments alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, TypeVar

T = TypeVar("T")

PADDING_ROW = -1

# Rows are sorted by length inside pools of this many global batches. A larger pool pads less, but makes each
# micro-batch more of one length, and so of one kind of row; see plan_steps.
POOL_STEPS = 8


def plan_steps(
    lengths: Sequence[int],
    *,
    global_batch_size: int,
    micro_batch_size: int,
    order: Literal["bucketed", "random"],
    seed: int,
    task_index: int,
    epoch: int,
) -> list[list[list[int]]]:
    """Steps -> micro-batches -> row positions, for one epoch over rows of these `lengths` (in tokens).

    Every row stands in it exactly once; every step has `global_batch_size / micro_batch_size` micro-batches
    of `micro_batch_size` entries; what the last step lacks is filled with PADDING_ROW. The number of ranks
    plays no part: let rank r of w take the micro-batches r, r + w, r + 2w, ... of each step.

    `random`: the shuffled rows in order. `bucketed`: the shuffled rows are cut into pools of POOL_STEPS
    global batches; a pool is sorted by length, cut into micro-batches, and these are dealt to its steps at
    random. So a micro-batch has rows of one length (little padding), while a step, where it has several
    micro-batches, mixes lengths as a random batch does, and steps come in no order of length. The price: rows
    of one micro-batch are alike in length, so a step of a single micro-batch is too; its rows are still a
    random choice among those of that length.
    """
    assert micro_batch_size > 0, f"micro_batch_size {micro_batch_size} is not positive"
    per_step, rest = divmod(global_batch_size, micro_batch_size)
    assert rest == 0, f"global_batch_size {global_batch_size} is no multiple of {micro_batch_size}"
    assert per_step > 0, f"global_batch_size {global_batch_size} is not positive"
    assert order in ("bucketed", "random"), f"order {order!r} is neither bucketed nor random"
    bucketed = order == "bucketed"
    stream = f"{seed}/{task_index}/{epoch}"
    rows = _shuffled(range(len(lengths)), f"{stream}/rows")
    whole = len(rows) - len(rows) % global_batch_size
    pool_size = POOL_STEPS * global_batch_size if bucketed else max(whole, 1)

    steps: list[list[list[int]]] = []
    for start in range(0, whole, pool_size):
        pool = rows[start : min(start + pool_size, whole)]
        if bucketed:
            # sorted() is stable, so rows of equal length stay in their shuffled order.
            micro_batches = _cut(sorted(pool, key=lambda row: -lengths[row]), micro_batch_size)
            micro_batches = _shuffled(micro_batches, f"{stream}/pool {start}")
        else:
            micro_batches = _cut(pool, micro_batch_size)
        steps += _cut(micro_batches, per_step)
    if whole < len(rows):
        last = rows[whole:]
        if bucketed:
            last = sorted(last, key=lambda row: -lengths[row])
        steps.append(_cut(last + [PADDING_ROW] * (global_batch_size - len(last)), micro_batch_size))
    if bucketed:
        # Neighbouring micro-batches, which ranks work on at the same time, are of like length: less waiting.
        steps = [sorted(step, key=lambda micro_batch: -_longest(micro_batch, lengths)) for step in steps]
    return steps


def _longest(micro_batch: Sequence[int], lengths: Sequence[int]) -> int:
    """Length of the longest row, 0 for nothing but padding rows."""
    return max((lengths[row] for row in micro_batch if row != PADDING_ROW), default=0)


def _cut(items: Sequence[T], size: int) -> list[list[T]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _shuffled(items: Sequence[T], stream: str) -> list[T]:
    """A permutation that depends on `stream` and the number of items, in every release of every library.

    Sorting by a hash costs about a microsecond an item, and promises more than NumPy's generators do.
    """
    keys = [hashlib.blake2b(f"{stream}/{i}".encode(), digest_size=16).digest() for i in range(len(items))]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]
