"""projection.projector: by hand, against the written-out formula, and what an optimizer cannot put back."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.projection.projector import (
    Complement,
    Projector,
    Residual,
    leak,
    leak_by_head,
    padded_bases,
    projector,
    projector_by_head,
    start_outside,
)
from pipeline.projection.subspace import Subspace

PROTECTED = Subspace(torch.tensor([[1.0, 0.0], [0.0, 0.6], [0.0, 0.8]]))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_space(width: int, rank: int, seed: int = 0) -> Subspace:
    return Subspace(torch.linalg.qr(normal(width, rank, seed=seed + 1000)).Q.float())


def outside(space: Subspace) -> Tensor:
    """`I - Q Q^T`, float64."""
    Q = space.basis.double()
    return torch.eye(space.width, dtype=torch.float64) - Q @ Q.T


def explicit(form: Projector, trained: Tensor) -> Tensor:
    """`A_start + A~ (I - Q Q^T)` or `A_start + C N^T`, written out."""
    start, matrix = form.start.double(), form.matrix.double()
    if isinstance(form, Complement):
        return start + trained @ matrix.mT
    return start + trained @ (torch.eye(len(start.mT), dtype=torch.float64) - matrix @ matrix.mT)


def test_by_hand() -> None:
    start = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 2.0]])
    trained = torch.tensor([[1.0, 5.0, 0.0], [2.0, 0.0, 5.0]], requires_grad=True)
    weights = torch.tensor([[1.0, 0.0, 5.0], [7.0, 5.0, 0.0]])
    value = Residual(start, PROTECTED.basis)(trained)
    torch.testing.assert_close(value, torch.tensor([[1.0, 4.2, -1.4], [0.0, -2.4, 3.8]]))
    (value * weights).sum().backward()
    torch.testing.assert_close(trained.grad, torch.tensor([[0.0, -2.4, 1.8], [0.0, 3.2, -2.4]]))

    free = torch.tensor([[0.0], [0.8], [-0.6]])
    short = torch.tensor([[5.0], [-1.0]], requires_grad=True)
    value = Complement(start, free)(short)
    torch.testing.assert_close(value, torch.tensor([[1.0, 5.0, -2.0], [0.0, -0.8, 2.6]]))
    (value * weights).sum().backward()
    torch.testing.assert_close(short.grad, torch.tensor([[-3.0], [4.0]]))

    assert leak(trained.detach(), PROTECTED) == pytest.approx(math.sqrt((1 + 9 + 4 + 16) / (26 + 29)))
    assert leak(torch.zeros(2, 3), PROTECTED) == 0
    assert leak(PROTECTED.basis.T, PROTECTED) == pytest.approx(1)
    assert leak(trained.detach(), Subspace.empty(3)) == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.data())
def test_value_gradient_and_change_are_the_formula(width: int, data: st.DataObject) -> None:
    space = random_space(width, data.draw(st.integers(1, width - 1), label="rank"))
    start = normal(3, width, seed=1)
    for form in (projector(start, space), Residual(start, space.basis), Complement(start, space.complement)):
        assert form is not None
        zero = form.initial()
        assert torch.equal(form(zero), start.float())
        assert torch.equal(form.change(zero), torch.zeros(3, width))
        trained, weights = normal(*zero.shape, seed=2).requires_grad_(), normal(3, width, seed=3)
        copy = trained.detach().float().requires_grad_()
        torch.testing.assert_close(form(copy).double(), explicit(form, trained), rtol=1e-5, atol=1e-5)
        change = form.change(copy)
        torch.testing.assert_close(change.double(), explicit(form, trained) - form.start, rtol=1e-5, atol=1e-5)
        assert leak(change, space) <= 1e-6
        assert leak(form(copy).detach() - form.start, space) <= 1e-5
        torch.autograd.backward([form(copy), explicit(form, trained)], [weights.float(), weights])
        assert copy.grad is not None
        torch.testing.assert_close(copy.grad.double(), trained.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_gradients_by_differences(rank: int) -> None:
    space = random_space(6, rank)
    for form in (Residual(normal(2, 6), space.basis), Complement(normal(2, 6), space.complement)):
        form = form.double()
        trained = normal(*form.initial().shape).requires_grad_()
        assert torch.autograd.gradcheck(form, (trained,))
        torch.testing.assert_close(form(trained), explicit(form, trained))
    spaces = [random_space(4, 3), random_space(4, 1), Subspace.empty(4)]
    heads = projector_by_head(normal(3, 2, 4), spaces)
    assert heads is not None
    assert torch.autograd.gradcheck(heads.double(), (normal(3, 2, 4).requires_grad_(),))


def test_an_expanded_gradient_is_projected_too() -> None:
    form = Residual(normal(2, 3), PROTECTED.basis)
    trained = form.initial().requires_grad_()
    form(trained).sum().backward()
    row = (torch.ones(3, dtype=torch.float64) @ outside(PROTECTED)).float()
    torch.testing.assert_close(trained.grad, row.expand(2, 3))


@pytest.mark.parametrize(
    ("width", "rank", "kind", "columns"),
    [(6, 1, Residual, 6), (6, 3, Residual, 6), (6, 4, Complement, 2), (5, 2, Residual, 5), (5, 3, Complement, 2)],
)
def test_the_form_that_trains_less(width: int, rank: int, kind: type[Projector], columns: int) -> None:
    form = projector(normal(2, width), random_space(width, rank))
    assert type(form) is kind
    assert form.initial().shape == (2, columns)
    assert form.initial().dtype == torch.float32
    assert not list(form.parameters())
    assert not form.state_dict()


def test_nothing_protected_and_nothing_free() -> None:
    assert projector(normal(2, 6), Subspace.empty(6)) is None
    assert projector_by_head(normal(2, 3, 6), [Subspace.empty(6)] * 2) is None
    with pytest.raises(AssertionError, match="nothing is left to train"):
        projector(normal(2, 6), random_space(6, 6))
    with pytest.raises(AssertionError):
        projector(normal(2, 5), random_space(6, 2))
    with pytest.raises(AssertionError):
        projector_by_head(normal(3, 2, 6), [random_space(6, 2)] * 2)


def test_heads_with_spaces_of_their_own() -> None:
    spaces = [random_space(5, rank, seed=rank) for rank in (3, 0, 1, 5)]
    start, weights = normal(4, 2, 5, seed=1), normal(4, 2, 5, seed=2)
    form = projector_by_head(start, spaces)
    assert form is not None
    trained = normal(4, 2, 5, seed=3).float().requires_grad_()
    value, change = form(trained), form.change(trained)
    value.backward(weights.float())
    assert trained.grad is not None
    for head, space in enumerate(spaces):
        expected = trained[head].detach().double() @ outside(space)
        torch.testing.assert_close(change[head].double(), expected, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(value[head].double(), start[head] + expected, rtol=1e-5, atol=2e-6)
        gradient = weights[head] @ outside(space)
        torch.testing.assert_close(trained.grad[head].double(), gradient, rtol=1e-5, atol=2e-6)
        assert leak(change[head], space) <= 1e-6
    assert not change[3].any()  # full: exactly nothing, for rounding would lie inside
    assert not trained.grad[3].any()
    assert torch.equal(value[3], start[3].float())
    assert leak_by_head(change, spaces) <= 1e-6


def test_leak_by_head_is_that_of_the_block_diagonal() -> None:
    spaces = [PROTECTED, Subspace.empty(3), random_space(3, 1)]
    change = normal(3, 2, 3)
    inside = sum(float((change[h] @ spaces[h].basis.double()).norm() ** 2) for h in range(3))
    assert leak_by_head(change, spaces) == pytest.approx(math.sqrt(inside) / float(change.norm()))
    assert leak_by_head(torch.zeros(3, 2, 3), spaces) == 0
    padded = padded_bases(spaces)
    assert padded.shape == (3, 3, 2)
    assert torch.equal(padded[0], PROTECTED.basis)
    assert not padded[1].any()
    assert not padded[2, :, 1].any()
    assert torch.equal(padded_bases([PROTECTED, random_space(3, 3)])[1], torch.eye(3))


@pytest.mark.parametrize("rank", [2, 6])
def test_change_is_exact_though_the_forward_is_in_bf16(rank: int) -> None:
    space = random_space(8, rank)
    form = projector(normal(3, 8), space)
    assert form is not None
    master = normal(*form.initial().shape, seed=4).float()
    exact = form.change(master)
    low = form.to(torch.bfloat16)
    value = low(master.bfloat16())
    assert value.dtype == torch.bfloat16
    assert low.start.dtype == low.matrix.dtype == torch.bfloat16
    assert torch.equal(low.change(master), exact)
    assert leak(exact, space) <= 1e-6
    assert leak((value - low.start).detach(), space) > 1e-4  # so that the check above can fail
    assert torch.equal(low.initial(), torch.zeros_like(master))


def train(value: Callable[[Tensor], Tensor], trained: nn.Parameter, shape: tuple[int, ...]) -> None:
    """30 steps of AdamW with weight decay and clipping, two micro-batches a step, of a regression."""
    optimizer = torch.optim.AdamW([trained], lr=1e-2, weight_decay=0.1)
    for step in range(30):
        for part in range(2):
            x = normal(*shape[:-2], shape[-1], 6, seed=100 * step + part).float()
            y = normal(*shape[:-2], shape[-2], 6, seed=100 * step + 50 + part).float()
            ((value(trained) @ x - y) ** 2).mean().backward()
        nn.utils.clip_grad_norm_([trained], 0.5)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("rank", range(1, 8))
def test_adamw_with_decay_and_clipping_puts_nothing_back(rank: int) -> None:
    space, start = random_space(8, rank, seed=rank), normal(3, 8).float()
    form = projector(start, space)
    assert form is not None
    trained = nn.Parameter(form.initial())
    train(form, trained, (3, 8))
    change = form.change(trained)
    assert float(change.norm()) > 0.05
    assert leak(change, space) <= 1e-6
    if isinstance(form, Residual):
        assert leak(trained, space) > 0.01  # what the forward has to keep out

    hooked = nn.Parameter(start.clone())
    hooked.register_hook(space.residual)
    train(lambda tensor: tensor, hooked, (3, 8))
    assert leak(hooked.detach() - start, space) > 0.01


def test_adamw_puts_nothing_back_in_heads() -> None:
    spaces = [random_space(8, rank, seed=rank) for rank in range(9)]
    form = projector_by_head(normal(9, 2, 8), spaces)
    assert form is not None
    trained = nn.Parameter(form.initial())
    train(form, trained, (9, 2, 8))
    change = form.change(trained)
    assert [leak(change[head], space) <= 1e-5 for head, space in enumerate(spaces)] == [True] * 9
    assert [bool(part.any()) for part in change] == [True] * 8 + [False]
    assert leak_by_head(change, spaces) <= 1e-6


def forms() -> list[Projector]:
    spaces = [random_space(6, rank) for rank in (2, 0, 5)]
    heads = projector_by_head(normal(3, 2, 6), spaces)
    assert heads is not None
    two, four = random_space(6, 2), random_space(6, 4)
    return [Residual(normal(2, 6), two.basis), Complement(normal(2, 6), four.complement), heads]


# torch 2.13's tracer makes an instance of every autograd function that it meets, which its own class warns of.
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
@pytest.mark.parametrize("way", ["compiled", "checkpointed"])
@pytest.mark.parametrize("form", forms(), ids=["residual", "complement", "heads"])
def test_compiling_and_checkpointing_change_nothing(form: Projector, way: str) -> None:
    def loss(trained: Tensor) -> Tensor:
        value: Tensor = form(trained)
        return (value**3).sum()

    def other(trained: Tensor) -> Tensor:
        if way == "compiled":
            value: Tensor = torch.compile(loss, backend="aot_eager", fullgraph=True)(trained)
        else:
            value = checkpoint(loss, trained, use_reentrant=False)
        return value

    values, gradients = [], []
    for function in (loss, other):
        trained = normal(*form.initial().shape, seed=5).float().requires_grad_()
        values.append(function(trained))
        values[-1].backward()
        gradients.append(trained.grad)
    torch.testing.assert_close(values[1], values[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 1, 20, 62, 63])
def test_a_start_outside_keeps_its_norms_and_leaks_nothing(rank: int) -> None:
    space, start = random_space(64, rank), normal(8, 64).float()
    moved = start_outside(start, space)
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved.norm(dim=1), start.norm(dim=1))
    assert leak(moved, space) <= 1e-6
    direction = nn.functional.normalize(start.double() @ outside(space))
    torch.testing.assert_close(nn.functional.normalize(moved.double()), direction, rtol=1e-4, atol=1e-4)
    if rank == 0:
        assert torch.equal(moved, start)


def test_a_start_of_zeros_stays_and_a_full_space_is_refused() -> None:
    start = normal(2, 3).float()
    start[0] = 0
    moved = start_outside(start, PROTECTED)
    assert not moved[0].any()
    torch.testing.assert_close(moved[1].norm(), start[1].norm())
    with pytest.raises(AssertionError, match="nothing is left outside"):
        start_outside(start, random_space(3, 3))
