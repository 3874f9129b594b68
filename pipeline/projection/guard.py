"""The protected subspaces of one trained tensor: a single one, or one for each head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pipeline.projection.projector import (
    FromLeft,
    Projector,
    leak,
    leak_by_head,
    padded_bases,
    projector,
    projector_by_head,
)
from pipeline.projection.subspace import Subspace


@dataclass(frozen=True)
class Guard:
    """Keeps the change of a tensor [r, d], or [heads, r, d] with a space a head, outside `spaces`."""

    spaces: Sequence[Subspace]
    left: bool = False  # of a tensor [d, r], whose columns are to stay outside

    @property
    def empty(self) -> bool:
        """Whether nothing is protected."""
        return not any(space.rank for space in self.spaces)

    @property
    def closed(self) -> bool:
        """Whether no direction is left to learn in."""
        return not any(space.free for space in self.spaces)

    def projector(self, start: Tensor) -> Projector | FromLeft | None:
        """What the trained tensor passes through in the forward (`projection.projector`)."""
        if self.left:
            inner = projector(start.mT.contiguous(), self.spaces[0])
            return None if inner is None else FromLeft(inner)
        return projector(start, self.spaces[0]) if start.dim() == 2 else projector_by_head(start, self.spaces)

    def leak(self, change: Tensor) -> float:
        """`||dA Q||_F / ||dA||_F` of a finished change, from the left `||Q^T dB||_F / ||dB||_F` (methods.md 8.2)."""
        change = change.mT if self.left else change
        return leak(change, self.spaces[0]) if change.dim() == 2 else leak_by_head(change, self.spaces)

    def project_gradient(self, parameter: nn.Parameter) -> None:
        """The papers' literal form: a hook that projects the gradient, and nothing else.

        Linear, so it commutes with accumulation, loss scaling and averaging over ranks; what Adam makes of the
        projected gradient leaves the space again.
        """
        Q = self.spaces[0].basis if parameter.dim() == 2 else padded_bases(self.spaces)

        def outside(gradient: Tensor) -> Tensor:
            nonlocal Q
            Q = Q.to(gradient)  # moves in the first step
            return gradient - (Q @ (Q.mT @ gradient) if self.left else (gradient @ Q) @ Q.mT)

        parameter.register_hook(outside)
