"""LB-CL's subspaces: the joint basis of all finished tasks' singular vectors (methods.md 4.3).

Legend: d width of the space; k rank of the joint basis Q [d, k]; R [d, n] one old or new vector a column.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.projection.subspace import Subspace

SMALLEST_RESIDUAL = 1e-4  # of a column's norm: less outside is rounding


def joined(space: Subspace, R: Tensor) -> Subspace:
    """The joint span of a space and of the columns R [d, n]; a column with less than 1e-4 outside adds nothing.

    Column by column, against what the columns before it added too. In float64: the leading vectors of the result go
    on spanning the old space. ValueError for columns of another width, or not finite.
    """
    if R.shape[0] != space.width:
        raise ValueError(f"columns of {R.shape[0]} numbers for a space of {space.width} dimensions")
    if not bool(R.isfinite().all()):
        raise ValueError("the columns are not finite")
    old = torch.linalg.qr(space.basis.double()).Q if space.rank else space.basis.double()
    added: list[Tensor] = []
    for column in R.double().unbind(1):
        known = torch.cat([old, *(vector[:, None] for vector in added)], dim=1)
        rest = column - known @ (known.mT @ column)
        rest = rest - known @ (known.mT @ rest)  # twice is enough
        size = rest.norm()
        if known.shape[1] < space.width and size > SMALLEST_RESIDUAL * column.norm():
            added.append(rest / size)
    if not added:
        return space
    basis = torch.linalg.qr(torch.cat([old, torch.stack(added, dim=1)], dim=1)).Q
    return Subspace(basis.to(space.basis.device, torch.float32).contiguous())


def subtract_pairwise(parameter: nn.Parameter, R: Tensor, *, left: bool) -> None:
    """The paper's literal form: a hook that takes the sum of projections on each old vector off the gradient.

    `left`: of a tensor [d, r], else of one [r, d]. Old vectors that overlap are taken off more than once: that is no
    projection, and can enlarge a gradient.
    """
    units = R / R.norm(dim=0).clamp(min=torch.finfo(R.dtype).tiny)

    def subtracted(gradient: Tensor) -> Tensor:
        nonlocal units
        units = units.to(gradient)  # moves in the first step
        taken: Tensor = units @ (units.mT @ gradient) if left else (gradient @ units) @ units.mT
        return gradient - taken

    parameter.register_hook(subtracted)
