"""Weights that rest on the host: the same numbers, one block at a time, all on one device, nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import module_adapter_cases
import pytest
import torch
from module_adapter_cases import KINDS, kind_of, random_tensors
from random_backbones import PAD, save_backbone
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eval.prompt_state import LlamaState, PromptState, T5State
from pipeline.adapters.base import Trained
from pipeline.adapters.lora import LoraKind
from pipeline.from_host import blocks_from_host, numbers_held
from pipeline.layers import target_modules
from pipeline.memory_estimate import LongestRow, Scored, beginning_bytes, scoring_bytes
from pipeline.models import blocks_of, load_backbone, recomputing
from pipeline.recipe import Recipe

CPU, META = torch.device("cpu"), torch.device("meta")
FAMILIES = ["t5", "llama2"]
PROMPTS = [[5, 9, 23, 41], [7, 12], [3, 3, 8, 30, 31, 4]]


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    folder = save_backbone(tmp_path / "model", request.param)
    return load_backbone(folder, request.param, dtype=torch.float32)


def family_of(model: Any) -> str:
    return "t5" if model.config.is_encoder_decoder else "llama2"


def read(model: Any) -> PromptState:
    state = T5State if family_of(model) == "t5" else LlamaState
    return state(model, PROMPTS, PAD)


def scored(model: Any) -> list[Tensor]:
    """Logits after prompts, of packed options, after one more token: all that scoring asks a model for."""
    with torch.inference_mode():
        state = read(model)
        tokens = torch.tensor([4, 6, 9])
        packed = state.packed_logits(tokens, torch.tensor([0, 1, 0]), torch.eye(3, dtype=torch.bool))
        return [state.logits, packed, state.step(torch.tensor([5, 6, 7]))]


def test_scores_are_the_same_and_nothing_is_left_behind(backbone: Any) -> None:
    expected = scored(backbone)
    before = {name: (id(weight), weight.data_ptr()) for name, weight in backbone.named_parameters()}
    with blocks_from_host(backbone, CPU):
        found = scored(backbone)
    for value, other in zip(found, expected, strict=True):
        assert torch.equal(value, other)
    assert {name: (id(weight), weight.data_ptr()) for name, weight in backbone.named_parameters()} == before
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks_of(backbone))


def test_one_block_at_a_time_is_on_the_device(backbone: Any) -> None:
    resting = {id(weight) for block in blocks_of(backbone) for weight in block.parameters()}
    away: list[list[int]] = []

    def look(*_: object) -> None:
        blocks = enumerate(blocks_of(backbone))
        away.append([index for index, block in blocks if not resting >= {id(weight) for weight in block.parameters()}])

    linear = [layer for block in blocks_of(backbone) for layer in block.modules() if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_pre_hook(look) for layer in linear]
    with blocks_from_host(backbone, CPU), torch.inference_mode():
        read(backbone)
    for handle in handles:
        handle.remove()
    assert {index for found in away for index in found} == set(range(len(blocks_of(backbone))))
    assert all(len(found) == 1 for found in away)


def test_a_block_that_fails_gives_its_weights_back(backbone: Any) -> None:
    before = [id(weight) for weight in backbone.parameters()]
    block = blocks_of(backbone)[0]
    handle = next(m for m in block.modules() if isinstance(m, nn.Linear)).register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="in the block"), blocks_from_host(backbone, CPU):
        read(backbone)
    handle.remove()
    assert [id(weight) for weight in backbone.parameters()] == before


def _fail(*_: object) -> None:
    raise RuntimeError("in the block")


def gradients(model: Any, device: torch.device) -> dict[str, Tensor]:
    """Of the trained tensors, of a backward before any engine, with blocks run again as there."""
    model.zero_grad()
    ids = torch.full((2, 5), 7, device=device)
    inputs: dict[str, Any] = {"input_ids": ids}
    if family_of(model) == "t5":
        inputs["decoder_input_ids"] = ids[:, :3]
    else:  # a mask that is ready: making one looks at numbers, which the meta device has not
        inputs["attention_mask"] = torch.zeros(2, 1, 5, 5, device=device)
    model.enable_input_require_grads()
    with recomputing(model):
        model(**inputs, use_cache=False).logits.square().sum().backward()
    model.disable_input_require_grads()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def with_lora(model: Any) -> Any:
    targets = target_modules(model, family_of(model), "all_linear")
    kind = LoraKind(targets, rank=2, alpha=4, dropout=0.0)
    draw = torch.Generator().manual_seed(3)
    starts = kind.starts(model, draw)
    kind.attach(model, {name: Trained(torch.randn(start.shape, generator=draw)) for name, start in starts.items()})
    return model


def test_a_backward_finds_the_weights_of_its_block(backbone: Any) -> None:
    model = with_lora(backbone)
    expected = {name: gradient.clone() for name, gradient in gradients(model, CPU).items()}
    assert expected
    with blocks_from_host(model, CPU):
        found = gradients(model, CPU)
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


@contextmanager
def outside_on(model: Any, device: torch.device) -> Iterator[Any]:
    """A copy of `model` on `device` but for its blocks' linear layers, which rest on the host, as for a GPU."""
    moved = copy.deepcopy(model).to(device)
    for block, resting in zip(blocks_of(moved), blocks_of(model), strict=True):
        for module, other in zip(block.modules(), resting.modules(), strict=True):
            if isinstance(module, nn.Linear):
                module.weight = other.weight
    with blocks_from_host(moved, device):
        yield moved


