"""GORP: equal to the plain reference, leak-free, equal to its twins, resumable (methods.md 3, 8)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gorp_compare import differences, reference, space_differences
from one_rank import SEED, TRAINING, context, learn, learns_alike_from_its_stage, new_method, rows_of
from torch import Tensor, nn

from pipeline.adapters.lora import LoraKind
from pipeline.methods import METHODS
from pipeline.methods.core_updates import CoreUpdates
from pipeline.projection.projector import Complement
from pipeline.projection.subspace import Subspace
from pipeline.recipe import LoraAdapter, SeqLora

FAMILIES = ("t5", "llama2")
ADAPTER = LoraAdapter(rank=3, alpha=6, dropout=0.0)
SMALL: dict[str, Any] = {"core_rank": 4, "refresh_every": 4, "full_rank_lr": 1e-3}
# methods.md 8.4: at LoRA's lr 1e-4, Adam's eps 1e-8 and in float64; `full_rank_lr` lets the cores move as far.
SLOW = TRAINING.model_copy(update={"learning_rate": 1e-4, "warmup_steps": 2, "schedule": "cosine"})
TWELVE_STEPS = SLOW.model_copy(update={"epochs": 6})
FIFTY_STEPS = SLOW.model_copy(update={"epochs": 25})
EQUAL: list[Any] = [
    pytest.param(FIFTY_STEPS, "t5", {"refresh_every": 10}, id="t5-50"),
    pytest.param(FIFTY_STEPS, "llama2", {"refresh_every": 10}, id="llama2-50"),
    pytest.param(TWELVE_STEPS, "t5", {"refresh_moments": "keep", "refresh_every": 5}, id="t5-keep"),
    pytest.param(TWELVE_STEPS, "llama2", {"refresh_moments": "reset", "refresh_every": 5}, id="llama2-reset"),
    pytest.param(TWELVE_STEPS, "t5", {"refresh_every": 1}, id="t5-every-step", marks=pytest.mark.full),
    pytest.param(TWELVE_STEPS, "llama2", {"project": "off"}, id="llama2-off", marks=pytest.mark.full),
    pytest.param(TWELVE_STEPS, "t5", {"project_b": False}, id="t5-free-b", marks=pytest.mark.full),
    pytest.param(TWELVE_STEPS, "t5", {"mode": "literal"}, id="t5-literal"),
    pytest.param(TWELVE_STEPS, "llama2", {"mode": "literal"}, id="llama2-literal", marks=pytest.mark.full),
    pytest.param(TWELVE_STEPS, "t5", {"mode": "literal", "project": "exact"}, id="t5-literal-exact"),
    pytest.param(TWELVE_STEPS, "llama2", {"project": "gradient", "core_scale": 3.0}, id="llama2-gradient-scale"),
    pytest.param(TWELVE_STEPS, "t5", {"parts": "B"}, id="t5-B", marks=pytest.mark.full),
    pytest.param(TWELVE_STEPS, "llama2", {"parts": "B+L"}, id="llama2-B+L", marks=pytest.mark.full),
    pytest.param(TWELVE_STEPS, "t5", {"parts": "B+S"}, id="t5-B+S", marks=pytest.mark.full),
]


def gorp(folder: Path, family: str, adapter: LoraAdapter = ADAPTER, **settings: Any) -> Any:
    return new_method(folder, family, "gorp", adapter, **(SMALL | settings))


def bases(method: Any) -> dict[str, Tensor]:
    return {name: method.memory[name].basis for name in method.memory}


# ---- against the reference


def assert_equals_reference(folder: Path, family: str, method: Any, training: Any) -> None:
    ends, rows = None, [rows_of(task, family) for task in (1, 2)]
    for task in (1, 2):
        tensors = learn(folder, family, method, task, training=training, rows=rows[:task], dtype=torch.float64)
        ends = ends or reference(
            folder,
            family,
            method.settings,
            method.kind,
            training=training,
            tasks=[(rows[t - 1], context(folder, family, method, t, rows, training=training)._steps) for t in (1, 2)],
            seed=SEED,
        )
        found = differences(tensors, ends[task - 1], folder)
        assert found.keys() == {"lora", "full"} if method.settings.trains_cores else {"lora"}
        assert max(found.values()) <= 1e-4, (task, found)
        apart = space_differences(bases(method), ends[task - 1])
        assert apart
        assert max(apart.values()) <= 1e-5, apart


@pytest.mark.parametrize(("training", "family", "settings"), EQUAL)
def test_it_equals_the_reference(folders: dict[str, Path], training: Any, family: str, settings: Any) -> None:
    """methods.md 8.4, in float64, two tasks of 12 or 50 steps each, the second under projection."""
    method = gorp(folders[family], family, **{"svd": "exact"} | settings)
    assert_equals_reference(folders[family], family, method, training)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_the_reference_where_the_complement_is_trained(folders: dict[str, Path], family: str) -> None:
    """More than half of a space protected: C of `A + C N^T` is trained, and T5's cores of 15 x 15 lack directions."""
    wide = LoraAdapter(rank=9, alpha=6, dropout=0.0)
    method = gorp(folders[family], family, wide, svd="exact", core_rank=9, energy=0.9999)
    assert_equals_reference(folders[family], family, method, TWELVE_STEPS)
    ctx = context(folders[family], family, method, 3)
    method.begin_task(ctx)
    assert any(isinstance(getattr(t.projector, "turned", t.projector), Complement) for t in method._trained.values())
    assert any(record["missing"] for record in method.records() if "full_rank" in record) == (family == "t5")


