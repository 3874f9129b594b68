"""Methods beside a quantized backbone: equal to the same numbers unpacked, the past as one branch, leak-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from one_rank import LORA, TRAINING, learn, new_method
from random_backbones import save_backbone
from torch import Tensor, nn

from data_prep.errors import UserError
from pipeline.adapters.frozen import PastBranch
from pipeline.adapters.lora import Factors
from pipeline.checkpoints import backbone_folder
from pipeline.layers import is_packed, merge, target_modules
from pipeline.memory_estimate import frozen_bytes
from pipeline.models import load_backbone, skeleton
from pipeline.models import packed_layers as expected_packed_layers
from pipeline.recipe import Recipe
from pipeline.recipe_groups import BottleneckAdapter, PrefixAdapter, PromptAdapter, TripletAdapter

FAMILIES = ("t5", "llama2")
# eps 1e-4: with 1e-8 Adam turns rounding noise in near-zero gradients into steps of full size (methods.md 8.7).
CALM = TRAINING.model_copy(update={"adam_eps": 1e-4, "learning_rate": 1e-2})
METHODS: dict[str, dict[str, Any]] = {
    "seqlora": {},
    "inclora": {},
    "olora": {},
    "pegp": {"energy": 0.7, "feature_samples": 8},
    "gorp": {"parts": "B+S"},
    "lbcl": {"seed_samples": 4},
    "pertask": {},
}
ADAPTERS: dict[str, Any] = {  # in the place of a LoRA; through a stream by seqlora
    "lbcl": TripletAdapter(kind="triplet", rank=3, dropout=0.0, target_modules="all_linear"),
    "bottleneck": BottleneckAdapter(kind="bottleneck", width=3),
    "prompt": PromptAdapter(kind="prompt", length=3),
    "prefix": PrefixAdapter(kind="prefix", length=3),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family, a random backbone; under "<family>-<bits>", one that holds what its 4 or 8 bits stand for."""
    root = tmp_path_factory.mktemp("backbones")
    made = {}
    for family in FAMILIES:
        made[family] = save_backbone(root / family, family)
        for bits, values in UNPACKED.items():
            packed = load_backbone(made[family], family, dtype=torch.float32, quantization=bits)
            plain: Any = load_backbone(made[family], family, dtype=torch.float32)
            for name in packed_layers(packed):
                weight: Any = packed.get_submodule(name).weight
                plain.get_submodule(name).weight.copy_(values(weight))
            made[f"{family}-{bits}"] = root / f"{family}-{bits}"
            plain.save_pretrained(made[f"{family}-{bits}"])
    return made


UNPACKED: dict[Any, Any] = {
    "nf4": lambda weight: dequantize_4bit(weight, weight.quant_state),
    "int8": lambda weight: weight.CB.float() * weight.SCB[:, None] / 127,
}


def packed_layers(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and is_packed(part)]


def method_of(folder: Path, family: str, name: str) -> Any:
    method = name if name in METHODS else "seqlora"
    return new_method(folder, family, method, ADAPTERS.get(name, LORA), **METHODS[method])


LOOKING = ("pegp", "lbcl")
FAST = [
    ("t5", "pegp", "nf4"),
    ("llama2", "lbcl", "nf4"),
    ("llama2", "gorp", "nf4"),
    ("t5", "bottleneck", "nf4"),
    ("t5", "gorp", "int8"),
    ("llama2", "inclora", "int8"),
]
# PEGP's features and LB-CL's sensitivities come from passes in evaluation mode, in which int8 layers round what they
# read too: a test of their own, below.
STREAMS = [
    (family, name, bits)
    for family in FAMILIES
    for name in (*METHODS, "bottleneck", "prompt", "prefix")
    for bits in UNPACKED
    if bits == "nf4" or name not in LOOKING
]


