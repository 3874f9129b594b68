"""projection.features: streamed second moments against X^T X, and which layers read the same tensor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.projection.features import FeaturesNotFinite, SecondMoments, SharedInputs


def batch(rows: int, length: int, *shape: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features [b, s, ...] with huge values at the padding positions, and the mask [b, s] of the real ones."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (rows,), generator=draw)
    mask = torch.arange(length) < lengths[:, None]
    if seed % 2:
        mask = mask.flip(1)  # padding on the left, as decoder-only models have it
    x = torch.randn(rows, length, *shape, generator=draw)
    x[~mask] = 1e6
    return x, mask


def real(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero().flatten()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_streamed_moments_are_those_of_all_real_rows(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 9))
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=4))
    moments, kept = SecondMoments(["a", "b"]), []
    for seed, (rows, length) in enumerate(sizes):
        x, mask = batch(rows, length, width, seed=seed)
        moments.add("a", x, real(mask))
        moments.add("b", 2 * x, real(mask))
        kept += [x[b, s] for b in range(rows) for s in range(length) if mask[b, s]]
    X = torch.stack(kept).double()
    torch.testing.assert_close(moments.sums["a"].double(), X.T @ X, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.sums["b"], 4 * moments.sums["a"])
    assert moments.sums["a"].dtype == torch.float32
    assert moments.sums["a"].shape == (width, width)


def test_heads_have_a_moment_each() -> None:
    moments, kept = SecondMoments(["q"]), []
    for seed in range(3):
        x, mask = batch(2, 5, 4, 3, seed=seed)  # 4 heads of 3 dimensions
        moments.add("q", x, real(mask))
        kept.append(x[mask])
    X = torch.cat(kept).double()  # [n, heads, d]
    assert moments.sums["q"].shape == (4, 3, 3)
    for head in range(4):
        torch.testing.assert_close(moments.sums["q"][head].double(), X[:, head].T @ X[:, head], rtol=1e-5, atol=1e-5)


def test_only_wanted_spaces_are_counted() -> None:
    moments = SecondMoments(iter(["a"]))
    x, mask = batch(2, 3, 4, seed=0)
    moments.add("other", x, real(mask))
    assert moments.sums == {}
    moments.add("a", x, real(mask))
    assert set(moments.sums) == {"a"}


def test_half_precision_features_are_summed_in_float32() -> None:
    x, mask = batch(2, 50, 4, seed=0)
    moments = SecondMoments(["a"])
    for _ in range(20):
        moments.add("a", x.bfloat16(), real(mask))
    rows = x.bfloat16()[mask].double()
    torch.testing.assert_close(moments.sums["a"].double(), 20 * rows.T @ rows, rtol=1e-5, atol=1e-4)


def test_features_are_neither_kept_nor_part_of_a_graph() -> None:
    moments = SecondMoments(["a"])
    x = torch.ones(1, 2, 3, requires_grad=True)
    for _ in range(2):
        moments.add("a", 2 * x, torch.tensor([0]))
    assert not moments.sums["a"].requires_grad
    with torch.no_grad():
        x.zero_()
    torch.testing.assert_close(moments.sums["a"], torch.full((3, 3), 8.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])  # 1e30: its square is past float32
def test_what_is_not_finite_shows_unless_it_is_padding(bad: float) -> None:
    moments = SecondMoments(["padding", "real"])
    x = torch.ones(1, 3, 2)
    x[0, 1, 0] = bad
    moments.add("padding", x, torch.tensor([0, 2]))
    moments.add("real", x, torch.tensor([0, 1]))
    assert torch.equal(moments.sums["padding"], torch.full((2, 2), 2.0))
    assert not moments.sums["real"].isfinite().all()


def test_the_layer_and_the_rows_at_fault_are_named() -> None:
    fault = FeaturesNotFinite("encoder.q", [3, 8])
    assert (fault.layer, fault.rows) == ("encoder.q", [3, 8])
    assert "encoder.q" in str(fault)
    assert "[3, 8]" in str(fault)


class Attention(nn.Module):
    """Layers that read one tensor, a copy of it, a view of it and its in-place successor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.copy, self.later, self.o = (nn.Linear(6, 6, bias=False) for _ in range(6))
        self.head, self.flat = nn.Linear(3, 3, bias=False), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.q(x) + self.k(x) + self.v(x)
        y = y + self.copy(x.clone()) + self.head(x.view(*x.shape[:-1], 2, 3)).flatten(-2)
        y = y + self.flat(x.flatten(0, 1)).view_as(x)
        x.mul_(2)
        y = self.o(y + self.later(x))
        return y


def seen_by_hooks(model: nn.Module, x: Tensor) -> SharedInputs:
    shared = SharedInputs()
    for name, module in model.named_children():
        module.register_forward_pre_hook(lambda _, inputs, name=name: shared.see(name, inputs[0]))
    with torch.no_grad():
        model(x)
    return shared


def test_layers_that_read_one_tensor_are_grouped_and_no_others() -> None:
    leaders = seen_by_hooks(Attention(), torch.randn(2, 3, 6)).leaders()
    assert leaders == {"q": "q", "k": "q", "v": "q"} | {n: n for n in ("copy", "head", "flat", "later", "o")}


def test_memory_used_again_is_another_tensor() -> None:
    shared = SharedInputs()
    for number in range(20):
        shared.see(str(number), torch.zeros(1000))  # freed here, unless it is kept
    assert all(name == leader for name, leader in shared.leaders().items())


def test_views_are_grouped_by_what_they_show() -> None:
    x = torch.zeros(4, 6)
    shared = SharedInputs()
    for name, view in {
        "whole": x,
        "alias": x.view(4, 6),
        "detached": x.detach(),
        "transposed": x.T,
        "top": x[:2],
        "bottom": x[2:],
        "square": x[:, :4],
        "square transposed": x[:, :4].T,
        "as integers": x.view(torch.int32),
    }.items():
        shared.see(name, view)
    shared.see("whole", x)
    leaders = shared.leaders()
    assert [name for name, leader in leaders.items() if leader != name] == ["alias", "detached"]
    assert {leaders["alias"], leaders["detached"]} == {"whole"}
