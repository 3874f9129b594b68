"""GORP under DeepSpeed: equal to the plain reference in every ZeRO stage, on 1 and 2 ranks; leaks, moments, merges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from comparing import flat, full, relative
from gorp_compare import differences, reference, space_differences, updates
from gorp_compare import relative as apart
from gorp_reference import BETAS, TaskEnd
from pegp_runs import ADAPTERS, rows_of, settings, steps_of
from plain_reference import rate_of
from rank_cases import SEED, TRAINING, WRITE_AFTER, Case
from torch import Tensor

from pipeline.adapter_kinds import adapter_kind
from pipeline.models import load_backbone

FAMILIES = ("t5", "llama2")


def case(family: str, zero: int, run: str = "gorp_tasks", **changes: Any) -> Case:
    return Case(run, family, zero, **{"method": "gorp", "adapter": "shared"} | changes)


EQUAL = [
    *(case(family, zero) for family in FAMILIES for zero in (0, 1, 2, 3)),
    *(case(family, zero, offload="optimizer") for family in FAMILIES for zero in (1, 2, 3)),
    *(case(family, 3, offload="parameters") for family in FAMILIES),
    *(case(family, zero, checkpointing=True) for family in FAMILIES for zero in (2, 3)),
    *(case(family, zero, refresh=how) for how in ("reset", "keep") for family in FAMILIES for zero in (0, 1, 2, 3)),
]
EQUAL_FAST = [
    case("llama2", 2, checkpointing=True),
    case("t5", 3),
]
BF16 = [case(family, zero, precision="bf16") for family in FAMILIES for zero in (2, 3)]
SKETCHED = [case(family, zero, svd="randomized") for family in FAMILIES for zero in (0, 1, 2, 3)]
PER_TASK = [case(family, zero, adapter="lora") for family in FAMILIES for zero in (0, 2, 3)]
FIFTY = [case(family, zero, long=True) for family in FAMILIES for zero in (0, 1, 2, 3)]
FIFTY_FAST = [case("llama2", 2, long=True)]
LITERAL = [case(family, zero, mode="literal") for family in FAMILIES for zero in (0, 1, 2, 3)]
LITERAL_FAST = [case("t5", 2, mode="literal")]
ALL = [*EQUAL, *BF16, *SKETCHED, *PER_TASK]
ALL_FAST = [*EQUAL_FAST, case("llama2", 3, precision="bf16")]


def ranks(runs: Any, case: Case) -> list[tuple[int, Mapping[str, Any]]]:
    return [(1, runs.one(case)), *((2, result) for result in runs.two(case))]


_ENDS: dict[tuple[str, str, bool], list[TaskEnd]] = {}


def wanted(runs: Any, case: Case) -> list[TaskEnd]:
    """The reference's ends of both tasks."""
    chosen = settings(case)
    key = case.family, chosen.model_dump_json(), case.long
    if key not in _ENDS:
        folder = runs.backbones / case.backbone
        model = load_backbone(folder, case.family, dtype=torch.float32)
        kind: Any = adapter_kind(ADAPTERS["shared"], model, case.family, chosen)
        tasks = [(rows, steps_of(case, task)) for task, rows in enumerate(rows_of(case), start=1)]
        _ENDS[key] = reference(folder, case.family, chosen, kind, training=case.training, tasks=tasks, seed=SEED)
    return _ENDS[key]


@pytest.mark.parametrize(
    "case", full([*EQUAL, *FIFTY, *LITERAL], but=[*EQUAL_FAST, *FIFTY_FAST, *LITERAL_FAST]), ids=str
)
def test_it_equals_the_plain_reference(runs, case: Case) -> None:
    """methods.md 8.4 and 8.7: all dW after both tasks, Adam's moments, the spaces; with Adam's eps 1e-4."""
    for world, result in ranks(runs, case):
        for task, end in enumerate(wanted(runs, case), start=1):
            found = differences(result[f"trained_{task}"], end, runs.backbones / case.backbone)
            assert found.keys() == {"lora", "full"}
            for part, difference in found.items():
                assert runs.note(case, f"dW {part}, {world} ranks", difference) <= 1e-4
            for key, moments in (("first", end.moments), ("second", end.second_moments)):
                difference = moments_apart(result[key], task, moments)
                assert runs.note(case, f"{key} moments", difference) <= 1e-4
        assert max(space_differences(result["spaces"], wanted(runs, case)[1]).values()) <= 1e-3


