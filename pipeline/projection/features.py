"""The feature family (PEGP): second moments of what layers read, streamed; which layers read the same tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class FeaturesNotFinite(ValueError):
    """A layer's features hold values that are not finite."""

    def __init__(self, layer: str, rows: list[int], task_index: int | None = None) -> None:
        super().__init__(f"the features of {layer} are not finite in rows {rows}")
        self.layer = layer
        self.rows = rows
        self.task_index = task_index  # whose rows; None: the current task's


class SecondMoments:
    """`C = sum over real tokens of x x^T` by space, float32; the features themselves are never kept.

    A space whose features come with heads, [n, heads, d], has one C a head: [heads, d, d].
    """

    def __init__(self, spaces: Iterable[str]) -> None:
        self._wanted = set(spaces)
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, space: str, x: Tensor, real: Tensor) -> None:
        """Count the features x [b, s, d] or [b, s, heads, d] of the positions `real` [n] of the flat batch [b s]."""
        if space not in self._wanted:
            return
        rows = x.flatten(0, 1).index_select(0, real).float()  # [n, d] or [n, heads, d]
        heads = rows.transpose(0, 1) if rows.dim() == 3 else rows  # [heads, n, d] or [n, d]
        if space in self.sums:
            total = self.sums[space]
            (total.addmm_ if rows.dim() == 2 else total.baddbmm_)(heads.mT, heads)
        else:
            self.sums[space] = heads.mT @ heads

    def not_finite(self) -> list[str]:
        """The spaces whose sum is not finite."""
        return [space for space, total in self.sums.items() if not bool(total.isfinite().all())]


class SharedInputs:
    """Finds which spaces read the same tensor: `see` every input of one forward, then ask for the leaders."""

    def __init__(self) -> None:
        # The tensors are kept until the end, so that no memory is used twice.
        self._groups: dict[tuple[object, ...], list[str]] = {}
        self._kept: list[Tensor] = []

    def see(self, space: str, x: Tensor) -> None:
        """Note that `space` reads `x`: the same memory in the same layout, seen without an in-place change between."""
        self._kept.append(x)
        key = (x.data_ptr(), x.dtype, x.shape, x.stride(), x._version)
        self._groups.setdefault(key, []).append(space)

    def leaders(self) -> dict[str, str]:
        """Space -> the first space that read the same tensor."""
        return {space: group[0] for group in self._groups.values() for space in dict.fromkeys(group)}
