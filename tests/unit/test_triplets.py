"""LB-CL's mathematics: joint bases, pairwise sums, injection (methods.md 4)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from data_prep.errors import UserError
from pipeline.adapter_kinds import layers_reached
from pipeline.adapters.triplet import Triplets, as_factors
from pipeline.methods.injection import injected
from pipeline.projection.subspace import Subspace
from pipeline.projection.triplets import joined, subtract_pairwise


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- joint bases


def test_a_joint_basis_by_hand() -> None:
    """e1 is known; (1, 1, 0) adds e2; (3, -4, 0) nothing more; (0, 0, 2) adds e3."""
    known = Subspace(torch.tensor([[1.0], [0.0], [0.0]]))
    R = torch.tensor([[1.0, 3.0], [1.0, -4.0], [0.0, 0.0]])
    grown = joined(known, R)
    assert torch.allclose(grown.basis.abs(), torch.eye(3)[:, :2], atol=1e-7)
    assert joined(grown, torch.tensor([[0.0], [0.0], [2.0]])).free == 0


def test_a_column_all_but_inside_adds_nothing() -> None:
    """A residual of 0.5e-4 of a column's norm is dropped, one of 2e-4 is kept."""
    known = Subspace(torch.tensor([[1.0], [0.0], [0.0]]))
    assert joined(known, torch.tensor([[1.0], [0.5e-4], [0.0]])).rank == 1
    assert joined(known, torch.tensor([[1.0], [2e-4], [0.0]])).rank == 2
    assert joined(known, torch.zeros(3, 2)) is known


@given(st.integers(0, 2**16), st.integers(1, 12), st.integers(0, 5), st.integers(1, 6), st.integers(0, 3))
def test_a_joint_basis_spans_old_and_new(seed: int, width: int, old: int, new: int, dependent: int) -> None:
    """Orthonormal, monotone, of the rank of all columns together, idempotent; vectors equal up to their signs."""
    known = joined(Subspace.empty(width), drawn(seed, width, min(old, width)))
    R = drawn(seed + 1, width, new)
    R = torch.cat([R, R @ drawn(seed + 2, new, dependent)], dim=1)
    grown = joined(known, R)
    eye = torch.eye(grown.rank)
    assert (grown.basis.T @ grown.basis - eye).abs().max() <= 1e-5
    for columns in (known.basis, R):
        assert grown.residual(columns.T.double()).norm() <= 2e-3 * columns.norm()
    assert known.rank <= grown.rank <= min(width, known.rank + new)
    assert grown.rank >= min(width, new)
    assert joined(grown, R).rank == grown.rank
    assert joined(grown, known.basis).rank == grown.rank


def test_fifteen_tasks_keep_a_basis_orthonormal() -> None:
    space = Subspace.empty(192)
    for task in range(15):
        space = joined(space, drawn(task, 192, 8))
        assert space.rank == 8 * (task + 1)
        assert (space.basis.T @ space.basis - torch.eye(space.rank)).abs().max() <= 1e-5


def test_columns_that_cannot_be_joined_are_refused() -> None:
    with pytest.raises(ValueError, match="columns of 4 numbers for a space of 3"):
        joined(Subspace.empty(3), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="not finite"):
        joined(Subspace.empty(3), torch.full((3, 1), torch.nan))


# ---- the literal sum


def test_the_pairwise_sum_by_hand() -> None:
    """Two old vectors along e1 take its part off twice: (1, 2) becomes (-1, 2); from the right likewise."""
    old = torch.tensor([[2.0, -3.0], [0.0, 0.0]])  # columns (2, 0), (-3, 0)
    for left in (True, False):
        parameter = nn.Parameter(torch.zeros(2, 1) if left else torch.zeros(1, 2))
        subtract_pairwise(parameter, old, left=left)
        (parameter.flatten() * torch.tensor([1.0, 2.0])).sum().backward()
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad.flatten(), torch.tensor([-1.0, 2.0]))


# ---- injection


def one(u: list[float], sigma: float, v: list[float]) -> Triplets:
    """A single triplet."""
    return Triplets(torch.tensor(u)[:, None], torch.tensor([sigma]), torch.tensor(v)[None])


def test_injection_by_hand() -> None:
    """Sensitivities 3 and 1: alpha 3/4 and 1/4. `none` cancels what `signs` adds up."""
    past = [one([1.0, 0.0], 4.0, [0.0, 1.0, 0.0]), one([-1.0, 0.0], 8.0, [0.0, -1.0, 0.0])]
    scores = torch.tensor([[3.0], [1.0]])
    plain, signed = (injected(past, scores, align=how) for how in ("none", "signs"))
    assert plain.U.flatten().tolist() == [0.5, 0.0]
    assert plain.V.flatten().tolist() == [0.0, 0.5, 0.0]
    assert signed.U.flatten().tolist() == [1.0, 0.0]
    assert signed.V.flatten().tolist() == [0.0, 1.0, 0.0]
    assert plain.sigma.tolist() == signed.sigma.tolist() == [5.0]


