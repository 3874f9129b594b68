"""Projectors of many layers at once: the same tensors and gradients as one by one, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pipeline.adapters.base import Trained, install, value_of
from pipeline.projection import together
from pipeline.projection.guard import Guard
from pipeline.projection.projector import Complement, FromLeft, Residual
from pipeline.projection.subspace import Subspace
from pipeline.projection.together import Together

WIDTH, RANK = 12, 3
KS = [0, 1, 1, 4, 6, 7, 8, 5]
MANY = together.OWN_GROUP // 2  # layers: A and B of each


class Layers(nn.Module):
    """Layers with an A projected from the right and a B projected from the left, each by a space of its own."""

    is_gradient_checkpointing = False

    def __init__(self, ks: list[int] = KS) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.layers = nn.ModuleList()
        for k in ks:
            space = Subspace(torch.linalg.qr(torch.randn(WIDTH, k, generator=draw)).Q.contiguous())
            layer = nn.Module()
            for name, left in (("A", False), ("B", True)):
                start = torch.randn(RANK, WIDTH, generator=draw)
                start = start.mT.contiguous() if left else start
                parameter = install(layer, name, Trained(start, Guard([space], left=left).projector(start)), start)
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=draw))
            self.layers.append(layer)

    def values(self) -> list[Tensor]:
        return [value_of(getattr(m, name), getattr(m, f"{name}_projector")) for m in self.layers for name in "AB"]

    def projectors(self) -> list[Residual | Complement]:
        return [module for module in self.modules() if isinstance(module, Residual | Complement)]


def loss(values: list[Tensor]) -> Tensor:
    return torch.stack([(index + 1) * (value**3).sum() for index, value in enumerate(values)]).sum()


@pytest.mark.parametrize("ks", [KS, [*KS, *[8] * MANY], [3] * MANY])
def test_tensors_and_gradients_are_those_of_one_by_one(ks: list[int]) -> None:
    model = Layers(ks)
    alone = model.values()
    loss(alone).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with Together(model).ready():
        assert sum(projector.ready is not None for projector in model.projectors()) == 2 * sum(k > 0 for k in ks)
        found = model.values()
        for value, other in zip(found, alone, strict=True):
            assert_close(value, other, rtol=1e-5, atol=1e-5)
        loss(found).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-3)  # float32 sums of cubes of up to 1e3


def test_both_forms_and_both_sides_are_there() -> None:
    forms = {type(projector) for projector in Layers().projectors()}
    assert forms == {Residual, Complement}
    assert any(isinstance(module, FromLeft) for module in Layers().modules())


def test_a_device_holds_each_number_once() -> None:
    model = Layers()
    own = [(projector.start.clone(), projector.matrix.clone()) for projector in model.projectors()]
    group = Together(model)
    with group.ready():
        stacks = [stack for one in group._groups or () for stack in (one.starts, one.matrices)]
    pieces = [{tensor.untyped_storage().data_ptr() for tensor in tensors} for tensors in (stacks, model.buffers())]
    assert pieces[0] == pieces[1]
    for projector, (start, matrix) in zip(model.projectors(), own, strict=True):
        assert torch.equal(projector.start, start)
        assert torch.equal(projector.matrix, matrix)


def test_at_most_half_of_what_is_stacked_is_padding() -> None:
    model = Layers()
    group = Together(model)
    with group.ready():
        stacked = [(one.matrices.numel(), one.members) for one in group._groups]
    assert len(stacked) == 3, "narrow bases, wide ones, complements"
    for size, members in stacked:
        assert size < 2 * sum(projector.matrix.numel() for _, projector in members)


def test_many_of_one_width_stand_alone_unpadded() -> None:
    group = Together(Layers([*KS, *[8] * MANY]))
    with group.ready():
        bases = [[projector.matrix.shape[1] for _, projector in one.members] for one in group._groups]
    of_4 = [widths for widths in bases if 4 in widths and 5 not in widths]
    assert [4] * (2 * MANY + 2) in of_4, "complements of k = 8, one more layer of KS among them"
    assert len(bases) == 4, "beside it narrow bases, wide ones, complements of k = 7"


def test_after_the_forward_each_stands_for_itself_again() -> None:
    model = Layers()
    with pytest.raises(RuntimeError, match="in the forward"), Together(model).ready():
        raise RuntimeError("in the forward")
    assert all(projector.ready is None for projector in model.projectors())


def test_each_forward_sees_what_training_has_changed() -> None:
    model = Layers()
    group = Together(model)
    with group.ready():
        before = model.values()[2].clone()
    with torch.no_grad():
        model.layers[1].A += 1
    with group.ready():
        after = model.values()[2]
    assert_close(after, model.values()[2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, after)


def test_another_precision_is_stacked_anew() -> None:
    model = Layers()
    group = Together(model)
    with group.ready():
        pass
    model.double()
    with group.ready():
        assert all(projector.ready.dtype == torch.float64 for projector in model.projectors())


def test_where_layers_run_again_or_bases_are_large_they_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layers()
    model.is_gradient_checkpointing = True
    with Together(model).ready():
        assert all(projector.ready is None for projector in model.projectors())
    model.is_gradient_checkpointing = False
    monkeypatch.setattr(together, "MOST_NUMBERS", 10)
    with Together(model).ready():
        assert all(projector.ready is None for projector in model.projectors())
