"""LoRA: a hand-computed example, where it starts, PEFT's own layer, targets, files."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from random_backbones import save_backbone
from torch import nn

from data_prep.errors import UserError
from pipeline.adapters.base import Trained
from pipeline.adapters.branches import with_branch
from pipeline.adapters.lora import Factors, LoraKind, LoraLinear, from_tensors, summed_update, to_tensors
from pipeline.layers import target_modules
from pipeline.models import load_backbone

# W: 3 x 2, r = 1, alpha = 2, so s = 2.
W = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
A = torch.tensor([[1.0, -1.0]])
B = torch.tensor([[2.0], [0.0], [1.0]])


def linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def test_hand_computed_forward_and_gradients() -> None:
    layer = LoraLinear(linear(W), Trained(A), Trained(B), scale=2.0, dropout=0.0)
    x = torch.tensor([[3.0, 1.0]], requires_grad=True)

    y = layer(x)
    # W x = (5, 13, 21); A x = 2; s B (A x) = 2 * (2, 0, 1) * 2 = (8, 0, 4).
    assert y.tolist() == [[13.0, 13.0, 25.0]]

    y.backward(torch.tensor([[1.0, 1.0, -1.0]]))
    # dL/dB = s delta (A x)^T = 2 * 2 * delta; dL/dA = s (B^T delta) x^T = 2 * (2 - 1) * x.
    assert layer.B.grad.tolist() == [[4.0], [4.0], [-4.0]]
    assert layer.A.grad.tolist() == [[6.0, 2.0]]
    # dL/dx = W^T delta + s A^T B^T delta = (-1, 0) + 2 * (1, -1) * 1.
    assert x.grad.tolist() == [[1.0, -2.0]]
    assert layer.base.weight.grad is None


def test_hand_computed_update_of_two_tasks() -> None:
    second = Factors(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0], [1.0], [1.0]]), scale=0.5)
    total = summed_update([Factors(A, B, 2.0), second])
    # 2 * (2, 0, 1)^T (1, -1) + 0.5 * (1, 1, 1)^T (0, 1)
    assert total.tolist() == [[4.0, -3.5], [0.0, 0.5], [2.0, -1.5]]


@given(rank=st.integers(1, 4), d_in=st.integers(1, 9), scale=st.sampled_from([0.5, 2.0, 4.0]))
def test_starting_factors_change_nothing_and_stay_in_bounds(rank: int, d_in: int, scale: float) -> None:
    model = nn.Sequential(nn.Linear(d_in, 5, bias=False))
    kind = LoraKind(["0"], rank=rank, alpha=scale * rank, dropout=0.0)
    factors = kind.factors(kind.starts(model, torch.Generator().manual_seed(1)))["0"]
    assert factors.A.shape == (rank, d_in)
    assert factors.B.shape == (5, rank)
    assert factors.A.abs().max() <= 1 / math.sqrt(d_in)
    assert not factors.B.any()
    assert factors.scale == pytest.approx(scale)
    assert not summed_update([factors]).any()


def test_starting_factors_are_uniform_to_their_bound_and_depend_on_the_seed_alone() -> None:
    model = nn.ModuleDict({"q": nn.Linear(64, 8, bias=False), "v": nn.Linear(64, 8, bias=False)})

    def start(seed: int) -> dict[str, Factors]:
        kind = LoraKind(["q", "v"], rank=50, alpha=200, dropout=0.0)
        return kind.factors(kind.starts(model, torch.Generator().manual_seed(seed)))

    first, again, other = start(3), start(3), start(4)
    for name in ("q", "v"):
        assert torch.equal(first[name].A, again[name].A)
        assert not torch.equal(first[name].A, other[name].A)
    assert not torch.equal(first["q"].A, first["v"].A)
    # Kaiming-uniform with a = sqrt 5: bound sqrt(6 / ((1 + 5) 64)) = 1/8, standard deviation bound / sqrt 3.
    values = torch.cat([part.A.flatten() for part in first.values()])
    assert values.abs().max() == pytest.approx(1 / 8, rel=0.01)
    assert values.std() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.03)  # 6400 draws: 0.6 % a sigma
    assert values.mean() == pytest.approx(0, abs=0.004)


def test_the_layer_equals_that_of_peft() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5, bias=False))
    weight = model[0].weight.detach().clone()
    config = LoraConfig(r=3, lora_alpha=12, lora_dropout=0.0, target_modules=["0"], bias="none")
    theirs = get_peft_model(model, config)
    layer = theirs.base_model.model[0]
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(up)
    ours = LoraLinear(linear(weight), Trained(down.detach()), Trained(up.detach()), scale=4.0, dropout=0.0)

    x, delta = torch.randn(4, 6, 7), torch.randn(4, 6, 5)
    expected, got = theirs(x), ours(x)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    (expected * delta).sum().backward()
    (got * delta).sum().backward()
    torch.testing.assert_close(ours.A.grad, down.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.B.grad, up.grad, rtol=1e-5, atol=1e-5)
    merged = theirs.merge_and_unload()[0].weight
    update = summed_update([Factors(ours.A.detach(), ours.B.detach(), 4.0)])
    torch.testing.assert_close(weight + update, merged, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_a_branch_added_as_one_product_is_the_plain_sum(*, trained: bool, turned: bool) -> None:
    torch.manual_seed(0)
    output, hidden = torch.randn(2, 5, 6, dtype=torch.double), torch.randn(2, 5, 3, dtype=torch.double)
    left = torch.randn(3, 6, dtype=torch.double).mT if turned else torch.randn(6, 3, dtype=torch.double)
    leaves = [output.requires_grad_(), hidden.requires_grad_(), left.requires_grad_(trained)]
    delta = torch.randn(2, 5, 6, dtype=torch.double)

    def gradients(summed: torch.Tensor) -> list[torch.Tensor]:
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return list(torch.autograd.grad((summed * delta).sum(), wanted))

    expected, got = output + 4.0 * nn.functional.linear(hidden, left), with_branch(output, hidden, left, 4.0)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got), gradients(expected))


def test_dropout_acts_on_the_branch_alone_and_in_training_alone() -> None:
    layer = LoraLinear(linear(W), Trained(A), Trained(B), scale=2.0, dropout=0.5)
    x = torch.tensor([[3.0, 1.0]])
    layer.eval()
    assert layer(x).tolist() == [[13.0, 13.0, 25.0]]
    layer.train()
    torch.manual_seed(0)
    branches = {tuple((layer(x) - x @ W.T)[0].tolist()) for _ in range(60)}
    # Each input is dropped or doubled: A x is one of 0, 6, -2, 4; s B times it.
    assert branches == {(4.0 * h, 0.0, 2.0 * h) for h in (0.0, 6.0, -2.0, 4.0)}


def test_attach_starts_at_the_factors_and_detach_restores() -> None:
    model = nn.Sequential(linear(W)).eval()
    bare = model[0]
    kind = LoraKind(["0"], rank=1, alpha=2, dropout=0.1)
    attached = kind.attach(model, {"0.A": Trained(A), "0.B": Trained(B)})
    assert isinstance(model[0], LoraLinear)
    assert attached.parameters["0.A"] is model[0].A
    assert not model[0].training, "the layer takes the mode of its model"
    assert [parameter.requires_grad for parameter in model.parameters()].count(True) == 2
    with torch.no_grad():
        attached.parameters["0.A"].add_(1)
    assert A.tolist() == [[1.0, -1.0]], "training must not write into the factors it started from"
    attached.detach()
    assert model[0] is bare


def test_factors_survive_a_file() -> None:
    torch.manual_seed(0)
    factors = {
        f"encoder.block.{i}.q": Factors(torch.randn(2, 3), torch.randn(4, 2), scale)
        for i, scale in enumerate([4.0, 0.1])
    }
    back = from_tensors(to_tensors(factors))
    assert list(back) == list(factors)
    for name, part in factors.items():
        assert torch.equal(back[name].A, part.A)
        assert torch.equal(back[name].B, part.B)
        # float32 on file: relative rounding of at most 2^-24.
        assert back[name].scale == pytest.approx(part.scale, rel=2**-24)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    folder = tmp_path_factory.mktemp("backbones")
    return {
        family: load_backbone(save_backbone(folder / family, family), family, dtype=torch.float32)
        for family in ("t5", "llama2")
    }


def test_default_targets_are_q_and_v_of_every_attention(backbones: dict[str, nn.Module]) -> None:
    assert target_modules(backbones["t5"], "t5", None) == [
        "encoder.block.0.layer.0.SelfAttention.q",
        "encoder.block.0.layer.0.SelfAttention.v",
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.0.SelfAttention.v",
        "decoder.block.0.layer.1.EncDecAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.v",
    ]
    assert target_modules(backbones["llama2"], "llama2", None) == [
        f"model.layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in ("q", "v")
    ]


@pytest.mark.parametrize(
    ("family", "count"),
    # T5: encoder 4 + 2, decoder 4 + 4 + 2; LLaMA: 2 layers of 4 + 3.
    [("t5", 16), ("llama2", 14)],
)
def test_all_linear_leaves_the_head_out(backbones: dict[str, nn.Module], family: str, count: int) -> None:
    names = target_modules(backbones[family], family, "all_linear")
    assert len(names) == count
    assert "lm_head" not in names


def test_targets_by_name_and_the_unknown_refused(backbones: dict[str, nn.Module]) -> None:
    assert target_modules(backbones["llama2"], "llama2", ["down_proj"]) == [
        f"model.layers.{i}.mlp.down_proj" for i in (0, 1)
    ]
    for word in ("query", "lm_head", "embed_tokens"):
        with pytest.raises(UserError, match=f"adapter.target_modules: '{word}' names no linear layer") as refused:
            target_modules(backbones["llama2"], "llama2", ["q_proj", word])
        assert "legal are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(refused.value)