# ---- twins


@pytest.mark.parametrize("family", FAMILIES)
def test_without_projection_part_b_is_seqlora_bit_for_bit(folders: dict[str, Path], family: str) -> None:
    """methods.md 8.8, on the same targets; with projection, in the first task alone."""
    folder = folders[family]
    for project, tasks in (("off", (1, 2)), ("exact", (1,))):
        ours = gorp(folder, family, parts="B", project=project)
        kind = LoraKind(ours.kind.targets, rank=3, alpha=6, dropout=0.0)
        theirs = METHODS["seqlora"](SeqLora(name="seqlora"), kind, task_count=2)
        for task in tasks:
            found, wanted = learn(folder, family, ours, task), learn(folder, family, theirs, task)
            whole = {name for name in found if name.endswith(".W")}
            assert not whole, "no full-rank weight is kept where none is trained"
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("lora", ["shared", "per_task"])
def test_with_hidden_features_its_lora_is_pegps(folders: dict[str, Path], lora: str) -> None:
    """The rival of moments: the same spaces, and the same second task, bit for bit."""
    folder = folders["t5"]
    same: dict[str, Any] = {"lora": lora, "energy": 0.7, "feature_samples": 5}
    ours = gorp(folder, "t5", gradient_space="hidden_features", parts="B+S", full_rank_modules=[], **same)
    theirs = new_method(folder, "t5", "pegp", ADAPTER, **same)
    for task in (1, 2):
        found, wanted = learn(folder, "t5", ours, task), learn(folder, "t5", theirs, task)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert bases(ours).keys() == bases(theirs).keys()
        assert all(torch.equal(Q, bases(theirs)[name]) for name, Q in bases(ours).items())


def test_the_first_task_does_not_depend_on_what_its_stage_is_not_addressed_by(folders: dict[str, Path]) -> None:
    """Stages of equal addresses are shared between runs: what `influences(1)` leaves out must not matter."""
    folder = folders["llama2"]
    wanted = learn(folder, "llama2", first := gorp(folder, "llama2"), 1)
    for other in ({"gradient_space": "mean_gradient"}, {"gradient_space": "hidden_features"}, {"energy": 0.5}):
        method = gorp(folder, "llama2", **other)
        found = learn(folder, "llama2", method, 1)
        assert method.influences(1) == first.influences(1)
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), other
    literal = gorp(folder, "llama2", mode="literal", refresh_moments="rotate")
    assert literal.influences(1) == first.influences(1)
    found = learn(folder, "llama2", literal, 1)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


# ---- leaks


