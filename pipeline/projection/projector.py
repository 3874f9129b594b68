"""Projection by construction: what a trained tensor passes through in the forward (methods.md section 1).

The chain rule then projects the gradient and the forward projects whatever update an optimizer makes, so AdamW's
scaling, momentum and weight decay, clipping, accumulation and ZeRO need no special case.

Legend: Q [d, k] protected basis; N [d, d - k] its complement; start [r, d]. A leading dimension of Q (one basis a
head, zero-padded to one k) goes with a leading dimension of the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.projection.subspace import Subspace


class Projector(nn.Module):
    """`trained -> start + the part of trained outside span(Q)`; holds no parameter."""

    start: Tensor
    matrix: Tensor
    ready: Tensor | None = None  # during a forward: the tensor, where it was made with others (`projection.together`)
    latest: Tensor | None = None  # what `ready` was in the last forward: for a penalty on it in the same backward

    def __init__(self, start: Tensor, matrix: Tensor) -> None:
        super().__init__()
        # Not buffers, so that neither a cast to bf16 nor a move to another device touches them.
        self._exact = start.float(), matrix.float()
        self.register_buffer("start", start.float(), persistent=False)
        self.register_buffer("matrix", matrix.float(), persistent=False)

    def initial(self) -> Tensor:
        """Zeros in the shape of the trained tensor, float32: the tensor then stands at its start."""
        raise NotImplementedError

    def change(self, trained: Tensor) -> Tensor:
        """What training has added to the start, float32 on the CPU, from the trained tensor's float32 master."""
        raise NotImplementedError

    def lifted(self, moment: Tensor) -> Tensor:
        """Adam's moment of the trained tensor, or its gradient, as rows [r, d] of the tensor's own space."""
        raise NotImplementedError


class Residual(Projector):
    """`A = A_start + A~ (I - Q Q^T)`; the trained tensor has the shape of A."""

    def initial(self) -> Tensor:
        """Zeros like the start."""
        return torch.zeros_like(self._exact[0])

    def change(self, trained: Tensor) -> Tensor:
        """`A~ (I - Q Q^T)`."""
        value, Q = trained.detach().cpu().double(), self._exact[1].cpu().double()
        return (value - (value @ Q) @ Q.mT).float()

    def lifted(self, moment: Tensor) -> Tensor:
        """Itself."""
        return moment

    def forward(self, trained: Tensor) -> Tensor:  # [r, d] -> [r, d]
        """The tensor that the adapter uses."""
        return outside(trained, self.start, self.matrix) if self.ready is None else self.ready


class Complement(Projector):
    """`A = A_start + C N^T`; the trained tensor C is [r, d - k]: fewer numbers where k > d / 2."""

    def initial(self) -> Tensor:
        """Zeros [r, d - k]."""
        start, N = self._exact
        return start.new_zeros(*start.shape[:-1], N.shape[-1])

    def change(self, trained: Tensor) -> Tensor:
        """`C N^T`."""
        return (trained.detach().cpu().double() @ self._exact[1].cpu().double().mT).float()

    def lifted(self, moment: Tensor) -> Tensor:
        """`M N^T`."""
        return moment @ self._exact[1].to(moment).mT

    def forward(self, trained: Tensor) -> Tensor:  # [r, d - k] -> [r, d]
        """The tensor that the adapter uses."""
        return torch.addmm(self.start, trained, self.matrix.mT) if self.ready is None else self.ready


class FromLeft(nn.Module):
    """`B = B_start + (I - Q Q^T) B~` for a tensor [d, r]: the projector of its transpose, which is what is trained."""

    def __init__(self, turned: Projector) -> None:
        super().__init__()
        self.turned = turned

    def initial(self) -> Tensor:
        """Zeros [r, d], or [r, d - k] in the complement."""
        return self.turned.initial()

    def change(self, trained: Tensor) -> Tensor:  # -> [d, r]
        """What training has added to the start, float32 on the CPU."""
        return self.turned.change(trained).mT.contiguous()

    def lifted(self, moment: Tensor) -> Tensor:
        """As rows [r, d]: a column of the tensor's space each."""
        return self.turned.lifted(moment)

    def forward(self, trained: Tensor) -> Tensor:  # [r, d] or [r, d - k] -> [d, r]
        """The tensor that the adapter uses."""
        tensor: Tensor = self.turned(trained)
        return tensor.mT


