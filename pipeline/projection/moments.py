"""What a gradient space is grown from: Adam's first moment, or the task's mean gradient, in a tensor's own space."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pipeline.projection.projector import FromLeft, Projector


def moment_columns(moment: Tensor, projector: Projector | FromLeft | None, *, left: bool) -> Tensor:  # [d, n]
    """The columns R that a moment (or gradient) of a trained tensor gives (methods.md section 3).

    `M^T` of A [r, d_in], `M` of B [d_out, r] (`left`); of a projected tensor it is first lifted into the tensor's
    space: `N M_C^T` of the complement form.
    """
    if projector is not None:
        return projector.lifted(moment).mT
    return moment if left else moment.mT


class GradientSums:
    """Each trained tensor's gradient, summed over the backwards of this rank; nothing is communicated meanwhile.

    Of the mean over a task only the span and the proportions matter: a common factor is left in.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._sums: dict[str, Tensor] = {}
        self._handles = [parameter.register_hook(self._adder(name)) for name, parameter in parameters.items()]

    def _adder(self, name: str) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            gradient = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
            self._sums[name] = self._sums[name] + gradient if name in self._sums else gradient.clone()

        return add

    def close(self) -> dict[str, Tensor]:
        """The sums, by name; the tensors are let go."""
        for handle in self._handles:
            handle.remove()
        return self._sums