@pytest.mark.parametrize(
    ("family", "name", "bits"),
    [case if case in FAST else pytest.param(*case, marks=pytest.mark.full) for case in STREAMS],
)
def test_a_stream_beside_packed_weights_is_the_stream_beside_their_values(folders, family, name, bits) -> None:
    """Three tasks: what each trains differs by rounding alone, so the past's branch is what merging would have been."""
    plain, folder = folders[f"{family}-{bits}"], folders[family]
    expected, packed = method_of(plain, family, name), method_of(folder, family, name)
    for task in (1, 2, 3):
        wanted = learn(plain, family, expected, task, training=CALM)
        found = learn(folder, family, packed, task, training=CALM, quantization=bits)
        assert found.keys() == wanted.keys() != set()
        apart = sum((found[key] - wanted[key]).square().sum() for key in wanted)
        size = sum(wanted[key].square().sum() for key in wanted)
        assert (apart / size).sqrt() <= 1e-4  # methods.md 8.4's for the same comparison over many steps
    assert bool(packed.leaks()) == (name in ("pegp", "gorp", "lbcl"))
    for leaks in packed.leaks().values():
        assert max(leaks.values()) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_the_past_stands_beside_the_weight_and_is_replaced(folders, family: str, bits: Any) -> None:
    folder = folders[family]
    model = load_backbone(folder, family, dtype=torch.float32, quantization=bits)
    layer, targets = packed_layers(model)[0], target_modules(model, family, "all_linear")
    base: Any = model.get_submodule(layer)
    x, draw = torch.randn(2, 4, base.in_features), torch.Generator().manual_seed(3)

    def factors(rank: int) -> Factors:
        A, B = (torch.randn(*shape, generator=draw) for shape in ((rank, base.in_features), (base.out_features, rank)))
        return Factors(A, B, 0.5)

    plain: Tensor = base(x)
    for past in ([factors(3), factors(2)], [factors(3)], []):
        merge(model, folder, targets, {layer: past})
        branch = model.get_submodule(layer)
        assert isinstance(branch, PastBranch)
        assert branch.base is base
        expected = plain + sum(part.scale * x @ part.A.mT @ part.B.mT for part in past)
        torch.testing.assert_close(branch(x), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_task_is_scored_with_its_own_model_beside_four_bits(folders, family: str) -> None:
    plain, folder = folders[f"{family}-nf4"], folders[family]
    targets = target_modules(load_backbone(plain, family, dtype=torch.float32), family, "all_linear")
    method = method_of(folder, family, "pertask")
    for task in (1, 2):
        learn(folder, family, method, task, training=CALM, quantization="nf4")
    models: Any = (
        load_backbone(plain, family, dtype=torch.float32),
        load_backbone(folder, family, dtype=torch.float32, quantization="nf4"),
    )
    seen = []
    for task in (1, 2, None, 1):
        method.begin_evaluation("", task)
        for model, where in zip(models, (plain, folder), strict=True):
            merge(model, where, targets, method.active())
        ids = torch.arange(2, 14).view(2, 6)
        labels = {"decoder_input_ids": ids} if family == "t5" else {}
        wanted, found = (model.eval()(input_ids=ids, **labels).logits for model in models)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        seen.append(found)
    first, second, bare, again = seen
    assert torch.equal(first, again)
    assert min((first - second).abs().max(), (first - bare).abs().max(), (second - bare).abs().max()) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_the_plan_counts_what_a_packed_backbone_holds(family: str, bits: Any) -> None:
    """Of the tiny backbone; of 4 bits to 2 %, since constants of constants are not counted."""
    recipe = Recipe.load(f"recipes/tiny_{family}_order1.yaml", [f"model.quantization={bits}", "method=inclora"])
    folder = backbone_folder(recipe.model)
    model: Any = load_backbone(folder, family, dtype=torch.float32, quantization=bits)
    names = packed_layers(model)
    assert len(names) == len(expected_packed_layers(plain := skeleton(folder, family))) > 0
    held = {id(tensor): tensor for tensor in model.parameters()}
    for name in names:
        weight = model.get_submodule(name).weight
        state = [weight.SCB] if bits == "int8" else [weight.quant_state.absmax]
        held |= {id(tensor): tensor for tensor in state}
    assert sum(tensor.nbytes for tensor in held.values()) == pytest.approx(frozen_bytes(recipe, plain), rel=0.02)


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize("family", FAMILIES)
def test_methods_that_look_first_learn_beside_eight_bits_and_do_not_leak(folders, family: str, name: str) -> None:
    """Near what 8 bits' numbers give: looking rounds what layers read to 1/254 = 4e-3 of a row's most.

    Of the trained tensors after three tasks 7e-3 (pegp) and 7e-4 (lbcl) were measured.
    """
    plain, folder = folders[f"{family}-int8"], folders[family]
    expected, packed = method_of(plain, family, name), method_of(folder, family, name)
    for task in (1, 2, 3):
        wanted = learn(plain, family, expected, task, training=CALM)
        found = learn(folder, family, packed, task, training=CALM, quantization="int8")
        apart = sum((found[key] - wanted[key]).square().sum() for key in wanted)
        assert (apart / sum(value.square().sum() for value in wanted.values())).sqrt() <= 2e-2
    for leaks in packed.leaks().values():
        assert max(leaks.values()) <= 1e-5


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("model.quantization=int8 zero=3", "model.quantization: int8 gains nothing in engine.zero: 3"),
        ("model.quantization=int8 method=gorp", "model.quantization: int8 leaves gorp's cores no weight"),
        ("method=gorp training.optimizer=adamw_8bit", "training.optimizer: adamw_8bit keeps moments in 8 bits"),
        ("model.quantization=int4", "model.quantization: 'int4'"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(overrides: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Recipe.load("recipes/tiny_t5_order1.yaml", overrides.split())
