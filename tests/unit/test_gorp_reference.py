"""gorp_reference: by hand, and against what plain AdamW, the growth rule's other form and linear algebra say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gorp_reference
import pytest
import torch
from gorp_reference import Core, Factor, GorpSettings, TaskEnd, clipped, gorp_plain, grown, leading
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from plain_reference import Float64, load_plain, pad, rate_of, train_plain
from random_backbones import random_examples
from torch import Tensor
from torch.testing import assert_close

from pipeline.projection.subspace import Subspace
from pipeline.recipe import Training

FAMILIES = ("t5", "llama2")
CORES = {
    "t5": ["decoder.block.0.layer.1.EncDecAttention.k", "decoder.block.0.layer.1.EncDecAttention.v"],
    "llama2": ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"],
}
LORA = {
    "t5": ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.v"],
    "llama2": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"],
}
TRAINING = Training(
    learning_rate=1e-2,
    global_batch_size=4,
    micro_batch_size=2,
    weight_decay=0.1,
    warmup_steps=2,
    schedule="cosine",
    gradient_clipping=0.5,
)
STEPS = [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[1, 6], [3, 4]], [[7, 2], [5, 0]], [[2, 4], [6, -1]]]
SMALL = GorpSettings(core_rank=3, refresh_every=2, full_rank_lr=1e-2)  # of five steps: three windows


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(width: int, rank: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(width, rank, seed=seed + 100)).Q


def starts(folder: Path, family: str, rank: int = 3) -> dict[str, Tensor]:
    model, found = load_plain(folder, family), {}
    for number, layer in enumerate(LORA[family]):
        d_out, d_in = model.get_submodule(layer).weight.shape
        found[f"{layer}.A"] = normal(rank, d_in, seed=number) / 4
        found[f"{layer}.B"] = normal(d_out, rank, seed=number + 9) / 4
    return found


def learn(folder: Path, family: str, settings: GorpSettings, *, count: int = 2, **changes: Any) -> list[TaskEnd]:
    """Tasks of five steps each, with cores and LoRA on two layers."""
    given = {
        "tasks": [(random_examples(8, family, seed=task), STEPS) for task in range(count)],
        "start": starts(folder, family),
        "scale": 2.0,
        "cores": CORES[family],
        "training": TRAINING,
        "settings": settings,
    }
    return gorp_plain(folder, family, **(given | changes))


def share(value: Tensor, of: Tensor) -> float:
    return float(value.detach().norm() / of.detach().norm())


# ---- by hand


def core_by_hand(**changes: Any) -> tuple[Core, Tensor]:
    settings = GorpSettings(core_rank=2, core_scale=2.0, **changes)
    core = Core(
        torch.zeros(3, 2, dtype=torch.float64), torch.tensor([[0.0], [1.0], [0.0]]).double(), settings, TRAINING
    )
    return core, torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 1.0]], dtype=torch.float64)


def test_a_step_of_a_core_by_hand() -> None:
    """The second output direction is protected: of singular values 3 and sqrt 17, 3 and 1 are left."""
    core, G = core_by_hand()
    core.begin(G)
    assert_close(core.U.abs(), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    assert_close(core.V.abs(), torch.eye(2, dtype=torch.float64))
    assert_close(core.gradient(G), torch.tensor([[6.0, 0.0], [0.0, 2.0]], dtype=torch.float64))
    core.step(core.gradient(G), 0.1)  # Adam's first step: every gradient's sign
    assert_close(core.W, torch.tensor([[-0.2, 0.0], [0.0, 0.0], [0.0, -0.2]], dtype=torch.float64), rtol=1e-6, atol=0)
    assert_close(core.total, core.W)
    assert_close(core.columns.abs(), torch.tensor([[0.6, 0.0], [0.0, 0.0], [0.0, 0.2]], dtype=torch.float64))


def test_a_literal_core_by_hand() -> None:
    """U from the whole gradient; what is projected away lies in R^k."""
    settings = GorpSettings(core_rank=2, mode="literal")
    core = Core(torch.zeros(3, 2, dtype=torch.float64), torch.tensor([[1.0], [0.0]]).double(), settings, TRAINING)
    G = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    core.begin(G)
    assert_close(core.U.abs(), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    assert_close(core.gradient(G), torch.tensor([[0.0, 0.0], [0.0, 3.0]], dtype=torch.float64))


@pytest.mark.parametrize("how", ["rotate", "keep", "reset"])
def test_moments_at_a_refresh_by_hand(how: str) -> None:
    """The gradient's two axes change places, and one of them its sign."""
    core, _ = core_by_hand(refresh_moments=how)
    core.P = torch.eye(3, dtype=torch.float64)
    core.U, core.V = torch.eye(3, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    m, v = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double(), torch.tensor([[5.0, 6.0], [7.0, 8.0]]).double()
    core.adam.m, core.adam.v, core.adam.count = m, v, 4
    core.refresh(torch.tensor([[0.0, 0.0], [0.0, 9.0], [0.0, 0.0]], dtype=torch.float64))
    s = (core.U[1, 0] * core.V[1, 0]).item()
    assert s == pytest.approx(1)  # G = 9 u v^T
    rotated = torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.tensor([[8.0, 0.0], [0.0, 0.0]])
    expected = {"rotate": rotated, "keep": (m, v), "reset": (0 * m, 0 * v)}[how]
    assert_close((core.adam.m, core.adam.v), tuple(part.double() for part in expected))
    assert core.adam.count == (0 if how == "reset" else 4)


def test_clipping_by_hand() -> None:
    assert_close(clipped([torch.tensor([3.0]), torch.tensor([4.0])], 2.5), [torch.tensor([1.5]), torch.tensor([2.0])])
    assert_close(clipped([torch.tensor([3.0]), torch.tensor([4.0])], 0.0), [torch.tensor([3.0]), torch.tensor([4.0])])


# ---- its parts


@examples(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.data())
def test_growth_is_the_eigenvalue_form(width: int, data: st.DataObject) -> None:
    """Section 1 in terms of C = R R^T, as the memory has it: two computations of one rule."""
    rank, count = data.draw(st.integers(0, width)), data.draw(st.integers(1, 4))
    energy, seed = data.draw(st.sampled_from([0.5, 0.9, 0.95, 1.0])), data.draw(st.integers(0, 99))
    Q, R = orthonormal(width, rank, seed), normal(width, count, seed=seed)
    ours, theirs = grown(Q, R, energy), Subspace(Q.float()).extended(R=R, energy=energy).basis.double()
    assert ours.shape == theirs.shape
    assert_close(ours @ ours.T, theirs @ theirs.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("rank", [0, 2, 5, 6])
def test_gradient_of_a_trained_form_is_autograds(left: bool, rank: int) -> None:
    Q, start, weights = orthonormal(6, rank), normal(3, 6), normal(3, 6, seed=1)
    if left:
        start, weights = start.T, weights.T
    factor = Factor(start, Q, GorpSettings(), TRAINING, left=left)
    assert_close(factor.value, start)
    factor.trained = normal(*factor.trained.shape, seed=2).requires_grad_()
    (factor.value * weights).sum().backward()
    assert_close(factor.gradient(weights), factor.trained.grad)
    change = (factor.value - start).T if left else factor.value - start
    assert rank == 0 or share(change @ Q, start) < 1e-6  # the complement's N is float32


@pytest.mark.parametrize("left", [False, True])
def test_both_projected_forms_agree_where_adam_does_not_see_the_basis(left: bool) -> None:
    """With an eps above all gradients Adam is linear: then C N^T moves as A~ P does, and its moment lifts to P's."""
    training = TRAINING.model_copy(update={"adam_eps": 1e3, "weight_decay": 0.3})
    Q = Subspace(orthonormal(7, 5).float()).basis.double()
    start = normal(3, 7).T if left else normal(3, 7)
    short = Factor(start, Q, GorpSettings(), training, left=left)
    long = Factor(start, Q, GorpSettings(), training, left=left)
    long.map, long.trained = gorp_reference.outside(Q), torch.zeros(3, 7, dtype=torch.float64)
    long.adam = gorp_reference.Adam(long.trained, 1e3)
    for step in range(4):
        g = normal(*start.shape, seed=step)
        for factor in (short, long):
            factor.step(factor.gradient(g), 10.0)
    assert short.trained.shape == (3, 2)
    assert short.moment.shape == ((2, 3) if left else (3, 2))
    assert share(short.value - long.value, long.value - start) < 3e-3  # sqrt(v) / eps
    assert_close(short.columns, long.columns, atol=1e-5, rtol=0)


# ---- whole tasks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("project", ["off", "exact"])
def test_without_cores_the_first_task_is_plain_adamw(folders: dict[str, Path], family: str, project: Any) -> None:
    (task,) = learn(folders[family], family, GorpSettings(project=project), count=1, cores=[])
    seen = train_plain(
        folders[family],
        family,
        start=starts(folders[family], family),
        scale=2.0,
        steps=STEPS,
        examples=random_examples(8, family, seed=0),
        training=TRAINING,
    )
    assert min(seen.norms) > TRAINING.gradient_clipping  # else clipping is not seen
    assert_close(task.lora, seen.tensors, rtol=1e-9, atol=1e-12)
    assert_close(task.moments, seen.moments[-1], rtol=1e-9, atol=1e-12)
    assert_close(task.losses, seen.losses, rtol=1e-9, atol=0)


@pytest.mark.parametrize("refresh_every", [2, 100])
def test_a_core_of_full_rank_is_adam_on_the_weight(folders: dict[str, Path], refresh_every: int) -> None:
    """With a large eps Adam is momentum, which no rotation changes: all of W's training must come out.

    T5's cross-attention keys and values: square, so that U and V of full rank lose nothing at a refresh.
    """
    training = TRAINING.model_copy(update={"adam_eps": 1e6, "gradient_clipping": 0.0, "weight_decay": 0.0})
    settings = GorpSettings(core_rank=15, refresh_every=refresh_every, full_rank_lr=1e5, project="off")
    rows = random_examples(24, "t5", seed=3)
    steps = [[list(range(24))]] * 5
    (task,) = learn(folders["t5"], "t5", settings, training=training, start={}, tasks=[(rows, steps)])
    model = load_plain(folders["t5"], "t5")
    weights = {name: model.get_submodule(name).weight.requires_grad_() for name in CORES["t5"]}
    before = {name: W.detach().clone() for name, W in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), eps=1e6, weight_decay=0.0)
    for number in range(len(steps)):
        optimizer.zero_grad()
        with Float64():
            model(**pad(rows, "t5")).loss.backward()
        rate = rate_of(training.model_copy(update={"learning_rate": 1e5}), number, len(steps))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    for name, W in weights.items():
        assert share(task.full[name] - W.detach(), W.detach() - before[name]) < 1e-5
        assert_close(task.updates[name], task.full[name] - before[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_enters_a_protected_space(folders: dict[str, Path], family: str) -> None:
    """methods.md 8.2 on the second task, for A, B and the lifted core; without projection all three leak."""
    for project, low, high in (("exact", 0.0, 1e-6), ("off", 1e-2, 1.0)):
        first, second = learn(folders[family], family, replace(SMALL, project=project))
        for name, value in second.lora.items():
            change, Q = value - first.lora[name], first.spaces[name]
            inside = change @ Q if name.endswith(".A") else Q.T @ change
            assert low <= share(inside, change) < high, (name, project)
        for layer, update in second.updates.items():
            Q = first.spaces[f"{layer}.C"]
            assert 1 <= Q.shape[1] <= 3
            assert low <= share(Q.T @ update, update) < high, (layer, project)
            assert_close(second.full[layer] - first.full[layer], update)


def test_spaces_accumulate_with_part_s_alone(folders: dict[str, Path]) -> None:
    for parts, contained in (("B+L+S", True), ("B+L", False)):
        settings = replace(SMALL, parts=parts)
        first, second = learn(folders["llama2"], "llama2", settings)
        for name, Q in second.spaces.items():
            old = first.spaces[name]
            assert (share(old - Q @ (Q.T @ old), old) < 1e-6) == contained, (name, parts)


def test_without_part_l_nothing_of_full_rank_moves(folders: dict[str, Path]) -> None:
    (task,) = learn(folders["t5"], "t5", GorpSettings(parts="B+S"), count=1)
    model = load_plain(folders["t5"], "t5")
    assert not task.updates
    assert all(torch.equal(W, model.get_submodule(name).weight) for name, W in task.full.items())
    assert set(task.spaces) == set(task.lora)


@pytest.mark.parametrize(("steps", "every", "times"), [(5, 2, 3), (4, 2, 2), (5, 10, 1), (2, 1, 2)])
def test_bases_are_made_at_the_start_and_after_each_window_but_the_last(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, steps: int, every: int, times: int
) -> None:
    seen: list[Tensor] = []

    def counted(G: Tensor, k: int) -> tuple[Tensor, Tensor]:
        seen.append(G)
        return leading(G, k)

    monkeypatch.setattr(gorp_reference, "leading", counted)
    plan: Sequence[Any] = [(random_examples(8, "llama2", seed=0), STEPS[:steps])]
    learn(
        folders["llama2"],
        "llama2",
        GorpSettings(core_rank=2, refresh_every=every),
        tasks=plan,
        cores=CORES["llama2"][:1],
    )
    assert len(seen) == times
    if every == 1:  # the second base is of the same step's gradient, at the parameters before its update
        assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("how", ["rotate", "reset"])
def test_signs_of_singular_vectors_do_not_matter(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, how: Any
) -> None:
    settings = replace(SMALL, refresh_moments=how)
    expected = learn(folders["llama2"], "llama2", settings)[-1]
    made: list[int] = []

    def flipped(G: Tensor, k: int) -> tuple[Tensor, Tensor]:
        U, V = leading(G, k)
        made.append(1)
        signs = normal(k, seed=len(made)).sign()
        return U * signs, V * signs

    monkeypatch.setattr(gorp_reference, "leading", flipped)
    found = learn(folders["llama2"], "llama2", settings)[-1]
    for name, update in expected.updates.items():
        assert share(found.updates[name] - update, update) < 1e-9
    assert math.isclose(found.losses[-1], expected.losses[-1], rel_tol=1e-12)


def test_the_literal_mode_projects_gradients_alone(folders: dict[str, Path]) -> None:
    """B is free, A leaks through Adam, the core's space lies in R^k."""
    settings = replace(SMALL, **gorp_reference.LITERAL)
    first, second = learn(folders["llama2"], "llama2", settings)
    assert {name.rpartition(".")[2] for name in second.spaces} == {"A", "S"}
    for layer in CORES["llama2"]:
        assert len(second.spaces[f"{layer}.S"]) == 3
    for layer in LORA["llama2"]:
        change = second.lora[f"{layer}.A"] - first.lora[f"{layer}.A"]
        assert 1e-3 < share(change @ first.spaces[f"{layer}.A"], change) < 0.7
