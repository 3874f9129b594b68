"""One rank's fault or order to stop is all ranks': same step, same message, nobody left waiting."""

from __future__ import annotations

import pytest
from comparing import full
from rank_cases import Case

TOLD = [Case("told_to_stop", "t5", 2), Case("told_to_stop", "t5", 3)]


@pytest.mark.parametrize("case", full(TOLD, but=TOLD[:1]), ids=str)
def test_a_signal_to_one_rank_stops_both_at_the_same_step(runs, case: Case) -> None:
    one, (first, second) = runs.one(case), runs.two(case)

    assert second["raised"] == one["raised"] == ["Stopped", "signal SIGUSR1"]
    assert first["raised"] == ["Stopped", "another rank was told to stop"]
    # Told in its second step, seen with that step's losses, which are looked at a step later.
    assert one["steps"] == first["steps"] == second["steps"] == 3
    assert "trained" not in first


NOT_FINITE = [Case("not_finite", "llama2", 2), Case("not_finite", "llama2", 3)]


@pytest.mark.parametrize("case", full(NOT_FINITE, but=NOT_FINITE[:1]), ids=str)
def test_a_loss_that_is_no_number_is_refused_with_step_and_rows(runs, case: Case) -> None:
    # Three optimizer steps an epoch; the broken token stands where the first such row of the plan has it.
    token = runs.one(case)["token"]
    bad = {row for row, example in enumerate(case.examples) if token in (*example.input_ids, *example.label_ids)}
    step, rows = next(
        (number, [row for batch in step if bad & {*batch} for row in batch if row >= 0])
        for number, step in enumerate(case.steps, start=1)
        if any(bad & {*batch} for batch in step)
    )
    named = ", ".join(str(case.examples[row].row_id) for row in rows)

    for result in (runs.one(case), *runs.two(case)):
        kind, message = result["raised"]
        assert kind == "UserError"
        assert f"task letters, step {step}: the loss is not finite" in message
        assert f"training rows {named};" in message
        assert "training.learning_rate" in message


DIVERGED = [Case("diverged", "llama2", zero) for zero in (0, 1, 2, 3)]


@pytest.mark.parametrize("case", full(DIVERGED, but=DIVERGED[1:2]), ids=str)
def test_weights_that_diverge_stop_every_rank_at_the_next_step(runs, case: Case) -> None:
    (kind, message), *others = [result["raised"] for result in (runs.one(case), *runs.two(case))]
    assert kind == "UserError"
    assert "step 3: the loss is not finite" in message
    assert others == [[kind, message]] * 2


STEEP = [Case("steep", "llama2", zero) for zero in (0, 1, 2, 3)]
STEEP.append(Case("steep", "t5", 2, precision="bf16"))


@pytest.mark.parametrize("case", full(STEEP, but=STEEP[2:3]), ids=str)
def test_a_gradient_that_is_no_number_is_refused_and_never_left_out(runs, case: Case) -> None:
    (kind, message), *others = [result["raised"] for result in (runs.one(case), *runs.two(case))]
    assert kind == "UserError"
    assert "step 3: the gradient is not finite" in message
    rows = [row for micro_batch in case.steps[2] for row in micro_batch if row >= 0]
    assert f"training rows {', '.join(str(case.examples[row].row_id) for row in rows)};" in message
    assert others == [[kind, message]] * 2


@pytest.mark.parametrize("case", [Case("disk_full", "llama2", 2)], ids=str)
def test_a_log_that_cannot_be_written_stops_every_rank(runs, case: Case) -> None:
    for result in (runs.one(case), *runs.two(case)):
        kind, message = result["raised"]
        assert kind == "UserError"
        assert "No space left" in message or "full" in message
        # Step 2's line fails during step 3; all are told with that step's losses, and look at them during step 4.
        assert result["steps"] <= 4
        assert "trained" not in result


@pytest.mark.parametrize("case", [Case("messages")], ids=str)
def test_ranks_talk(runs, case: Case) -> None:
    one, two = runs.one(case), runs.two(case)
    assert one["sum"].tolist() == [1, 0]
    for rank, result in enumerate(two):
        assert result["sum"].tolist() == [2, 1]
        assert result["mine"].tolist() == [1, rank], "the operand stays as it was"
        assert result["broadcast"].tolist() == [5]
        assert result["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert result["said"] == "from 0"
        assert result["calls"] == ([0] if rank == 0 else [])
        assert result["first_refuses"] == ["UserError", "data.path: /nowhere: no such folder"]
        assert result["done"] == rank
        assert result["last_refuses"] == ["UserError", "on rank 1: output.dir: disk full"]
        assert result["last_told"] == ["Stopped", "signal SIGTERM"]
    assert one["last_refuses"] == ["UserError", "output.dir: disk full"]
    assert one["last_told"] == ["Stopped", "signal SIGTERM"]


@pytest.mark.parametrize("case", [Case("wrong_world", "t5", 2)], ids=str)
def test_ranks_that_cannot_share_the_micro_batches_are_refused(runs, case: Case) -> None:
    assert runs.one(case)["raised"] == [], "one rank takes all three"
    for result in runs.two(case):
        kind, message = result["raised"]
        assert kind == "UserError"
        assert "training.global_batch_size: 3 rows" in message
        assert "multiple of 2" in message
