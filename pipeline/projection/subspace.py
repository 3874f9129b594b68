"""One protected subspace: an orthonormal basis, what lies inside and outside of it, and how it grows.

Legend: d width of the space; k rank of the basis; Q [d, k] basis; R [d, n] one column a vector that old tasks depend
on; C = R R^T [d, d] its second moment. Vectors are rows: `x` has shape [..., d].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Eigenvalues below this share of the largest are rounding: at energy 1 they would fill the whole space.
SMALLEST_EIGENVALUE = 1e-6
# Shares of energy that differ by less are the same: what rounding a basis to float32 can lose. Without it the
# same C, given twice, adds a vector the second time where its share met the energy exactly.
SAME_SHARE = 1e-7


@dataclass(frozen=True, eq=False)
class Subspace:
    """The span of an orthonormal basis; every operation gives a new value."""

    basis: Tensor  # [d, k] float32, contiguous, max |Q^T Q - I| at most 1e-5

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> Subspace:
        """The subspace of R^width that holds the zero vector alone."""
        return cls(torch.zeros(width, 0, device=device))

    @property
    def width(self) -> int:
        """d, the dimension of the surrounding space."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """k, the number of protected directions."""
        return self.basis.shape[1]

    @property
    def free(self) -> int:
        """d - k, the directions that are left to learn in."""
        return self.width - self.rank

    @property
    def bytes(self) -> int:
        """Memory of the basis."""
        return self.basis.numel() * self.basis.element_size()

    def coordinates(self, x: Tensor) -> Tensor:  # [..., d] -> [..., k]
        """`x Q`, in the dtype of `x`."""
        return x @ self.basis.to(x)

    def component(self, x: Tensor) -> Tensor:  # [..., d] -> [..., d]
        """The part inside: `x Q Q^T`."""
        return self.coordinates(x) @ self.basis.to(x).mT

    def residual(self, x: Tensor) -> Tensor:  # [..., d] -> [..., d]
        """The part outside: `x (I - Q Q^T)`."""
        return x - self.component(x)

    @cached_property
    def complement(self) -> Tensor:  # [d, d - k]
        """An orthonormal basis N of all that is outside, float32; made once for all layers that share the space."""
        full: Tensor = torch.linalg.qr(self.basis.double(), mode="complete").Q
        return full[:, self.rank :].float().contiguous()

    def share(self, C: Tensor) -> float:
        """`tr(Q^T C Q) / tr C`: the share of the energy of C [d, d] that lies inside; 1 for a zero C."""
        C = _checked(C, self.width).double()
        total = float(C.trace())
        Q = self.basis.to(C)
        return min(float((Q * (C @ Q)).sum()) / total, 1.0) if total > 0 else 1.0

    def extended(
        self,
        *,
        R: Tensor | None = None,
        C: Tensor | None = None,
        energy: float,
        max_rank: int | float | None = None,
        merge_beta: float | None = None,
    ) -> Subspace:
        """Grow until the share `energy` of C (given, or R R^T) is inside (the GPM rule, methods.md section 1).

        Appends the fewest eigenvectors of `(I - QQ^T) C (I - QQ^T)`, by falling eigenvalue, for which
        `(tr C - tr C' + sum of appended eigenvalues) / tr C >= energy`, then re-orthonormalises by QR: the leading
        columns go on spanning the old subspace. A zero C adds nothing. Eigenvalues below 1e-6 of the largest one
        (of C' or of C inside Q) are never appended; energy 1 appends all others. Computed in float64, since C' loses
        the digits that Q holds; shares are compared to 1e-7.

        `max_rank`, a number of directions (int) or a share of d (float), caps k and wins over the energy.
        `merge_beta`: an eigenvector v of C with ||Q^T v|| above it counts as known, its energy as captured.
        ValueError for an energy outside (0, 1], a rank above d, a C that is not finite or of another shape.
        """
        if not 0 < energy <= 1:
            raise ValueError(f"energy: {energy} is not in (0, 1]")
        cap = rank_cap(max_rank, self.width)
        if (R is None) == (C is None):
            raise ValueError("either R or C is to be given")
        if R is not None:
            C = R.double() @ R.double().mT
        assert C is not None
        C = _checked(C, self.width).double()
        total = float(C.trace())
        if total <= 0:
            return self
        if not self.free:
            return self
        whole = torch.linalg.qr(self.basis.to(C), mode="complete").Q  # exactly orthonormal, unlike float32's Q
        Q, N = whole[:, : self.rank], whole[:, self.rank :]
        largest = float(torch.linalg.eigvalsh(Q.mT @ C @ Q)[-1]) if self.rank else 0.0
        if merge_beta is not None and self.rank:
            C = _without_known(C, Q, merge_beta)
        values, vectors = torch.linalg.eigh(N.mT @ C @ N)  # C' in the coordinates of the complement
        values, vectors = values.flip(0).clamp(min=0), N @ vectors.flip(1)
        captured = total - float(values.sum())  # tr C - tr C', known energy included
        reached = (captured + torch.cat([values.new_zeros(1), values.cumsum(0)])) / total
        wanted = int((reached < energy * (1 - SAME_SHARE)).sum())  # they rise: the first that suffices comes after
        real = int((values > SMALLEST_EIGENVALUE * max(largest, float(values[0]))).sum())
        count = min(wanted if energy < 1 else real, real, cap - self.rank, self.free)
        if count <= 0:
            return self
        basis = torch.linalg.qr(torch.cat([Q, vectors[:, :count]], dim=1)).Q
        return Subspace(basis.to(self.basis.device, torch.float32).contiguous())


def rank_cap(max_rank: int | float | None, width: int) -> int:
    """The most directions that `max_rank` allows in a space of `width` dimensions.

    ValueError where it is no count from 1 to `width` and no share in (0, 1].
    """
    if max_rank is None:
        return width
    if isinstance(max_rank, int):
        if not 1 <= max_rank <= width:
            raise ValueError(f"max_rank: {max_rank} directions, but the space has {width}; legal is 1 to {width}")
        return max_rank
    if not 0 < max_rank <= 1:
        raise ValueError(f"max_rank: {max_rank} is no share in (0, 1]")
    return max(1, int(max_rank * width + 1e-9))  # 0.29 of 100 is 29, although 0.29 * 100 is below it


def _checked(C: Tensor, width: int) -> Tensor:
    if C.shape != (width, width):
        raise ValueError(f"a second moment of shape {tuple(C.shape)} for a space of {width} dimensions")
    if not bool(C.isfinite().all()):
        raise ValueError("the second moment is not finite")
    return C


def _without_known(C: Tensor, Q: Tensor, beta: float) -> Tensor:
    """C without the eigenvectors that lie in span(Q) to a cosine of more than `beta`."""
    values, vectors = torch.linalg.eigh(C)
    known = (Q.mT @ vectors).norm(dim=0) > beta
    chosen = vectors[:, known]
    without: Tensor = C - (chosen * values[known]) @ chosen.mT
    return without