def moments_apart(read: Mapping[str, Tensor], task: int, moments: Mapping[str, Tensor]) -> float:
    """Of one of Adam's moments of all tensors, as the engine reads it; a projected B is held transposed."""
    found = {name: read[f"{task} {name}"] for name in moments}
    turned = {name: m if m.shape == moments[name].shape else m.mT for name, m in found.items()}
    assert all(m.shape == moments[name].shape for name, m in turned.items())
    return relative(flat(turned, list(moments)), flat(moments, list(moments)))


@pytest.mark.parametrize("case", full(ALL, but=ALL_FAST), ids=str)
def test_the_number_of_ranks_does_not_matter(runs, case: Case) -> None:
    one, (first, second) = runs.one(case), runs.two(case)
    for task in ("trained_1", "trained_2"):
        assert one[task].keys() == first[task].keys()
        assert all(torch.equal(first[task][name], second[task][name]) for name in first[task])
    for name, Q in first["spaces"].items():
        assert torch.equal(Q, second["spaces"][name])
    if case.precision == "bf16":
        assert first["loss_2"] == pytest.approx(one["loss_2"], rel=2.0**-7)
        return
    # Bases are singular vectors: rounding of a gradient (1e-7) over the gap between the last value kept and the next,
    # more in the second task, whose spaces come from the first's moments.
    for task, limit in ((1, 1e-5), (2, 1e-4)):
        ours, theirs = (updates(r[f"trained_{task}"], runs.backbones / case.backbone) for r in (first, one))
        difference = apart(joined(ours), joined(theirs))
        assert runs.note(case, f"dW, 1 vs 2 ranks, task {task}", difference) <= limit


def joined(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """LoRA's products and whole matrices in one mapping."""
    return {layer: dW for layers in found.values() for layer, dW in layers.items()}


@pytest.mark.parametrize("case", full(ALL, but=ALL_FAST), ids=str)
def test_nothing_leaks_into_the_protected_spaces(runs, case: Case) -> None:
    """methods.md 8.2, of A, B and the lifted updates."""
    for world, result in ranks(runs, case):
        assert {name[-1] for name in result["leaks"]} == {"A", "B", "C"}
        assert runs.note(case, f"leak, {world} ranks", max(result["leaks"].values())) <= 1e-5
        for name, Q in result["bases"].items():
            if name.endswith((".A", ".B")):
                before = 0 if case.adapter == "lora" else result["trained_1"][name].double()
                change = result["trained_2"][name].double() - before
                inside = change @ Q.double() if name.endswith(".A") else Q.double().mT @ change
                assert inside.norm() <= 1e-4 * change.norm()  # of float32 tensors, whose rounding is in it


@pytest.mark.parametrize("case", full(FIFTY, but=FIFTY_FAST), ids=str)
def test_a_long_task_moves_and_its_updates_stay_outside(runs, case: Case) -> None:
    """The 50 steps are compared on cores that learn, and nothing leaks with time."""
    for world, result in ranks(runs, case):
        assert {name[-1] for name in result["leaks"]} == {"A", "B", "C"}
        assert runs.note(case, f"leak, {world} ranks", max(result["leaks"].values())) <= 1e-5
        cores = [name for name in result["trained_1"] if name.endswith(".W")]
        for name in cores:
            before, after = result["trained_1"][name], result["trained_2"][name]
            assert (after - before).norm() > 1e-3 * before.norm(), "an idle core equals any reference"
        assert len(result["merged"]) == 2 * 4 * len(cores), "after steps 10, 20, 30 and 40 of 50, in both tasks"


@pytest.mark.parametrize("case", full(LITERAL, but=LITERAL_FAST), ids=str)
def test_the_papers_own_form_leaks(runs, case: Case) -> None:
    """Adam moves A back, and a core between new bases is protected by nothing; measured of what the stages hold."""
    for world, result in ranks(runs, case):
        leaks: dict[str, float] = {}
        for name, Q in result["bases"].items():
            if name[-1] in "AC":
                tensor = name if name.endswith(".A") else f"{name[:-2]}.W"
                change = result["trained_2"][tensor].double() - result["trained_1"][tensor].double()
                inside = change @ Q.double() if name.endswith(".A") else Q.double().mT @ change
                leaks[name] = float(inside.norm() / change.norm())
        assert result["leaks"] == pytest.approx(leaks, rel=1e-2)
        for part in "AC":
            worst = max(leak for name, leak in leaks.items() if name[-1] == part)
            assert runs.note(case, f"leak of {part}, {world} ranks", worst) > 1e-2


GRADIENT = [replace(case, project="gradient", refresh="keep") for case in EQUAL[:4]]


@pytest.mark.parametrize("case", full(GRADIENT, but=[GRADIENT[2]]), ids=str)
def test_projecting_gradients_alone_leaks(runs, case: Case) -> None:
    """Of A and B; it shows that the measurement above can fail. Cores lie outside by their bases."""
    for _, result in ranks(runs, case):
        assert max(leak for name, leak in result["leaks"].items() if name[-1] in "AB") > 1e-2
        assert max(leak for name, leak in result["leaks"].items() if name[-1] == "C") <= 1e-5


@pytest.mark.parametrize("case", full(ALL, but=ALL_FAST), ids=str)
def test_a_merge_reaches_every_copy(runs, case: Case) -> None:
    """The forward's W is the float32 master rounded once, on every rank; C is zero in both copies."""
    for _, result in ranks(runs, case):
        cores = len([name for name in result["trained_1"] if name.endswith(".W")])
        assert len(result["merged"]) == 2 * 2 * cores, "after steps 2 and 4 of 6, in both tasks"
        assert all(all(copies.values()) for copies in result["merged"]), result["merged"]
        for task in (1, 2):  # the engine's model with its core, before the last merge, and what the stage holds
            live, stored = result[f"live_{task}"], result[f"stored_{task}"]
            difference = runs.note(case, "engine vs stored", abs(live / stored - 1))
            assert difference <= (0.02 if case.precision == "bf16" else 1e-5)


PLACES = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), *((zero, "optimizer") for zero in (1, 2, 3))]
MOMENTS = [
    *(case(family, zero, "gorp_moments", offload=offload) for family in FAMILIES for zero, offload in PLACES),
    *(case(family, zero, "gorp_moments", precision="bf16") for family in FAMILIES for zero in (2, 3)),
]
MOMENTS_FAST = [MOMENTS[5]]


