"""Which rows stand in which micro-batch of which optimizer step: a function of its arguments alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal, TypeVar

T = TypeVar("T")

PADDING_ROW = -1

# Rows are sorted by length inside pools of this many global batches. A larger pool pads less, but makes each
# micro-batch more of one length, and so of one kind of row; see plan_steps.
POOL_STEPS = 8
# Rows that stay together when a pool is dealt to steps: fixed, so that the rows of a step do not depend on the size
# of micro-batches. Smaller buckets mix lengths more and pad more.
BUCKET_ROWS = 8


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

    Every row stands in it exactly once; every step has `global_batch_size / micro_batch_size` micro-batches of
    `micro_batch_size` entries; what the last step lacks is filled with PADDING_ROW. Which rows a step has depends
    neither on the micro-batches nor on the ranks: let rank r of w take the micro-batches r, r + w, r + 2w, ...

    `random`: the shuffled rows in order. `bucketed`: the shuffled rows are cut into pools of POOL_STEPS global
    batches; a pool is sorted by length, cut into buckets of BUCKET_ROWS, and these are dealt to its steps at random.
    So rows of one micro-batch are of like length (little padding), while a step, where it has several buckets,
    mixes lengths as a random batch does, and steps come in no order of length.
    """
    assert micro_batch_size > 0, f"micro_batch_size {micro_batch_size} is not positive"
    assert global_batch_size > 0, f"global_batch_size {global_batch_size} is not positive"
    assert global_batch_size % micro_batch_size == 0, (
        f"global_batch_size {global_batch_size} is no multiple of micro_batch_size {micro_batch_size}"
    )
    assert order in ("bucketed", "random"), f"order {order!r} is neither bucketed nor random"
    stream = f"{seed}/{task_index}/{epoch}"
    rows = _shuffled(range(len(lengths)), f"{stream}/rows")
    whole = len(rows) - len(rows) % global_batch_size
    last = rows[whole:]
    if order == "random":
        steps = _cut(rows[:whole], global_batch_size)
    else:
        steps = _bucketed_steps(rows[:whole], lengths, global_batch_size, stream)
        last = _longest_first(last, lengths)
    if last:
        steps.append(last + [PADDING_ROW] * (global_batch_size - len(last)))
    return [_cut(step, micro_batch_size) for step in steps]


def _bucketed_steps(rows: Sequence[int], lengths: Sequence[int], size: int, stream: str) -> list[list[int]]:
    """Whole global batches of `size` rows made of buckets, a step's longest bucket first: so neighbouring
    micro-batches, which ranks work on at the same time, are of like length and wait less for each other.
    """
    bucket_rows = math.gcd(BUCKET_ROWS, size)
    pool_size = POOL_STEPS * size
    steps: list[list[int]] = []
    for start in range(0, len(rows), pool_size):
        pool = _longest_first(rows[start : start + pool_size], lengths)
        buckets = _shuffled(_cut(pool, bucket_rows), f"{stream}/pool {start}")
        for step in _cut(buckets, size // bucket_rows):
            step.sort(key=lambda bucket: -lengths[bucket[0]])
            steps.append([row for bucket in step for row in bucket])
    return steps


def _longest_first(rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Sorted by falling length; rows of equal length stay in their shuffled order."""
    return sorted(rows, key=lambda row: -lengths[row])


def _cut(items: Sequence[T], size: int) -> list[list[T]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _shuffled(items: Sequence[T], stream: str) -> list[T]:
    """A permutation that depends on `stream` and the number of items, in every release of every library.

    Sorting by a hash costs about a microsecond an item, and promises more than NumPy's generators do.
    """
    keys = [hashlib.blake2b(f"{stream}/{i}".encode(), digest_size=16).digest() for i in range(len(items))]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]
