"""The plan of an epoch: every row once, whole steps, random order, micro-batches of like length."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, product
from statistics import mean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.batches import PADDING_ROW, plan_steps
from data_prep.planning import POOL_STEPS

Plan = list[list[list[int]]]
ORDERS = ("bucketed", "random")

# Plans of ten rows in batches of 4 and 2, seed 42.
PINNED_BUCKETED = [[[7, 2], [4, 6]], [[1, 3], [5, 0]], [[9, 8], [-1, -1]]]
PINNED_SHA256 = "d08acc91d8cdde8d2303cc5b8ec0dc1b3233fc4077ba7024f1cab9fb78504a27"  # 300 rows, two buckets a step
PINNED_RANDOM = [[[1, 2], [4, 6]], [[7, 0], [5, 3]], [[9, 8], [-1, -1]]]


def plan(lengths: Sequence[int], size: int = 16, micro: int = 4, order: str = "bucketed", **seeds: int) -> Plan:
    numbers: dict[str, Any] = {"seed": 3, "task_index": 1, "epoch": 0, **seeds}
    return plan_steps(lengths, global_batch_size=size, micro_batch_size=micro, order=order, **numbers)


def uneven(rows: int) -> list[int]:
    return [20 + (row * 7919) % 101 for row in range(rows)]


def flat(steps: Plan) -> list[int]:
    return [row for step in steps for micro_batch in step for row in micro_batch]


def padded_share(steps: Plan, lengths: Sequence[int]) -> float:
    """Of the tokens a model sees, the share that is padding."""
    width = sum(len(micro) * max(lengths[row] for row in micro) for step in steps for micro in step)
    return 1 - sum(lengths) / width


@given(
    lengths=st.lists(st.integers(1, 60), max_size=150),
    micro=st.integers(1, 5),
    per_step=st.integers(1, 4),
    order=st.sampled_from(ORDERS),
    seed=st.integers(-5, 2**70),
    epoch=st.integers(0, 3),
)
def test_every_row_once_in_whole_steps(
    lengths: list[int], micro: int, per_step: int, order: str, seed: int, epoch: int
) -> None:
    size = micro * per_step
    steps = plan(lengths, size, micro, order, seed=seed, epoch=epoch)
    assert len(steps) == -(-len(lengths) // size)
    assert all([len(micro_batch) for micro_batch in step] == [micro] * per_step for step in steps)
    counts = Counter(flat(steps))
    padding = counts.pop(PADDING_ROW, 0)
    assert counts == Counter(range(len(lengths)))
    assert padding == len(steps) * size - len(lengths)
    assert PADDING_ROW not in flat(steps[:-1])
    assert steps == plan(list(lengths), size, micro, order, seed=seed, epoch=epoch)


@pytest.mark.parametrize("order", ORDERS)
def test_order_depends_on_seed_task_and_epoch(order: str) -> None:
    lengths = uneven(200)
    plans = [
        plan(lengths, order=order, seed=seed, task_index=task, epoch=epoch)
        for seed, task, epoch in product((0, 1, 11), (0, 1, 11), (0, 1, 11))
    ]
    firsts = Counter(str(steps[0]) for steps in plans)
    assert len(firsts) == 27, "two plans begin alike"


def test_plan_is_the_same_in_every_process() -> None:
    # Written down once: a changed value means that old runs can no longer be continued as they began.
    assert plan(uneven(10), 4, 2, seed=42, task_index=0) == PINNED_BUCKETED
    assert plan(uneven(10), 4, 2, "random", seed=42, task_index=0) == PINNED_RANDOM
    larger = str(plan(uneven(300), 16, 8, seed=42, task_index=0))
    assert hashlib.sha256(larger.encode()).hexdigest() == PINNED_SHA256


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [4, 16, 24, 64])
def test_the_rows_of_a_step_do_not_depend_on_the_micro_batches(order: str, size: int) -> None:
    lengths = uneven(150)
    wanted = [sorted(flat([step])) for step in plan(lengths, size, size, order)]
    for micro in (m for m in range(1, size) if size % m == 0):
        assert [sorted(flat([step])) for step in plan(lengths, size, micro, order)] == wanted


def test_random_takes_no_notice_of_lengths() -> None:
    assert plan(uneven(90), order="random") == plan([1] * 90, order="random")


@pytest.mark.parametrize(
    ("size", "micro", "share"),
    [(64, 8, 1 / 3), (16, 4, 1 / 3), (16, 16, 2 / 3)],  # the last has two buckets of other lengths in a micro-batch
)
def test_bucketing_saves_padding(size: int, micro: int, share: float) -> None:
    lengths = uneven(1024)
    bucketed, random = (padded_share(plan(lengths, size, micro, order), lengths) for order in ORDERS)
    assert bucketed < random * share


def test_steps_come_in_no_order_of_length_and_each_mixes_lengths() -> None:
    lengths = uneven(2048)
    steps = plan(lengths, 64, 8)
    means = [mean(lengths[row] for row in flat([step])) for step in steps]
    rises = sum(b > a for a, b in pairwise(means))
    assert 8 < rises < 23, "of 31 neighbours about half should rise"
    # Micro-batches span 20 to 120 tokens; a step is eight of them, dealt at random: far nearer the middle.
    spread = [max(lengths[row] for row in micro) - min(lengths[row] for row in micro) for micro in steps[0]]
    assert max(spread) < 15
    assert all(40 < m < 100 for m in means)


def test_a_pool_is_a_random_set_of_rows() -> None:
    # Rows come sorted by label in some files: no pool may then hold one label alone.
    rows = 4 * POOL_STEPS * 16
    lengths = uneven(rows)
    steps = plan(lengths)
    for start in range(0, len(steps), POOL_STEPS):
        quarters = Counter(row * 4 // rows for row in flat(steps[start : start + POOL_STEPS]))
        assert min(quarters.values()) > POOL_STEPS * 16 / 4 / 2


def test_rows_of_one_length_are_in_random_order() -> None:
    rows = flat(plan([7] * 160))
    assert sum(b > a for a, b in pairwise(rows)) < 110


def test_micro_batches_that_ranks_take_together_are_alike() -> None:
    lengths = uneven(640)
    for step in plan(lengths, 64, 8):
        longest = [max(lengths[row] for row in micro) for micro in step]
        assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_the_last_step_pads_its_shortest_rows(seed: int) -> None:
    lengths = uneven(16 + 6)
    last = plan(lengths, 16, 4, seed=seed)[-1]
    assert [sum(row == PADDING_ROW for row in micro) for micro in last] == [0, 2, 4, 4]
    assert min(lengths[row] for row in last[0]) >= max(lengths[row] for row in last[1] if row != PADDING_ROW)


def test_no_rows_no_steps() -> None:
    assert plan([]) == []


def test_sizes_that_do_not_divide_are_our_own_fault() -> None:
    with pytest.raises(AssertionError, match="global_batch_size 10"):
        plan([1] * 20, 10, 4)
