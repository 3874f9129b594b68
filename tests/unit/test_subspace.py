"""projection.subspace: by hand, and as properties against a reference in numpy that shares no formula with the code."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.projection.subspace import Subspace, rank_cap

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def space(*vectors: list[float]) -> Subspace:
    return Subspace(torch.tensor(vectors).T.contiguous())


def random_space(width: int, rank: int, seed: int) -> Subspace:
    draw = torch.Generator().manual_seed(seed)
    return Subspace(torch.linalg.qr(torch.randn(width, rank, generator=draw, dtype=torch.float64)).Q.float())


def vectors(width: int, count: int, seed: int, decay: float = 0.0) -> Tensor:  # [width, count]
    """Random columns; with `decay` on turned axes of falling length."""
    draw = torch.Generator().manual_seed(seed)
    R = torch.randn(width, count, generator=draw, dtype=torch.float64)
    axes = random_space(width, width, seed + 1).basis.double()
    return axes @ (torch.arange(1, width + 1).double().pow(-decay)[:, None] * R)


def rotated(eigenvalues: list[float], seed: int = 3) -> Tensor:
    """A second moment with these eigenvalues and no axis along a coordinate."""
    axes = random_space(len(eigenvalues), len(eigenvalues), seed).basis.double()
    return axes @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ axes.T


def projection(found: Subspace) -> Array:
    """The matrix that projects onto the span, from its basis by the pseudo-inverse."""
    Q = found.basis.double().numpy()
    return Q @ np.linalg.pinv(Q) if Q.shape[1] else np.zeros((len(Q), len(Q)))


def reference(old: Subspace, R: Tensor, energy: float) -> tuple[Array, list[float]]:
    """The growth rule from R itself: the new projection, and the share of energy inside after 0, 1, ... vectors."""
    columns, inside = R.double().numpy(), projection(old)
    outside = columns - inside @ columns
    left, lengths, _ = np.linalg.svd(outside)
    total = float((columns**2).sum())
    largest = max(lengths[0], np.linalg.norm(inside @ columns, 2)) ** 2
    shares = [1 - float((outside**2).sum()) / total]
    for length, vector in zip(lengths, left.T, strict=False):
        if shares[-1] >= energy or length**2 <= 1e-6 * largest:
            break
        shares.append(shares[-1] + float(length) ** 2 / total)
        inside = inside + np.outer(vector, vector)
    return inside, shares


def orthonormality(found: Subspace) -> float:
    Q = found.basis.double()
    return float((Q.T @ Q - torch.eye(found.rank, dtype=torch.float64)).abs().max()) if found.rank else 0.0


PROTECTED = space([1.0, 0.0, 0.0], [0.0, 0.6, 0.8])


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 5.0, 0.0], [2.0, 0.0, 5.0]])
    assert (PROTECTED.width, PROTECTED.rank, PROTECTED.free, PROTECTED.bytes) == (3, 2, 1, 24)
    torch.testing.assert_close(PROTECTED.coordinates(x), torch.tensor([[1.0, 3.0], [2.0, 4.0]]))
    torch.testing.assert_close(PROTECTED.component(x), torch.tensor([[1.0, 1.8, 2.4], [2.0, 2.4, 3.2]]))
    torch.testing.assert_close(PROTECTED.residual(x), torch.tensor([[0.0, 3.2, -2.4], [0.0, -2.4, 1.8]]))
    N = PROTECTED.complement
    torch.testing.assert_close(N * N[1].sign(), torch.tensor([[0.0], [0.8], [-0.6]]))


def test_extended_and_share_by_hand() -> None:
    C = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.36, 0.48], [0.0, 0.48, 0.64]])  # eigenvalues 4, 1, 0
    first = Subspace.empty(3).extended(C=C, energy=0.8)  # 4 of 5: met exactly
    torch.testing.assert_close(first.basis.abs(), torch.tensor([[1.0], [0.0], [0.0]]))
    assert first.share(C) == pytest.approx(0.8)
    both = first.extended(C=C, energy=0.81)
    np.testing.assert_allclose(projection(both), projection(PROTECTED), atol=1e-6)
    assert both.share(C) == pytest.approx(1)
    assert Subspace.empty(3).share(C) == 0
    assert PROTECTED.share(torch.zeros(3, 3)) == 1  # nothing depends on anything outside


def test_leading_dimensions_and_dtype_of_x() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(PROTECTED.residual(x)[1, 4], PROTECTED.residual(x[1, 4]))
    assert PROTECTED.coordinates(x).shape == (2, 5, 2)
    for result in (PROTECTED.coordinates(x), PROTECTED.component(x), PROTECTED.residual(x)):
        assert result.dtype == torch.float64


@pytest.mark.parametrize("rank", range(6))
def test_complement_is_all_that_is_outside(rank: int) -> None:
    old = random_space(5, rank, seed=rank)
    N = Subspace(old.complement)
    assert N.basis.dtype == torch.float32
    assert N.basis.is_contiguous()
    assert orthonormality(N) <= 1e-6
    np.testing.assert_allclose(projection(N), np.eye(5) - projection(old), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_growth_is_the_reference(data: st.DataObject) -> None:
    width = data.draw(st.integers(2, 12), label="width")
    old = random_space(width, data.draw(st.integers(0, width - 1), label="rank"), seed=1)
    R = vectors(width, data.draw(st.integers(1, 20), label="n"), data.draw(st.integers(0, 10**6)), decay=1.0)
    energy = data.draw(st.sampled_from([0.2, 0.5, 0.8, 0.95, 0.99, 0.999]), label="energy")
    expected, shares = reference(old, R, energy)
    assume(all(abs(share - energy) > 1e-6 for share in shares))  # a tie is settled by rounding
    grown = old.extended(R=R, energy=energy)
    assert grown.rank == old.rank + len(shares) - 1
    np.testing.assert_allclose(projection(grown), expected, atol=1e-4)
    assert orthonormality(grown) <= 1e-6
    assert grown.share(R @ R.T) >= energy - 1e-6
    for other in (old.extended(C=R @ R.T, energy=energy), old.extended(C=(R @ R.T).float(), energy=energy)):
        np.testing.assert_allclose(projection(other), expected, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 6), st.sampled_from([0.5, 0.9, 0.99]))
def test_no_smaller_set_of_directions_would_do(seed: int, rank: int, energy: float) -> None:
    old, R = random_space(8, rank, seed), vectors(8, 15, seed, decay=0.5)
    grown = old.extended(R=R, energy=energy)
    outside = (np.eye(8) - projection(old)) @ R.numpy()
    falling = np.sort(np.linalg.eigvalsh(outside @ outside.T))[::-1]
    added, total = grown.rank - old.rank, float((R**2).sum())
    if added:  # by Ky Fan no m - 1 directions hold more than the largest m - 1 eigenvalues
        assert 1 - (falling.sum() - falling[: added - 1].sum()) / total < energy
    else:
        assert 1 - falling.sum() / total >= energy - 1e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([0.3, 0.9, 0.999, 1.0]))
def test_monotone_and_idempotent(seed: int, count: int, energy: float) -> None:
    old, R = random_space(8, 2, seed), vectors(8, count, seed, decay=0.5)
    grown = old.extended(R=R, energy=energy)
    leading = Subspace(grown.basis[:, : old.rank])
    np.testing.assert_allclose(projection(leading), projection(old), atol=1e-5)
    assert grown.extended(R=R, energy=energy) is grown
    assert grown.extended(C=(R @ R.T).float(), energy=energy).rank == grown.rank


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 5), st.integers(1, 3))
def test_a_threshold_met_exactly_is_met_and_stays_so(seed: int, rank: int, count: int) -> None:
    old, R = random_space(16, rank, seed), vectors(16, 9, seed, decay=1.0)
    _, shares = reference(old, R, energy=1.0)
    grown = old.extended(R=R, energy=shares[count])
    assert grown.rank == rank + count
    assert grown.extended(R=R, energy=shares[count]) is grown


def test_fifteen_tasks() -> None:
    memory, ranks = Subspace.empty(48), [0]
    for task in range(15):
        R, old = vectors(48, 30, seed=100 + task, decay=1.5), memory
        memory = memory.extended(C=(R @ R.T).float(), energy=0.9)
        ranks.append(memory.rank)
        assert orthonormality(memory) <= 1e-6
        assert memory.basis.is_contiguous()
        assert memory.share(R @ R.T) >= 0.9 - 1e-6
        np.testing.assert_allclose(projection(Subspace(memory.basis[:, : old.rank])), projection(old), atol=1e-5)
    assert ranks[1] > 1
    assert 15 < ranks[-1] < 48


def test_a_drifted_basis_is_straightened_before_it_counts() -> None:
    """Its columns 4e-6 too long: not 1.000008 times the energy."""
    drifted = Subspace(torch.tensor([[1.000004], [0.0], [0.0]]))
    grown = drifted.extended(C=torch.tensor([1.0, 1.0, 0.0]).diag(), energy=0.500003)
    assert grown.rank == 2
    assert orthonormality(grown) <= 1e-6


def test_eigenvalues_are_energies_already() -> None:
    """Shares 4/8, 6/8, 7/8, 1. Of squares they would be 0.73, 0.91, ..., of roots 0.37, 0.63, 0.82, 1."""
    C = rotated([4.0, 2.0, 1.0, 1.0])
    root = torch.linalg.cholesky(C)
    assert Subspace.empty(4).extended(C=C, energy=0.85).rank == 3
    assert Subspace.empty(4).extended(R=root, energy=0.85).rank == 3


@pytest.mark.parametrize(("energy", "rank"), [(0.74, 1), (0.75, 1), (0.76, 2)])
def test_the_first_task_counts_like_a_later_one(energy: float, rank: int) -> None:
    assert Subspace.empty(2).extended(C=torch.tensor([3.0, 1.0]).diag(), energy=energy).rank == rank
    later = space([1.0, 0.0, 0.0]).extended(C=torch.tensor([1.0, 2.0, 1.0]).diag(), energy=energy)
    assert later.rank == 1 + rank


def test_nothing_to_learn_from() -> None:
    assert PROTECTED.extended(R=torch.zeros(3, 4), energy=1.0) is PROTECTED
    assert Subspace.empty(3).extended(C=torch.zeros(3, 3), energy=0.5).rank == 0
    assert PROTECTED.extended(R=PROTECTED.basis, energy=1.0) is PROTECTED
    full = random_space(6, 6, seed=2)
    assert full.extended(R=vectors(6, 9, seed=2), energy=1.0) is full


def test_one_token_is_protected_whole() -> None:
    token = vectors(9, 1, seed=4)
    for energy in (0.01, 1e-9, 1.0):
        grown = Subspace.empty(9).extended(R=token, energy=energy)
        np.testing.assert_allclose(projection(grown), (token @ token.T / (token**2).sum()).numpy(), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(0, 3), st.booleans())
def test_energy_one_fills_the_real_rank_alone(seed: int, rank: int, known: int, rounded: bool) -> None:
    """Also from a float32 C, whose rounding gives every direction some energy."""
    old = random_space(24, known, seed)
    R = vectors(24, rank, seed) @ torch.randn(rank, 200, generator=torch.Generator().manual_seed(seed)).double()
    C = R.float() @ R.float().T if rounded else R @ R.T
    real = np.linalg.matrix_rank(np.hstack([old.basis.double().numpy(), R.numpy()]), tol=1e-3)
    assert old.extended(C=C, energy=1.0).rank == real


def test_the_floor_is_a_millionth_of_the_largest_inside_or_outside() -> None:
    assert Subspace.empty(3).extended(C=rotated([1.0, 1.1e-6, 0.9e-6]), energy=1.0).rank == 2
    small_share = rotated([1.0] * 20 + [1.1e-6, 0.9e-6])
    assert Subspace.empty(22).extended(C=small_share, energy=1.0).rank == 21
    known = space([1.0, 0.0, 0.0])
    assert known.extended(C=torch.tensor([1.0, 1.1e-6, 0.9e-6]).diag(), energy=1.0).rank == 2
    assert known.extended(C=torch.tensor([0.0, 1.1e-6, 0.9e-6]).diag(), energy=1.0).rank == 3


@pytest.mark.parametrize(("max_rank", "rank"), [(1, 1), (3, 3), (0.25, 2), (0.01, 1), (1.0, 7), (None, 7), (8, 7)])
def test_max_rank_wins_over_the_energy(max_rank: int | float | None, rank: int) -> None:
    C = rotated([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    grown = Subspace.empty(8).extended(C=C, energy=0.95, max_rank=max_rank)
    assert grown.rank == rank
    if rank < 7:
        assert grown.share(C) == pytest.approx(sum(range(8, 8 - rank, -1)) / 36)
        assert grown.extended(C=C, energy=0.95, max_rank=max_rank) is grown
    assert random_space(8, 5, seed=1).extended(C=C, energy=0.95, max_rank=3).rank == 5  # never shrinks


@given(st.integers(1, 100))
def test_a_share_of_the_width_is_that_many_directions(percent: int) -> None:
    assert rank_cap(percent / 100, 100) == percent
    assert rank_cap(percent, 100) == percent
    assert rank_cap(None, 100) == 100


def near_duplicate(cosine: float) -> Tensor:
    """Energy 10 along a vector at this cosine to the first axis, and 1 along the third."""
    v = torch.tensor([cosine, math.sqrt(1 - cosine**2), 0.0], dtype=torch.float64)
    return 10 * torch.outer(v, v) + torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).diag()


@pytest.mark.parametrize(
    ("energy", "merge_beta", "rank"),
    [
        (0.9, None, 2),  # inside: 10 * 0.99^2 of 11, 0.891
        (0.9, 0.995, 2),  # not that near
        (0.9, 0.98, 1),  # known: its 10 of 11 are captured
        (0.99, None, 3),
        (0.99, 0.98, 2),  # the third axis alone is new
    ],
)
def test_a_near_duplicate_counts_as_known(energy: float, merge_beta: float | None, rank: int) -> None:
    grown = space([1.0, 0.0, 0.0]).extended(C=near_duplicate(0.99), energy=energy, merge_beta=merge_beta)
    assert grown.rank == rank
    if merge_beta == 0.98 and rank == 2:
        np.testing.assert_allclose(projection(grown), np.diag([1.0, 0.0, 1.0]), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_merging_nothing_changes_nothing(seed: int) -> None:
    old, R = random_space(7, 3, seed), vectors(7, 9, seed)
    plain = old.extended(R=R, energy=0.9)
    assert torch.equal(old.extended(R=R, energy=0.9, merge_beta=None).basis, plain.basis)
    np.testing.assert_allclose(projection(old.extended(R=R, energy=0.9, merge_beta=1.0)), projection(plain), atol=1e-6)
    first = Subspace.empty(7).extended(R=R, energy=0.9)
    assert torch.equal(Subspace.empty(7).extended(R=R, energy=0.9, merge_beta=0.5).basis, first.basis)
    assert plain.extended(R=R, energy=0.9, merge_beta=0.9) is plain


@pytest.mark.parametrize("seed", range(12))
def test_what_is_known_leaves_no_rounding_to_append(seed: int) -> None:
    R = vectors(12, 5, seed)
    C = (R @ R.T).float()
    known = Subspace.empty(12).extended(C=C, energy=1.0)
    assert known.extended(C=C, energy=1.0, merge_beta=0.9) is known


@pytest.mark.parametrize("energy", [0.0, -0.5, 1.2, math.nan, math.inf])
def test_energy_outside_its_range(energy: float) -> None:
    with pytest.raises(ValueError, match=r"energy: .* is not in \(0, 1\]"):
        PROTECTED.extended(C=torch.eye(3), energy=energy)


@pytest.mark.parametrize("max_rank", [0, -1, 4, 0.0, -0.1, 1.5, math.nan])
def test_rank_outside_its_range(max_rank: int | float) -> None:
    with pytest.raises(ValueError, match=f"max_rank: {max_rank} "):
        PROTECTED.extended(C=torch.eye(3), energy=0.5, max_rank=max_rank)


def test_bad_second_moments() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        C, R = torch.eye(3), torch.ones(3, 2)
        C[1, 2] = R[2, 1] = bad
        with pytest.raises(ValueError, match="not finite"):
            PROTECTED.extended(C=C, energy=0.5)
        with pytest.raises(ValueError, match="not finite"):
            PROTECTED.extended(R=R, energy=0.5)
        with pytest.raises(ValueError, match="not finite"):
            PROTECTED.share(C)
    for wrong in (torch.eye(4), torch.ones(3, 2), torch.ones(3)):
        with pytest.raises(ValueError, match="for a space of 3 dimensions"):
            PROTECTED.extended(C=wrong, energy=0.5)
    with pytest.raises(ValueError, match="for a space of 3 dimensions"):
        PROTECTED.extended(R=torch.ones(2, 3), energy=0.5)  # [n, d]: the wrong way round
    with pytest.raises(ValueError, match="either R or C"):
        PROTECTED.extended(energy=0.5)
    with pytest.raises(ValueError, match="either R or C"):
        PROTECTED.extended(R=torch.eye(3), C=torch.eye(3), energy=0.5)


def test_what_is_given_stays_as_it_was() -> None:
    old, C = random_space(6, 2, seed=1), rotated([5.0, 4.0, 3.0, 2.0, 1.0, 0.5]).double()
    basis, moment = old.basis.clone(), C.clone()
    old.extended(C=C, energy=0.9, merge_beta=0.5)
    assert torch.equal(old.basis, basis)
    assert torch.equal(C, moment)
