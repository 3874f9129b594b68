"""Bottleneck, prompt and prefix: by hand, in training, where they start, attached and taken off."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from module_adapter_cases import (
    FAMILIES,
    KINDS,
    LENGTH,
    WIDTH,
    attached,
    attentions_of,
    backbone,
    blocks_of,
    inputs_of,
    kind_of,
    random_tensors,
    relative_difference,
    score,
)
from random_backbones import random_examples
from torch import Tensor, nn

from data_prep.batches import collate
from pipeline.adapters.base import Trained
from pipeline.adapters.bottleneck import Bottleneck
from pipeline.label_loss import LabelLoss
from pipeline.models import prepare_for_training

cases = pytest.mark.parametrize(("family", "name"), [(family, name) for family in FAMILIES for name in KINDS])
families = pytest.mark.parametrize("family", FAMILIES)


def test_a_hand_computed_bottleneck() -> None:
    block = nn.Linear(2, 3, bias=False)
    block.weight = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), requires_grad=False)
    down = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]])
    up = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    layer = Bottleneck(block, Trained(down), Trained(up), like=block.weight)

    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    output = layer(x)
    # y = (1, 2, -1); W_down y = (-1, 3); relu (0, 3); W_up of it (0, 6, 3).
    assert output.tolist() == [[1.0, 8.0, 2.0]]

    output.backward(torch.tensor([[1.0, 1.0, -1.0]]))
    # dL/dW_up = delta (0, 3)^T; W_up^T delta = (0, 1), which relu lets through at the second unit alone.
    assert layer.up.grad.tolist() == [[0.0, 3.0], [0.0, 3.0], [0.0, -3.0]]
    assert layer.down.grad.tolist() == [[0.0, 0.0, 0.0], [1.0, 2.0, -1.0]]
    # dL/dy = delta + W_down^T (0, 1) = (1, 2, -2); dL/dx = W^T of it.
    assert x.grad.tolist() == [[3.0, 2.0]]


@contextmanager
def plain_bottlenecks(model: nn.Module, tensors: dict[str, Tensor], family: str) -> Iterator[None]:
    """The same adapter as forward hooks on the bare model."""

    def hook(block: str, _: nn.Module, __: Any, y: Tensor) -> Tensor:
        return y + torch.relu(y @ tensors[f"{block}.down"].T) @ tensors[f"{block}.up"].T

    handles = [
        model.get_submodule(block).register_forward_hook(lambda *call, block=block: hook(block, *call))
        for block in blocks_of(family)
    ]
    yield
    for handle in handles:
        handle.remove()


@families
def test_bottlenecks_stand_on_the_feed_forward_outputs(family: str) -> None:
    model, inputs, kind = backbone(family), inputs_of(family), kind_of("bottleneck", family)
    tensors = random_tensors(kind, model)
    with attached(kind, model, tensors) as adapter:
        got = model(**inputs).logits
        score(got, inputs).backward()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    with plain_bottlenecks(model, leaves, family):
        want = model(**inputs).logits
        score(want, inputs).backward()
    assert relative_difference(want, model(**inputs).logits) > 0.1, "the adapter must matter"
    assert relative_difference(got, want) < 1e-6
    for name, parameter in adapter.parameters.items():
        assert relative_difference(parameter.grad, leaves[name].grad) < 1e-5


@cases
def test_gradients_reach_the_trained_tensors_and_nothing_else(family: str, name: str) -> None:
    model, kind = backbone(family), kind_of(name, family)
    tensors = random_tensors(kind, model)
    with attached(kind, model, tensors) as adapter:
        assert set(adapter.parameters) == set(tensors)
        model.train()
        batch = collate(random_examples(4, family), family=family, pad_id=0)
        LabelLoss(model, family)(**batch).backward()
        with_gradient = {id(p) for p in model.parameters() if p.grad is not None and p.grad.any()}
        assert with_gradient == {id(parameter) for parameter in adapter.parameters.values()}
        assert {id(p) for p in model.parameters() if p.requires_grad} == with_gradient


@cases
def test_a_fixed_tensor_is_not_trained(family: str, name: str) -> None:
    model, kind = backbone(family), kind_of(name, family)
    tensors = random_tensors(kind, model)
    fixed = list(tensors)[-1]
    trained = {key: Trained(tensor, fixed=key == fixed) for key, tensor in tensors.items()}
    adapter = kind.attach(model, trained)
    assert [key for key, parameter in adapter.parameters.items() if not parameter.requires_grad] == [fixed]


class Away(nn.Module):
    """`start + t (I - Q Q^T)`: a trained tensor that keeps out of one direction."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        direction = torch.randn(start.shape[-1], 1, generator=torch.Generator().manual_seed(8))
        self.register_buffer("start", start)
        self.register_buffer("Q", direction / direction.norm())

    def initial(self) -> Tensor:
        return torch.zeros_like(self.start)

    def forward(self, trained: Tensor) -> Tensor:
        return self.start + trained - trained @ self.Q @ self.Q.T


@cases
def test_projected_tensors_act_by_their_value_and_learn_by_the_chain_rule(family: str, name: str) -> None:
    model, inputs, kind = backbone(family), inputs_of(family), kind_of(name, family)
    starts, changes = random_tensors(kind, model), random_tensors(kind, model, seed=6)
    projectors = {key: Away(start) for key, start in starts.items()}
    adapter = kind.attach(model, {key: Trained(start, projectors[key]) for key, start in starts.items()})
    with torch.no_grad():
        assert not any(parameter.any() for parameter in adapter.parameters.values())
        for key, parameter in adapter.parameters.items():
            parameter.copy_(changes[key])
    got = model(**inputs).logits
    score(got, inputs).backward()
    adapter.detach()

    with attached(kind, model, {key: projectors[key](changes[key]) for key in starts}) as plain:
        want = model(**inputs).logits
        score(want, inputs).backward()
    assert relative_difference(got, want) < 1e-6
    for key, parameter in adapter.parameters.items():
        full, Q = plain.parameters[key].grad, projectors[key].Q
        assert relative_difference(parameter.grad, full - full @ Q @ Q.T) < 1e-5