def test_a_negative_sigma_turns_its_u_alone() -> None:
    """sigma -2 with u is sigma 2 with -u; the product stays, and the next step may turn u and v together."""
    past = [one([1.0, 0.0], 1.0, [1.0, 0.0, 0.0]), one([0.0, 1.0], -2.0, [1.0, 0.0, 0.0])]
    new = injected(past, torch.tensor([[1.0], [1.0]]), align="signs")
    assert new.sigma.tolist() == [1.5]
    assert new.U.flatten().tolist() == [0.5, -0.5]
    assert new.V.flatten().tolist() == [1.0, 0.0, 0.0]


def test_sensitivities_of_zero_weigh_alike() -> None:
    past = [one([1.0, 0.0], 2.0, [1.0, 0.0, 0.0]), one([1.0, 0.0], 6.0, [1.0, 0.0, 0.0])]
    assert injected(past, torch.zeros(2, 1), align="signs").sigma.tolist() == [4.0]


@given(st.integers(0, 2**16), st.integers(1, 4), st.integers(1, 5))
def test_signs_do_not_matter_where_they_are_aligned(seed: int, tasks: int, rank: int) -> None:
    """Whatever signs and order singular vectors come in, the injected update is the same (order: hungarian)."""
    past = [
        Triplets(drawn(seed + k, 7, rank), drawn(seed + 10 + k, rank).abs() + 0.1, drawn(seed + 20 + k, rank, 6))
        for k in range(tasks)
    ]
    scores = drawn(seed + 30, tasks, rank).abs() + 0.1
    signs = drawn(seed + 40, tasks, rank).sign()
    turned = [
        Triplets(part.U * sign, part.sigma, part.V * sign[:, None]) for part, sign in zip(past, signs, strict=True)
    ]
    flipped = [Triplets(part.U * sign, part.sigma * sign, part.V) for part, sign in zip(past, signs, strict=True)]
    wanted = injected(past, scores, align="signs")
    for other in (injected(turned, scores, align="signs"), injected(flipped, scores, align="signs")):
        ours, theirs = (as_factors(new, 1.0) for new in (wanted, other))
        assert torch.allclose(ours.B @ ours.A, theirs.B @ theirs.A, atol=1e-4)
    order = [torch.randperm(rank, generator=torch.Generator().manual_seed(seed + k)) for k in range(tasks)]
    mixed = [Triplets(p.U[:, o], p.sigma[o], p.V[o]) for p, o in zip(past, order, strict=True)]
    moved = torch.stack([row[o] for row, o in zip(scores, order, strict=True)])
    whole = as_factors(injected(past, scores, align="hungarian"), 1.0)
    for parts, weights in ((mixed, moved), (flipped, scores), (turned, scores)):
        other = as_factors(injected(parts, weights, align="hungarian"), 1.0)
        assert torch.allclose(whole.B @ whole.A, other.B @ other.A, atol=1e-4)


def test_order_is_that_of_the_most_sensitive_task() -> None:
    """Task 2 leads with e1, e2; task 1 has them the other way round, and its sensitivities move with them."""
    eye = torch.eye(2)
    past = [Triplets(eye.flip(1), torch.tensor([8.0, 2.0]), eye.flip(0)), Triplets(eye, torch.tensor([4.0, 6.0]), eye)]
    new = injected(past, torch.tensor([[1.0, 2.0], [2.0, 3.0]]), align="hungarian")
    assert torch.allclose(new.U, eye)
    assert torch.allclose(new.V, eye)
    # e1: alpha 2/4 of task 1's 2 and 2/4 of task 2's 4; e2: 1/4 of 8 and 3/4 of 6
    assert torch.allclose(new.sigma, torch.tensor([3.0, 6.5]))


def test_one_past_task_is_injected_as_it_is() -> None:
    past = Triplets(drawn(1, 5, 3), torch.tensor([1.0, 2.0, 0.5]), drawn(2, 3, 4))
    for align in ("none", "signs", "hungarian"):
        new = injected([past], torch.ones(1, 3), align=align)
        assert torch.allclose(new.U, past.U)
        assert torch.allclose(new.V, past.V)
        assert torch.equal(new.sigma, past.sigma)


# ---- layers

LAYERS = [
    "encoder.block.0.layer.0.SelfAttention.q",
    "encoder.block.1.layer.0.SelfAttention.q",
    "decoder.block.0.layer.0.SelfAttention.q",
    "decoder.block.1.layer.1.EncDecAttention.k",
    "decoder.block.2.layer.2.DenseReluDense.wi",
]


def test_top_layers_are_the_last_decoder_blocks() -> None:
    assert layers_reached(LAYERS, "all") == LAYERS
    assert layers_reached(LAYERS, "top_2") == LAYERS[3:]
    llama = [f"model.layers.{number}.self_attn.q_proj" for number in range(3)]
    assert layers_reached(llama, "top_1") == llama[2:]
    with pytest.raises(
        UserError, match="top_4, but the decoder blocks with adapters number 3; legal are top_1 to top_3"
    ):
        layers_reached(LAYERS, "top_4")
