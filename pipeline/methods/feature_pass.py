"""PEGP's pass over training rows: second moments of what an attached adapter's tensors are multiplied with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.adapters.base import Attached
from pipeline.methods.base import TaskContext
from pipeline.projection.features import FeaturesNotFinite, SecondMoments, SharedInputs

Shapes = Mapping[str, tuple[int, ...]]  # by space: (d,), or (heads, d)


def probe(ctx: TaskContext, attached: Attached) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """From one forward: space -> the first space that reads the same tensor, and each such leader's shape."""
    shared = SharedInputs()
    shapes: dict[str, tuple[int, ...]] = {}

    def see(space: str, x: Tensor) -> None:
        shared.see(space, x)
        shapes[space] = tuple(x.shape[2:])

    with attached.observe(see):
        ctx.run_probe()
    leaders = shared.leaders()
    return leaders, {leader: shapes[leader] for leader in dict.fromkeys(leaders.values())}


def feature_sample(ctx: TaskContext, size: int) -> list[int]:
    """At most `size` rows of the task's training data, drawn from the recipe's seed, ascending."""
    chosen = torch.randperm(ctx.row_count, generator=ctx.generator("features"))[:size]
    return sorted(chosen.tolist())


def measure(
    ctx: TaskContext, attached: Attached, shapes: Shapes, rows: Sequence[int], *, task_index: int | None = None
) -> dict[str, Tensor]:
    """`C = sum x x^T` over the real tokens of `rows`, by space, over all ranks: [d, d] or [heads, d, d], float32.

    Collective. Raises `FeaturesNotFinite` with the layer and the rows at fault.
    """
    sums = _summed(ctx, attached, shapes, rows, task_index)
    bad = [space for space, total in sums.items() if not _finite(total)]
    if not bad:
        return sums
    layer = {bad[0]: shapes[bad[0]]}
    guilty = [row for row in rows if not _finite(_summed(ctx, attached, layer, [row], task_index)[bad[0]])]
    raise FeaturesNotFinite(bad[0], guilty or list(rows), task_index)  # each row may be finite where their sum is not


def _summed(
    ctx: TaskContext, attached: Attached, shapes: Shapes, rows: Sequence[int], task_index: int | None
) -> dict[str, Tensor]:
    moments = SecondMoments(shapes)

    def see(space: str, x: Tensor) -> None:
        if space in shapes:  # the others read what a leader reads
            moments.add(space, x, ctx.real_positions(x.shape[1]))

    with attached.observe(see):
        ctx.run_rows(rows, backward=False, task_index=task_index)
    # A rank whose share is empty has seen nothing, and adds zeros.
    found: dict[str, Tensor] = {}
    for space, shape in shapes.items():  # one after another: each is let go of once its sum over ranks is there
        mine = moments.sums.pop(space, None)
        found[space] = ctx.all_sum(torch.zeros(*shape, shape[-1]) if mine is None else mine)
    return found


def _finite(total: Tensor) -> bool:
    return bool(total.isfinite().all())
