"""One rank's fault or order to stop is all ranks': same step, same message, nobody left waiting."""

from __future__ import annotations

import pytest
from comparing import full
from rank_cases import Case

TOLD = [Case("told_to_stop", "t5", 2), Case("told_to_stop", "t5", 3)]


@pytest.mark.parametrize("case", full(TOLD, but=TOLD[:1]), ids=str)
def test_a_signal_to_one_rank_stops_both_at_the_same_step(runs, case: Case) -> None:
    one, (first, second) = runs.one(case), runs.two(case)

    assert [one["raised"], first["raised"], second["raised"]] == ["Stopped"] * 3
    assert second["message"] == one["message"] == "signal SIGUSR1"
    assert first["message"] == "another rank was told to stop"
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
        assert result["raised"] == "UserError"
        assert f"task letters, step {step}: the loss is not finite" in result["message"]
        assert f"training rows {named};" in result["message"]
        assert "training.learning_rate" in result["message"]


DIVERGED = [Case("diverged", "llama2", zero) for zero in (0, 1, 2, 3)]


@pytest.mark.parametrize("case", full(DIVERGED, but=DIVERGED[3:]), ids=str)
def test_weights_that_diverge_stop_every_rank_at_the_next_step(runs, case: Case) -> None:
    results = [runs.one(case), *runs.two(case)]
    assert {result["raised"] for result in results} == {"UserError"}
    assert len({result["message"] for result in results}) == 1
    assert "step 3: the loss is not finite" in results[0]["message"]


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
        assert result["raised"] == "UserError"
        assert result["message"] == "data.path: /nowhere: no such folder"


@pytest.mark.parametrize("case", [Case("wrong_world", "t5", 2)], ids=str)
def test_ranks_that_cannot_share_the_micro_batches_are_refused(runs, case: Case) -> None:
    assert "raised" not in runs.one(case), "one rank takes all three"
    for result in runs.two(case):
        assert result["raised"] == "UserError"
        assert "training.global_batch_size: 3 rows" in result["message"]
        assert "multiple of 2" in result["message"]
