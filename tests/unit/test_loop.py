"""The loop's own arithmetic: schedules, the plan of a task's steps. Training itself: tests/distributed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_backbones import random_examples

from data_prep.batches import Example
from pipeline.loop import learning_rate, plan_joint, plan_task
from pipeline.recipe import Batching, Training


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=4),
    st.sampled_from(["bucketed", "random"]),
)
def test_tasks_trained_jointly_stand_in_every_part_of_the_run(sizes: list[tuple[int, int]], order: str) -> None:
    parts = [(random_examples(count, "t5", seed=task), epochs) for task, (count, epochs) in enumerate(sizes)]
    steps = plan_joint(parts, training(), Batching(order=order), seed=7, task_index=2)
    dealt = [row for step in steps for part in step for row in part if row >= 0]
    position, most, seen = 0, max(epochs for _, epochs in sizes), list(dealt)
    for count, epochs in sizes:
        rows = range(position, position + count)
        assert all(dealt.count(row) == epochs for row in rows)
        own = [row for row in dealt if row in rows]
        if epochs == most:  # no row comes twice before all have come
            assert all(sorted(own[start : start + count]) == list(rows) for start in range(0, len(own), count))
        position += count
    assert max(dealt) == position - 1
    for epoch in range(most):  # each epoch deals an equal share of every task's passes
        shares = [count * epochs * (epoch + 1) // most - count * epochs * epoch // most for count, epochs in sizes]
        now, seen = seen[: sum(shares)], seen[sum(shares) :]
        position = 0
        for share, (count, _) in zip(shares, sizes, strict=True):
            assert sum(position <= row < position + count for row in now) == share
            position += count
    assert not seen


def training(**values: object) -> Training:
    return Training.model_validate({"learning_rate": 0.8, "global_batch_size": 8, "micro_batch_size": 2} | values)


def test_constant_after_warm_up() -> None:
    rates = [learning_rate(training(warmup_steps=4), step, 7) for step in range(7)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8])
    assert learning_rate(training(), 0, 7) == 0.8


def test_cosine_after_warm_up() -> None:
    rates = [learning_rate(training(schedule="cosine", warmup_steps=2), step, 6) for step in range(6)]
    # After the warm-up: cos^2 of 0, 1/8, 2/8, 3/8 of pi.
    root = math.sqrt(0.5)
    assert rates == pytest.approx([0.4, 0.8, 0.8, 0.8 * (1 + root) / 2, 0.4, 0.8 * (1 - root) / 2])


def test_a_task_shorter_than_its_warm_up() -> None:
    rates = [learning_rate(training(schedule="cosine", warmup_steps=8), step, 2) for step in range(2)]
    assert rates == pytest.approx([0.1, 0.2])


@given(steps=st.integers(1, 60), warmup=st.integers(0, 60), schedule=st.sampled_from(["constant", "cosine"]))
def test_rates_rise_to_the_learning_rate_and_never_beyond(steps: int, warmup: int, schedule: str) -> None:
    settings = training(warmup_steps=warmup, schedule=schedule)
    rates = [learning_rate(settings, step, steps) for step in range(steps)]
    assert all(0 < rate <= 0.8 for rate in rates), "no step is wasted at a rate of zero"
    risen = rates[:warmup]
    assert risen == sorted(risen)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if steps > warmup:
        assert max(rates) == 0.8


def test_epochs_follow_each_other_in_other_orders() -> None:
    examples = random_examples(21, "t5")
    steps = plan_task(examples, training(epochs=2), Batching(), seed=7, task_index=1)
    assert [len(step) for step in steps] == [4] * 6
    epochs = [[row for step in part for micro in step for row in micro if row >= 0] for part in (steps[:3], steps[3:])]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert plan_task(examples, training(epochs=2), Batching(), seed=7, task_index=2) != steps
    assert plan_task(examples, training(epochs=2), Batching(), seed=8, task_index=1) != steps
    assert plan_task(examples, training(epochs=2), Batching(order="random"), seed=7, task_index=1) != steps


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (3, 3), (4, 4), (6, 6), (7, 6), (None, 6)])
def test_max_steps_cuts_the_plan_short(limit: int | None, count: int) -> None:
    examples = random_examples(21, "llama2")
    whole = plan_task(examples, training(epochs=2), Batching(), seed=7, task_index=1)
    assert plan_task(examples, training(epochs=2, max_steps=limit), Batching(), seed=7, task_index=1) == whole[:count]


def test_the_plan_sorts_by_prompt_and_label_together() -> None:
    """Rows are bucketed by all the tokens they bring: a long label costs as much as a long prompt."""
    prompt = Example(0, (5,) * 10, (6,), truncated=False)
    label = Example(1, (5,), (6,) * 40, truncated=False)
    settings = training(global_batch_size=2, micro_batch_size=1)
    assert plan_task([prompt, label], settings, Batching(), seed=1, task_index=1) == [[[1], [0]]]