class OneDevice(TorchDispatchMode):
    """Refuses what a GPU does: operands of several devices (torch's meta device itself lets products pass)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim]
        devices = {x.device for x in operands}
        assert len(devices) <= 1, f"{func} of {devices}"
        return func(*args, **(kwargs or {}))


def test_all_that_meets_in_a_backward_lies_on_the_device(backbone: Any) -> None:
    model = with_lora(backbone)
    with outside_on(model, META) as moved, OneDevice():
        found = gradients(moved, META)
    assert found
    assert {gradient.device for gradient in found.values()} == {META}
    with pytest.raises(AssertionError, match="mm"), OneDevice():
        gradients(moved, META)  # its blocks are on the host again


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_adapters_bring_meets_the_backbone_on_the_device(name: str, family: str) -> None:
    """A prefix is read by its stack, before the blocks; T5's position bias by `packed_logits`, between forwards."""
    model, kind = module_adapter_cases.backbone(family), kind_of(name, family)
    kind.attach(model, {name: Trained(tensor, fixed=True) for name, tensor in random_tensors(kind, model).items()})
    with outside_on(model, META) as moved, torch.no_grad(), OneDevice():
        ids = torch.zeros(2, 5, dtype=torch.long, device=META)
        inputs: dict[str, Any] = {"input_ids": ids}
        if family == "t5":
            inputs["decoder_input_ids"] = ids[:, :1]
        output = moved(**inputs, use_cache=True)
        state = (T5State if family == "t5" else LlamaState).__new__(T5State if family == "t5" else LlamaState)
        state.model, state.mask, state.cache = moved, None, output.past_key_values
        state.logits = output.logits[:, -1]
        if isinstance(state, T5State):
            state.encoded = output.encoder_last_hidden_state
        else:
            state.lengths = ids[:, 0]
        packed = state.packed_logits(ids[0, :3], ids[0, :3], torch.ones(3, 3, dtype=torch.bool, device=META))
    assert packed.device == META


def test_the_estimate_counts_what_is_outside_of_blocks_and_the_largest(backbone: Any) -> None:
    family = family_of(backbone)
    plain = Recipe.load(f"recipes/tiny_{family}_order1.yaml", ["zero=3"])
    resting = Recipe.load(f"recipes/tiny_{family}_order1.yaml", ["zero=3", "engine.offload=parameters"])
    linear = [[layer for layer in block.modules() if isinstance(layer, nn.Linear)] for block in blocks_of(backbone)]
    sizes = [sum(layer.weight.numel() for layer in layers) for layers in linear]
    saved = 4 * (sum(sizes) - max(sizes))
    assert saved > 0
    whole, part = (scoring_bytes(recipe, backbone, Scored(20, 6)) for recipe in (plain, resting))
    assert whole["frozen weights"] - part["frozen weights"] == saved
    assert whole | {"frozen weights": 0} == part | {"frozen weights": 0}
    assert numbers_held(copy.deepcopy(backbone).requires_grad_(True)) == numbers_held(backbone), "as of a skeleton"
    row = LongestRow(20, 5)
    assert beginning_bytes(plain, backbone, row) - beginning_bytes(resting, backbone, row) == saved