@pytest.mark.parametrize("case", full(MOMENTS, but=MOMENTS_FAST), ids=str)
def test_written_moments_and_a_restarted_count_are_what_adam_goes_on_from(runs, case: Case) -> None:
    """By AdamW's formulas: of cores the first step of a new count, of the others the fourth of theirs."""
    first_beta, second_beta = BETAS
    rate = rate_of(TRAINING, WRITE_AFTER, 6)
    for _, seen in ranks(runs, case):
        clip = min(1.0, TRAINING.gradient_clipping / (seen["norm"] + 1e-6))
        names = list(seen["gradient"])
        assert {name[-1] for name in names} == {"A", "B", "C"}
        changes: dict[str, list[Tensor]] = {"first": [], "second": [], "master": []}
        for name in names:
            assert torch.equal(seen["read first"][name], seen["written first"][name])
            assert torch.equal(seen["read second"][name], seen["written second"][name])
            core = name.endswith(".C")
            count, lr, decay = (1, rate, 0.0) if core else (WRITE_AFTER + 1, rate, TRAINING.weight_decay)
            g = clip * seen["gradient"][name].double()
            m = first_beta * seen["written first"][name] + (1 - first_beta) * g
            v = second_beta * seen["written second"][name] + (1 - second_beta) * g**2
            direction = m / (1 - first_beta**count) / ((v / (1 - second_beta**count)).sqrt() + TRAINING.adam_eps)
            start = seen["master before"][name].double()
            master = start * (1 - lr * decay) - lr * direction
            for key, value in (("first", m), ("second", v), ("master", master - start)):
                found = seen[key][name].double() - (start if key == "master" else 0)
                changes[key].append(torch.stack([found.flatten(), value.flatten()]))
        for key, pairs in changes.items():
            found, value = torch.cat(pairs, dim=1)
            assert runs.note(case, f"{key} after writing", relative(found, value)) <= 1e-4, key