class Weights:
    """The full-rank weights at each task's end in the engine's precision, which the stage rounds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends: list[dict[str, Tensor]] = []
        close = CoreUpdates.close

        def kept(cores: CoreUpdates) -> dict[str, Tensor]:
            self.ends.append({name: W.clone() for name, W in close(cores).items()})
            return self.ends[-1]

        monkeypatch.setattr(CoreUpdates, "close", kept)


def measured_leaks(method: Any, spaces: Any, first: Any, second: Any, W: Any) -> dict[str, float]:
    """The second task's changes inside the first's spaces, of what was saved and of the weights in float64."""
    leaks = {}
    for name, Q in spaces.items():
        Q, layer, part = Q.double(), name[:-2], name[-1]
        if part == "S" or (part in "AB" and name not in second):
            continue
        if part == "C":
            change = W.ends[1][layer].double() - first[f"{layer}.W"].double()
        else:
            change = second[name].double() - (0 if method.per_task else first[name].double())
        inside = change @ Q if part == "A" else Q.mT @ change
        leaks[name] = float(inside.norm() / change.norm())
    return leaks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"lora": "per_task"}, {"svd": "exact"}, {"gradient_space": "mean_gradient"}],
    ids=["shared", "per-task", "exact", "means"],
)
def test_nothing_leaks_into_the_protected_spaces(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str, settings: Any
) -> None:
    """methods.md 8.2, of A, of B and of the lifted updates, with AdamW, weight decay and clipping."""
    weights = Weights(monkeypatch)
    method = gorp(folders[family], family, **settings)
    first = learn(folders[family], family, method, 1, dtype=torch.float64)
    spaces = bases(method)
    second = learn(folders[family], family, method, 2, dtype=torch.float64)
    leaks = measured_leaks(method, spaces, first, second, weights)
    assert {name[-1] for name in leaks} == {"A", "B", "C"}
    assert max(leaks.values()) <= 1e-5, leaks
    assert method.leaks().keys() == {2}
    told = method.leaks()[2]
    assert told.keys() == leaks.keys()
    assert max(told.values()) <= 1e-5
    moved = [record["moved"] for record in method.records() if "full_rank" in record]
    assert min(moved) > 1e-4, "an idle core leaks nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_literal_mode_leaks(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str, record_property: Any
) -> None:
    """The paper's own form: Adam moves A back, and a core between new bases is protected by nothing."""
    weights = Weights(monkeypatch)
    method = gorp(folders[family], family, mode="literal", energy=0.5)
    first = learn(folders[family], family, method, 1, dtype=torch.float64)
    spaces = bases(method)
    second = learn(folders[family], family, method, 2, dtype=torch.float64)
    assert {name[-1] for name in spaces} == {"A", "C", "S"}
    leaks = measured_leaks(method, spaces, first, second, weights)
    told = method.leaks()[2]
    for part in "AC":
        worst = max(leak for name, leak in leaks.items() if name[-1] == part)
        record_property(f"literal leak of {part}", worst)
        assert worst > 1e-2
    assert told == pytest.approx(leaks, rel=1e-3)


def test_a_literal_core_is_frozen_after_at_most_k_tasks(folders: dict[str, Path]) -> None:
    """Its space lies in R^k and gains at least one direction a task; the record says when nothing is left."""
    method = gorp(folders["llama2"], "llama2", mode="literal", core_rank=2, energy=0.5)
    ranks, closed = [], []
    for task in (1, 2, 3):
        tensors = learn(folders["llama2"], "llama2", method, task, training=TRAINING.model_copy(update={"epochs": 1}))
        ranks.append([method.memory[f"{layer}.S"].rank for layer in method.kind.cores])
        closed.append([record["space"] for record in method.records() if record.get("closed")])
        if task == 2:
            before = tensors
    assert all(1 <= one < two or one == two == 2 for one, two in zip(*ranks[:2], strict=True))
    assert ranks[1:] == [[2, 2], [2, 2]]
    assert sorted(closed[2]) == sorted(f"{layer}.S" for layer in method.kind.cores)
    for layer in method.kind.cores:
        assert torch.equal(tensors[f"{layer}.W"], before[f"{layer}.W"])


def test_full_spaces_train_nothing(folders: dict[str, Path]) -> None:
    """One layer's core and factors closed; then every layer's, and the stream goes on without an engine."""
    folder = folders["t5"]
    method = gorp(folder, "t5")
    first = learn(folder, "t5", method, 1)
    lora, core = method.kind.targets[0], method.kind.cores[0]
    for name in (f"{lora}.A", f"{lora}.B", f"{core}.C"):
        method.memory.put(name, Subspace(torch.eye(method.memory[name].width)))
    second = learn(folder, "t5", method, 2)
    fixed = [name for name in first if torch.equal(first[name], second[name]) and not name.endswith(".scale")]
    assert sorted(fixed) == sorted([f"{lora}.A", f"{lora}.B", f"{core}.W"])
    for name in method.memory:
        method.memory.put(name, Subspace(torch.eye(method.memory[name].width)))
    third = learn(folder, "t5", method, 3)
    assert third.keys() == second.keys()
    assert all(torch.equal(third[name], second[name]) for name in second)
    assert all(record["closed"] for record in method.records())