def outside(trained: Tensor, start: Tensor, Q: Tensor) -> Tensor:
    """`start + t (I - Q Q^T)`, of one tensor or of several with a basis each."""
    projected: Tensor = _Outside.apply(trained, start, Q)  # type: ignore[no-untyped-call]
    return projected


class _Outside(torch.autograd.Function):
    """`start + t - (t Q) Q^T`; written out, its backward is two small products and nothing else."""

    @staticmethod
    def forward(ctx: Any, trained: Tensor, start: Tensor, Q: Tensor) -> Tensor:
        ctx.save_for_backward(Q)
        return _residual(trained, Q).add_(start)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (Q,) = ctx.saved_tensors
        return _residual(gradients[0], Q), None, None


def _residual(x: Tensor, Q: Tensor) -> Tensor:
    if x.dim() == 2:
        return torch.addmm(x, x @ Q, Q.mT, alpha=-1)
    return torch.baddbmm(x, x @ Q, Q.mT, alpha=-1)


def projector(start: Tensor, space: Subspace) -> Projector | None:
    """The projector of a tensor [r, d] whose change shall stay outside `space`, in whichever form trains less.

    None for an empty space: the plain tensor is trained, so that an empty projection is no projection, bit for bit.
    Where nothing is free there is nothing to train, and no projector.
    """
    assert start.shape[-1] == space.width, (start.shape, space.width)
    assert space.free, "nothing is left to train: the tensor keeps its start"
    if space.rank == 0:
        return None
    if space.rank > space.width / 2:
        return Complement(start, space.complement)
    return Residual(start, space.basis)


def padded_bases(spaces: Sequence[Subspace]) -> Tensor:  # [m, d, largest k]
    """The bases of spaces of one width side by side; columns of zeros project nothing.

    A full space stands as the identity, which leaves exactly nothing outside: a rounded basis leaves 1e-7, all of it
    inside, and Adam would make steps of full size of that.
    """
    most = max(space.rank for space in spaces)
    bases = [space.basis if space.free else torch.eye(space.width).to(space.basis) for space in spaces]
    return torch.stack([torch.nn.functional.pad(basis, (0, most - basis.shape[1])) for basis in bases])


def projector_by_head(start: Tensor, spaces: Sequence[Subspace]) -> Projector | None:
    """The same for a tensor [heads, r, d] with a space for each head; a head with nothing free keeps its start."""
    assert len(start) == len(spaces), (start.shape, len(spaces))
    if not any(space.rank for space in spaces):
        return None
    return Residual(start, padded_bases(spaces))


def start_outside(start: Tensor, space: Subspace) -> Tensor:
    """`start` [r, d] moved into the complement of `space`, its rows at their old norm (zeros stay), float32.

    `(A N) N^T` is `A - A Q Q^T`: taken twice in float64, since what a float32 basis leaves inside (1e-7) grows with
    the rescaling where little is left (once, in float32: a leak of 1.5e-5 at k = d - 2).
    """
    assert space.free, "nothing is left outside"
    if space.rank == 0:
        return start
    outside = space.residual(space.residual(start.double()))
    norms = outside.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    moved: Tensor = (outside * (start.double().norm(dim=1) / norms)[:, None]).float()
    return moved


def leak(change: Tensor, space: Subspace) -> float:
    """`||dA Q||_F / ||dA||_F`: the share of a change [r, d] inside the protected space (methods.md 8.2).

    0 for no change.
    """
    change = change.detach().double()
    size = float(change.norm())
    return float(space.coordinates(change).norm()) / size if size > 0 else 0.0


def leak_by_head(change: Tensor, spaces: Sequence[Subspace]) -> float:
    """The same for a change [heads, r, d] with a space for each head."""
    change = change.detach().double()
    size = float(change.norm())
    inside = sum(float(space.coordinates(part).square().sum()) for part, space in zip(change, spaces, strict=True))
    return inside**0.5 / size if size > 0 else 0.0
