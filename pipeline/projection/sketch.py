"""The leading singular vectors of a layer's gradient from linear sketches that never form it (methods.md section 3).

Tropp et al. 2017 (arXiv 1609.00048), single pass. Legend: G = sum g x^T [d_out, d_in] gradient of a layer's weight,
from its inputs x [d_in] and output gradients g [d_out]; k rank; l = 2 k + 1; Omega [d_in, l], Psi [2 l + 1, d_out]
Gaussian; Y = G Omega, Z = Psi G. Both are linear in G: they add up over micro-batches and ranks.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.projection.subspace import Subspace

# Directions whose singular value is at most this share of the largest are rounding: T5's cross-attention gradient is
# rank-deficient, and its trailing singular vectors are arbitrary.
SMALLEST_SINGULAR_VALUE = 1e-5
ROUNDING = 1e-6  # of sums in float32


class Factors(NamedTuple):
    """`G ~ U diag(S) V^T`, on the CPU in the sums' dtype; columns that are not there are zero, in U and V alike."""

    U: Tensor  # [d_out, k]
    S: Tensor  # [k], falling
    V: Tensor  # [d_in, k]

    @property
    def missing(self) -> int:
        """How many of the k directions are not there."""
        return int((self.S == 0).sum())


class Protected(NamedTuple):
    """What G is projected against before its singular vectors are taken: columns, rows, or both."""

    left: Subspace | None = None  # of R^d_out: G <- (I - QQ^T) G
    right: Subspace | None = None  # of R^d_in: G <- G (I - QQ^T)

    def outside(self, Y: Tensor, Z: Tensor) -> tuple[Tensor, Tensor]:
        """`(I - QQ^T) Y` for columns Y [d_out, n], `Z (I - QQ^T)` for rows Z [m, d_in]."""
        left, right = self
        return (Y if left is None else _outside(left, Y.mT).mT, Z if right is None else _outside(right, Z))


class GradientSum(Protocol):
    """The sum of a layer's gradient over micro-batches, or what is kept of it."""

    sums: dict[str, Tensor]  # linear in G: add up over ranks

    def add(self, x: Tensor, g: Tensor) -> None:
        """Add `g^T x` of inputs [..., d_in] and output gradients [..., d_out]."""

    def factors(self, rank: int) -> Factors:
        """The leading `rank` singular triplets of the projected G."""


class Sketch:
    """Y and Z alone: (2 k + 1) d_out + (4 k + 3) d_in numbers."""

    def __init__(
        self, d_out: int, d_in: int, rank: int, generator: torch.Generator, protected: Protected | None = None
    ) -> None:
        """Draws Omega and Psi on the CPU: the same on every rank for generators of one seed.

        `protected` is projected away here: `[Psi (I - QQ^T)] G` is no function of `Psi G`.
        """
        size = 2 * rank + 1
        self._protected = protected or Protected()
        left, right = self._protected
        Omega = torch.randn(d_in, size, generator=generator)
        Psi = torch.randn(2 * size + 1, d_out, generator=generator)
        self._Omega = Omega if right is None else _outside(right, Omega.double().mT).mT.float()
        self._Psi = Psi if left is None else _outside(left, Psi.double()).float()
        self.sums = {"Y": torch.zeros(d_out, size), "Z": torch.zeros(2 * size + 1, d_in)}

    def add(self, x: Tensor, g: Tensor) -> None:
        """`Y += g^T (x Omega)`, `Z += (Psi g^T) x`, in float32 or better, where x lies."""
        x, g = _rows(x), _rows(g)
        self._Omega, self._Psi = self._Omega.to(x), self._Psi.to(x)
        Y, Z = self.sums["Y"].to(x), self.sums["Z"].to(x)
        self.sums = {"Y": torch.addmm(Y, g.mT, x @ self._Omega), "Z": torch.addmm(Z, self._Psi @ g.mT, x)}

    def factors(self, rank: int) -> Factors:
        """`Q_y = orth(Y)`, `B = (Psi Q_y)^+ Z`, and the SVD of the small B; in float64."""
        dtype = self.sums["Y"].dtype
        whole = self.sums["Y"].cpu().double(), self.sums["Z"].cpu().double()
        Y, Z = self._protected.outside(*whole)
        vectors, values, _ = torch.linalg.svd(Y, full_matrices=False)
        # Of a rank-deficient Y, QR would complete Q_y by arbitrary vectors, protected ones among them. What is left of
        # a Y inside the protected space is rounding as well.
        Q_y = vectors[:, values > ROUNDING * whole[0].norm()]
        B = torch.linalg.pinv(self._Psi.cpu().double() @ Q_y) @ Z
        sizes = (float(whole[0].norm()) / Y.shape[1] ** 0.5, float(whole[1].norm()) / Z.shape[0] ** 0.5)
        return _leading(Q_y, B, rank, dtype, max(sizes))  # E ||G Omega||^2 = l ||G||^2


class ExactGradient:
    """G itself [d_out, d_in]: for small models, and what sketches are compared with."""

    def __init__(self, d_out: int, d_in: int, protected: Protected | None = None) -> None:
        self._protected = protected or Protected()
        self.sums = {"G": torch.zeros(d_out, d_in)}

    def add(self, x: Tensor, g: Tensor) -> None:
        """`G += g^T x`, in float32 or better, where x lies."""
        x, g = _rows(x), _rows(g)
        self.sums = {"G": torch.addmm(self.sums["G"].to(x), g.mT, x)}

    def factors(self, rank: int) -> Factors:
        """The SVD of the projected G; in float64."""
        whole = self.sums["G"].cpu().double()
        G, _ = self._protected.outside(whole, whole[:0])
        _, G = self._protected.outside(G[:, :0], G)
        return _leading(None, G, rank, self.sums["G"].dtype, float(whole.norm()))


def _rows(x: Tensor) -> Tensor:  # [..., d] -> [n, d]
    return x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))


def _outside(space: Subspace, x: Tensor) -> Tensor:
    """`x (I - QQ^T)`, taken twice.

    A float32 basis leaves 1e-7 inside: much beside a direction of small singular value, and in a trailing column of
    Q_y, where little is left of G, all there is; the pseudo-inverse of `Psi Q_y` then blows it up.
    """
    return space.residual(space.residual(x))


def _leading(left: Tensor | None, B: Tensor, rank: int, dtype: torch.dtype, size: float) -> Factors:
    """The leading triplets of `left B` for orthonormal `left` [d_out, n]; zeros where there are fewer than `rank`.

    `size`: ||G|| before projection, beside which the whole of `left B` may be rounding.
    """
    W, S, Vt = torch.linalg.svd(B, full_matrices=False)
    U = W if left is None else left @ W
    smallest = SMALLEST_SINGULAR_VALUE * S[:1]
    count = min(rank, int(((smallest < S) & (S[:1] > ROUNDING * size)).sum()))
    missing = (0, rank - count)
    U, S, V = U[:, :count], S[:count], Vt[:count].mT
    # Of the two signs of a pair one rule chooses, on any device: moments that are kept over a refresh depend on it.
    signs = U.gather(0, U.abs().argmax(dim=0, keepdim=True)).sign()
    U, V = U * signs, V * signs
    return Factors(*(torch.nn.functional.pad(part, missing).to(dtype).contiguous() for part in (U, S, V)))