@cases
def test_the_loss_does_not_depend_on_padding_nor_on_the_other_rows(family: str, name: str) -> None:
    model, kind, examples = backbone(family), kind_of(name, family), random_examples(5, family)
    with attached(kind, model, random_tensors(kind, model)), torch.no_grad():
        loss = LabelLoss(model, family)
        together = loss(**collate(examples, family=family, pad_id=0))
        alone = sum(loss(**collate([example], family=family, pad_id=0)) for example in examples)
    assert float(together) == pytest.approx(float(alone), rel=1e-5)


@cases
def test_detaching_restores_the_model_bit_for_bit(family: str, name: str) -> None:
    model, inputs, kind = backbone(family), inputs_of(family), kind_of(name, family)
    before, modules = model(**inputs).logits, dict(model.named_modules())
    with attached(kind, model, random_tensors(kind, model)):
        assert relative_difference(model(**inputs).logits, before) > 0.1
    assert dict(model.named_modules()) == modules
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(**inputs).logits, before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@cases
def test_a_copy_of_the_model_has_an_adapter_of_its_own(family: str, name: str) -> None:
    model, inputs, kind = backbone(family), inputs_of(family), kind_of(name, family)
    with attached(kind, model, random_tensors(kind, model)) as adapter:
        twin = copy.deepcopy(model)
        before = model(**inputs).logits
        with torch.no_grad():
            for parameter in adapter.parameters.values():
                parameter.zero_()
        assert torch.equal(twin(**inputs).logits, before)
        assert not torch.equal(model(**inputs).logits, before)


@families
@pytest.mark.parametrize("name", ["bottleneck", "prompt"])
def test_recomputed_activations_give_the_same_gradients(family: str, name: str) -> None:
    gradients = []
    for recompute in (False, True):
        model, kind = backbone(family), kind_of(name, family)
        batch = collate(random_examples(4, family), family=family, pad_id=0)
        with attached(kind, model, random_tensors(kind, model)) as adapter:
            prepare_for_training(model, gradient_checkpointing=recompute)
            LabelLoss(model, family)(**batch).backward()
            gradients.append({key: parameter.grad for key, parameter in adapter.parameters.items()})
    for key, gradient in gradients[0].items():
        assert gradient.any()
        assert relative_difference(gradients[1][key], gradient) < 1e-6


@families
def test_a_prefix_does_not_vanish_silently_where_caches_do(family: str) -> None:
    model, kind = backbone(family), kind_of("prefix", family)
    with attached(kind, model, random_tensors(kind, model)):
        prepare_for_training(model, gradient_checkpointing=True)
        with pytest.raises(AssertionError, match="gradient checkpointing drops every cache"):
            LabelLoss(model, family)(**collate(random_examples(2, family), family=family, pad_id=0))


@cases
def test_starts_depend_on_the_generator_alone(family: str, name: str) -> None:
    model, kind = backbone(family), kind_of(name, family)
    first, again, other = (kind.starts(model, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    for key, start in first.items():
        assert start.dtype == torch.float32
        assert start.device.type == "cpu"
        assert torch.equal(start, again[key])
        assert torch.equal(start, other[key]) == (not start.any())


@families
def test_bottlenecks_start_without_effect_and_as_wide_as_kaiming(family: str) -> None:
    model, inputs, kind = backbone(family), inputs_of(family), kind_of("bottleneck", family)
    starts = kind.starts(model, torch.Generator().manual_seed(1))
    downs = torch.stack([starts[f"{block}.down"] for block in blocks_of(family)])
    assert downs.shape[1:] == (7, WIDTH)
    bound = 1 / math.sqrt(WIDTH)
    assert 0.95 * bound < downs.abs().max() <= bound
    before = model(**inputs).logits
    with attached(kind, model, starts):
        assert torch.equal(model(**inputs).logits, before)


@families
def test_a_prefix_starts_with_keys_apart_and_values_that_add_nothing(family: str) -> None:
    model, kind = backbone(family), kind_of("prefix", family)
    starts = kind.starts(model, torch.Generator().manual_seed(1))
    assert list(starts) == [f"{attention}.{part}" for attention in attentions_of(family) for part in ("key", "value")]
    shape = (3, LENGTH["prefix"], 5) if family == "t5" else (2, LENGTH["prefix"], 6)
    assert {tuple(start.shape) for start in starts.values()} == {shape}
    keys = torch.cat([start.flatten() for name, start in starts.items() if name.endswith(".key")])
    assert keys.std() == pytest.approx(1, rel=0.25)  # 72 or 90 draws: 8 % a sigma
    assert not any(start.any() for name, start in starts.items() if name.endswith(".value"))


@families
def test_a_prompt_starts_at_embeddings_of_tokens(family: str) -> None:
    model, kind = backbone(family), kind_of("prompt", family)
    start = kind.starts(model, torch.Generator().manual_seed(1))["prompt"]
    embeddings = model.get_input_embeddings().weight
    assert start.shape == (LENGTH["prompt"], WIDTH)
    assert all(any(torch.equal(row, embedding) for embedding in embeddings) for row in start)
    assert not torch.equal(start[0], start[1])
