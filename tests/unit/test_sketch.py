"""projection.sketch: by hand, against autograd and numpy's SVD, and what is left of a gradient outside a subspace."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from pipeline.projection.sketch import ExactGradient, Factors, GradientSum, Protected, Sketch
from pipeline.projection.subspace import Subspace

KINDS = ("exact", "randomized")
SEEDS = st.integers(0, 999)
BOTH = pytest.mark.parametrize("kind", KINDS)
several = settings(max_examples=25, deadline=None)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(width: int, rank: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(width, rank, seed=seed)).Q


def random_space(width: int, rank: int, seed: int) -> Subspace:
    return Subspace(orthonormal(width, rank, seed + 5000).float())


def outside(space: Subspace) -> Tensor:
    """`I - Q Q^T` of the basis's span, float64: a stored basis is orthonormal to float32's rounding only."""
    Q = torch.linalg.qr(space.basis.double()).Q
    return torch.eye(space.width, dtype=torch.float64) - Q @ Q.T


def with_values(d_out: int, d_in: int, values: Tensor | list[float], seed: int) -> Tensor:
    """A matrix [d_out, d_in] of these singular values."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return orthonormal(d_out, len(values), seed) * values @ orthonormal(d_in, len(values), seed + 1).T


def new(kind: str, d_out: int, d_in: int, rank: int, protected: Protected | None = None, seed: int = 0) -> GradientSum:
    if kind == "exact":
        return ExactGradient(d_out, d_in, protected)
    return Sketch(d_out, d_in, rank, torch.Generator().manual_seed(seed), protected)


