"""LB-CL's start of a new triplet adapter from the old ones, weighted by their sensitivity (methods.md 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pipeline.adapters.triplet import Triplets

Align = Literal["signs", "hungarian", "none"]


def injected(past: Sequence[Triplets], scores: Tensor, *, align: Align) -> Triplets:
    """`{sum_k alpha U_i^k, sum_k alpha sigma_i^k, sum_k alpha V_i^k}` with `alpha_i^k = S_i^k / sum_k S_i^k`.

    `scores` [past tasks, r]; alpha is uniform at an index where all are zero. `align` says how the past tasks'
    triplets, whose signs and order are arbitrary, are made to agree first: their signs, their order too, or nothing.
    Signs: no sigma below zero, by turning u; then u and v of each towards those of the most sensitive task.
    """
    U = torch.stack([part.U.double() for part in past])  # [tasks, d_out, r]
    sigma = torch.stack([part.sigma.double() for part in past])  # [tasks, r]
    V = torch.stack([part.V.double() for part in past])  # [tasks, r, d_in]
    scores = scores.double()
    if align != "none":
        U, sigma = torch.where(sigma[:, None] < 0, -U, U), sigma.abs()
    if align == "hungarian":
        U, sigma, V, scores = _reordered(U, sigma, V, scores)
    if align != "none":
        U, V = _same_signs(U, V, scores)
    totals = scores.sum(dim=0)
    uniform = torch.full_like(scores, 1 / len(past))
    alpha = torch.where(totals > 0, scores / totals.where(totals > 0, torch.ones_like(totals)), uniform)
    return Triplets(
        torch.einsum("kr,kdr->dr", alpha, U).float().contiguous(),
        (alpha * sigma).sum(dim=0).float(),
        torch.einsum("kr,krd->rd", alpha, V).float().contiguous(),
    )


def _reordered(U: Tensor, sigma: Tensor, V: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each task's triplets in the order of those of the most sensitive task that they resemble most."""
    leader = int(scores.sum(dim=1).argmax())
    order = torch.arange(sigma.shape[1]).repeat(len(sigma), 1)
    for task in range(len(sigma)):
        resemblance = (U[leader].mT @ U[task] + V[leader] @ V[task].mT).abs()  # [r of the leader, r]
        if task != leader:
            order[task] = torch.as_tensor(linear_sum_assignment(resemblance.numpy(), maximize=True)[1])
    picked = [(U[task][:, index], sigma[task][index], V[task][index]) for task, index in enumerate(order)]
    moved = tuple(torch.stack(part) for part in zip(*picked, strict=True))
    return moved[0], moved[1], moved[2], scores.gather(1, order)


def _same_signs(U: Tensor, V: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """u and v of a triplet turned round together where they point away from the most sensitive task's."""
    leaders = scores.argmax(dim=0)  # [r]
    index = torch.arange(len(leaders))
    u, v = U[leaders, :, index], V[leaders, index]  # [r, d_out], [r, d_in]
    along = torch.einsum("kdr,rd->kr", U, u) + torch.einsum("krd,rd->kr", V, v)
    turned = along < 0
    return torch.where(turned[:, None], -U, U), torch.where(turned[:, :, None], -V, V)