def test_full_spaces_of_features_close_the_layers_that_share_them(folders: dict[str, Path]) -> None:
    """Two layers that read the same tensor have one space, kept under the first one's name."""
    folder = folders["t5"]
    method = gorp(folder, "t5", gradient_space="hidden_features")
    first = learn(folder, "t5", method, 1)
    assert [name for name in method.kind.cores if method.memory.leader(name) != name], "cores that follow another"
    for name in method.memory:
        method.memory.put(name, Subspace(torch.eye(method.memory[name].width)))
    ctx = context(folder, "t5", method, 2)
    method.begin_task(ctx)
    assert not method._attached.cores
    assert not any(parameter.requires_grad for parameter in ctx.model.parameters())
    second = learn(folder, "t5", method, 2)
    assert second.keys() == first.keys()
    assert all(torch.equal(second[name], first[name]) for name in first)


def test_a_full_space_of_b_closes_its_layer_to_a_new_lora(folders: dict[str, Path]) -> None:
    """With a LoRA per task, half a LoRA would be none: A could learn, and B stays zero."""
    folder = folders["llama2"]
    method = gorp(folder, "llama2", lora="per_task")
    first = learn(folder, "llama2", method, 1)
    layer = method.kind.targets[0]
    A = method.memory[f"{layer}.A"]
    assert A.free > 0
    method.memory.put(f"{layer}.B", Subspace(torch.eye(method.memory[f"{layer}.B"].width)))
    second = learn(folder, "llama2", method, 2)
    assert set(first) - set(second) == {f"{layer}.{part}" for part in ("A", "B", "scale")}
    assert len(method.active()[layer]) == 1
    assert torch.equal(method.memory[f"{layer}.A"].basis, A.basis), "what is not trained adds nothing"
    closed = [record["space"] for record in method.records() if record.get("closed")]
    assert closed == [f"{layer}.B"]


def test_without_part_s_a_space_is_the_last_tasks_alone(folders: dict[str, Path]) -> None:
    for parts, contained in (("B+L+S", True), ("B+L", False)):
        method = gorp(folders["llama2"], "llama2", parts=parts, energy=0.7)
        learn(folders["llama2"], "llama2", method, 1)
        old = {name: method.memory[name] for name in method.memory}
        learn(folders["llama2"], "llama2", method, 2)
        for name, space in old.items():
            outside = method.memory[name].residual(space.basis.mT).norm() / space.basis.norm()
            assert (outside < 1e-5) == contained, (name, parts)


# ---- what spaces are made of


def test_the_mean_gradient_is_that_of_all_steps(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The span of hand-made sums: of each factor's gradient, and of the full gradient of a core's weight."""
    folder = folders["llama2"]
    method = gorp(folder, "llama2", gradient_space="mean_gradient", svd="exact", energy=0.9, project="off")
    sums: dict[str, Tensor] = {}

    def keep(ctx: Any) -> None:
        for name, parameter in method._attached.parameters.items():
            if not name.endswith(".C"):
                sums[name] = sums.get(name, 0) + parameter.grad

    def watch(ctx: Any) -> None:
        started(ctx)
        for name, layer in method._attached.cores.items():
            layer.register_forward_hook(full_gradient(name))

    def full_gradient(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)
            output.register_hook(
                lambda g: sums.update({f"{name}.C": sums.get(f"{name}.C", 0) + g.flatten(0, -2).T @ x})
            )

        return hook

    started = method.engine_started
    monkeypatch.setattr(method, "before_step", keep)
    monkeypatch.setattr(method, "engine_started", watch)
    learn(folder, "llama2", method, 1, dtype=torch.float64)
    assert {name[-1] for name in sums} == {"A", "B", "C"}
    for name, total in sums.items():
        R = total.T if name.endswith(".A") else total
        if name.endswith(".C"):  # of a core, the leading k directions
            U, S, _ = torch.linalg.svd(total)
            R = U[:, :4] * S[:4]
        wanted = Subspace.empty(len(R)).extended(R=R, energy=0.9).basis.double()
        found = method.memory[name].basis.double()
        assert found.shape == wanted.shape, name
        assert (found @ found.T - wanted @ wanted.T).norm() <= 1e-5, name


# ---- what is kept


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora": "per_task"}, {"mode": "literal"}, {"gradient_space": "hidden_features", "energy": 0.7}],
    ids=["shared", "per-task", "literal", "features"],
)
def test_taking_stages_leads_where_learning_led(folders: dict[str, Path], settings: Any) -> None:
    """methods.md 8.6: memory and weights survive a file, and the next task is learnt alike, bit for bit."""
    folder = folders["t5"]
    learning, taking = (gorp(folder, "t5", **settings) for _ in range(2))
    second = learns_alike_from_its_stage(folder, "t5", learning, taking)
    assert any(name.endswith(".W") for name in second)
