"""Tensors of many layers through their projectors at once: on small layers the calls cost more than the products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.projection.projector import Complement, FromLeft, Projector, Residual, outside

MOST_NUMBERS = 2**24  # of a group's stacked bases: larger ones cost memory, and their products hide the calls
OWN_GROUP = 8  # as many layers of one very width stand alone: padding them to others' costs more than a group's calls


@dataclass
class _Group:
    """Layers whose projectors have one form and whose tensors have one shape [r, d]; bases padded to one width."""

    members: Sequence[tuple[nn.Parameter, Projector]]
    starts: Tensor  # [M, r, d]
    matrices: Tensor  # [M, d, widest]

    def values(self) -> Tensor:  # [M, r, d]
        """All the tensors."""
        trained: list[Tensor] = [parameter for parameter, _ in self.members]
        if isinstance(self.members[0][1], Residual):
            return outside(torch.stack(trained), self.starts, self.matrices)
        values: Tensor = _InComplements.apply(self.starts, self.matrices, *trained)  # type: ignore[no-untyped-call]
        return values

    def share(self) -> None:
        """Let the members' own tensors be parts of the stacked ones, so that a device holds each number once."""
        for (_, projector), start, matrix in zip(self.members, self.starts, self.matrices, strict=True):
            projector.start, projector.matrix = start, matrix[:, : projector.matrix.shape[1]]


class _InComplements(torch.autograd.Function):
    """`start + C N^T` of several C [r, d - k], whose widths may differ: N [M, d, widest] ends in columns of zeros.

    Written out: padding each C in autograd's sight, and taking the pads off its gradient, cost more than the products.
    """

    @staticmethod
    def forward(ctx: Any, starts: Tensor, matrices: Tensor, *trained: Tensor) -> Tensor:
        ctx.save_for_backward(matrices)
        ctx.widths = [C.shape[-1] for C in trained]
        if set(ctx.widths) == {matrices.shape[-1]}:
            return torch.baddbmm(starts, torch.stack(trained), matrices.mT)
        padded = starts.new_zeros(*starts.shape[:-1], matrices.shape[-1])
        for room, C in zip(padded.unbind(), trained, strict=True):
            room[:, : C.shape[-1]] = C
        return torch.baddbmm(starts, padded, matrices.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (matrices,) = ctx.saved_tensors
        found = (gradients[0] @ matrices).unbind()
        if set(ctx.widths) == {matrices.shape[-1]}:
            return None, None, *found
        return None, None, *(part[:, :width] for part, width in zip(found, ctx.widths, strict=True))


class Together:
    """The projectors of a model, grouped by form and shape."""

    def __init__(self, model: nn.Module) -> None:
        """To be made once the adapter is attached."""
        self._model = model
        self._groups: list[_Group] | None = None

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, for one forward, the projectors of groups have their tensors (afterwards, as `latest`).

        Not where ZeRO 3 holds the parameters, whose modules gather their own; nor where layers are run again in the
        backward, which a tensor made outside of them would cut off.
        """
        groups = [] if _runs_layers_again(self._model) else self._current_groups()
        used = [projector for group in self._groups or () for _, projector in group.members]
        for projector in used:
            projector.latest = None  # of the forward before
        try:
            for group in groups:
                for (_, projector), value in zip(group.members, group.values().unbind(), strict=True):
                    projector.ready = value
                    if torch.is_grad_enabled():
                        projector.latest = value
            yield
        finally:
            for projector in used:
                projector.ready = None

    def _current_groups(self) -> list[_Group]:
        """The groups, stacked in the first forward, after the engine has moved and cast the model."""
        if self._groups is None or any(group.starts.dtype != group.members[0][0].dtype for group in self._groups):
            self._groups = _groups(self._model)
        return self._groups


def _runs_layers_again(model: nn.Module) -> bool:
    if hasattr(type(model), "is_activation_checkpointing"):  # transformers' name since 5.23
        return bool(model.is_activation_checkpointing)
    return bool(getattr(model, "is_gradient_checkpointing", False))


def _groups(model: nn.Module) -> list[_Group]:
    stackable = [
        (parameter, projector)
        for parameter, projector in _projected(model)
        if projector.start.dim() == 2 and not hasattr(parameter, "ds_id")
    ]
    alike = Counter(_form(projector) for _, projector in stackable)
    by_form: dict[tuple[object, ...], list[tuple[nn.Parameter, Projector]]] = {}
    for parameter, projector in stackable:
        form, width = _form(projector)
        # Others with those of like widths, so that at most half of what is stacked is padding.
        shared = (width, 0) if alike[form, width] >= OWN_GROUP else (0, width.bit_length())
        by_form.setdefault((form, *shared), []).append((parameter, projector))
    found = []
    for members in by_form.values():
        bases = [projector.matrix for _, projector in members]
        widest = max(basis.shape[1] for basis in bases)
        if len(members) > 1 and len(members) * bases[0].shape[0] * widest <= MOST_NUMBERS:
            stacked = torch.stack([nn.functional.pad(basis, (0, widest - basis.shape[1])) for basis in bases])
            group = _Group(members, torch.stack([projector.start for _, projector in members]), stacked)
            group.share()
            found.append(group)
    return found


def _form(projector: Projector) -> tuple[object, int]:
    """What may lie side by side, and the width of its basis."""
    return (type(projector), projector.start.shape, projector.start.device), projector.matrix.shape[1]


def _projected(model: nn.Module) -> Iterator[tuple[nn.Parameter, Projector]]:
    """Each trained tensor with its projector, as `adapters.base.install` registers them."""
    for module in model.modules():
        for name, child in module.named_children():
            inner = child.turned if isinstance(child, FromLeft) else child
            if name.endswith("_projector") and isinstance(inner, Residual | Complement):
                parameter = getattr(module, name.removesuffix("_projector"))
                assert isinstance(parameter, nn.Parameter)
                yield parameter, inner
