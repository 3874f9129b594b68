"""How results of ranks are compared with each other and with the plain reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from plain_reference import Trained, train_plain
from rank_cases import TRAINING, Case
from torch import Tensor, cat


def full(cases: Sequence[Case], *, but: Sequence[Case]) -> list[Any]:
    """Parameters: those of `but` are in every run of the tests, the rest in the full matrix only."""
    return [case if case in but else pytest.param(case, marks=pytest.mark.full) for case in cases]


def names(result: Mapping[str, Any]) -> list[str]:
    """Names of the trained tensors."""
    return list(result["start"])


def flat(tensors: Mapping[str, Tensor], order: Sequence[str]) -> Tensor:
    """All tensors as one float64 vector."""
    return cat([tensors[name].double().flatten() for name in order])


def change(result: Mapping[str, Any], reference: Trained | None = None) -> Tensor:
    """What training changed since `result["start"]`, in `result` or in a reference that starts there."""
    order = names(result)
    trained = result["trained"] if reference is None else reference.tensors
    return flat(trained, order) - flat(result["start"], order)


def relative(value: Tensor, reference: Tensor) -> float:
    """Relative Frobenius norm of the difference."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


_TRAINED: dict[tuple[Any, ...], list[tuple[dict[str, Tensor], Trained]]] = {}


def plain(
    runs: Any,
    case: Case,
    result: Mapping[str, Any],
    *,
    penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    writes: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> Trained:
    """The reference for `case`, from the factors at which `result` started.

    Trained once for all cases that start from, and write, the same numbers.
    """
    given = dict(result["start"])
    for step, tensors in (writes or {}).items():
        given |= {f"{name} after {step}": value for name, value in tensors.items()}
    key = (case.backbone, penalty, *given)
    for known, trained in _TRAINED.setdefault(key, []):
        if all(torch.equal(known[name], value) for name, value in given.items()):
            return trained
    trained = train_plain(
        runs.backbones / case.backbone,
        case.family,
        start=result["start"],
        scale=case.kind([]).scale,
        steps=case.steps,
        examples=case.examples,
        training=TRAINING,
        penalty=penalty,
        writes=writes,
    )
    _TRAINED[key].append((given, trained))
    return trained