def rows_of(G: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs x [2, n, d_in] and output gradients g [2, n, d_out] of which `sum g x^T` is G."""
    n = G.shape[1] + G.shape[1] % 2
    X = orthonormal(n, G.shape[1], seed + 77)
    return X.reshape(2, n // 2, -1), (X @ G.T).reshape(2, n // 2, -1)


def factors(kind: str, G: Tensor, rank: int, protected: Protected | None = None, seed: int = 0) -> Factors:
    """What is found of G, given as two micro-batches."""
    gradient = new(kind, *G.shape, rank, protected, seed)
    for x, g in zip(*rows_of(G), strict=True):
        gradient.add(x, g)
    return gradient.factors(rank)


def product(found: Factors) -> Tensor:
    return (found.U * found.S @ found.V.T).double()


def sine(found: Tensor, expected: Tensor) -> float:
    """Of the largest principal angle between two spans: what of `expected` lies outside of `found`."""
    return float(torch.linalg.matrix_norm(expected - found @ (found.mT @ expected), 2))


def assert_orthonormal(columns: Tensor, count: int) -> None:
    """The first `count` columns are orthonormal, the others zero."""
    expected = torch.diag((torch.arange(columns.shape[1]) < count).double())
    assert_close(columns.double().T @ columns.double(), expected, atol=1e-5, rtol=0)
    assert not columns[:, count:].any()


def assert_leading(found: Factors, G: Tensor, rank: int, tolerance: float = 1e-6) -> None:
    """The leading triplets of G are found, up to signs: spans, values and G between them."""
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    count = min(rank, int((S / S[0] > 1e-5).sum()))
    assert found.missing == rank - count
    assert_close(found.S[:count].double(), S[:count], rtol=tolerance, atol=0)
    assert_orthonormal(found.U, count)
    assert_orthonormal(found.V, count)
    assert sine(found.U.double(), U[:, :count]) < tolerance
    assert sine(found.V.double(), Vt[:count].T) < tolerance
    core = found.U.double().T @ G @ found.V.double()  # pairs u_i with v_i, both of one sign
    assert_close(core, found.S.double().diag(), atol=tolerance * float(S[0]), rtol=0)


# ---- by hand


@BOTH
def test_by_hand(kind: str) -> None:
    """Two tokens: G = [1, 2, 2] [3, 0]^T + [2, -2, 1] [0, 1]^T, whose singular values are 9 and 3."""
    gradient = new(kind, 3, 2, 2)
    gradient.add(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 2.0, 2.0]]))
    gradient.add(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[2.0, -2.0, 1.0]]]))
    U, S, V = found = gradient.factors(2)
    assert_close(S, torch.tensor([9.0, 3.0]), rtol=1e-5, atol=0)
    assert_close(V.abs(), torch.eye(2), atol=1e-5, rtol=0)
    assert_close(U * V.sum(0), torch.tensor([[1.0, 2.0], [2.0, -2.0], [2.0, 1.0]]) / 3, atol=1e-5, rtol=0)
    assert found.missing == 0

    # With the first output direction protected, [[0, 0], [6, -2], [6, 1]] is left.
    protected = Protected(left=Subspace(torch.tensor([[1.0], [0.0], [0.0]])))
    gradient = new(kind, 3, 2, 2, protected)
    gradient.add(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 2.0, 2.0], [2.0, -2.0, 1.0]]))
    left = torch.tensor([[0.0, 0.0], [6.0, -2.0], [6.0, 1.0]])
    assert_close(product(gradient.factors(2)).float(), left, atol=1e-5, rtol=0)
    larger, smaller = ((77 + sign * math.sqrt(77**2 - 4 * 18**2)) / 2 for sign in (1, -1))  # trace 77, det 18^2
    assert_close(gradient.factors(2).S, torch.tensor([larger, smaller]).sqrt(), rtol=1e-5, atol=0)


# ---- sums


@several
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), SEEDS)
def test_the_exact_sum_is_autograds_gradient(d_out: int, d_in: int, batches: int, seed: int) -> None:
    W = normal(d_out, d_in, seed=seed).requires_grad_()
    gradient = ExactGradient(d_out, d_in)
    for number in range(batches):
        x = normal(2, 3, d_in, seed=seed + number)
        y = F.linear(x, W)
        y.retain_grad()
        y.tanh().square().sum().backward()
        assert y.grad is not None
        gradient.add(x, y.grad)
    assert_close(gradient.sums["G"], W.grad)


@several
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), SEEDS)
def test_a_sketch_is_two_products_with_the_gradient(d_out: int, d_in: int, rank: int, seed: int) -> None:
    """`Y = G Omega`, `Z = Psi G`, with Omega [d_in, 2k + 1] and Psi [4k + 3, d_out] normal numbers."""
    x, g = normal(2, 4, d_in, seed=seed), normal(2, 4, d_out, seed=seed + 1)
    sketch = Sketch(d_out, d_in, rank, torch.Generator().manual_seed(seed))
    sketch.add(x, g)
    draw, G = torch.Generator().manual_seed(seed), torch.einsum("bno,bni->oi", g, x)
    Omega, Psi = torch.randn(d_in, 2 * rank + 1, generator=draw), torch.randn(4 * rank + 3, d_out, generator=draw)
    assert_close(sketch.sums, {"Y": G @ Omega.double(), "Z": Psi.double() @ G})


@BOTH
@several
@given(st.integers(1, 3), st.booleans(), SEEDS)
def test_sums_of_two_halves_add_up(kind: str, rank: int, guarded: bool, seed: int) -> None:
    """Over micro-batches and ranks; the same seed on all of them makes the same Omega and Psi."""
    protected = Protected(random_space(7, 2, seed), random_space(6, 2, seed)) if guarded else None
    x, g = normal(2, 5, 6, seed=seed), normal(2, 5, 7, seed=seed + 1)
    whole, *halves = (new(kind, 7, 6, rank, protected, seed) for _ in range(3))
    whole.add(x, g)
    for half, part_x, part_g in zip(halves, x, g, strict=True):
        half.add(part_x, part_g)
    added = {name: halves[0].sums[name] + halves[1].sums[name] for name in whole.sums}
    assert_close(added, whole.sums)
    halves[0].sums = added
    assert_close(product(halves[0].factors(rank)), product(whole.factors(rank)))


@several
@given(st.sampled_from(KINDS), st.sampled_from([torch.bfloat16, torch.float16]), SEEDS)
def test_short_inputs_are_summed_in_float32(kind: str, dtype: torch.dtype, seed: int) -> None:
    """In bf16, from the 256th on, a token of the same size would leave the sum as it is."""
    x, g = normal(1, 6, seed=seed).to(dtype), normal(1, 5, seed=seed + 1).to(dtype)
    gradient, expected = new(kind, 5, 6, 1), g.float().T @ x.float()
    for _ in range(3):
        gradient.add(x.expand(400, 6), g.expand(400, 5))
    found = gradient.factors(1)
    assert {part.dtype for part in (*found, *gradient.sums.values())} == {torch.float32}
    assert_close(product(found), 1200 * expected.double(), rtol=1e-3, atol=1e-3)


@BOTH
def test_one_seed_gives_the_same_bits(kind: str) -> None:
    """On every rank; another seed gives another sketch, if nearly the same factors."""
    G = with_values(9, 8, [3.0, 2.0, 1.0], 0)
    first, again, other = (factors(kind, G, 2, seed=seed) for seed in (4, 4, 5))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    if kind == "randomized":
        assert not all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


# ---- what a sketch finds


@several
@given(st.integers(1, 3), SEEDS, st.data())
def test_a_gradient_of_low_rank_is_found_to_rounding(rank: int, seed: int, data: st.DataObject) -> None:
    """Of rank k .. 2k + 1: l columns of Y span its range, so the single pass loses nothing."""
    values = [2.0**-number for number in range(data.draw(st.integers(rank, 2 * rank + 1), label="rank of G"))]
    d_out, d_in = (data.draw(st.integers(len(values), 24), label=label) for label in ("d_out", "d_in"))
    G = with_values(d_out, d_in, values, seed)
    assert_leading(factors("randomized", G, rank, seed=seed), G, rank)
    assert_leading(factors("exact", G, rank), G, rank)


@pytest.mark.parametrize("power", [0.3, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(40, 60, 3), (60, 40, 8), (50, 50, 1)])
def test_of_a_slowly_decaying_gradient_little_more_than_the_optimum_is_lost(
    power: float, d_out: int, d_in: int, rank: int
) -> None:
    """Tropp et al. 2017 (arXiv 1609.00048), real numbers, l columns of Omega and m rows of Psi.

    E ||G - Q_y B||_F^2 <= (1 + f(l, m)) (1 + f(k, l)) tau^2, with f(s, t) = s / (t - s - 1) and tau the optimum, the
    norm of the singular values after the k-th. Here l = 2k + 1 and m = 2l + 1 make both f equal to 1: 4 tau^2, so
    E ||G - Q_y B||_F <= 2 tau. Of that the k leading triplets lie at most (tau + 2 ||G - Q_y B||_F) from G: 5 tau.
    """
    values = torch.arange(1, min(d_out, d_in) + 1).double().pow(-power)
    G, optimum = with_values(d_out, d_in, values, 3), float(values[rank:].norm())
    errors = [float((product(factors("randomized", G, rank, seed=seed)) - G).norm()) for seed in range(20)]
    assert min(errors) >= optimum * (1 - 1e-6)
    assert sum(errors) / len(errors) <= 5 * optimum
    assert float((product(factors("exact", G, rank)) - G).norm()) == pytest.approx(optimum, rel=1e-6)


# ---- protected subspaces


@BOTH
@several
@given(st.sampled_from(["left", "right", "both"]), st.integers(1, 3), SEEDS, st.data())
def test_factors_are_those_of_the_projected_gradient(
    kind: str, sides: str, rank: int, seed: int, data: st.DataObject
) -> None:
    """Of low rank outside, so that the sketch is exact too; of any rank inside, and as large."""
    d_out, d_in = (data.draw(st.integers(3, 12), label=label) for label in ("d_out", "d_in"))
    left, right = (random_space(d, data.draw(st.integers(1, d - 2), label="k"), seed + d) for d in (d_out, d_in))
    protected = Protected(left if sides != "right" else None, right if sides != "left" else None)
    G = normal(d_out, 2 * rank, seed=seed) @ normal(2 * rank, d_in, seed=seed + 1)
    G += 0 if protected.left is None else left.basis.double() @ normal(left.rank, d_in, seed=seed + 2)
    G += 0 if protected.right is None else normal(d_out, right.rank, seed=seed + 3) @ right.basis.double().T
    projected = G if protected.left is None else outside(left) @ G
    projected = projected if protected.right is None else projected @ outside(right)
    found = factors(kind, G, rank, protected, seed)
    U, S, Vt = torch.linalg.svd(projected, full_matrices=False)
    count = rank - found.missing
    assert count == min(rank, int((S / S[0] > 1e-5).sum()))
    assert_close(found.S[:count].double(), S[:count], rtol=1e-4, atol=1e-5 * float(S[0]))
    expected = (U[:, :count] * S[:count]) @ Vt[:count]
    if len(S) <= count or float(S[count] / S[count - 1]) < 0.9:  # else the last of them is hardly decided
        assert_close(product(found), expected, atol=1e-4 * float(S[0]), rtol=0)
    for space, columns in ((protected.left, found.U), (protected.right, found.V)):
        if space is not None:
            assert float((space.basis.double().T @ columns.double()).abs().max()) <= 1e-6
    assert_orthonormal(found.U, count)
    assert_orthonormal(found.V, count)


@BOTH
@pytest.mark.parametrize("side", ["left", "right"])
@several
@given(st.sampled_from([6, 8, 20]), st.sampled_from([1.0, 30.0, 1e3]), st.sampled_from([1.0, 1e-1, 1e-2]), SEEDS)
def test_what_is_large_inside_or_small_outside_does_not_leak(
    kind: str, side: str, d: int, inside: float, fall: float, seed: int
) -> None:
    """A float32 basis is orthonormal to 1e-7: what one projection leaves inside is no rounding beside a direction of
    small singular value, and Adam makes a step of full size along each direction. Two or more dimensions are free.
    """
    space = random_space(d, 4, seed)
    free = torch.linalg.qr(outside(space) @ normal(d, min(d - 4, 3), seed=seed + 1)).Q
    values = torch.tensor([fall**number for number in range(free.shape[1])], dtype=torch.float64)
    G = free * values @ orthonormal(15, free.shape[1], seed + 2).T
    G = G + inside * torch.linalg.qr(space.basis.double()).Q @ orthonormal(15, 4, seed + 3).T
    if side == "right":
        found = factors(kind, G.T.contiguous(), 3, Protected(right=space), seed).V
    else:
        found = factors(kind, G, 3, Protected(left=space), seed).U
    assert found.any()
    assert float((space.basis.double().T @ found.double()).abs().max()) <= 1e-6


def test_projecting_the_first_sketch_alone_is_wrong() -> None:
    """With `Z = Psi G` of the whole gradient, what was projected away comes back through Psi."""
    space = random_space(9, 3, 0)
    G = with_values(9, 8, [2.0, 1.0], 1)
    G += 3 * space.component(G.T).T
    P, Omega, Psi = outside(space), normal(8, 5, seed=2), normal(11, 9, seed=3)
    Q_y = torch.linalg.svd(P @ G @ Omega, full_matrices=False).U[:, :2]

    def recovered(Psi_of_Z: Tensor) -> Tensor:
        return Q_y @ torch.linalg.pinv(Psi @ Q_y) @ Psi_of_Z @ G

    projected = P @ G
    found = product(factors("randomized", G, 2, Protected(left=space)))
    assert_close(recovered(Psi @ P), projected)
    assert_close(found, projected, atol=1e-6, rtol=0)
    assert float((recovered(Psi) - projected).norm()) > 0.1 * float(projected.norm())


# ---- directions that are not there


@BOTH
@several
@given(st.integers(1, 4), st.integers(1, 4), SEEDS)
def test_of_a_rank_deficient_gradient_the_rest_is_zero(kind: str, real: int, more: int, seed: int) -> None:
    G = with_values(12, 10, [1.0 + number for number in range(real)], seed)
    found = factors(kind, G, real + more, seed=seed)
    assert found.missing == more
    assert (found.U.shape, found.S.shape, found.V.shape) == ((12, real + more), (real + more,), (10, real + more))
    assert_leading(found, G, real + more)


@BOTH
def test_what_is_at_most_1e_5_of_the_largest_is_not_there(kind: str) -> None:
    """On a scale of its own: a small gradient is not a missing one."""
    for scale in (1.0, 1e-6, 1e6):
        found = factors(kind, scale * with_values(12, 10, [1.0, 2e-5, 0.8e-5], 0), 3)
        assert found.missing == 1
        assert_close(found.S[:2] / scale, torch.tensor([1.0, 2e-5]).to(found.S), rtol=1e-3, atol=0)
        assert_orthonormal(found.U, 2)


@BOTH
@pytest.mark.parametrize("guarded", [False, True])
def test_of_a_zero_gradient_nothing_is_there(kind: str, guarded: bool) -> None:
    protected = Protected(random_space(5, 2, 0), random_space(4, 2, 0)) if guarded else None
    untouched = new(kind, 5, 4, 3, protected).factors(3)
    for found in (untouched, factors(kind, torch.zeros(5, 4, dtype=torch.float64), 3, protected)):
        assert found.missing == 3
        assert [tuple(part.shape) for part in found] == [(5, 3), (3,), (4, 3)]
        assert not any(part.any() for part in found)


@BOTH
@several
@given(st.integers(1, 5), st.integers(1, 5), SEEDS)
def test_a_rank_above_the_layers_widths(kind: str, d_out: int, d_in: int, seed: int) -> None:
    G = with_values(d_out, d_in, [1.0 + number for number in range(min(d_out, d_in))], seed)
    found = factors(kind, G, 6, seed=seed)
    assert_leading(found, G, 6)
    assert_close(product(found), G, atol=1e-5, rtol=0)


@BOTH
@several
@given(st.sampled_from(["left", "right"]), st.integers(1, 3), SEEDS)
def test_no_more_directions_than_are_free(kind: str, side: str, free: int, seed: int) -> None:
    """The widths are 7; U (or V) fills what is free, and nothing of the protected space."""
    space = random_space(7, 7 - free, seed)
    G = with_values(7, 7, [1.0 + number / 7 for number in range(7)], seed)
    protected = Protected(left=space) if side == "left" else Protected(right=space)
    found = factors(kind, G, 4, protected, seed)
    assert found.missing == 4 - free
    assert_orthonormal(found.U, free)
    assert_orthonormal(found.V, free)
    columns = (found.U if side == "left" else found.V).double()
    assert_close(columns @ columns.T, outside(space), atol=1e-5, rtol=0)


@BOTH
@pytest.mark.parametrize("free", [0, 1, 5])
@pytest.mark.parametrize("convert", [Tensor.float, Tensor.double])
def test_of_a_gradient_inside_the_protected_space_nothing_is_left(
    kind: str, free: int, convert: Callable[[Tensor], Tensor]
) -> None:
    """What remains is rounding, of which Adam would make steps of full size."""
    space = random_space(8, 8 - free, 0)
    G = space.basis.double() @ normal(8 - free, 6, seed=1)
    gradient = new(kind, 8, 6, 2, Protected(left=space))
    gradient.add(*(convert(part) for part in rows_of(G)))
    assert gradient.factors(2).missing == 2
